"""Zero-shot tasks by EleutherAI's lm-evaluation-harness, on the model as it is loaded, sharded and intervened on."""

import copy
import logging
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from aura_dist.errors import AuraError, ConfigError, InputError, MissingPackageError, brief

Figures = dict[str, dict[str, float | int]]
_TOLD_ELSEWHERE = ("alias", "name", "sample_len", "sample_count", "samples")


class ZeroShot:
    """Tasks that have been found, before any model is loaded.

    Parameters
    ----------
    tasks
        Names of tasks, groups or tags, with wildcards.
    path
        Directory of YAML tasks of one's own, beside lm-eval's.

    Raises
    ------
    ConfigError
        lm-eval is missing, the directory is, or a task is not known.
    """

    def __init__(self, tasks: Sequence[str], path: str | None) -> None:
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise MissingPackageError("--tasks", "lm-eval", "evaluation") from error
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        if path is not None and not Path(path).is_dir():
            raise ConfigError(f"--tasks-path {path!r}: expected a directory of YAML tasks, found none")
        self.names = list(tasks)
        try:
            # lm-eval's own thousands of tasks take seconds to list: only if they are asked for
            self._manager: Any = TaskManager(include_path=path, include_defaults=path is None)
            if path is not None and not all(map(self._known, tasks)):
                self._manager = TaskManager(include_path=path)
        except AuraError:  # a signal
            raise
        except Exception as error:  # a broken YAML file fails in as many ways as there are keys
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
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        num_fewshot: int | None = None,
        limit: int | None = None,
        preprompt: str | None = None,
        batch_size: int = 8,
    ) -> Figures:
        """Task → metric → figure, as lm-eval gives them; alike on all ranks, whose forwards may be collective.

        Parameters
        ----------
        model, tokenizer
            What is evaluated; neither is changed.
        num_fewshot, limit
            As lm-eval's: examples in the context (None: the task's own number), examples a task.
        preprompt
            Text that stands before each context.
        batch_size
            Requests in one forward.

        Raises
        ------
        InputError
            A task's data cannot be loaded, or the task fails.
        """
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        harness = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
        try:
            found = simple_evaluate(
                harness,
                tasks=self.names,
                num_fewshot=num_fewshot,
                limit=limit,
                system_instruction=preprompt,
                task_manager=self._manager,
                log_samples=False,
            )
        except AuraError:
            raise
        except Exception as error:  # tasks run code of their own
            raise InputError(f"--tasks {' '.join(self.names)}: lm-eval failed: {brief(error)}") from error
        return {} if found is None else _figures(found)


def _figures(found: dict[str, Any]) -> Figures:
    """lm-eval's results without what is no figure: `acc,none` → `acc`, `acc_stderr,none` → `acc_stderr`."""
    figures: Figures = {}
    for task, metrics in found["results"].items():
        numbers = {
            key.removesuffix(",none"): value
            for key, value in metrics.items()
            if key not in _TOLD_ELSEWHERE and isinstance(value, int | float)
        }
        counts = found.get("n-samples", {}).get(task, {})
        numbers["num_fewshot"] = found.get("n-shot", {}).get(task, 0)
        if counts:
            numbers["num_examples"] = counts["effective"]
        figures[task] = numbers
    return figures
