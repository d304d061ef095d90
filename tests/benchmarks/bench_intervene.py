"""The forward under an intervention's hooks, and that of the exported checkpoint, against the plain one, in one run.

    python tests/benchmarks/bench_intervene.py --model MODEL_DIR [--rows 2] [--tokens 128] [--repeats 11]

AurA-like scales on the MLP linears, then scales and shifts as Linear-AcT gives them on the norms, and the same with a
gate of tokens. The variants take turns within a repeat, so that a slow moment of the machine meets them all.
"""

import argparse
import statistics
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

import aura_dist
from aura_dist.config.verbs import ExportConfig
from aura_dist.interventions.artifact import Intervention
from aura_dist.interventions.gates import Gate
from aura_dist.models.load import DTYPES
from aura_dist.ranks.process import keep_freed_memory
from aura_dist.sites.find import find_sites
from aura_dist.stages import export

UNGATED = "hooks, norm scales and shifts"
GATED = f"{UNGATED}, gate of tokens"


@torch.no_grad()
def seconds(model, ids: torch.Tensor) -> float:
    start = time.perf_counter()
    model(input_ids=ids, use_cache=False)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=11)
    args = parser.parse_args()
    keep_freed_memory()
    rng = np.random.default_rng(0)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=DTYPES[args.dtype]).eval()
    widths = {s.name: (s.width, s.kind) for s in find_sites(model).sites}
    mlp = {s: rng.uniform(0.4, 1, w).astype(np.float32) for s, (w, kind) in widths.items() if kind == "mlp"}
    norms = {s: rng.normal(1, 0.1, w).astype(np.float32) for s, (w, kind) in widths.items() if kind == "norm"}
    shifts = {s: rng.normal(0, 0.01, len(v)).astype(np.float32) for s, v in norms.items()}
    gates = {
        s: Gate("tokens", {"weight": rng.normal(0, 0.1, len(v)).astype(np.float32), "bias": np.zeros(1, np.float32)})
        for s, v in norms.items()
    }
    with tempfile.TemporaryDirectory() as scratch:
        Intervention(mlp).save(Path(scratch) / "mlp")
        out = Path(scratch) / "out"
        export.run(ExportConfig(model=args.model, intervention=str(Path(scratch) / "mlp"), out=str(out)))
        folded = AutoModelForCausalLM.from_pretrained(out, dtype=DTYPES[args.dtype]).eval()
        ids = torch.randint(5, 1000, (args.rows, args.tokens))
        variants = {
            "plain": (model, None),
            "hooks, mlp scales": (model, Intervention(mlp)),
            UNGATED: (model, Intervention(norms, shifts)),
            GATED: (model, Intervention(norms, shifts, gate=gates)),
            "exported, mlp scales": (folded, None),
        }
        seen: dict[str, list[float]] = {name: [] for name in variants}
        for _ in range(args.repeats + 1):
            for name, (which, intervention) in variants.items():
                with aura_dist.intervene(which, intervention) if intervention else nullcontext():
                    seen[name].append(seconds(which, ids))
    print(f"{args.dtype}, {args.rows} texts of {args.tokens} tokens, {torch.get_num_threads()} threads")
    for name, times in seen.items():
        ratios = [t / p for t, p in zip(times[1:], seen["plain"][1:], strict=True)]
        print(f"{name:45} median {statistics.median(times[1:]):.3f} s, {statistics.median(ratios):.3f}x plain")
    ratios = [gated / ungated for gated, ungated in zip(seen[GATED][1:], seen[UNGATED][1:], strict=True)]
    print(f"gated against ungated hooks: {statistics.median(ratios):.3f}x")


if __name__ == "__main__":
    main()
