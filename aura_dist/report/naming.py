"""Names of evaluations: short, and no two alike."""

import re
from collections.abc import Sequence

from aura_dist.report.evaluations import Evaluation

# how a sweep calls what a job gives: parts of its settings, and a digest of them all
_OF_A_SWEEP = re.compile(r"-[0-9a-f]{10}$")
PLAIN = "no intervention"


def labels_of(evaluations: Sequence[Evaluation]) -> list[str]:
    """Names of evaluations on the page: the file's, with the run's where several runs are shown.

    Names that a sweep made are replaced by what the evaluations differ in, as long as that tells them apart.
    """
    several = len({e.run for e in evaluations}) > 1
    names = [f"{e.run}/{e.name}" if several else e.name for e in evaluations]
    made = [i for i, e in enumerate(evaluations) if _OF_A_SWEEP.search(e.name)]
    described = _described([evaluations[i] for i in made])
    taken = set(names)
    for i, text in zip(made, described, strict=True):
        if described.count(text) == 1 and text not in taken:
            names[i] = text
    return names


def _described(evaluations: Sequence[Evaluation]) -> list[str]:
    """`mean-act 0.25, mlp`: method and strength, and whatever else is not the same in all that have it."""
    fitted = [e for e in evaluations if e.method != "none"]
    several_models = len({e.model for e in evaluations}) > 1
    several_modules = len({e.modules for e in fitted}) > 1
    short = modules_in_short(fitted)
    texts = []
    for e in evaluations:
        method = PLAIN if e.method == "none" else e.method
        parts = [method if e.strength in (None, 1.0) else f"{method} {e.strength:g}"]
        parts += [f"top {e.top_k}"] if len({o.top_k for o in fitted if o.method == e.method}) > 1 else []
        parts += [e.variant] if e.variant and len({o.variant for o in fitted if o.method == e.method}) > 1 else []
        parts += [short[e.modules]] if several_modules and e in fitted else []
        parts += ["pre-prompt"] if e.preprompt is not None else []
        parts += [e.model.rstrip("/").rsplit("/", 1)[-1]] if several_models else []
        parts += [e.run] if len({o.run for o in evaluations}) > 1 else []
        texts.append(", ".join(parts))
    return texts


def modules_in_short(evaluations: Sequence[Evaluation]) -> dict[tuple[str, ...] | None, str]:
    """Modules that maps lie over → a short name: `norms` for several patterns of norms, where no other is."""
    given = list(dict.fromkeys(e.modules for e in evaluations))
    long = ["all modules" if m is None else " + ".join(p.removeprefix("*.") for p in m) for m in given]
    norms = [m is not None and len(m) > 1 and all("norm" in p for p in m) for m in given]
    brief = "norms" if norms.count(True) == 1 and "norms" not in long else None
    return {m: brief if brief and is_norm else name for m, name, is_norm in zip(given, long, norms, strict=True)}
