"""plan: what `collect` would take, before anything is spent; the model's configuration is read, never its weights.

Data flow: rows and their token counts (from the data, or an upper bound) → the model on the meta device → sites,
weights, a traced forward → `planning/budget.py` → tables, or a refusal that names the largest setting that fits.

`sweep --dry-run` never imports torch, so it asks a process for the figures of its jobs:

    python -m aura_dist.stages.plan JOBS.json ANSWERS.jsonl

JOBS.json is a list of [stage, settings]: of `collect` with the settings of `plan`, or of `evaluate` with `tflops`
(null: a usual rank's); both with `world_size`. A line of JSON answers each job as soon as it is planned;
stdout and stderr are left to what libraries print.

    seconds        of all ranks together
    gpu            whether these are seconds of a GPU
    store_bytes    written by a collection
    store_files    files of the store, with its scores
    left_out       what the figures do not count, in words
    refused        why it cannot be planned, or does not fit; the figures are there if they are known
"""

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PretrainedConfig

from aura_dist.config.file import merge
from aura_dist.config.settings import resolve
from aura_dist.config.verbs import EvaluateConfig, PlanConfig
from aura_dist.errors import AuraError, BudgetError, ConfigError, brief
from aura_dist.evaluation.decoding import takes_padding
from aura_dist.evaluation.perplexity import read_texts, tokenize_texts, tokens_at_once
from aura_dist.evaluation.prompts import (
    Prefix,
    chat_of_prompts,
    make_prefix,
    read_preprompt,
    read_prompts,
    tokenize_prompts,
)
from aura_dist.evaluation.sampling import Decoding
from aura_dist.interventions.use import LoadedModel
from aura_dist.models.load import load_config, skeleton, source_of, tokenizer_of
from aura_dist.models.quantization import check_held
from aura_dist.models.strategies.strategy import Spread
from aura_dist.models.strategies.table import sharding_of
from aura_dist.planning.budget import with_largest_batch
from aura_dist.planning.disk import bytes_at, shortage_of_disk
from aura_dist.planning.estimate import collection_report, estimate, estimate_evaluation
from aura_dist.planning.seconds import EvaluationPlan, Rates, Step, continuing
from aura_dist.planning.text import Report, refusal, render
from aura_dist.planning.work import Machine
from aura_dist.ranks.device import wants_gpu
from aura_dist.store.grid import make_batches
from aura_dist.text.selection import Selection, select
from aura_dist.text.table import read_table
from aura_dist.units import parse_bytes

MAX_RANKS_PER_HOST = 8


def run(config: PlanConfig) -> None:
    """Print the plan; BudgetError if it does not fit."""
    report, refused = make_plan(config)
    print(json.dumps(asdict(report), indent=2) if config.json else render(report))
    sys.stdout.flush()
    if refused:
        raise BudgetError(refused)


def make_plan(config: PlanConfig) -> tuple[Report, str]:
    """All figures, and why they do not fit: one line, empty if they do."""
    sharding, machine = sharding_of(config), make_machine(config)
    spread = Spread(sharding.layout(config.world_size), sharding.options)
    source = source_of(config)
    model_config = load_config(source)
    check_held(source, model_config, sharding.strategy.name)
    num_tokens, shortest, origin = find_rows(config, model_config)
    found = estimate(
        source,
        model_config,
        config.modules,
        config.pooling,
        num_tokens,
        config.task_tokens,
        keep_tokens=config.keep_tokens,
        shortest=shortest,
        data_bytes=Path(config.data).stat().st_size if config.data and Path(config.data).is_file() else 0,
        gpu=machine.gpu,
        tensor_ranks=spread.layout.tensor,
        plan_file=config.tensor_plan,
    )
    keeps = bool(found.token_sites)  # their batches are the store's
    if config.tokens_per_batch is None and not keeps and sharding.strategy.reads_every_batch(sharding.options):
        found = replace(found, work=with_largest_batch(found.work, spread, machine))
    report = collection_report(
        found, origin, spread, machine, config.tflops, _rates(config), first_tokens=not config.skip_first_tokens
    )
    if config.unlabelled:  # no gate is fitted from texts without labels alone
        report = replace(report, gate_bytes={})
    refused = refusal(report, config.device_memory, config.host_memory)
    if config.store and not refused:
        refused = shortage_of_disk(config.store, report.store, bytes_at(config.store))
    return report, refused


def _rates(config: PlanConfig) -> Rates:
    """Bytes a second of disk and copies, as given."""
    given = {"copy": config.copy_rate, "disk": config.disk_rate}
    return Rates(
        **{name: parse_bytes(size, f"--{name}-rate", "2GB") for name, size in given.items() if size is not None}
    )


def make_machine(config: PlanConfig) -> Machine:
    """Where the ranks would run: on a GPU if `--device` means one or its memory is given."""
    device = None if config.device_memory is None else parse_bytes(config.device_memory, "--device-memory")
    host = None if config.host_memory is None else parse_bytes(config.host_memory, "--host-memory")
    if config.device == "cpu" and device is not None:
        raise ConfigError("--device-memory: expected with a GPU, got --device cpu; use --host-memory")
    ranks = config.ranks_per_host or min(config.world_size, MAX_RANKS_PER_HOST)
    if ranks > config.world_size:
        raise ConfigError(f"--ranks-per-host: expected at most --world-size {config.world_size}, got {ranks}")
    return Machine(device is not None or wants_gpu(config.device), device, host, ranks)


