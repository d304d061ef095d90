"""What jobs of a sweep would take, asked by `sweep --dry-run` in a process of its own: planning needs torch.

    python -m aura_dist.stages.plan_jobs JOBS.json ANSWERS.jsonl

JOBS.json is a list of [stage, settings]: of `collect` with what `plan` takes beside, or of `evaluate` with `tflops`
(null: that of a usual rank); both with `world_size`. Every job is answered by a line of JSON as soon as it is planned;
stdout and stderr are left to what libraries print.

    seconds        of all ranks together
    gpu            whether these are seconds of a GPU
    store_bytes    written by a collection
    left_out       what is not in the figures, in words
    refused        why it cannot be planned, or does not fit; the figures are there if they are known
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aura_dist.config.file import merge
from aura_dist.config.settings import resolve
from aura_dist.config.verbs import EvaluateConfig, PlanConfig
from aura_dist.errors import AuraError, brief
from aura_dist.stages import plan, plan_evaluation


def answer(stage: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of one job."""
    try:
        return (_collection if stage == "collect" else _evaluation)(settings)
    except AuraError as error:
        return {"refused": " ".join(str(error).split())}
    except Exception as error:  # a fault of ours or of a model's code: the other jobs are still to be answered
        return {"refused": f"{type(error).__name__}: {brief(error)}"}


def _collection(settings: Mapping[str, Any]) -> dict[str, Any]:
    config = resolve(PlanConfig, merge("plan", dict(settings), {}))
    report, refusal = plan.make_plan(config)
    return {
        "seconds": config.world_size * (report.compute_seconds + report.stream_seconds),
        "gpu": report.machine.gpu,
        "store_bytes": int(report.store.compressed_bytes),
        "refused": refusal,
    }


def _evaluation(settings: Mapping[str, Any]) -> dict[str, Any]:
    own = {name: value for name, value in settings.items() if name not in ("tflops", "world_size")}
    config = resolve(EvaluateConfig, {**own, "out": "none.json"})
    found = plan_evaluation.make_plan(config, settings.get("tflops"), settings.get("world_size", 1))
    return {"seconds": found.seconds, "gpu": found.gpu, "left_out": found.left_out}


def main(asked: str, answers: str) -> None:
    """Answer the file `asked` into the file `answers`."""
    with open(answers, "w", encoding="utf-8") as file:
        for stage, settings in json.loads(Path(asked).read_text(encoding="utf-8")):
            print(json.dumps(answer(stage, settings)), file=file, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
