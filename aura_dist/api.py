"""The stages `collect`, `score` and `fit` as functions for notebooks, with the command line's code and settings.

They print nothing: progress goes to the logger `aura_dist`. Errors name parameters in place of flags.
"""

import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from functools import wraps
from inspect import Parameter, signature
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from aura_dist.config.file import check_taken
from aura_dist.config.options import LoadOptions
from aura_dist.config.settings import default_of, resolve
from aura_dist.config.verbs import VERBS, CollectConfig, FitConfig, ScoreConfig, SequentialConfig
from aura_dist.errors import AuraError, ConfigError, InputError, ModelError
from aura_dist.ranks.world import place_from_environment
from aura_dist.scoring.columns import as_array
from aura_dist.text.labels import check_texts, parse_labels
from aura_dist.text.table import Table
from aura_dist.text.tokenizer import check_has_vocabulary

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr
    from numpy.typing import ArrayLike
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from aura_dist.interventions.artifact import Intervention
    from aura_dist.models.in_memory import InMemory

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])
TEXT = "text"  # the column of the texts
CONCEPT = "concept"  # the name of labels that come without one
_FROM_ARGUMENTS = {"data", "split", "text_column", "concepts", "unlabelled", "clean_negatives"}


def _takes(*configs: type, without: Collection[str] = ()) -> Callable[[FunctionT], FunctionT]:
    """Show the settings of `configs` in a function's signature, refuse others, and name parameters in its errors."""

    def decorate(function: FunctionT) -> FunctionT:
        own = [p for p in signature(function).parameters.values() if p.kind != Parameter.VAR_KEYWORD]
        names = {p.name for p in own}
        every = (f for config in reversed(configs) for f in fields(config))
        taken = {f.name: default_of(f) for f in every if f.name not in {*names, *without}}

        @wraps(function)
        def call(*args: Any, **settings: Any) -> Any:
            for name in settings.keys() - names - taken.keys():
                raise ConfigError(f"{name}: expected one of {', '.join(taken)}; leave it out")
            try:
                return function(*args, **{n: _plain(v) for n, v in settings.items()})
            except AuraError as error:
                error.args = (re.sub(r"--([a-z][a-z-]*)", lambda flag: flag[1].replace("-", "_"), str(error)),)
                raise

        shown = [Parameter(n, Parameter.KEYWORD_ONLY, default=default) for n, default in taken.items()]
        call.__signature__ = signature(function).replace(parameters=[*own, *shown])  # type: ignore[attr-defined]
        return call  # type: ignore[return-value]

    return decorate


@_takes(CollectConfig, without={"model", *_FROM_ARGUMENTS})
def collect(
    model: "str | Path | PreTrainedModel",
    texts: Sequence[str],
    labels: "ArrayLike | Mapping[str, ArrayLike] | None",
    *,
    store: str | Path,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    **settings: Any,
) -> str:
    """Run texts through a model and store each neuron's pooled responses, or continue a store that was begun.

    Parameters
    ----------
    model
        A directory or hub name, or a causal language model of transformers in memory, which keeps its dtype and device
        and needs its `tokenizer`. During the call it is in eval mode and lacks the decoder layers after the last
        captured one, because they would cost time; afterwards it is as before. A digest of all its weights identifies
        it, so an intervention fitted from the store counts as made for another model than the checkpoint on disk.
    labels
        [N] values for the concept "concept", or a dict concept → [N] values: 0, 1, or −1, NaN and None for "not
        labelled"; numbers of any size with `threshold`. None: all texts are run, and the store cannot be scored.
    store
        A directory or a URL to write to; it is returned.
    **settings
        As for `aura-dist collect`: `modules`, `pooling`, `max_tokens`, `num_positive`, `overwrite`, …

    Raises
    ------
    InputError, ConfigError, ModelError, StoreError
        Texts or labels, a setting, the model, or what is at `store` cannot be used.

    Examples
    --------
    >>> aura_dist.collect(model, texts, is_toxic, tokenizer=tokenizer, store="toxic.zarr", pooling=["max", "mean"])
    """
    from aura_dist.stages import collect as stage

    by_concept = labels if isinstance(labels, Mapping) else {} if labels is None else {CONCEPT: labels}
    about = {"concepts": list(by_concept), "unlabelled": labels is None}
    given = {**settings, **about, "store": store, "data": "texts"}
    if isinstance(model, (str, Path)):
        if tokenizer is not None:
            raise ConfigError("tokenizer: expected it with a model in memory, got it with a name; leave it out")
        config = resolve(CollectConfig, {**given, "model": str(model)})
        stage.run(config, _table(texts, by_concept, config.threshold))
    else:
        loading = {f.name for f in fields(LoadOptions)}
        for name in loading & settings.keys():
            raise ConfigError(f"{name}: expected it with a model's name, got it with one in memory; leave it out")
        subject = _in_memory(model, tokenizer)
        config = resolve(CollectConfig, {**given, "model": subject.source.name, "dtype": subject.source.dtype})
        stage.collect(config, subject, str(model.device), _table(texts, by_concept, config.threshold))
    return str(store)


