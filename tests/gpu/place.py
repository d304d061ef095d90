"""Where a part runs, what it finds, and the texts and models that parts share. Imports torch where it is used."""

import csv
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

# verdicts: `ran` is a row of which this machine can say no more, `not here` one that needs a GPU
OK, MISSED, FAILED, RAN, NOT_HERE = "ok", "missed", "failed", "ran", "not here"
FALCON = {"hidden_size": 8192, "num_attention_heads": 128, "num_kv_heads": 8, "vocab_size": 65024}
TINY_FALCON = {"hidden_size": 64, "num_attention_heads": 8, "num_kv_heads": 2, "vocab_size": 384}
_LAYER_BYTES = 1.4e9  # of Falcon-40B, in 16 bits
_SPARE_BYTES = 10e9  # for batches, and for what torch's allocator leaves unused


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    measured: str
    aim: str
    verdict: str


@dataclass(frozen=True)
class Place:
    """The device as torch calls it, whether all is made small, a directory that is deleted, and maybe a real model."""

    device: str
    tiny: bool
    scratch: str
    model: str | None = None

    @property
    def gpu(self) -> bool:
        return self.device != "cpu"

    @property
    def folder(self) -> Path:
        """A directory of this part alone."""
        return Path(self.scratch)

    def same(self, what: str, error: float, most: float) -> Row:
        """A row of a comparison with the CPU, of which a CPU alone says little."""
        verdict = MISSED if not error <= most else OK if self.gpu else RAN
        return Row(what, f"{error:.1e}", f"≤ {most:.0e}", verdict)

    def holds(self, what: str, measured: str, aim: str, fine: bool) -> Row:
        """A row that counts anywhere."""
        return Row(what, measured, aim, OK if fine else MISSED)

    def fast(self, what: str, measured: str, aim: str, fine: bool) -> Row:
        """A row of a speed or of memory, which small models on a CPU do not show."""
        return Row(what, measured, aim, RAN if self.tiny or not self.gpu else OK if fine else MISSED)

    def needs_gpu(self, what: str, aim: str = "–") -> Row:
        return Row(what, "needs a GPU", aim, NOT_HERE)

    def wait(self) -> None:
        """Until the device has done all that was queued."""
        if self.gpu:
            self.torch.synchronize()

    @property
    def torch(self) -> Any:
        """What torch has for this kind of device, such as `torch.cuda`."""
        import torch

        return torch.get_device_module(torch.device(self.device))

    def seconds(self, call: Callable[[], object]) -> float:
        self.wait()
        begun = time.perf_counter()
        call()
        self.wait()
        return time.perf_counter() - begun


def median_ratio(
    place: Place,
    ours: Callable[[], object],
    theirs: Callable[[], object],
    repeats: int,
    before: Callable[[], object] = lambda: None,
) -> float:
    """Time of `ours` ÷ time of `theirs`, taken in turns, each after `before`; the first turn warms up alone."""
    ratios = []
    for repeat in range(repeats + 1):
        before()
        pair = [ours, theirs] if repeat % 2 else [theirs, ours]
        times = {call: place.seconds(call) for call in pair}
        ratios.append(times[ours] / times[theirs])
    return float(np.median(ratios[1:]))


def texts(place: Place, number: int, longest: int = 128) -> list[str]:
    """Texts with lengths like those of comments: most have some dozens of tokens, a few are cut."""
    rng = np.random.default_rng(0)
    words = Path(__file__).parents[2].joinpath("aura_dist", "demo", "sentences.csv").read_text().split()
    sizes = np.clip(rng.lognormal(2.6 if longest == 128 else 1.5, 0.8, number).astype(int), 2, longest)
    return [" ".join(rng.choice(words, size)) for size in sizes]


def data_file(place: Place, number: int, longest: int = 128) -> str:
    """The texts as a CSV file with the columns `text` and `toxic`."""
    path = place.folder / f"texts-{number}.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "toxic"])
        writer.writerows([text, i % 2] for i, text in enumerate(texts(place, number, longest)))
    return str(path)


def small_model(place: Place, name: str) -> str:
    """Directory of a small random checkpoint."""
    from tests.models import save_tiny

    return str(save_tiny(name, place.folder / name))


def small_models(place: Place) -> dict[str, str]:
    """Name → directory of small random checkpoints, and of the real model, where there is one."""
    names = ("llama", "qwen3-moe") if place.tiny else ("llama", "falcon-40b-style", "qwen3-moe")
    made = {name: small_model(place, name) for name in names}
    return made if place.model is None else {**made, "real model": place.model}


def falcon(place: Place, num_layers: int | None = None) -> Any:
    """A random causal language model of Falcon-40B's widths on the device, in bfloat16, with as many layers as fit."""
    import torch
    import transformers as hf

    shape = TINY_FALCON if place.tiny or not place.gpu else FALCON
    if num_layers is None:
        num_layers = 2 if shape is TINY_FALCON else layers_that_fit(place)
    config = hf.FalconConfig(
        **shape, num_hidden_layers=num_layers, new_decoder_architecture=True, alibi=False, bias=False,
        bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    with torch.device(place.device):
        return hf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)


def layers_that_fit(place: Place) -> int:
    """Decoder layers of Falcon-40B, 60 at most, for which the device has room beside the batches."""
    free, _ = place.torch.mem_get_info()
    return max(1, min(60, int((free - _SPARE_BYTES) / _LAYER_BYTES)))


def command(*words: object) -> None:
    """Run `aura-dist WORDS` in this process; AssertionError unless it ends well."""
    from aura_dist.cli import main

    code = main([str(word) for word in words])
    assert code == 0, f"aura-dist {words[0]} ended with {code}"


def difference(path: str | Path, other: str | Path) -> float:
    """Largest difference of two stores' responses, in units of a site's largest value; not finite where one is not."""
    import aura_dist

    ours, theirs = (aura_dist.open_store(str(p))["activations"] for p in (path, other))
    errors = []
    for site in theirs.children:
        for pooling in theirs[site].data_vars:
            expected, found = theirs[site][pooling].to_numpy(), ours[site][pooling].to_numpy()
            assert np.isfinite(expected).all()
            errors.append(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-30))
    return float(np.max(errors))  # an error if there was nothing to compare


@contextmanager
def alone() -> Iterator[None]:
    """Within the context this rank is the only process of a launch."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        for name in names:
            os.environ.pop(name, None)
        os.environ.update(kept)
