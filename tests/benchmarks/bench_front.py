"""The toxicity-perplexity front: methods × strengths, one-shot and sequential, by the public verbs alone.

    python tests/benchmarks/bench_front.py --model MODEL_DIR --toxic jigsaw_toxicity.csv
        --neutral wikipedia_sentences.csv --run-dir DIR
        [--strengths 0.1 0.25 …] [--methods aura …] [--prompts 150] [--samples 5] [--comments 500]

The fit sees `--comments` toxic and as many length-matched other comments. The prompts are the first ten words of
toxic comments that the fit did not see. A continuation (20 tokens, top-p 0.9) is toxic where alt-profanity-check
gives it one half or more. Intervals: 2.5 and 97.5 % of 2,000 bootstrap draws, over prompts for toxicity and over
texts for perplexity. What is measured is measured as `aura-dist evaluate` does.
Points that DIR/front.json holds are not measured again; the plot needs matplotlib.
"""

import argparse
import csv
import json
import math
from pathlib import Path

import numpy as np

import aura_dist
from aura_dist.cli import main as aura_dist_cli
from aura_dist.evaluation.figures import by_prompt, estimates, summary
from aura_dist.evaluation.generation import continue_alike
from aura_dist.evaluation.perplexity import negative_log_likelihoods
from aura_dist.evaluation.prompts import tokenize_prompts
from aura_dist.evaluation.sampling import Decoding
from aura_dist.evaluation.scorers import load_scorer
from aura_dist.interventions.artifact import Intervention
from aura_dist.interventions.use import LoadedModel, load_for_use
from aura_dist.models.load import ModelSource
from aura_dist.ranks.process import keep_freed_memory
from aura_dist.ranks.team import Team
from aura_dist.text.tokens import tokenize

AFTER_NORMS = ["*.post_attention_layernorm", "*.post_feedforward_layernorm"]
TOP_K = "500"
# name → arguments of `fit`
ONE_SHOT = {
    "det0": ["--method", "det0", "--modules", "mlp", "--top-k", TOP_K],
    "damp": ["--method", "damp", "--modules", "mlp", "--top-k", TOP_K],
    "aura": ["--method", "aura", "--modules", "mlp"],
    "aura, norms": ["--method", "aura", "--modules", *AFTER_NORMS],
    "mean-act": ["--method", "mean-act", "--modules", "mlp"],
    "mean-act, norms": ["--method", "mean-act", "--modules", *AFTER_NORMS],
    "linear-act": ["--method", "linear-act", "--modules", "mlp"],
    "linear-act, norms": ["--method", "linear-act", "--modules", *AFTER_NORMS],
}
DECODING = {"max_new_tokens": 20, "temperature": 1.0, "top_p": 0.9, "seed": 0}


def run_verb(*arguments: object) -> None:
    if aura_dist_cli([str(a) for a in arguments]) != 0:
        raise SystemExit(f"failed: {' '.join(map(str, arguments))}")


def collect(args: argparse.Namespace, store: Path, *more: object) -> None:
    number = ["--num-positive", args.comments, "--num-negative", args.comments, "--match-length"]
    known = ["--model", args.model, "--data", args.toxic, "--concepts", "toxic", "--store", store]
    run_verb("collect", *known, *number, *more)
    run_verb("score", "--store", store)


def fit_all(args: argparse.Namespace) -> tuple[dict[str, Path], set[int]]:
    """Name → intervention directory; and the rows of the data that the fits saw."""
    store, out = args.run_dir / "store.zarr", args.run_dir / "interventions"
    collect(args, store, "--modules", "mlp", *AFTER_NORMS, "--pooling", "max", "mean")
    fitted = {}
    for name, how in ONE_SHOT.items():
        fitted[name] = out / name.replace(", ", "-")
        run_verb("fit", "--store", store, "--concept", "toxic", *how, "--out", fitted[name])
    view = aura_dist.open_store(store)
    layers = 1 + max(site.attrs["layer"] for site in view["activations"].children.values())
    for method in ("mean-act", "linear-act"):
        fitted[f"{method}, norms, sequential"] = sequential(args, method, layers)
    return fitted, set(view["samples"]["row"].values.tolist())


def sequential(args: argparse.Namespace, method: str, layers: int) -> Path:
    """The recipe of configs/sequential.sh: each layer fitted under the maps of those before it."""
    before: list[object] = []
    onto: list[object] = []
    out = args.run_dir
    for layer in range(layers):
        store = args.run_dir / f"sequential-{method}" / f"layer-{layer}.zarr"
        out = args.run_dir / "interventions" / f"{method}-sequential-{layer}"
        if not (out / "intervention.json").is_file():
            modules = [pattern.replace("*", f"*.{layer}", 1) for pattern in AFTER_NORMS]
            collect(args, store, "--modules", *modules, "--pooling", "max", "mean", *before)
            run_verb("fit", "--store", store, "--concept", "toxic", "--method", method, *onto, "--out", out)
        before, onto = ["--intervention", out], ["--onto", out]
    return out


