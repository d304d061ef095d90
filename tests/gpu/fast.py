"""How fast a device is under the product, against the bare forward and transformers, side by side in one run."""

import json
import os
import shutil
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tests.gpu.place import Place, Row, command, data_file, falcon, layers_that_fit, median_ratio, texts

NUM_TEXTS = 500
MOST_OVER_BARE = 1.03
NUM_LENGTHS = 4  # of prompts: one batch holds prompts of one length
FEWER_LAYERS = 20  # where several collections are timed: a ratio depends little on their number


@dataclass
class Collection:
    """A model in memory and labelled texts, to collect from again and again; the weights are not hashed."""

    place: Place
    model: Any
    modules: list[str]
    num_texts: int = NUM_TEXTS
    tokens_per_batch: int = 4096
    writing_seconds: float = 0.0  # of the last collection, after its last forward

    def __post_init__(self) -> None:
        from aura_dist.collecting.description import load_samples
        from aura_dist.config.settings import resolve
        from aura_dist.config.verbs import CollectConfig
        from aura_dist.models.in_memory import InMemory
        from aura_dist.stages.collect import make_spec
        from tests.models import tiny_tokenizer

        number = 40 if self.place.tiny else self.num_texts
        self.subject = InMemory(self.model, tiny_tokenizer())
        source = self.subject.source
        config: Any = resolve(
            CollectConfig,
            {
                "model": source.name, "dtype": source.dtype, "data": data_file(self.place, number),
                "concepts": ["toxic"], "modules": self.modules, "store": "unused",
                "tokens_per_batch": self.tokens_per_batch,
            },
        )  # fmt: skip
        self.samples, self.tokens, identity = load_samples(config, self.subject)
        self.spec = make_spec(config, self.subject, identity, lambda: "random weights")

    @property
    def num_tokens(self) -> int:
        return int(self.samples.num_tokens.sum())

    @cached_property
    def batches(self) -> list[slice]:
        """The batches of a collection, in the order in which one process runs them."""
        from aura_dist.store.grid import make_batches, row_chunks, rows_per_chunk
        from aura_dist.store.schema import tasks_of

        lengths = self.tokens.num_tokens.tolist()
        tasks = sorted(tasks_of(self.tokens.num_tokens, self.tokens_per_batch), key=lambda t: (-t.num_tokens, t.index))
        chunks = [chunk for task in tasks for chunk in row_chunks(task, rows_per_chunk(len(lengths)))]
        return [rows for chunk in chunks for rows in make_batches(lengths, chunk, self.tokens_per_batch)]

    def bare(self) -> None:
        """The same batches through the base model alone, up to its last layer."""
        import torch

        with torch.no_grad():
            for rows in self.batches:
                batch = self.tokens.batch(rows)
                self.model.base_model(
                    input_ids=torch.from_numpy(batch.input_ids).to(self.place.device),
                    attention_mask=torch.from_numpy(batch.attention_mask).to(self.place.device, torch.int64),
                    use_cache=False,
                )

    @property
    def path(self) -> Path:
        return self.place.folder / "timed.zarr"

    def delete(self) -> None:
        """Delete what the last collection has written."""
        shutil.rmtree(self.path, ignore_errors=True)

    def collect(self) -> None:
        """Into a new store, which is whole at the end."""
        from aura_dist.collecting.run import Run
        from aura_dist.collecting.stream import stream
        from aura_dist.models.load import column_plans
        from aura_dist.models.strategies.table import parse_sharding
        from aura_dist.ranks.launch import start_team
        from aura_dist.ranks.signals import StopFlag
        from aura_dist.store.access import open_group
        from aura_dist.store.schema import create_store, shard_widths, tasks_of

        create_store(str(self.path), self.spec, self.samples, {})
        group = open_group(str(self.path))
        num_layers = 1 + max(site.layer for site in self.spec.sites)
        with (
            start_team(parse_sharding("replicate"), self.place.device) as team,
            self.subject.base(team.world, num_layers) as base,
        ):
            plans = column_plans(base, self.spec.sites, shard_widths(group, self.spec), team.world)
            run = Run(self.spec, self.tokens, plans, team, StopFlag())
            with run.writer(group) as writer:
                stream(base, run, tasks_of(self.samples.num_tokens, self.tokens_per_batch), writer)
                self.place.wait()
                last = time.perf_counter()
            self.writing_seconds = time.perf_counter() - last


