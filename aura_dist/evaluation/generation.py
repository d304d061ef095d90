"""Continuations of prompts, over all ranks of a launch or on one alone.

Batches of prompts are claimed, as tasks of a collection are, and each continuation is a function of the model, the
prompt and the noise of (seed, prompt, sample, step): who makes it, in which batch and when, does not matter. Ranks
whose forwards are collective take each step together; one that is out of batches runs along, its result dropped.
"""

from collections.abc import Callable, Sequence
from math import ceil

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from aura_dist.evaluation.decoding import Decoder, Rows
from aura_dist.evaluation.noise import sample_key
from aura_dist.evaluation.prompts import Pair, TokenizedPrompts, tokenize_prompts
from aura_dist.evaluation.sampling import Decoding
from aura_dist.interventions.use import LoadedModel
from aura_dist.ranks.progress import Progress
from aura_dist.ranks.signals import StopFlag
from aura_dist.ranks.team import Team

ROWS_PER_BATCH = 128
# batches that each row worker finds at least, where there is so much work: the last ones end together
_BATCHES_PER_WORKER = 4


def generate(
    loaded: LoadedModel,
    prompts: TokenizedPrompts,
    pairs: Sequence[Pair],
    how: Decoding,
    rows_per_batch: int,
    team: Team,
    stop: StopFlag,
    write: Callable[[list[dict[str, object]]], None],
) -> None:
    """Make this rank's share of the continuations `pairs`; returns once all ranks of the replica have none left.

    Parameters
    ----------
    loaded, prompts, how
        What is continued, and how.
    pairs
        (index of the prompt, number of the sample) of what is to be made, alike on all ranks.
    rows_per_batch
        Largest number of continuations in one forward.
    team, stop
        The other ranks, and the signals received.
    write
        Takes the continuations of one batch: `prompt`, `sample`, `text`, `num_tokens`, `ids`.

    Raises
    ------
    RunInterruptedError
        A signal came; batches that were written stay.
    PeerError
        Another rank failed.
    ModelError
        Logits are NaN or infinite.
    """
    workers = team.world.layout.num_row_workers
    share = ceil(len(pairs) / (_BATCHES_PER_WORKER * workers)) if workers > 1 else rows_per_batch
    batches = prompts.batches(pairs, max(1, min(rows_per_batch, share)))
    batches.sort(key=lambda batch: -len(batch) * (len(prompts.ids[batch[0][0]]) + how.max_new_tokens))
    decoder = _decoder(loaded.model, loaded.tokenizer, how, team)
    progress = Progress("generate", len(pairs), len(pairs), "continuations", "continuations")
    while claims := team.claim("continued", len(batches)):
        team.keep_step(stop.received)
        mine = claims[team.world.rank // team.world.layout.tensor]
        if mine is None:
            decoder.run(_rows(prompts, [batches[0][0]]), counts=False)
            continue
        made = decoder.run(_rows(prompts, batches[mine]))
        if team.world.column_rank == 0:
            write(_records(batches[mine], made, loaded.tokenizer))
            progress.reach(*[team.add("continuations", len(made))] * 2)
    team.meet("generated", lambda: stop.received)
    if team.world.is_first:
        progress.reach(*[team.add("continuations", 0)] * 2)
        progress.finish()


def continue_alike(
    loaded: LoadedModel, prompts: TokenizedPrompts, how: Decoding, team: Team | None = None
) -> list[list[str]]:
    """Continuations of each prompt, made by every rank alike; for few prompts.

    Raises
    ------
    ModelError
        Logits are NaN or infinite.
    """
    decoder = _decoder(loaded.model, loaded.tokenizer, how, team)
    samples = range(how.num_samples if how.temperature > 0 else 1)
    texts: dict[Pair, str] = {}
    for batch in prompts.batches([(p, s) for p in range(len(prompts.ids)) for s in samples], ROWS_PER_BATCH):
        for pair, ids in zip(batch, decoder.run(_rows(prompts, batch)), strict=True):
            texts[pair] = str(loaded.tokenizer.decode(ids, skip_special_tokens=True))
    greedy = how.temperature == 0
    return [[texts[p, 0 if greedy else s] for s in range(how.num_samples)] for p in range(len(prompts.ids))]


def continuations(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, how: Decoding) -> list[str]:
    """`how.num_samples` continuations of one prompt by one process, without the prompt.

    Raises
    ------
    InputError
        The prompt has no tokens, or the tokenizer cannot take it.
    ModelError
        The logits are not finite, or the tokenizer is another model's.
    """
    prompts = tokenize_prompts([prompt], tokenizer, model.config, how)
    return continue_alike(LoadedModel(model, tokenizer, "", None), prompts, how)[0]


def _decoder(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, how: Decoding, team: Team | None) -> Decoder:
    stop_ids = _stop_ids(model, tokenizer)
    if team is None:
        return Decoder(model, how, stop_ids)

    def any_alive(alive: bool) -> bool:
        return any(numbers[0] for numbers in team.share(int(alive)))

    return Decoder(model, how, stop_ids, any_alive, team.agreed)


def _stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """What ends a text: the checkpoint's word, else the tokenizer's."""
    given = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids = given if isinstance(given, list) else [tokenizer.eos_token_id if given is None else given]
    return frozenset(int(i) for i in ids if i is not None)


def _rows(prompts: TokenizedPrompts, batch: Sequence[Pair]) -> Rows:
    indices = sorted({prompt for prompt, _ in batch})
    place = {prompt: p for p, prompt in enumerate(indices)}
    return Rows(
        [prompts.ids[prompt] for prompt in indices],
        [place[prompt] for prompt, _ in batch],
        [sample_key(prompts.keys[prompt], sample) for prompt, sample in batch],
    )


def _records(
    batch: Sequence[Pair], made: Sequence[list[int]], tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, object]]:
    return [
        {
            "prompt": prompt,
            "sample": sample,
            "text": str(tokenizer.decode(ids, skip_special_tokens=True)),
            "num_tokens": len(ids),
            "ids": ids,
        }
        for (prompt, sample), ids in zip(batch, made, strict=True)
    ]