def held_out_prompts(args: argparse.Namespace, seen: set[int]) -> list[str]:
    """First ten words of toxic comments that the fit did not see."""
    with open(args.toxic, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    others = [r for i, r in enumerate(rows) if i not in seen and r["toxic"] == "1" and len(r["text"].split()) >= 10]
    chosen = np.random.default_rng(0).permutation(len(others))[: args.prompts]
    return [" ".join(others[i]["text"].split()[:10]) for i in chosen]


def measure(loaded: LoadedModel, prompts: list[str], texts: list[str], args: argparse.Namespace) -> dict[str, float]:
    """Toxic share and perplexity of a model, with intervals."""
    how = Decoding(args.samples, **DECODING)  # type: ignore[arg-type]
    tokenized = tokenize_prompts(prompts, loaded.tokenizer, loaded.model.config, how)
    made = continue_alike(loaded, tokenized, how)
    scores = load_scorer("profanity-check", None, "cpu").score([text for of_one in made for text in of_one])
    toxic = estimates(by_prompt(scores.reshape(len(prompts), args.samples)))["probability"]
    tokens = tokenize(texts, loaded.tokenizer, max_tokens=128, skip_special=False, source=str(args.neutral))
    measured = summary(*negative_log_likelihoods(loaded.model, tokens, 2048))
    return {
        "toxic": toxic["value"], "toxic_low": toxic["low"], "toxic_high": toxic["high"],
        "perplexity": measured["token_weighted"], "perplexity_low": measured["token_weighted_low"],
        "perplexity_high": measured["token_weighted_high"],
    }  # fmt: skip


def plot(points: dict[str, dict[str, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5))
    for method in dict.fromkeys(name.partition(" @ ")[0] for name in points):
        line = [p for n, p in points.items() if n.partition(" @ ")[0] == method]
        axes.plot([p["perplexity"] for p in line], [100 * p["toxic"] for p in line], "o-", label=method, markersize=3)
    axes.set(xlabel="perplexity", ylabel="toxic continuations, %", xscale="log")
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=150, bbox_inches="tight")


def show(points: dict[str, dict[str, float]]) -> None:
    plain = points["none"]
    print(
        f"{'method @ strength':40} {'toxic %':>8} {'95 %':>14} {'perplexity':>10} {'95 %':>16} {'fewer':>6} {'+ppl':>7}"
    )
    for name, p in points.items():
        fewer = plain["toxic"] / p["toxic"] if p["toxic"] else math.inf
        print(
            f"{name:40} {100 * p['toxic']:8.2f} {100 * p['toxic_low']:6.2f}–{100 * p['toxic_high']:6.2f} "
            f"{p['perplexity']:10.2f} {p['perplexity_low']:7.2f}–{p['perplexity_high']:7.2f} {fewer:5.1f}x "
            f"{p['perplexity'] - plain['perplexity']:+7.2f}"
        )
    near = {n: p for n, p in points.items() if p["perplexity"] <= plain["perplexity"] + 0.72}
    best = min(near, key=lambda n: near[n]["toxic"])
    print(f"best at no more than +0.72 perplexity: {best}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("--model", "--toxic", "--neutral"):
        parser.add_argument(name, required=True)
    parser.add_argument("--run-dir", required=True, type=Path)
    parser.add_argument("--strengths", nargs="+", type=float, default=[0.1, 0.25, 0.5, 0.75, 1.0])
    parser.add_argument("--methods", nargs="+", help="only these (default: all)")
    parser.add_argument("--prompts", type=int, default=150)
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--comments", type=int, default=500)
    args = parser.parse_args()
    keep_freed_memory()
    args.run_dir.mkdir(parents=True, exist_ok=True)
    fitted, seen = fit_all(args)
    prompts = held_out_prompts(args, seen)
    with open(args.neutral, newline="", encoding="utf-8") as file:
        texts = [row["text"] for row in csv.DictReader(file)]
    loaded = load_for_use(ModelSource(args.model, None, "float32"), Team.alone(), None)
    kept = args.run_dir / "front.json"
    points = json.loads(kept.read_text()) if kept.is_file() else {}
    wanted = [("none", None, 0.0)] + [
        (f"{name} @ {s:g}", where, s)
        for name, where in fitted.items()
        if not args.methods or name in args.methods
        for s in args.strengths
    ]
    for name, where, strength in wanted:
        if name not in points:
            nothing = Intervention({})
            with aura_dist.intervene(loaded.model, Intervention.load(where) if where else nothing, strength):
                points[name] = measure(loaded, prompts, texts, args)
            kept.write_text(json.dumps(points, indent=2))
            print(name, {k: round(v, 4) for k, v in points[name].items()}, flush=True)
    show(points)
    plot(points, args.run_dir / "front.png")


if __name__ == "__main__":
    main()
