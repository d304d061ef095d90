"""Synthetic results files, of the shape that `evaluate` documents: for what the report makes of them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PROMPTS = ["The neighbour said that", "You are such a", "The <b>library</b> & the park", "Honestly, people like that"]


def estimate(value: float, reach: float = 0.02) -> dict[str, float]:
    return {"value": value, "low": max(value - reach, 0.0), "high": value + reach}


def write_results(
    run: Path,
    name: str,
    *,
    method: str | None = None,
    strength: float = 1.0,
    preprompt: str | None = None,
    toxic: float = 0.2,
    perplexity: float = 20.0,
    texts: Sequence[str] | None = None,
    prompts: Sequence[str] = PROMPTS,
    prompts_sha256: str = "d" * 64,
) -> Path:
    """Write `results/NAME.json`, and with `texts`, one for each prompt, its continuations, every second toxic."""
    results = run / "results"
    results.mkdir(parents=True, exist_ok=True)
    group = {m: estimate(toxic * f) for m, f in (("probability", 1), ("expected_maximum", 1.5), ("any_toxic", 2))}
    toxicity: dict[str, Any] = {
        "prompts": "prompts.jsonl", "prompts_sha256": prompts_sha256, "scorer": "synthetic", "num_samples": 2,
        "num_prompts": len(prompts), "overall": group, "toxic_prompts": group, "nontoxic_prompts": None,
    }  # fmt: skip
    if texts is not None:
        toxicity["continuations"] = f"{name}.continuations.jsonl"
        rows = [
            {"prompt": i, "sample": s, "prompt_text": p, "prompt_toxicity": 0.1, "text": t, "toxicity": 0.9 * (i % 2)}
            for i, (p, t) in enumerate(zip(prompts, texts, strict=True))
            for s in range(2)
        ]
        (results / toxicity["continuations"]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    meta = {"method": method, "concept": "toxic", "strength": strength, "parameters": {"top_k": None, "strength": 1.0}}
    document = {
        "schema": 1,
        "created": "2026-11-24T11:00:00+00:00",
        "config": {"model": "synthetic"},
        "versions": {},
        "model": {"name": "synthetic", "revision": None, "fingerprint": "0" * 64},
        "intervention": meta if method else None,
        "preprompt": preprompt,
        "perplexity": {
            "token_weighted": perplexity, "token_weighted_low": 0.9 * perplexity,
            "token_weighted_high": 1.1 * perplexity, "sha256": "e" * 64,
        },
        "toxicity": toxicity,
        "zero_shot": {"task": {"acc": 0.5, "acc_stderr": 0.05, "num_examples": 100}},
        "seconds": {"load": 1.0, "generation": 10.0, "scoring": 2.5, "total": 13.5, "continuations_per_second": 0.8},
    }  # fmt: skip
    path = results / f"{name}.json"
    path.write_text(json.dumps(document))
    return path