def stream(place: Place) -> Iterator[Row]:
    """`collect` of all MLP linears against the bare forward, and tokens per second against the best product."""
    model = falcon(place)
    it = Collection(place, model, ["mlp"])
    num_layers = model.config.num_hidden_layers
    yield Row("model", f"Falcon-40B's widths, {num_layers} of 60 layers, {it.num_tokens} tokens", "–", "ran")
    yield _over_bare(place, it)
    it.delete()
    seconds = place.seconds(it.collect)
    weights = sum(p.numel() for layer in model.transformer.h for p in layer.parameters())
    rate, best = 2 * weights * it.num_tokens / seconds, best_product(place)
    yield Row("tokens per second", f"{it.num_tokens / seconds:,.0f}", "–", "ran")
    share = f"{rate / 1e12:.1f} of {best / 1e12:.1f} TFLOP/s, {rate / best:.0%}"
    yield Row("of the best matrix product", share, "–", "ran")


def kinds(place: Place) -> Iterator[Row]:
    """The same for other kinds of sites, with fewer layers."""
    model = falcon(place, None if place.tiny or not place.gpu else min(FEWER_LAYERS, layers_that_fit(place)))
    for kind in ("residual", "neurons", "heads"):
        yield _over_bare(place, Collection(place, model, [kind]), repeats=1)


def _over_bare(place: Place, it: Collection, repeats: int = 2) -> Row:
    ratio = median_ratio(place, it.collect, it.bare, repeats, it.delete)
    name = f"collect / bare forward, {' '.join(it.modules)}"
    found = f"{ratio:.3f}×; the last chunk is written {it.writing_seconds:.2f} s after the last forward"
    return place.fast(name, found, f"≤ {MOST_OVER_BARE}×", ratio <= MOST_OVER_BARE)


def best_product(place: Place) -> float:
    """FLOP/s of the best of some large products in bfloat16."""
    import torch

    best = 0.0
    for m, k, n in [(64, 64, 64)] if place.tiny else [(8192, 8192, 8192), (4096, 8192, 32768)]:
        a, b = (torch.randn(*shape, dtype=torch.bfloat16, device=place.device) for shape in ((m, k), (k, n)))
        a @ b
        best = max(best, *(2 * m * k * n / place.seconds(lambda a=a, b=b: a @ b) for _ in range(5)))
    return best


def hooks(place: Place) -> Iterator[Row]:
    """The forward under AurA's hooks on all MLP linears against the plain one."""
    import torch

    import aura_dist
    from aura_dist.sites.find import find_sites

    model = falcon(place)
    rng = np.random.default_rng(0)
    sites = [s for s in find_sites(model).sites if s.kind == "mlp"]
    map_ = aura_dist.Intervention({s.name: rng.uniform(0.4, 1, s.width).astype(np.float32) for s in sites})
    for rows, length in ((2, 16),) if place.tiny else ((32, 128), (128, 1)):
        ids = torch.randint(3, 300, (rows, length), device=place.device)

        @torch.no_grad()
        def forward(ids: Any = ids) -> None:
            model(input_ids=ids, use_cache=False)

        with aura_dist.intervene(model, map_):
            forward()
        plain, hooked = [], []
        for _ in range(3 if place.tiny else 7):
            plain.append(place.seconds(forward))
            with aura_dist.intervene(model, map_):
                hooked.append(place.seconds(forward))
        ratio = statistics.median(h / p for h, p in zip(hooked, plain, strict=True))
        name = f"forward of {rows} × {length} tokens, hooks / plain"
        yield place.fast(name, f"{ratio:.3f}×", "≤ 1.02×", ratio <= 1.02)


