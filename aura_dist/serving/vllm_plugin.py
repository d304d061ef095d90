"""vLLM's plugin: `AURA_INTERVENTION=DIR[@STRENGTH] vllm serve MODEL` serves the model under an intervention.

vLLM calls `register` in each of its processes: those that answer requests, and the workers that hold the model. Names
of vLLM that are not its interface are used here alone. Seen with vLLM 0.32.
"""

import logging
import os
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aura_dist.errors import AuraError, ConfigError, ModelError, StoreError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from aura_dist.interventions.artifact import Intervention
    from aura_dist.serving.strengths import Strengths

VARIABLE = "AURA_INTERVENTION"
_CACHE_KEY = "aura_dist_maps"
logger = logging.getLogger("vllm.aura_dist")  # below vLLM's own, so that its log shows it

_registered = False


def register() -> None:
    """Lay the intervention that the environment names over the model that this process will load, if it loads one.

    Nothing changes where the variable is not set. The process ends with one line if it names no intervention: vLLM
    would only log an error, and serve the plain model.
    """
    global _registered
    given = os.environ.get(VARIABLE)
    if not given or _registered:
        return
    try:
        intervention, strength = chosen(given)
    except AuraError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    _patch(intervention, strength)
    _patch_requests(intervention, strength)
    _registered = True


def chosen(given: str) -> "tuple[Intervention, float]":
    """What `DIR[@STRENGTH]` names; ConfigError for a strength that is none, StoreError without an intervention."""
    from aura_dist.interventions.artifact import Intervention
    from aura_dist.serving.strengths import checked_strength

    directory, strength = given, 1.0
    before, at, after = given.rpartition("@")
    if at and not Path(given).is_dir():
        directory = before
        number: object = after
        with suppress(ValueError):
            number = float(after)
        strength = checked_strength(number, f"{VARIABLE}={given}: expected DIR@STRENGTH with one strength")
    if not Path(directory).is_dir():
        before, at, after = directory.rpartition("@")
        if at and Path(before).is_dir():
            raise ConfigError(f"{VARIABLE}={given}: expected DIR@STRENGTH with one strength, got {after!r} too")
        raise StoreError(f"{VARIABLE}={given}: expected a directory that `fit` wrote, found none at {directory!r}")
    return Intervention.load(directory), strength


def _patch(intervention: "Intervention", strength: float) -> None:
    """Have vLLM's loader, worker and runners call us."""
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader
    from vllm.v1.worker.gpu_worker import Worker

    from aura_dist.serving.strengths import Strengths

    laid: list[Any] = []
    strengths: list[Strengths] = []  # of the model, once it is made
    create, load, warm_up = BaseModelLoader.create_model, Worker.load_model, Worker.compile_or_warm_up_model

    @wraps(create)
    def create_model(self: Any, vllm_config: Any, model_config: Any, prefix: str = "") -> Any:
        model = create(self, vllm_config, model_config, prefix)
        if model_config is vllm_config.model_config:  # not the draft of a speculative one
            _check_not_folded(model_config, intervention)
            of_requests = one_strength_because(vllm_config, intervention) is None
            _keep_compiled_apart(vllm_config, intervention, "requests" if of_requests else strength)
            # vLLM has the model's device as default here
            num_tokens = vllm_config.scheduler_config.max_num_batched_tokens if of_requests else 1
            strengths[:] = [Strengths(strength, num_tokens)]
            laid.append(_loading(model, vllm_config, intervention, strengths[0]))
        return model

    @wraps(load)
    def load_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = load(self, *args, **kwargs)
        if not any(one.done for one in laid):
            raise ModelError(
                f"{VARIABLE}: expected weights that vLLM reads from a checkpoint's tensors, got --load-format "
                f"{self.vllm_config.load_config.load_format}; serve it with --load-format auto, or what `export` writes"
            )
        return result

    def check(vllm_config: Any) -> None:
        compiled = bool(vllm_config.compilation_config.mode)
        checked = _checked(vllm_config)
        for one in laid:
            one.check_called(checked_before=compiled and checked.exists())
        if compiled:
            with suppress(OSError):  # then nothing else is kept there either
                checked.parent.mkdir(parents=True, exist_ok=True)
                checked.touch()

    @wraps(warm_up)
    def compile_or_warm_up_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = warm_up(self, *args, **kwargs)
        if any(one.called for one in laid):
            check(self.vllm_config)
        return result

    BaseModelLoader.create_model, Worker.load_model = create_model, load_model
    Worker.compile_or_warm_up_model = compile_or_warm_up_model
    _patch_runners(strengths, check)


