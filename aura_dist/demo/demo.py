"""demo: the whole pipeline in a few minutes: collect → score → fit → evaluate and generate, with and without AurA."""

import logging
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path

import numpy as np

from aura_dist.config.verbs import CollectConfig, DemoConfig, EvaluateConfig, FitConfig, GenerateConfig, ScoreConfig
from aura_dist.demo.packaged import gemma_270m
from aura_dist.errors import ConfigError, StoreError
from aura_dist.files import write_whole
from aura_dist.interventions.artifact import Intervention
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
DECODING = {"max_new_tokens": 24, "num_samples": 1, "temperature": 1.0, "top_p": 0.9, "seed": 7}


def run(config: DemoConfig) -> None:
    """Run every stage into a run directory, and end with a summary."""
    if local_path(config.out) is None:
        raise ConfigError(f"--out: expected a local directory, got {config.out!r}")
    out = Path(config.out)
    model = config.model or str(gemma_270m())
    bundled = files("aura_dist.demo")
    store, intervention = str(out / "store.zarr"), str(out / "interventions" / "aura")
    data = config.data or str(bundled / "sentences.csv")
    collected = CollectConfig(
        model=model, dtype=config.dtype, data=data, text_column=config.text_column, concepts=[config.concept],
        modules=config.modules, store=store, overwrite=config.overwrite,
    )  # fmt: skip
    _check_config(out)
    collect.run(collected)
    _write_config(out, collected, config.concept, intervention)
    score.run(ScoreConfig(store=store))
    fit.run(FitConfig(store=store, concept=config.concept, method="aura", out=intervention))
    passages = str(bundled / "passages.csv")
    perplexities = {}
    for name, directory in (("plain", None), ("aura", intervention)):
        results = str(out / "results" / f"{name}.json")
        measured = EvaluateConfig(
            model=model, dtype=config.dtype, intervention=directory, perplexity_texts=passages, out=results
        )
        perplexities[name] = evaluate.run(measured)["perplexity"]
    generate.run(
        GenerateConfig(model=model, dtype=config.dtype, intervention=intervention, prompt=PROMPTS, **DECODING)  # type: ignore[arg-type]
    )
    _summary(out, perplexities, Intervention.load(intervention))


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


def _write_config(out: Path, collected: CollectConfig, concept: str, intervention: str) -> None:
    """`config.yaml`: the same run again, verb by verb, with `aura-dist VERB --config`."""
    import yaml

    left_out = ("store", "overwrite")  # every verb needs the store; a second run must not delete it
    sections = {
        "collect": {k: v for k, v in asdict(collected).items() if v not in (None, []) and k not in left_out},
        "fit": {"concept": concept, "method": "aura", "out": intervention},
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump({"store": collected.store, **sections}, sort_keys=False, allow_unicode=True)
        write_whole(out / "config.yaml", CONFIG_HEADER + text)
    except OSError as error:
        raise StoreError(f"--out {str(out)!r} cannot be written: {error}") from error


def _summary(out: Path, perplexities: dict[str, dict[str, float | None]], intervention: Intervention) -> None:
    total = sum(len(s) for s in intervention.scale.values())
    plain, aura = (np.nan if (p := perplexities[n]["token_weighted"]) is None else p for n in ("plain", "aura"))
    print(f"\nAurA scales down {intervention.num_changed:,} of {total:,} neurons")
    print(f"perplexity on neutral passages: {plain:.2f} plain, {aura:.2f} under AurA ({aura - plain:+.2f})")
    print("\nwritten:")
    for path in ("config.yaml", "store.zarr", "interventions/aura", "results/plain.json", "results/aura.json"):
        print(f"  {out / path}")