def continuing(place: Place) -> Iterator[Row]:
    """512 continuations of 20 tokens against transformers' `generate` on the same prompts."""
    import torch

    from aura_dist.evaluation.generation import continue_alike
    from aura_dist.evaluation.prompts import tokenize_prompts
    from aura_dist.evaluation.sampling import Decoding
    from aura_dist.interventions.use import LoadedModel
    from tests.models import tiny_tokenizer

    model, tokenizer = falcon(place), tiny_tokenizer()
    num_prompts, samples, new = (4, 2, 3) if place.tiny else (64, 8, 20)
    how = Decoding(samples, new, 1.0, 0.9, 0)
    asked = alike(texts(place, 30 * num_prompts, 12), tokenizer, num_prompts, 1 if place.tiny else NUM_LENGTHS)
    prompts = tokenize_prompts(asked, tokenizer, model.config, how)
    loaded = LoadedModel(model, tokenizer, "", None)
    tokenizer.padding_side = "left"
    at_once = max(1, 128 // samples)

    @torch.no_grad()
    def theirs() -> None:
        for first in range(0, num_prompts, at_once):
            rows = tokenizer(asked[first : first + at_once], return_tensors="pt", padding=True)
            model.generate(
                input_ids=rows["input_ids"].to(place.device), attention_mask=rows["attention_mask"].to(place.device),
                max_new_tokens=new, do_sample=True, top_p=0.9, top_k=0, num_return_sequences=samples, pad_token_id=2,
            )  # fmt: skip

    yield _waits_of_a_step(place, lambda tokens: continue_alike(loaded, prompts, replace(how, max_new_tokens=tokens)))
    ratio = median_ratio(place, lambda: continue_alike(loaded, prompts, how), theirs, 1 if place.tiny else 2)
    name = f"{num_prompts * samples} continuations of {new} tokens, full batches / transformers' generate"
    yield place.fast(name, f"{ratio:.2f}×", "≤ 1×", ratio <= 1)


def _waits_of_a_step(place: Place, run: Callable[[int], object]) -> Row:
    """What torch's own check of waiting says more often of a run of more steps."""
    import torch

    what, aim = "waits of a step of decoding", "0"
    if not place.device.startswith("cuda"):
        return place.needs_gpu(what, aim)
    said = []
    for num_tokens in (4, 4, 14):  # the first to warm up
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                run(num_tokens)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        said.append(sum("synchronizing" in str(warning.message) for warning in caught))
    each = (said[2] - said[1]) / 10
    return place.holds(what, f"{each:g}", aim, each <= 0)


def alike(found: list[str], tokenizer: Any, number: int, num_lengths: int) -> list[str]:
    """As many of the texts, of few numbers of tokens, so that batches are full, as those of many prompts are."""
    lengths = [len(ids) for ids in tokenizer(found)["input_ids"]]
    common = [length for length, _ in Counter(lengths).most_common(num_lengths)]
    chosen = [[t for t, length in zip(found, lengths, strict=True) if length == c] for c in common]
    return [text for group in chosen for text in group[: number // num_lengths]]


def peak(place: Place) -> Iterator[Row]:
    """The device's peak memory against what `plan` predicted; on a CPU what the process holds at the end."""
    from tests.memory import anonymous_bytes
    from tests.models import tiny_tokenizer

    folder, data = place.folder / "planned", data_file(place, 40 if place.tiny else NUM_TEXTS)
    model = falcon(place)
    num_layers = model.config.num_hidden_layers
    tiny_tokenizer().save_pretrained(folder)
    model.config.save_pretrained(folder)
    flags = ["--model", folder, "--data", data, "--concepts", "toxic", "--dtype", "bfloat16"]
    predicted = _planned(place, flags)
    it = Collection(place, model, ["mlp"])
    if place.gpu:
        place.torch.empty_cache()
        place.torch.reset_peak_memory_stats()
    it.collect()
    if place.gpu:
        free, total = place.torch.mem_get_info()
        outside = total - free - place.torch.memory_reserved()  # the context, if this process is alone on the device
        measured = place.torch.max_memory_reserved() + max(0, outside)
    else:
        measured = anonymous_bytes(os.getpid())
    ratio = predicted / measured
    found = f"{measured / 1e9:.2f} GB measured, {predicted / 1e9:.2f} GB predicted, {ratio:.2f}×"
    yield place.fast(f"peak memory, {num_layers} layers", found, "1 to 1.3×", 1 <= ratio <= 1.3)


def _planned(place: Place, flags: list[Any]) -> int:
    """Bytes that `plan` predicts."""
    from contextlib import redirect_stdout
    from io import StringIO

    shown = StringIO()
    with redirect_stdout(shown):
        command("plan", *flags, "--device", "cuda" if place.gpu else "cpu", "--json")
    report = json.loads(shown.getvalue())
    return int(report["device_bytes" if place.gpu else "anonymous_bytes"])


def layers(place: Place) -> Iterator[Row]:
    """`--sharding layers` from a checkpoint on the disk against the bare forward of the same weights in memory."""
    from tests.models import tiny_tokenizer

    model = falcon(place, 3 if place.tiny else 6)
    folder = place.folder / "checkpoint"
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    number = 40 if place.tiny else 2 * NUM_TEXTS
    it = Collection(place, model, ["mlp"], number)
    it.bare()
    bare = place.seconds(it.bare)
    del model, it.model, it.subject
    if place.gpu:
        place.torch.empty_cache()
    base = ["collect", "--model", folder, "--data", data_file(place, number), "--concepts", "toxic"]
    base += ["--dtype", "bfloat16", "--device", "cuda" if place.gpu else "cpu"]
    ways = {"one wave": it.num_tokens, "four waves": max(1, it.num_tokens // 4), "waves as the product chooses": None}
    for name, tokens in ways.items():
        path = place.folder / f"{name.split()[0]}.zarr"
        waves = [] if tokens is None else ["--wave-tokens", tokens]
        command(*base, "--sharding", "layers", *waves, "--store", path)
        times = json.loads((Path(path) / "progress" / "zarr.json").read_text())["attributes"]["times"]
        seconds = times[0]["seconds"] if isinstance(times, list) else times["seconds"]
        yield Row(f"layers / bare forward, {name}", f"{seconds / bare:.2f}×", "–", "ran")


def pooled(place: Place) -> Iterator[Row]:
    """AUROC of pooled values on the device, by a sort, against the kernel on a core: whether it would be worth it."""
    import torch

    import aura_dist

    rows, columns = (60, 64) if place.tiny else (2500, 32768)
    values = without_ties(rows, columns, place.device)
    labels = torch.arange(rows, device=place.device) % 5 == 0
    num = int(labels.sum())

    def on_device() -> Any:
        ranks = values.argsort(dim=0).argsort(dim=0) + 1
        return (ranks[labels].sum(dim=0).double() - num * (num + 1) / 2) / (num * (rows - num))

    host, host_labels = values.cpu().numpy(), labels.cpu().numpy().astype(np.int8)
    aura_dist.auroc(host[:, :8], host_labels)
    error = float(np.abs(on_device().cpu().numpy() - np.asarray(aura_dist.auroc(host, host_labels))).max())
    yield place.holds("AUROC by a sort on the device", f"{error:.1e}", "≤ 1e-09", error <= 1e-9)
    rates = [columns / place.seconds(call) for call in _twice(on_device, lambda: aura_dist.auroc(host, host_labels))]
    found = f"{rates[0]:,.0f} neurons/s on the device, {rates[1]:,.0f} on the host, {rates[0] / rates[1]:.1f}×"
    yield Row(f"AUROC of {rows} rows", found, "–", "ran")


def without_ties(rows: int, columns: int, device: str) -> Any:
    """[rows, columns] float32 random order in each column; of 2,500 random numbers of 32 bits, some are often equal."""
    import torch

    return torch.rand(rows, columns, device=device).argsort(dim=0).float()


def _twice(*calls: Callable[[], Any]) -> tuple[Callable[[], Any], ...]:
    """The calls, each warmed up."""
    for call in calls:
        call()
    return calls
