"""Zero-shot tasks by EleutherAI's lm-evaluation-harness, on the model as it is loaded, sharded and intervened on.

Replicas share the requests. lm-eval's own way, a share of the documents for each rank, fails for tasks of fewer
documents than ranks and changes the order in which figures are summed. So every rank prepares all requests and
computes all figures; the replicas divide only the forwards.
"""

import logging
from collections.abc import Callable, Container, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from torch.distributed import DistError

from aura_dist.errors import AuraError, ConfigError, InputError, MissingPackageError, brief
from aura_dist.ranks.process import variable
from aura_dist.ranks.team import Team
from aura_dist.text.chat import Chat
from aura_dist.text.own_code import OwnCodeError, code_of_tasks

Figures = dict[str, dict[str, float | int]]
# resamples behind the standard error of a metric that has no formula for it; lm-eval's 100,000 take hours for an F1
_NUM_RESAMPLES = 1_000
_NO_METRICS = ("alias", "name", "sample_len", "sample_count", "samples")
# what a task may ask of a model
_REQUESTS = ("loglikelihood", "loglikelihood_rolling", "generate_until")


class ZeroShot:
    """Tasks that have been found, before any model is loaded; ConfigError if lm-eval, the directory or a task is not.

    OwnCodeError if the directory's tasks have code run, unless `trust_code`.

    `tasks` are names of tasks, groups or tags, with wildcards; `path` is a directory of the user's own YAML tasks,
    beside lm-eval's.
    """

    def __init__(self, tasks: Sequence[str], path: str | None, *, trust_code: bool = False) -> None:
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise MissingPackageError("--tasks", "lm-eval", "evaluation") from error
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        if path is not None and not Path(path).is_dir():
            raise ConfigError(f"--tasks-path {path!r}: expected a directory of YAML tasks, found none")
        if path is not None and not trust_code and (found := code_of_tasks(Path(path), _known_metrics())):
            raise OwnCodeError(f"--tasks-path: {found}")
        self.names = list(tasks)
        try:
            # lm-eval's own thousands of tasks take seconds to list: only if they are asked for
            self._manager: Any = TaskManager(include_path=path, include_defaults=path is None)
            if path is not None and not all(map(self._known, tasks)):
                self._manager = TaskManager(include_path=path)
        except AuraError:  # a signal
            raise
        except Exception as error:  # a broken YAML file fails in many ways
            raise ConfigError(f"--tasks-path {path!r} cannot be read: {brief(error)}") from error
        for name in tasks:
            if not self._known(name):
                near = get_close_matches(name, self._manager.all_tasks, n=3)
                hint = f"did you mean {' or '.join(near)}?" if near else "see `lm_eval ls tasks`"
                raise ConfigError(f"--tasks: expected tasks that lm-eval or --tasks-path knows, got {name!r}; {hint}")

    def _known(self, name: str) -> bool:
        return bool(self._manager.match_tasks([name]))

    def run(
        self,
        harness: Any,
        *,
        team: Team,
        num_fewshot: int | None = None,
        limit: int | None = None,
        preprompt: str | None = None,
        chat: Chat | None = None,
    ) -> Figures:
        """Task → metric → figure, as lm-eval computes them; InputError if a task fails or its data cannot be loaded.

        A standard error that needs resampling, such as an F1's, comes from 1,000 resamples, so it is known to 2 %.

        `harness` is what `Engine.harness` returns. All ranks of `team` must call this. `num_fewshot` is the number of
        examples in the context (None: the task's own), `limit` the examples of a task, `preprompt` a text before each
        context. With `chat`, lm-eval puts each context into the tokenizer's chat template, and the system's turn is the
        chat's.
        """
        from lm_eval import simple_evaluate

        if team.world.layout.num_replicas > 1:
            for kind in _REQUESTS:
                setattr(harness, kind, _shared(getattr(harness, kind), team, kind))
        try:
            # lm-eval starts no processes: it would fork this one, and a fork of a process with threads may never end
            with variable("DISABLE_MULTIPROC", "1"):
                found = simple_evaluate(
                    harness,
                    tasks=self.names,
                    num_fewshot=num_fewshot,
                    limit=limit,
                    system_instruction=preprompt if chat is None else chat.system,
                    apply_chat_template=chat is not None,
                    task_manager=self._manager,
                    log_samples=False,
                    bootstrap_iters=_NUM_RESAMPLES,
                )
        except (AuraError, DistError):  # another rank failed
            raise
        except Exception as error:  # tasks run code of their own
            if "confirm_run_unsafe_code" in str(error):
                raise InputError(
                    f"--tasks {' '.join(self.names)}: one of them would run the code that the model writes, which "
                    "`evaluate` never does; leave it out"
                ) from error
            raise InputError(f"--tasks {' '.join(self.names)}: lm-eval failed: {brief(error)}") from error
        return {} if found is None else _figures(found)


def _known_metrics() -> Container[str]:
    """Names of the metrics that lm-eval has; for others it runs what Hugging Face's `evaluate` finds by that name."""
    import lm_eval.api.metrics  # noqa: F401, it registers them
    from lm_eval.api.registry import METRIC_REGISTRY

    known: Container[str] = METRIC_REGISTRY
    return known


def _shared(answer: Callable[[list[Any]], list[Any]], team: Team, kind: str) -> Callable[[list[Any]], list[Any]]:
    """The same method of a model for all requests of a run, of which each replica answers its share.

    The requests of one document go to one replica: those that continue the same context may take one forward.
    """

    def answers(requests: list[Any]) -> list[Any]:
        replica, num_replicas = team.world.replica, team.world.layout.num_replicas
        mine = [i for i, request in enumerate(requests) if request.doc_id % num_replicas == replica]
        found = dict(zip(mine, answer([requests[i] for i in mine]), strict=True)) if mine else {}
        everyone = team.gather(f"zero_shot/{kind}", found if team.world.rank == 0 else {})
        merged = {i: value for part in everyone for i, value in part.items()}
        return [merged[i] for i in range(len(requests))]

    return answers


def _figures(found: dict[str, Any]) -> Figures:
    """The metrics of lm-eval's results: `acc,none` → `acc`, `acc_stderr,none` → `acc_stderr`."""
    figures: Figures = {}
    for task, metrics in found["results"].items():
        numbers = {
            key.removesuffix(",none"): value
            for key, value in metrics.items()
            if key not in _NO_METRICS and isinstance(value, int | float)
        }
        counts = found.get("n-samples", {}).get(task, {})
        numbers["num_fewshot"] = found.get("n-shot", {}).get(task, 0)
        if counts:
            numbers["num_examples"] = counts["effective"]
        figures[task] = numbers
    return figures