@_takes(ScoreConfig)
def score(store: "str | Path | xr.DataTree", *, top: int = 10, **settings: Any) -> "pd.DataFrame":
    """Compute the statistics that a store lacks, of every neuron, out of core.

    `store` is the place that `collect` wrote to, or what `open_store` returned; `settings` are as for
    `aura-dist score`: `statistics`, `dask`, `num_workers`, `overwrite`, …

    Returns
    -------
    The `top` neurons of highest AUROC for each concept and pooling, best first: columns `concept`, `pooling` and those
    of `top_neurons`. Empty if AUROC is not among `statistics`. `open_store` shows all statistics of all neurons.

    Raises
    ------
    ConfigError, StoreError, ClusterError
        A setting or the store cannot be used, or workers cannot be kept.

    Examples
    --------
    >>> aura_dist.score("toxic.zarr", top=20)
    """
    import pandas as pd

    from aura_dist.scoring.tables import best_neurons, check_count, score_table
    from aura_dist.scoring.view import place_of
    from aura_dist.stages import score as stage

    check_count("top", top)
    group, spec, names = stage.score(resolve(ScoreConfig, {**settings, "store": place_of(store)}))
    tables = {
        (concept, pooling): best_neurons(score_table(group, spec, concept, pooling), top)
        for concept in spec.concepts
        for pooling in spec.poolings
        if "auroc" in names
    }
    if not tables:
        return pd.DataFrame()
    return pd.concat(tables, names=["concept", "pooling"]).reset_index([0, 1]).reset_index(drop=True)


@_takes(FitConfig, SequentialConfig)
def fit(
    store: "str | Path | xr.DataTree | None" = None, concept: str = "", method: str = "aura", **settings: Any
) -> "Intervention":
    """Turn a store's scores into an intervention: site → [D] float32 scale, and shift where the method moves neurons.

    `store` is as for `score`, and `method` and `settings` as for `aura-dist fit`: `pooling`, `modules`, `top_k`,
    `strength`, … The intervention is written only if `out` is given. With `sequential=True`, `model` and `data` take
    the store's place: each layer is fitted on responses under the maps of the layers before it.

    Raises
    ------
    ConfigError, InputError, ModelError, StoreError
        A setting, the concept, the model or the store cannot be used.

    Examples
    --------
    >>> with aura_dist.intervene(model, aura_dist.fit("toxic.zarr", "concept", "damp", top_k=100)):
    ...     model.generate(**prompt)
    >>> aura_dist.fit(concept="toxic", method="linear-act", sequential=True, model="gpt2", data="comments.csv")
    """
    from aura_dist.scoring.view import place_of

    if not isinstance(settings.get("model", ""), str):
        got = type(settings["model"]).__name__
        raise ConfigError(f"model: expected a name or a directory, because layers are read from its files, got {got}")
    given = {"out": "", **settings, "method": method, **({"concept": concept} if concept else {})}
    if store is not None:
        given["store"] = place_of(store)
    verb = VERBS["fit"].chosen(given)
    check_taken("fit", verb, given)
    fitted: Intervention = resolve_name(f"aura_dist.{verb.stage}").fit(resolve(verb.config, given))
    return fitted


def _plain(value: Any) -> Any:
    """A setting as msgspec takes it: paths as texts, NumPy's numbers as Python's, an array as a list."""
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    return str(value) if isinstance(value, Path) else value


def _table(texts: Sequence[str], labels: "Mapping[str, ArrayLike]", threshold: float | None) -> Table:
    """Texts and labels as the columns of a data file; its digest is over the texts and over what the labels mean."""
    if isinstance(texts, (str, Mapping)) or not isinstance(texts, Iterable) or hasattr(texts, "columns"):
        raise InputError(f"texts: expected a list of texts, got {type(texts).__name__}")
    columns: dict[str, list[Any]] = {TEXT: list(texts)}
    for concept, values in labels.items():
        array = as_array(values, f"labels of {concept!r}")
        if array.shape != (len(columns[TEXT]),) or concept == TEXT:
            raise InputError(
                f"labels: expected one value for each of {len(columns[TEXT])} texts, got shape {array.shape} for "
                f"{concept!r}"
            )
        columns[concept] = list(array)
    table = Table("texts", "", columns)
    content = json.dumps([check_texts(table, TEXT), list(labels)]).encode()
    label_NC = parse_labels(table, list(labels), threshold)
    return replace(table, sha256=hashlib.sha256(content + label_NC.tobytes()).hexdigest())


def _in_memory(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase | None") -> "InMemory":
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from aura_dist.models.in_memory import InMemory

    if not isinstance(model, PreTrainedModel):
        got = type(model).__name__
        raise ModelError(f"model: expected a name or a PreTrainedModel of transformers, got {got}; unwrap it")
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ConfigError(f"tokenizer: expected the tokenizer of the model in memory, got {type(tokenizer).__name__}")
    if (num_processes := place_from_environment().world_size) > 1:
        raise ConfigError(f"model: expected a name in a launch of {num_processes} processes, got one in memory")
    check_has_vocabulary(tokenizer, "model")
    return InMemory(model, tokenizer)
