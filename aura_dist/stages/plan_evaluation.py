"""What an evaluation would take; no weights are read.

Left out are the scorer, sampling, loading and communication; zero-shot tasks, where there are any; and what a model
computes again at every step that has another state than keys and values.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import DynamicCache, PreTrainedModel

from aura_dist.config.verbs import EvaluateConfig
from aura_dist.evaluation.decoding import only_attention
from aura_dist.evaluation.perplexity import read_texts, tokenize_texts, tokens_at_once
from aura_dist.evaluation.prompts import Prefix, make_prefix, read_preprompt, read_prompts, tokenize_prompts
from aura_dist.evaluation.sampling import Decoding
from aura_dist.interventions.use import LoadedModel
from aura_dist.models.load import DTYPES, ModelSource, load_config, skeleton
from aura_dist.planning.evaluation_work import READ_RATE, LanguageModelCost, Step, continuing, reading
from aura_dist.planning.schedule import TFLOPS
from aura_dist.planning.sizes import prepare, weight_sizes
from aura_dist.planning.trace import forward_cost
from aura_dist.ranks.layout import parse_layout
from aura_dist.store.grid import make_batches
from aura_dist.text.tokens import load_tokenizer


@dataclass(frozen=True)
class EvaluationPlan:
    """What an evaluation would take.

    Attributes
    ----------
    seconds
        Of all ranks together: they share the continuations and the texts.
    flops
        Of all forwards.
    gpu
        Whether these are seconds of a GPU.
    left_out
        What is not in the figures, in words.
    """

    seconds: float
    flops: float
    gpu: bool
    left_out: str


def make_plan(config: EvaluateConfig, tflops: float | None = None, world_size: int = 1) -> EvaluationPlan:
    """The figures at `tflops` a rank, or at those of a usual one.

    Raises
    ------
    AuraError
        Inputs cannot be read, or the model's forward cannot be traced without its weights.
    """
    source = ModelSource(config.model, config.revision, config.dtype)
    tokenizer = load_tokenizer(source.name, source.revision)
    loaded = LoadedModel(skeleton(load_config(source)), tokenizer, "", None)
    prefix = None if config.preprompt is None else make_prefix(read_preprompt(config.preprompt), tokenizer)
    parse_layout(config.sharding, world_size)  # refuses what does not fit the ranks
    steps = [*_texts(config, loaded, prefix), *_prompts(config, loaded, prefix)]
    device = "cuda" if config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available()) else "cpu"
    rate = tflops or TFLOPS[device, DTYPES[config.dtype].itemsize]
    longest = max((step.num_new for step in steps), default=1)
    selects = only_attention(DynamicCache(config=loaded.model.config))
    cost = model_cost(loaded.model, config.dtype, longest)
    left_out = [*(["zero-shot tasks"] if config.tasks else []), *([] if selects else ["what has no cache"])]
    return EvaluationPlan(
        seconds=sum(cost.seconds(step, rate, READ_RATE[device]) for step in steps),
        flops=sum(map(cost.flops, steps)),
        gpu=device == "cuda",
        left_out=" and ".join(left_out),
    )


def model_cost(model: PreTrainedModel, dtype: str, longest: int) -> LanguageModelCost:
    """Of a model on the meta device, whose texts have at most `longest` tokens."""
    head = model.get_output_embeddings().weight
    prepare(model, model.config.get_text_config(decoder=True).num_hidden_layers, dtype)
    sizes = weight_sizes(model, {})
    read_bytes = sum(map(sum, sizes.layers)) + head.numel() * DTYPES[dtype].itemsize
    return LanguageModelCost(forward_cost(model, [], [], max(2, longest)), 2.0 * head.numel(), read_bytes)


def _texts(config: EvaluateConfig, loaded: LoadedModel, prefix: Prefix | None) -> Iterator[Step]:
    if not config.perplexity_texts:
        return
    file = read_texts(config.perplexity_texts, config.text_column, config.perplexity_labels)
    lengths = sorted(tokenize_texts(file, loaded, prefix, config.max_tokens).num_tokens.tolist())
    limit = tokens_at_once(loaded.model, config.tokens_per_batch)
    batches = make_batches(lengths, slice(0, len(lengths)), limit)
    yield from reading([(b.stop - b.start, lengths[b.stop - 1]) for b in batches])


def _prompts(config: EvaluateConfig, loaded: LoadedModel, prefix: Prefix | None) -> Iterator[Step]:
    if not config.toxicity_prompts:
        return
    how = Decoding(config.num_samples, config.max_new_tokens, config.temperature, config.top_p, config.seed)
    texts = read_prompts(config.toxicity_prompts, config.prompt_column, config.prompt_toxicity_column).texts
    prompts = tokenize_prompts(texts, loaded.tokenizer, loaded.model.config, how, prefix=prefix)
    pairs = [(prompt, sample) for prompt in range(len(texts)) for sample in range(how.num_samples)]
    batches = prompts.batches(pairs, config.continuations_per_batch)
    yield from continuing(
        ((len({p for p, _ in batch}), len(batch), len(prompts.ids[batch[0][0]])) for batch in batches),
        how.max_new_tokens,
    )
