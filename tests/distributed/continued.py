"""Continuations of two runs, compared: where they part, the two choices were nearly tied."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from aura_dist.evaluation.sampling import Decoding, noisy_candidates, prompt_keys, sample_key
from aura_dist.models.strategies.table import parse_sharding
from aura_dist.ranks.launch import start_team

NEAR = 1e-4


def read(results: Path) -> dict[tuple[int, int], dict]:
    """(prompt, sample) → what the file beside these results says of it."""
    lines = results.with_name(f"{results.stem}.continuations.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    found = {(r["prompt"], r["sample"]): r for r in records}
    assert len(found) == len(records), "a continuation stands there twice"
    return found


def parting(mine: list[int], theirs: list[int], stop_id: int) -> tuple[int, int, int] | None:
    """Where two continuations part: the step, and the two ids; None where they are the same."""
    ends = [*mine, stop_id], [*theirs, stop_id]
    return next(((t, a, b) for t, (a, b) in enumerate(zip(*ends, strict=False)) if a != b), None)


@torch.no_grad()
def gap(model: PreTrainedModel, ids: list[int], key: int, step: int, pair: tuple[int, int], how: Decoding) -> float:
    """How far apart the noisy logits of two ids are; infinite where one of them is not in the nucleus.

    An id within 1e-5 of the nucleus's edge counts as in it.
    """
    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[:, -1]
    wider = Decoding(**{**vars(how), "top_p": min(1.0, how.top_p + 1e-5)})
    candidates, noisy = noisy_candidates(logits, wider, torch.tensor([key]), step)
    values = [noisy[0][(candidates[0] == token) & noisy[0].isfinite()].tolist() for token in pair]
    return abs(values[0][0] - values[1][0]) if all(values) else float("inf")


def assert_same_but_for_ties(
    mine: dict[tuple[int, int], dict],
    theirs: dict[tuple[int, int], dict],
    model: PreTrainedModel,
    prompts: list[list[int]],
    texts: list[str],
    how: Decoding,
    stop_id: int,
) -> None:
    """At least 99.8 % are identical, and each other one parts at a near tie of the noisy logits."""
    assert mine.keys() == theirs.keys()
    keys, parted = prompt_keys(texts, how.seed), 0
    for (p, s), record in mine.items():
        where = parting(record["ids"], theirs[p, s]["ids"], stop_id)
        if where is not None:
            step, a, b = where
            before = [*prompts[p], *record["ids"][:step]]
            found = gap(model, before, sample_key(keys[p], s), step, (a, b), how)
            assert found < NEAR, f"prompt {p}, sample {s}, step {step}: {a} and {b} are {found} apart"
            parted += 1
    assert parted <= 0.002 * len(mine)


def agree(arguments: Sequence[str]) -> int:
    """Every rank of a launch runs this: the ranks of a row worker go on with the ids of its first."""
    with start_team(parse_sharding(arguments[0]), "cpu") as team:
        own = torch.tensor([team.world.global_rank, 7])
        first = team.world.global_rank - team.world.column_rank
        assert team.agreed(own).tolist() == [first, 7]
    return 0