def find_rows(config: PlanConfig, model_config: PretrainedConfig) -> tuple[NDArray[np.int32], int, str]:
    """Token counts of the rows that would be run, ascending, a lower bound of them, and where they come from.

    They are the rows of the data if these can be read, otherwise as many as are asked for, of the largest length.
    AuraError if the data cannot be read and no numbers of rows are given.
    """
    asked = (config.num_positive or 0) + (config.num_negative or 0)
    reason = "no --data"
    if config.data:
        try:
            num_tokens = _sampled(config)
            return num_tokens, int(num_tokens[0]), f"{config.data}, tokenized and sampled"
        except AuraError as error:
            if not asked:
                raise
            reason = str(error)
    if not asked:
        raise ConfigError("expected --data, or --num-positive and --num-negative to say how many rows, got neither")
    positions = getattr(model_config.get_text_config(decoder=True), "max_position_embeddings", None)
    longest = min(config.max_tokens, positions or config.max_tokens)
    return np.full(asked, longest, dtype=np.int32), 1, f"upper bound: every row with {longest} tokens ({reason})"


def _sampled(config: PlanConfig) -> NDArray[np.int32]:
    """Token counts, ascending, of the rows that `collect` would run; without concepts, of as many of the longest."""
    which = Selection.of(config)
    table = read_table(config.data, which.columns, split=config.split)
    _, _, tokens = select(table, which, lambda: tokenizer_of(source_of(config)))
    asked = (config.num_positive or 0) + (config.num_negative or 0)
    return tokens.num_tokens if config.concepts else tokens.num_tokens[-asked:]


def plan_evaluation(config: EvaluateConfig, tflops: float | None = None, world_size: int = 1) -> EvaluationPlan:
    """What `evaluate` would take at `tflops` a rank, by default a usual rank's.

    AuraError if inputs cannot be read, or the model's forward cannot be traced without its weights.
    """
    source = source_of(config)
    sharding_of(config).layout(world_size)  # refuses what does not fit the ranks
    tokenizer = tokenizer_of(source)
    loaded = LoadedModel(skeleton(load_config(source), source), tokenizer, "", None)
    prefix = None if config.preprompt is None else make_prefix(read_preprompt(config.preprompt), tokenizer)
    steps = [*_text_steps(config, loaded, prefix), *_prompt_steps(config, loaded, prefix)]
    left_out = ["zero-shot tasks"] if config.tasks else []
    gpu = wants_gpu(config.device)
    return estimate_evaluation(loaded.model, config.dtype, steps, tflops, gpu=gpu, left_out=left_out)


def _text_steps(config: EvaluateConfig, loaded: LoadedModel, prefix: Prefix | None) -> Iterator[Step]:
    if not config.perplexity_texts:
        return
    file = read_texts(config.perplexity_texts, config.text_column, config.perplexity_labels)
    tokens = tokenize_texts(file, loaded.tokenizer, loaded.model.config, prefix, config.max_tokens)
    lengths = sorted(tokens.num_tokens.tolist())
    limit = tokens_at_once(loaded.model, config.tokens_per_batch)
    batches = make_batches(lengths, slice(0, len(lengths)), limit)
    for batch in batches:
        rows, length = batch.stop - batch.start, lengths[batch.stop - 1]
        yield Step(rows, length, 0, rows * length)


def _prompt_steps(config: EvaluateConfig, loaded: LoadedModel, prefix: Prefix | None) -> Iterator[Step]:
    if not config.toxicity_prompts:
        return
    how = Decoding(config.num_samples, config.max_new_tokens, config.temperature, config.top_p, config.seed)
    texts = read_prompts(config.toxicity_prompts, config.prompt_column, config.prompt_toxicity_column).texts
    preprompt = None if config.preprompt is None else read_preprompt(config.preprompt)
    chat = chat_of_prompts(loaded.tokenizer, preprompt) if config.chat else None
    prompts = tokenize_prompts(texts, loaded.tokenizer, loaded.model.config, how, prefix=prefix, chat=chat)
    pairs = [(prompt, sample) for prompt in range(len(texts)) for sample in range(how.num_samples)]
    batches = prompts.batches(pairs, config.continuations_per_batch, padded=takes_padding(loaded.model))
    yield from continuing(
        ((len({p for p, _ in batch}), len(batch), len(prompts.ids[batch[0][0]])) for batch in batches),
        how.max_new_tokens,
    )


def answer(stage: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of one job."""
    try:
        return _ANSWERS[stage](settings)
    except AuraError as error:
        return {"refused": " ".join(str(error).split())}
    except Exception as error:  # a fault of ours or of a model's code must not keep the other jobs from an answer
        return {"refused": f"{type(error).__name__}: {brief(error)}"}


def _collection(settings: Mapping[str, Any]) -> dict[str, Any]:
    config = resolve(PlanConfig, merge("plan", dict(settings), {}))
    report, refused = make_plan(config)
    return {
        "seconds": config.world_size * (report.compute_seconds + report.stream_seconds),
        "gpu": report.machine.gpu,
        "store_bytes": int(report.store.compressed_bytes),
        "store_files": report.store.num_files + report.store.score_files,
        "refused": refused,
    }


def _evaluation(settings: Mapping[str, Any]) -> dict[str, Any]:
    own = {name: value for name, value in settings.items() if name not in ("tflops", "world_size")}
    config = resolve(EvaluateConfig, {**own, "out": "none.json"})
    found = plan_evaluation(config, settings.get("tflops"), settings.get("world_size", 1))
    return {"seconds": found.seconds, "gpu": found.gpu, "left_out": found.left_out}


_ANSWERS = {"collect": _collection, "evaluate": _evaluation}


def main(asked: str, answers: str) -> None:
    """Answer the file `asked` into the file `answers`."""
    with open(answers, "w", encoding="utf-8") as file:
        for stage, settings in json.loads(Path(asked).read_text(encoding="utf-8")):
            print(json.dumps(answer(stage, settings)), file=file, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
