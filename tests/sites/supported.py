"""Which kinds of sites each architecture has, as the tests find them; they write the table of `aura_dist/README.md`.

python -m tests.sites.supported        runs the checks of every architecture and replaces the table
"""

import csv
import re
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import aura_dist
from aura_dist.cli import main
from aura_dist.interventions.artifact import Intervention
from aura_dist.models.load import skeleton
from aura_dist.sites.find import find_sites
from aura_dist.sites.kinds import KINDS
from aura_dist.sites.pooling import POOLINGS
from tests.models import DEMO_SENTENCES, save_tiny
from tests.poolings import pool_plainly

README = Path(__file__).parents[2] / "aura_dist" / "README.md"
ARCHITECTURES = (
    "llama", "falcon-rotary", "falcon-alibi", "falcon-40b-style", "mpt", "gpt2", "opt", "bloom", "gemma3", "qwen3",
    "phi3", "mixtral", "qwen3-moe", "gpt-oss", "deepseek-v3", "qwen3-next",
)  # fmt: skip
# kinds whose values a hook of a module shows
HOOKED = ("attention", "mlp", "norm", "neurons", "heads", "inputs", "residual")
NEW = ("neurons", "heads", "residual")
FOLDED = ("neurons", "heads")
ALL_POOLINGS = ("llama", "gpt2", "opt", "qwen3-next")
IDS = torch.arange(5, 29).reshape(2, 12)
TOLERANCE = 1e-5


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def random_map(directory, *kinds, shift=True, seed=0):
    """Scales from 0.2 to 1.2, and shifts, for the sites of some kinds of a checkpoint's model."""
    rng = np.random.default_rng(seed)
    sites = [s for s in find_sites(skeleton(AutoConfig.from_pretrained(directory))).sites if s.kind in kinds]
    scale = {s.name: rng.uniform(0.2, 1.2, s.width).astype(np.float32) for s in sites}
    moved = {s.name: rng.normal(0, 0.2, s.width).astype(np.float32) for s in sites} if shift else {}
    return Intervention(scale, moved, {"method": "random"})


def exported(directory, intervention, folder) -> int:
    """Exit code of `export` into `folder / "out"`."""
    intervention.save(folder / "map")
    words = ["--model", str(directory), "--intervention", str(folder / "map"), "--out", str(folder / "out")]
    return main(["export", *words])


def hooked(directory, intervention):
    model = AutoModelForCausalLM.from_pretrained(directory)
    with aura_dist.intervene(model, intervention):
        return logits(model)


@torch.no_grad()
def plain_responses(directory, texts, sites, poolings):
    """(site, pooling) → [N, D] by an ordinary hook of the module, one text at a time."""
    model, tokenizer = (c.from_pretrained(directory) for c in (AutoModelForCausalLM, AutoTokenizer))
    seen: dict[str, torch.Tensor] = {}
    for site in sites:
        module = model.get_submodule(site.removesuffix(":input"))
        if site.endswith(":input"):
            module.register_forward_pre_hook(lambda _m, args, n=site: seen.__setitem__(n, args[0].clone()))
        else:
            module.register_forward_hook(
                lambda _m, _a, out, n=site: seen.__setitem__(n, (out[0] if isinstance(out, tuple) else out).clone())
            )
    rows: dict[tuple[str, str], list[np.ndarray]] = {(s, p): [] for s in sites for p in poolings}
    for text in texts:
        encoded = tokenizer(text, return_tensors="pt")
        model.eval()(**encoded)
        for site, acts in seen.items():
            for pooling in poolings:
                acts_TD = acts.reshape(-1, acts.shape[-1])
                rows[site, pooling].append(pool_plainly(acts_TD, pooling, encoded["input_ids"][0]).numpy())
    return {key: np.stack(values) for key, values in rows.items()}


def kinds_of(directory) -> list[str]:
    sites = find_sites(skeleton(AutoConfig.from_pretrained(directory))).sites
    return [kind for kind in KINDS if any(s.kind == kind for s in sites)]


def check_values(directory, folder, poolings) -> None:
    """What `collect` stores equals what plain hooks see: of the new kinds in all layers, of the others in one."""
    with DEMO_SENTENCES.open() as file:
        texts = [row["text"] for row in csv.DictReader(file)][:12]
    store = folder / "s.zarr"
    with (folder / "t.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("text", "toxic"), *((text, i % 2) for i, text in enumerate(texts))])
    words = ["--data", str(folder / "t.csv"), "--concepts", "toxic", "--pooling", *poolings, "--tokens-per-batch", "90"]
    new = [kind for kind in kinds_of(directory) if kind in NEW]
    modules = ["--modules", *new, "*.1.*", "*.1.*:input"]
    assert main(["collect", "--model", str(directory), *words, "--store", str(store), *modules]) == 0
    view = aura_dist.open_store(store)
    sites = [site for site in view["activations"] if view["activations"][site].attrs["kind"] in HOOKED]
    assert {view["activations"][site].attrs["kind"] for site in sites} == set(kinds_of(directory)) & set(HOOKED)
    ordered = [texts[row] for row in view["samples"]["row"].values]
    for (site, pooling), plain in plain_responses(directory, ordered, sites, poolings).items():
        ours = view["activations"][site][pooling].values
        assert np.abs(ours - plain).max() <= TOLERANCE * max(1.0, np.abs(plain).max()), f"{site} {pooling}"


def check_fold(directory, kind: str, folder, *, shift: bool) -> bool:
    """Whether a map of a kind folds; if it does, the exported model equals the hooked one. Scales must fold."""
    folder.mkdir()
    intervention = random_map(directory, kind, shift=shift)
    if exported(directory, intervention, folder) != 0:
        assert shift, f"{kind}: scales fold"
        return False
    folded, expected = logits(AutoModelForCausalLM.from_pretrained(folder / "out")), hooked(directory, intervention)
    assert (folded - expected).abs().max() <= TOLERANCE * expected.abs().max(), kind
    return True


def checked_row(name: str, directory, folder) -> str:
    """A row of the table, after all its cells are checked."""
    check_values(directory, folder, list(POOLINGS) if name in ALL_POOLINGS else ["max", "mean"])
    cells, kinds = [], kinds_of(directory)
    for kind in KINDS:
        folds = ""
        if kind in FOLDED and kind in kinds:
            check_fold(directory, kind, folder / f"{kind}-scale", shift=False)
            folds = " ω b" if check_fold(directory, kind, folder / f"{kind}-shift", shift=True) else " ω"
        cells.append(f"✓{folds}" if kind in kinds else "–")
    return f"| `{name}` | {' | '.join(cells)} |"


def header() -> str:
    return f"| architecture | {' | '.join(f'`{kind}`' for kind in KINDS)} |\n|{'---|' * (len(KINDS) + 1)}"


def begin() -> str:
    """The line of the README before the table."""
    return "<!-- the table of kinds: python -m tests.sites.supported -->\n"


def rewrite() -> None:
    rows = []
    for name in ARCHITECTURES:
        with tempfile.TemporaryDirectory() as scratch:
            rows.append(checked_row(name, save_tiny(name, Path(scratch) / "model"), Path(scratch)))
    text = README.read_text()
    before, line, after = text.partition(begin())
    assert line, "the README has the line before the table"
    rest = re.sub(r"\A\|.*?(?=\n\n)", "", after, count=1, flags=re.DOTALL)
    README.write_text(before + line + header() + "\n" + "\n".join(rows) + rest)


if __name__ == "__main__":
    rewrite()
