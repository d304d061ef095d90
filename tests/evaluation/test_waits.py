"""A step of decoding does not wait for a GPU: what reads values is counted on a CPU, on the GPU's path."""

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import aura_dist
from aura_dist.evaluation.decoding import Decoder, Rows
from aura_dist.evaluation.sampling import Decoding
from tests.evaluation.test_decoding import late
from tests.evaluation.test_left_padding import PADDED
from tests.interventions.test_gates import gated
from tests.models import VOCAB, tiny_causal

# operations that read values, or whose result has a size that depends on them
READING_OPERATIONS = {
    "_local_scalar_dense", "_unique", "_unique2", "bincount", "equal", "is_nonzero", "masked_select", "nonzero",
    "repeat_interleave.Tensor", "unique_consecutive", "unique_dim",
}  # fmt: skip
# what reads values of a GPU by a copy, which is no operation on a CPU
READING_CALLS = {torch.Tensor.cpu, torch.Tensor.numpy, torch.Tensor.tolist}
CALLERS = tuple(str(Path(package.__file__).parent) for package in (aura_dist, transformers))
NOT_THE_CALLER = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
SHORT, LONG = 4, 14  # tokens; what the longer run does more often, steps do


def count(found, what):
    """Count `what` if the nearest function that is neither torch's nor a test's is aura_dist's or transformers'."""
    frame = sys._getframe(1)
    while frame.f_code.co_filename.startswith(NOT_THE_CALLER):
        frame = frame.f_back
    if frame.f_code.co_filename.startswith(CALLERS):
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
    late(monkeypatch)


def waits(model, lengths, num_tokens, how):
    """How often a run reads values, and copies Python's numbers to the device, by place."""
    prompts = [[5 + p] * length for p, length in enumerate(lengths)]
    rows = Rows(prompts, [row % 8 for row in range(16)], list(range(16)))
    decoder = Decoder(model, Decoding(2, num_tokens, **how), [VOCAB])  # the stop id is never chosen
    reads, copies = Counter(), Counter()
    with Operations(reads), Calls(reads, copies):
        made = decoder.run(rows)
    assert {len(ids) for ids in made} == {num_tokens}
    return reads, copies


def waits_of_steps(model, lengths, **how):
    """What a run of `LONG` steps does more than one of `SHORT`."""
    how = {"temperature": 1.0, "top_p": 0.9, "seed": 0, **how}
    both = zip(waits(model, lengths, SHORT, how), waits(model, lengths, LONG, how), strict=True)
    return [long - short for short, long in both]


EVEN, UNEVEN = [5] * 8, range(3, 11)


@pytest.mark.parametrize("name", PADDED)
@pytest.mark.parametrize("lengths", [EVEN, UNEVEN])
def test_a_step_waits_for_nothing(name, lengths):
    model = tiny_causal(name)
    model.config.pad_token_id = 2  # of which some models would look for it
    assert not any(waits_of_steps(model, lengths))


@pytest.mark.parametrize("how", [{"temperature": 0.0}, {"top_p": 1.0}, {"top_k": 9}, {"temperature": 3.0}])
def test_however_tokens_are_chosen(how):
    assert not any(waits_of_steps(tiny_causal("llama"), UNEVEN, **how))


@pytest.mark.parametrize("kind", ["tokens", "units"])
def test_under_an_intervention_with_gates(kind):
    model = tiny_causal("gemma3")
    with aura_dist.intervene(model, gated("gemma3", kind), 1.0):
        assert not any(waits_of_steps(model, UNEVEN))


def test_each_way_to_read_is_counted(monkeypatch):
    reads, copies = waits(tiny_causal("llama"), UNEVEN, SHORT, {"temperature": 1.0, "top_p": 0.9, "seed": 0})
    assert reads.keys() >= {"_local_scalar_dense in _ignore_causal_mask_sdpa", "tolist in _made"}
    assert copies["tensor in _begin"] > 0
    monkeypatch.undo()  # a CPU may read
    reads, _ = waits_of_steps(tiny_causal("llama"), UNEVEN)
    assert reads.keys() >= {"bincount in _probable", "_local_scalar_dense in _probable", "tolist in read"}
