"""The stages of a sweep, one record each; no other module compares their names.

To add a stage, add a row to `STAGE_SPECS`, below the stages that it needs.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aura_dist.config.verbs import execution_settings
from aura_dist.errors import AuraError

Settings = Mapping[str, Any]

# the value that leaves a stage out
PLAIN = "none"
# settings that say how a stage is run, not what it computes: no axis of a grid, and no part of a job's identity
EXECUTION = execution_settings()


@dataclass(frozen=True)
class StageSpec:
    """What a sweep knows of a stage."""

    # Settings that the sweep sets → path within its directory. `{name}` is the job's name, and `{fit[out]}` the path
    # `out` of the `fit` job that this job needs: without such a job the setting is left out.
    paths: Mapping[str, str]
    # stages whose jobs must be done before
    needs: tuple[str, ...] = ()
    # Words at the start of a job's name, from its settings and the labels of the jobs that it needs. A stage without
    # labels adds to what it reads: its jobs have the name of the job that they need. Its settings change no figure,
    # so they are no axes of a grid, and no later job depends on them.
    label: Callable[[Settings, Sequence[str]], list[str]] | None = None
    # whether several processes can share a job
    ranked: bool = False
    # setting that makes a job one process, because the work is done elsewhere
    single_with: str | None = None
    # settings beside `paths` that a grid file must not hold
    reserved: frozenset[str] = frozenset()
    # settings that this stage takes from its own sections alone, not from the top of the file or of the grid
    unshared: frozenset[str] = frozenset()
    # whether only cells of a file that names the stage have it
    optional: bool = False
    # setting whose value `none` leaves out this stage and every stage that cannot run without it
    skipped_by: str | None = None
    # settings that have no effect in a job without the jobs that it needs; None if there can be no such job
    alone: frozenset[str] | None = None
    # Completes the stage's settings from the settings of all stages; returns the names of those without an effect. The
    # second argument names the settings that the grid varies for this stage.
    settle: Callable[[Mapping[str, dict[str, Any]], Collection[str]], set[str]] = lambda settings, varied: set()
    # whether a job makes a results file as `evaluate` writes it
    has_results: bool = False
    # How much finished work of a job is on disk. It grows as the job progresses, and not when an attempt repeats work;
    # 0 for a stage that takes seconds.
    progress: Callable[[Path], int] = lambda product: 0
    # How `sweep --dry-run` asks for the cost of jobs: the settings to plan with, from a job's settings and the file's
    # settings of `plan`; None if nothing can tell the cost. Then the line above the answers, and whether jobs of equal
    # cost are one line.
    cost_question: Callable[[Settings, Settings], dict[str, Any]] | None = None
    cost_heading: str = ""
    cost_alike: bool = False

    @property
    def set_by_sweep(self) -> set[str]:
        """Settings that a grid file must not hold."""
        return {*self.paths, *self.reserved}


def num_ranks(stage: str, settings: Settings, ranks: int) -> int:
    """How many of `ranks` processes take part in a job with these settings."""
    spec = STAGE_SPECS[stage]
    return ranks if spec.ranked and not settings.get(spec.single_with or "") else 1


def kept(stage: str, product: Path) -> int:
    """`StageSpec.progress` of a job that makes `product`; 0 where nothing can be read."""
    try:
        return STAGE_SPECS[stage].progress(product)
    except (AuraError, OSError):  # another rank may still be creating its files
        return 0


def _model(settings: Settings) -> str:
    return str(settings.get("model", "")).rstrip("/").rpartition("/")[2]


def _collection_label(settings: Settings, needed: Sequence[str]) -> list[str]:
    return [_model(settings), *settings.get("modules", ["mlp"]), *settings.get("pooling", ["max"])]


def _fit_label(settings: Settings, needed: Sequence[str]) -> list[str]:
    top = [f"top{settings['top_k']}"] if "top_k" in settings else []
    return [str(settings.get("method", "aura")), *top, *([str(settings["gate"])] if "gate" in settings else [])]


def _evaluation_label(settings: Settings, needed: Sequence[str]) -> list[str]:
    strength = [f"s{settings['strength']:g}"] if "strength" in settings else []
    return [_model(settings), *(needed or ["plain"]), *strength]


def _settle_fit(settings: Mapping[str, dict[str, Any]], varied: Collection[str]) -> set[str]:
    """The concept is the first that was collected; options of other methods or gates than the cell's have no effect."""
    fit, concepts = settings["fit"], settings["collect"].get("concepts")
    if "concept" not in fit and concepts:
        fit["concept"] = concepts[0] if isinstance(concepts, list) else concepts
    from aura_dist.interventions.gates import GATES, NO_GATE, gate_options
    from aura_dist.interventions.methods import METHODS, method_options

    method, gate = METHODS.get(str(fit.get("method", "aura"))), GATES.get(str(fit.get("gate", NO_GATE)))
    of_methods = set() if method is None else method_options() - set(method.options)
    of_gates = gate_options() - set(() if gate is None else gate.options)
    chosen_by = (("method", of_methods), ("gate", of_gates))
    return {name for choice, unread in chosen_by for name in unread if name in varied or choice in varied}


def _finished_tasks(store: Path) -> int:
    import numpy as np

    from aura_dist.store.access import open_group, read_array
    from aura_dist.store.schema import DONE

    return int(np.count_nonzero(read_array(open_group(str(store)), DONE)))


def _scored_columns(store: Path) -> int:
    from aura_dist.scoring.scores import count_columns
    from aura_dist.store.access import open_group
    from aura_dist.store.schema import StoreSpec

    group = open_group(str(store))
    return count_columns(group, StoreSpec.of(group))[0]


def _written_bytes(results: Path) -> int:
    """Of the results and the continuations beside them."""
    return sum(path.stat().st_size for path in results.parent.glob(f"{results.stem}.*"))


def _evaluation_question(settings: Settings, planned: Settings) -> dict[str, Any]:
    gpu = {"device": "cuda"} if "device_memory" in planned else {}
    return {**settings, "tflops": planned.get("tflops"), **gpu}


STAGE_SPECS: dict[str, StageSpec] = {
    "collect": StageSpec(
        paths={"store": "collections/{name}/store.zarr"},
        label=_collection_label,
        ranked=True,
        reserved=frozenset({"overwrite"}),
        unshared=frozenset({"strength"}),
        progress=_finished_tasks,
        cost_question=lambda settings, planned: {**settings, **planned},
        cost_heading="collections to run, by `plan`",
    ),
    "score": StageSpec(
        paths={"store": "{collect[store]}"},
        needs=("collect",),
        unshared=frozenset({"pooling"}),
        progress=_scored_columns,
    ),
    "fit": StageSpec(
        paths={"store": "{score[store]}", "out": "interventions/{name}"},
        needs=("score",),
        label=_fit_label,
        unshared=frozenset({"strength", "sharding"}),
        skipped_by="method",
        settle=_settle_fit,
    ),
    "evaluate": StageSpec(
        paths={"out": "results/{name}.json", "intervention": "{fit[out]}"},
        needs=("fit",),
        label=_evaluation_label,
        ranked=True,
        single_with="server",
        optional=True,
        alone=frozenset({"strength", "side_effects"}),
        has_results=True,
        progress=_written_bytes,
        cost_question=_evaluation_question,
        cost_heading="evaluations to run",
        cost_alike=True,
    ),
}
