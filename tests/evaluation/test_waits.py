"""How often a step of decoding waits for a GPU, whatever rows there are: counted on a CPU, on the GPU's path.

Transformers' own attention masks, which wait too, are not counted.
"""

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import aura_dist
from aura_dist.evaluation import sampling
from aura_dist.evaluation.decoding import Decoder, Rows
from aura_dist.evaluation.sampling import Decoding
from tests.models import VOCAB, tiny_causal

# operations that read values, or whose result has a size that depends on them
READING_OPERATIONS = {
    "_local_scalar_dense", "_unique", "_unique2", "bincount", "equal", "is_nonzero", "masked_select", "nonzero",
    "repeat_interleave.Tensor", "unique_consecutive", "unique_dim",
}  # fmt: skip
# what reads values of a GPU by a copy, which is no operation on a CPU
READING_CALLS = {torch.Tensor.cpu, torch.Tensor.numpy, torch.Tensor.tolist}
OURS = str(Path(aura_dist.__file__).parent)
NOT_THE_CALLER = (str(Path(torch.__file__).parent), __file__)
SHORT, LONG = 4, 14  # tokens; what the longer run does more often, steps do


def count(found, what):
    """Count `what` if the nearest function that is neither torch's nor this file's is one of aura_dist."""
    frame = sys._getframe(1)
    while frame.f_code.co_filename.startswith(NOT_THE_CALLER):
        frame = frame.f_back
    if frame.f_code.co_filename.startswith(OURS):
        found[f"{what} in {frame.f_code.co_name}"] += 1


class Operations(TorchDispatchMode):
    def __init__(self, reads):
        super().__init__()
        self.reads = reads

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = str(operation).removeprefix("aten.").removesuffix(".default")
        indices = args[1] if name.startswith("index") and isinstance(args[1], list) else []
        if name in READING_OPERATIONS or any(index is not None and index.dtype == torch.bool for index in indices):
            count(self.reads, name)
        return operation(*args, **(kwargs or {}))


class Calls(TorchFunctionMode):
    def __init__(self, reads, copies):
        super().__init__()
        self.reads, self.copies = reads, copies

    def __torch_function__(self, call, types, args=(), kwargs=None):
        if call in READING_CALLS:
            count(self.reads, call.__name__)
        if call is torch.tensor:
            count(self.copies, "tensor")
        return call(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def path_of_a_gpu(monkeypatch):
    monkeypatch.setattr(sampling, "_at_least", lambda values, least: (values >= least).nonzero(as_tuple=True))
    monkeypatch.setattr(sampling, "_CACHED_VALUES", sampling._DEVICE_VALUES)
    monkeypatch.setattr(sampling, "_levels", lambda *of: [sampling._first_level(*of)])


def waits(model, num_rows, num_tokens, temperature=1.0):
    """How often a run reads values, and copies Python's numbers to the device, by place."""
    prompts = [[5 + p] * (3 + p) for p in range(8)]
    rows = Rows(prompts, [row % 8 for row in range(num_rows)], list(range(num_rows)))
    how = Decoding(8, num_tokens, temperature, 0.9, 0)
    decoder, reads, copies = Decoder(model, how, [VOCAB]), Counter(), Counter()  # the stop id is never chosen
    with Operations(reads), Calls(reads, copies):
        made = decoder.run(rows)
    assert {len(ids) for ids in made} == {num_tokens}
    return reads, copies


def waits_of_a_step(model, num_rows, temperature=1.0):
    both = zip(waits(model, num_rows, SHORT, temperature), waits(model, num_rows, LONG, temperature), strict=True)
    return [{place: n / (LONG - SHORT) for place, n in (long - short).items()} for short, long in both]


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_step_reads_four_times_whatever_the_number_of_rows(name):
    model = tiny_causal(name)
    reads, copies = waits_of_a_step(model, 64)
    assert sum(reads.values()) <= 4, reads
    assert not copies
    assert waits_of_a_step(model, 16) == waits_of_a_step(model, 64, 3.0) == [reads, copies]


@pytest.mark.parametrize("top_p", [0.5, 0.9, 0.99, 0.999])
@pytest.mark.parametrize("size", [0.1, 1.0, 3.0, 20.0])  # from flat to peaked: other levels
def test_levels_of_rows_choose_what_levels_in_turn_choose(size, top_p, monkeypatch):
    logits = size * torch.randn(40, 20_000, generator=torch.Generator().manual_seed(0))
    logits[20:] *= 0.1
    how, keys = Decoding(1, 1, 1.0, top_p, 0), torch.arange(40)
    here = sampling.choose(logits, how, keys, 0)
    monkeypatch.undo()
    assert torch.equal(sampling.choose(logits, how, keys, 0), here)


def test_each_way_to_read_is_counted():
    reads, copies = waits(tiny_causal("llama"), 16, SHORT)
    assert reads.keys() >= {"nonzero in _probable", "tolist in _probable", "index.Tensor in _made", "tolist in _made"}
    assert reads["_local_scalar_dense in choose"] == reads["_local_scalar_dense in run"] == SHORT
    assert copies["tensor in _begin"] > 0
