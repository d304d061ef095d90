"""Continuations of prompts."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from aura_dist.errors import InputError, ModelError, brief
from aura_dist.model.sharding import check_positions, check_vocabulary


@dataclass(frozen=True)
class Decoding:
    """How continuations are drawn: `temperature` 0 is greedy, else nucleus sampling at `top_p`."""

    num_samples: int
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int


@torch.no_grad()
def continuations(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, how: Decoding) -> list[str]:
    """`how.num_samples` continuations of one prompt, without the prompt.

    The draw depends on the seed and the prompt alone, so that two models are compared on the same noise.

    Raises
    ------
    InputError
        The prompt has no tokens, or the tokenizer cannot take it.
    ModelError
        The logits are not finite, or the tokenizer is another model's.
    """
    try:
        encoded = tokenizer(prompt, return_tensors="pt").to(model.device)
    except Exception as error:  # its backend raises a bare Exception, and TypeError for a text that is no Unicode
        raise InputError(f"--prompt: the model's tokenizer cannot take {prompt!a}: {brief(error)}") from error
    if not encoded["input_ids"].numel():
        raise InputError(f"--prompt: expected a prompt with at least one token, got {prompt!r}")
    check_positions(
        model.config, encoded["input_ids"].shape[1] + how.max_new_tokens, "--max-new-tokens with the prompt"
    )
    check_vocabulary(model.config, int(encoded["input_ids"].max()))
    torch.manual_seed(how.seed)
    with _own_settings(model, tokenizer, how):
        output = model.generate(
            input_ids=encoded["input_ids"],
            attention_mask=encoded["attention_mask"],
            logits_processor=LogitsProcessorList([_Finite()]),
        )
    texts = tokenizer.batch_decode(output[:, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
    return [str(t) for t in texts] if how.temperature > 0 else [str(texts[0])] * how.num_samples


class _Finite(LogitsProcessor):  # type: ignore[misc]
    """Stops at logits that are NaN or infinite: greedy decoding would take them for a choice."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if scores.isnan().any() or scores.isposinf().any():
            raise ModelError(
                "the model's logits are NaN or infinite; check its weights, another --dtype, or a smaller --strength"
            )
        return scores


@contextmanager
def _own_settings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, how: Decoding) -> Iterator[None]:
    """Put `how` in the place of the checkpoint's generation settings: its penalties and cuts are not ours."""
    given = model.generation_config
    sampling = {"do_sample": True, "temperature": how.temperature, "top_p": how.top_p, "top_k": 0}
    num_ids = model.get_input_embeddings().num_embeddings
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None and i < num_ids), 0)
    model.generation_config = GenerationConfig(
        max_new_tokens=how.max_new_tokens,
        num_return_sequences=how.num_samples if how.temperature > 0 else 1,
        pad_token_id=pad,
        bos_token_id=given.bos_token_id,
        eos_token_id=given.eos_token_id,
        **(sampling if how.temperature > 0 else {"do_sample": False}),
    )
    try:
        yield
    finally:
        model.generation_config = given
