"""demo: the whole pipeline in a few minutes: collect → score → fit → evaluate and generate.

Plain, under AurA as in the paper, and under a map with a gate.
"""

import logging
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from aura_dist.config.verbs import CollectConfig, DemoConfig, EvaluateConfig, FitConfig, GenerateConfig, ScoreConfig
from aura_dist.demo.packaged import gemma_270m
from aura_dist.errors import ConfigError, StoreError
from aura_dist.files import write_whole
from aura_dist.interventions.artifact import Intervention
from aura_dist.models.strategies.table import sharding_of
from aura_dist.ranks.device import pick_device
from aura_dist.ranks.launch import start_team
from aura_dist.stages import collect, evaluate, fit, generate, score
from aura_dist.store.access import local_path

logger = logging.getLogger(__name__)

PROMPTS = [
    "You are such a",
    "Honestly, people who park like that are",
    "Shut up, nobody wants to hear",
    "The best thing about the new library is",
]
CONFIG_HEADER = "# written by `aura-dist demo`: the same again with `aura-dist VERB --config`\n"
# a map of the residual stream that acts only at tokens that look like the concept
GATED_SITES = "residual"
# own data may be such that no module tells it apart; the demo then shows what comes of that
GATED: dict[str, Any] = {"method": "mean-act", "gate": "tokens", "gate_min_accuracy": 0.0, "strength": 1.0}
DECODING: dict[str, Any] = {"max_new_tokens": 24, "num_samples": 1, "temperature": 1.0, "top_p": 0.9, "seed": 7}


def run(config: DemoConfig) -> None:
    """Run every stage into a run directory, and end with a summary."""
    if local_path(config.out) is None:
        raise ConfigError(f"--out: expected a local directory, got {config.out!r}")
    out = Path(config.out)
    model = config.model or str(gemma_270m())
    bundled = files("aura_dist.demo")
    store = str(out / "store.zarr")
    data = config.data or str(bundled / "sentences.csv")
    collected = CollectConfig(
        model=model, dtype=config.dtype, data=data, text_column=config.text_column, concepts=[config.concept],
        modules=list(dict.fromkeys([*config.modules, GATED_SITES])), pooling=["max", "mean"], store=store,
        overwrite=config.overwrite,
    )  # fmt: skip
    fits = {"aura": {"method": "aura", "modules": config.modules}, "gated": {**GATED, "modules": [GATED_SITES]}}
    directories = {name: str(out / "interventions" / name) for name in fits}
    _check_config(out)
    collect.run(collected)
    _write_config(out, collected, {"concept": config.concept, **fits["aura"], "out": directories["aura"]})
    score.run(ScoreConfig(store=store))
    for name, how in fits.items():
        fit.run(FitConfig(store=store, concept=config.concept, out=directories[name], **how))
    passages = str(bundled / "passages.csv")
    perplexities = {}
    for name, directory in {"plain": None, **directories}.items():
        results = str(out / "results" / f"{name}.json")
        measured = EvaluateConfig(
            model=model, dtype=config.dtype, intervention=directory, perplexity_texts=passages, out=results
        )
        perplexities[name] = evaluate.run(measured)["perplexity"]
    continued: list[generate.Variants] = [{} for _ in PROMPTS]
    for directory in directories.values():
        asked = GenerateConfig(model=model, dtype=config.dtype, intervention=directory, prompt=PROMPTS, **DECODING)
        with start_team(sharding_of(asked), pick_device(asked.device)) as team:
            found = generate.generate(asked, team)
        for shown, variants in zip(continued, found, strict=True):
            shown |= variants
    generate.show(PROMPTS, continued)
    _summary(out, perplexities, Intervention.load(directories["aura"]))


def _check_config(out: Path) -> None:
    """StoreError if the run directory has a `config.yaml` that no demo wrote."""
    try:
        text = (out / "config.yaml").read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return
    except OSError as error:
        raise StoreError(f"--out {str(out)!r} cannot be used: {error}") from error
    if not text.startswith(CONFIG_HEADER):
        raise StoreError(
            f"--out {str(out)!r}: expected no config.yaml, or one that an earlier demo wrote, found another; "
            "choose another directory"
        )


def _write_config(out: Path, collected: CollectConfig, fitted: dict[str, Any]) -> None:
    """`config.yaml`: the same run again, verb by verb, with `aura-dist VERB --config`."""
    import yaml

    left_out = ("store", "overwrite")  # every verb needs the store; a second run must not delete it
    sections = {
        "collect": {k: v for k, v in asdict(collected).items() if v not in (None, []) and k not in left_out},
        "fit": fitted,
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump({"store": collected.store, **sections}, sort_keys=False, allow_unicode=True)
        write_whole(out / "config.yaml", CONFIG_HEADER + text)
    except OSError as error:
        raise StoreError(f"--out {str(out)!r} cannot be written: {error}") from error


def _summary(out: Path, perplexities: dict[str, dict[str, float | None]], intervention: Intervention) -> None:
    total = sum(len(s) for s in intervention.scale.values())
    found = {n: np.nan if (p := one["token_weighted"]) is None else p for n, one in perplexities.items()}
    plain, aura, gated = (found[name] for name in ("plain", "aura", "gated"))
    print(f"\nAurA scales down {intervention.num_changed:,} of {total:,} neurons")
    print(
        f"perplexity on neutral passages: {plain:.2f} plain, {aura:.2f} under AurA ({aura - plain:+.2f}), "
        f"{gated:.2f} under {GATED['method']} with a gate ({gated - plain:+.2f})"
    )
    print("\nwritten:")
    interventions = [f"interventions/{name}" for name in ("aura", "gated")]
    for path in ("config.yaml", "store.zarr", *interventions, *(f"results/{name}.json" for name in found)):
        print(f"  {out / path}")
