"""Continuations of prompts, over all ranks of a launch or on one alone.

Batches of prompts are claimed, as tasks of a collection are. Each continuation is a function of the model, the prompt
and the noise of (seed, prompt, sample, step): which rank makes it, in which batch and when, does not matter. Ranks
whose forwards are collective take each step together; one that has no batch left runs along and drops its result.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from aura_dist.evaluation.decoding import Decoder, Rows, takes_padding
from aura_dist.evaluation.prompts import Pair, TokenizedPrompts
from aura_dist.evaluation.sampling import Decoding, sample_key
from aura_dist.interventions.use import LoadedModel
from aura_dist.ranks.progress import Progress
from aura_dist.ranks.signals import StopFlag
from aura_dist.ranks.team import Team

ROWS_PER_BATCH = 128
# batches that each row worker finds at least, if there are enough pairs, so that all end at about the same time
_BATCHES_PER_WORKER = 4
# batches that are claimed for the rows of one forward
_PARTS = 4


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
    """Make this rank's share of the continuations `pairs`; return once all ranks of the replica have none left.

    Parameters
    ----------
    pairs
        (index of the prompt, number of the sample) of each continuation, alike on all ranks.
    rows_per_batch
        Largest number of continuations in one forward.
    write
        Takes the continuations of one batch: `prompt`, `sample`, `text`, `num_tokens`, `ids`. They stay if a signal, a
        failed rank, or logits that are NaN or infinite end the work.
    """
    workers = team.world.layout.num_row_workers
    share = ceil(len(pairs) / (_BATCHES_PER_WORKER * workers)) if workers > 1 else rows_per_batch
    decoder = _decoder(loaded.model, loaded.tokenizer, how, team)
    progress = Progress("generate", len(pairs), len(pairs), "continuations", "continuations")

    def keep(batch: Sequence[Pair], made: Sequence[list[int]]) -> None:
        if team.world.column_rank == 0:
            write(_records(batch, made, loaded.tokenizer))
            progress.reach(*[team.add("continuations", len(made))] * 2)

    work = _Work(decoder, prompts, pairs, max(1, min(rows_per_batch, share)), team, stop, keep)
    if takes_padding(loaded.model) and team.world.layout.replica_size == 1:
        work.stream()
    else:
        work.in_batches()
    if team.world.is_first:
        progress.reach(*[team.add("continuations", 0)] * 2)
        progress.finish()


@dataclass(frozen=True)
class _Work:
    """Continuations that the ranks share, at most `at_once` in one forward; `keep` takes pairs and the ids made."""

    decoder: Decoder
    prompts: TokenizedPrompts
    pairs: Sequence[Pair]
    at_once: int
    team: Team
    stop: StopFlag
    keep: Callable[[Sequence[Pair], Sequence[list[int]]], None]

    def in_batches(self) -> None:
        """Batch by batch, all ranks of the replica together."""
        longest = self.decoder.how.max_new_tokens
        batches = self.prompts.batches(self.pairs, self.at_once, padded=takes_padding(self.decoder.model))
        batches.sort(key=lambda batch: -len(batch) * (len(self.prompts.ids[batch[0][0]]) + longest))
        for turn in self.team.claimed("continuations", batches, lambda: self.stop.received):
            if turn is None:
                self.decoder.run(_rows(self.prompts, [batches[0][0]]), counts=False)
            else:
                self.keep(turn[0], self.decoder.run(_rows(self.prompts, turn[0])))

    def stream(self) -> None:
        """Claim small batches, as many as fit, and more of them as soon as there is room."""
        size = ceil(self.at_once / _PARTS)
        batches = self.prompts.batches(self.pairs, size, padded=True)
        given: list[Pair] = []  # to the run of the decoder that is under way
        held: list[list[Pair]] = []  # claimed, but of another length than what was taken

        def take(room: int) -> Rows | None:
            self.team.keep_step(self.stop.received)
            taken: list[Pair] = []
            while len(taken) + size <= room:
                batch = held.pop() if held else self.team.claim("continuations", batches)
                if batch is None:
                    break
                if taken and not self.prompts.are_similar([*taken, *batch]):
                    held.append(batch)
                    break
                taken += batch
            given.extend(taken)
            return _rows(self.prompts, taken) if taken else None

        def put(made: dict[int, list[int]]) -> None:
            self.keep([given[number] for number in made], list(made.values()))

        while (first := take(self.at_once)) is not None:
            self.decoder.run(first, most=self.at_once, more=take, put=put)
            given.clear()  # a run ends when nothing that is left would fit beside its last rows
        self.team.meet("claimed/continuations", lambda: self.stop.received)


def continue_alike(
    loaded: LoadedModel, prompts: TokenizedPrompts, how: Decoding, team: Team | None = None
) -> list[list[str]]:
    """Continuations of each of a few prompts, on every rank alike; ModelError if logits are NaN or infinite."""
    decoder = _decoder(loaded.model, loaded.tokenizer, how, team or Team.alone())
    samples = range(how.num_samples if how.temperature > 0 else 1)
    texts: dict[Pair, str] = {}
    pairs = [(p, s) for p in range(len(prompts.ids)) for s in samples]
    for batch in prompts.batches(pairs, ROWS_PER_BATCH, padded=takes_padding(loaded.model)):
        for pair, ids in zip(batch, decoder.run(_rows(prompts, batch)), strict=True):
            texts[pair] = str(loaded.tokenizer.decode(ids, skip_special_tokens=True))
    greedy = how.temperature == 0
    return [[texts[p, 0 if greedy else s] for s in range(how.num_samples)] for p in range(len(prompts.ids))]


def _decoder(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, how: Decoding, team: Team) -> Decoder:
    def any_alive(alive: bool) -> bool:
        return any(team.share(int(alive)))

    return Decoder(model, how, stop_ids(model, tokenizer), any_alive, team.agreed)


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids that end a text, as the checkpoint says, else as the tokenizer does."""
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