def _checked(vllm_config: Any) -> Path:
    """The file that says that a start has called all maps of what this configuration compiles, on this rank."""
    from vllm import envs

    name = f"{vllm_config.compute_hash()}-{vllm_config.parallel_config.rank}"
    return Path(envs.VLLM_CACHE_ROOT) / "aura_dist" / name


def one_strength_because(vllm_config: Any, intervention: "Intervention") -> str | None:
    """Why requests cannot have strengths of their own; None if they can."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    cut = [parallel.use_ubatching, parallel.use_sequence_parallel_moe, parallel.prefill_context_parallel_size > 1]
    reasons = {
        "maps of experts are in the weights": any(name.endswith(".experts") for name in intervention.sites),
        "drafts are decoded speculatively": vllm_config.speculative_config is not None,
        "forwards are cut into parts": any(cut),
        "modules see tokens in other orders": (
            model.has_inner_state or model.use_mla or vllm_config.cache_config.kv_sharing_fast_prefill
        ),
        "keys and values of other servers are read": (
            vllm_config.kv_transfer_config is not None or vllm_config.ec_transfer_config is not None
        ),
        "the model runs on vLLM's transformers backend": model.using_transformers_backend(),
        "requests do not come through Python": os.environ.get("VLLM_USE_RUST_FRONTEND", "0") not in ("", "0"),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _patch_requests(intervention: "Intervention", strength: float) -> None:
    """Have the server state what is laid, check the strengths that requests ask for, and keep their prefixes apart."""
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.input_processor import InputProcessor

    from aura_dist.interventions.statement import ASKED
    from aura_dist.serving.strengths import checked_strength

    begin, process = InputProcessor.__init__, InputProcessor.process_inputs

    def own_strength(given: Any, because: str | None) -> float:
        """The strength of a request with these `vllm_xargs`; ConfigError, for status 400, if it cannot have it."""
        if others := [key for key in given or {} if key.startswith("aura_") and key != ASKED]:
            raise ConfigError(f"vllm_xargs: expected {ASKED}, got {others[0]!r}")
        if ASKED not in (given or {}):
            return strength
        own = checked_strength(given[ASKED], f"{ASKED}: expected a number")
        if because is not None:
            raise ConfigError(
                f"{ASKED}: expected requests without it, because {because}; start a server with {VARIABLE}=DIR@{own:g}"
            )
        return own

    @wraps(begin)
    def init(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        begin(self, vllm_config, *args, **kwargs)
        self.aura_dist_because = one_strength_because(vllm_config, intervention)
        _state(intervention, strength, of_requests=self.aura_dist_because is None)
        _patch_beams()

    @wraps(process)
    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = process(self, *args, **kwargs)
        because = self.aura_dist_because
        try:
            own = own_strength(getattr(request.sampling_params, "extra_args", None), because)
        except ConfigError as error:
            raise VLLMValidationError(str(error)) from error
        if because is None:  # of all requests, so that no salt of a client's is another's strength
            request.cache_salt = f"{request.cache_salt or ''}{ASKED}={own!r}"
        return request

    InputProcessor.__init__, InputProcessor.process_inputs = init, process_inputs


@cache
def _patch_beams() -> None:
    """Refuse strengths of requests for beam search, which vLLM makes without their `vllm_xargs`."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.exceptions import VLLMValidationError

    from aura_dist.interventions.statement import ASKED

    for kind in (ChatCompletionRequest, CompletionRequest):
        make = kind.to_beam_search_params

        @wraps(make)
        def made(self: Any, *args: Any, make: Any = make, **kwargs: Any) -> Any:
            if ASKED in (self.vllm_xargs or {}):
                raise VLLMValidationError(f"{ASKED}: expected it without beam search; leave one of the two out")
            return make(self, *args, **kwargs)

        kind.to_beam_search_params = made


@cache
def _gauge() -> Any:
    from prometheus_client import Gauge

    from aura_dist.interventions.statement import LABELS, METRIC

    return Gauge(METRIC, "The intervention that is laid over the model", LABELS, multiprocess_mode="mostrecent")


def _state(intervention: "Intervention", strength: float, *, of_requests: bool) -> None:
    """Among the metrics of the server, so that its clients can check what they were promised."""
    from aura_dist.interventions.statement import Statement

    statement = Statement(intervention.digest, strength, len(intervention.sites), of_requests)
    _gauge().labels(**statement.labels).set(1)


def _patch_runners(strengths: "list[Strengths]", check: Callable[[Any], None]) -> None:
    """Have both of vLLM's runners say what they run, and in which order a forward has its tokens."""
    from vllm.v1.worker import gpu_model_runner as first

    unchecked = True

    def told(runner: Any, prepares: str, order: Callable[..., Any]) -> None:
        execute, prepare = runner.execute_model, getattr(runner, prepares)

        @wraps(execute)
        def execute_model(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal unchecked
            if kwargs.get("dummy_run") or not strengths:
                return execute(self, scheduler_output, *args, **kwargs)
            strengths[0].follow(scheduler_output)
            result = execute(self, scheduler_output, *args, **kwargs)
            strengths[0].check_written()
            if unchecked and scheduler_output.total_num_scheduled_tokens:
                check(self.vllm_config)
                unchecked = False
            return result

        @wraps(prepare)
        def prepared(self: Any, *args: Any, **kwargs: Any) -> Any:
            if strengths:
                strengths[0].write(*order(self, *args, **kwargs))
            return prepare(self, *args, **kwargs)

        runner.execute_model = execute_model
        setattr(runner, prepares, prepared)

    told(first.GPUModelRunner, "_prepare_inputs", lambda self, _, num_tokens: (self.input_batch.req_ids, num_tokens))
    with suppress(ImportError):  # it needs Triton
        from vllm.v1.worker.gpu import model_runner as second

        told(
            second.GPUModelRunner, "prepare_inputs",
            lambda self, _, batch, *more, **named: (batch.req_ids, batch.num_scheduled_tokens),
        )  # fmt: skip


def _loading(model: "nn.Module", vllm_config: Any, intervention: "Intervention", strengths: "Strengths") -> Any:
    """Have the model lay the maps once it has read its weights."""
    from vllm.distributed import (
        get_pp_group,
        get_tensor_model_parallel_rank,
        get_tensor_model_parallel_world_size,
        tensor_model_parallel_all_reduce,
    )
    from vllm.model_executor.layers.attention.mla_attention import MLAAttention
    from vllm.model_executor.layers.linear import LinearBase, RowParallelLinear

    from aura_dist.serving.laying import Laying, Ranks

    def partial(module: "nn.Module") -> bool:
        return isinstance(module, RowParallelLinear) and not module.reduce_results

    def takes_weights(module: "nn.Module") -> bool:
        return any(isinstance(one, MLAAttention) and one.kv_b_proj is module for one in model.modules())

    parallel = vllm_config.parallel_config
    reads_share = parallel.enable_expert_parallel and getattr(parallel, "enable_ep_weight_filter", False)
    num_experts = (vllm_config.model_config.get_num_experts() or None) if reads_share else None
    ranks = Ranks(
        get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size(), tensor_model_parallel_all_reduce,
        whole_model=get_pp_group().world_size == 1, partial=partial, is_linear=lambda m: isinstance(m, LinearBase),
        takes_weights=takes_weights, num_experts=num_experts,
    )  # fmt: skip
    laying = Laying(model, intervention, strengths, ranks)
    original: Callable[..., Any] = model.load_weights  # type: ignore[assignment]

    def load_weights(weights: "Iterable[tuple[str, Tensor]]", *args: Any, **kwargs: Any) -> Any:
        loaded = original(laying.watched(weights, original), *args, **kwargs)
        logger.info("aura_dist: %s", laying.lay())
        return loaded

    model.load_weights = load_weights  # type: ignore[assignment]
    return laying


def _check_not_folded(model_config: Any, intervention: "Intervention") -> None:
    """ModelError if `export` has folded the intervention into the served weights."""
    from aura_dist.models.fingerprints import FOLDED

    for record in getattr(model_config.hf_text_config, FOLDED, None) or []:
        if isinstance(record, dict) and record.get("digest") == intervention.digest:
            raise ModelError(
                f"{VARIABLE}: expected a model without the intervention, got {model_config.model!r}, whose weights "
                f"carry it: export folded it in at strength {record.get('strength')}; unset the variable"
            )


def _keep_compiled_apart(vllm_config: Any, intervention: "Intervention", strength: object) -> None:
    """Make the maps a part of the key of vLLM's cache, which might else return what was compiled of the plain model."""
    own = {_CACHE_KEY: f"{intervention.digest}@{strength}"}
    if not isinstance(vllm_config.additional_config, dict):
        raise ConfigError(
            f"{VARIABLE}: expected --additional-config to be a dictionary, got another object; leave it out"
        )
    vllm_config.additional_config = {**vllm_config.additional_config, **own}
