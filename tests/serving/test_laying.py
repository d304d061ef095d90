"""Maps on a model that merges, reorders and splits its linear layers, as vLLM does, by ranks that are threads."""

import math
import re
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from aura_dist.errors import ConfigError, ModelError
from aura_dist.interventions.artifact import Intervention
from aura_dist.interventions.gates import GATES, Gate
from aura_dist.interventions.statement import ASKED
from aura_dist.serving.laying import Laying, Ranks
from aura_dist.serving.maps import CALLED
from aura_dist.serving.strengths import Strengths
from aura_dist.serving.vllm_plugin import chosen, one_strength_because, register

WIDTH, HEADS, KV_HEADS, EACH, HIDDEN = 8, 4, 1, 2, 12


class Meeting:
    """Sums over ranks that are threads, written into the argument, as vLLM's are on CPUs."""

    def __init__(self, number):
        self.number, self.parts, self.barrier = number, [None] * number, threading.Barrier(number)

    def reducing(self, rank):
        def reduce(values):
            self.parts[rank] = values
            self.barrier.wait(20)
            total = sum(self.parts)
            self.barrier.wait(20)
            return values.copy_(total)

        return reduce


class Split(nn.Module):
    """A linear layer of which each rank has some rows, or columns; returns (output, None) as vLLM's do."""

    def __init__(self, num_outputs, num_inputs, *, reduce=None, partial=False):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_outputs, num_inputs), requires_grad=False)
        self.reduce, self.is_partial = reduce, partial

    def forward(self, x):
        out = x @ self.weight.T
        return (out if self.reduce is None or self.is_partial else self.reduce(out)), None


class Layer(nn.Module):
    """qkv with the keys' and values' head on every rank; a row-parallel output; a merged gate and up; a norm."""

    def __init__(self, rank, number, reduce, partial):
        super().__init__()
        self.rank, self.number, self.reduce = rank, number, reduce
        rows = (HEADS // number + 2 * KV_HEADS) * EACH
        self.qkv_proj = Split(rows, WIDTH)
        self.o_proj = Split(WIDTH, HEADS * EACH // number, reduce=reduce, partial=partial)
        self.gate_up_proj = Split(2 * HIDDEN // number, WIDTH)
        self.norm = Norm(WIDTH)

    def forward(self, x):
        normed, residual = self.norm(x, x)
        qkv, _ = self.qkv_proj(normed)
        q = qkv[:, : HEADS * EACH // self.number]
        k, v = qkv[:, q.shape[1] :].chunk(2, dim=-1)
        heads, _ = self.o_proj(q * k.repeat(1, HEADS // self.number) + v.repeat(1, HEADS // self.number))
        heads = self.reduce(heads) if self.o_proj.is_partial else heads
        gate, up = self.gate_up_proj(heads)[0].chunk(2, dim=-1)
        share = torch.zeros(len(x), HIDDEN)
        start = self.rank * gate.shape[1]
        share[:, start : start + gate.shape[1]] = torch.tanh(gate) * up
        return heads + self.reduce(share)[:, :WIDTH], residual


class Norm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width), requires_grad=False)

    def forward(self, x, residual):
        return x * self.weight, residual


class Served(nn.Module):
    """The layers of one stage of a pipeline; where the others would be, it has modules without parameters."""

    def __init__(self, rank, number, reduce, partial, stage=range(2), num_layers=2):
        super().__init__()
        self.rank, self.number, self.stage = rank, number, stage
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(
            Layer(rank, number, reduce, partial) if i in stage else nn.Identity() for i in range(num_layers)
        )

    def forward(self, x):
        residual = torch.zeros_like(x)
        for i in self.stage:
            x, residual = self.model.layers[i](x + residual)
        return x + residual

    def load_weights(self, weights):
        """The checkpoint's q, k and v are one tensor, head after head: k, q, q, q, q, v."""
        parameters, loaded = dict(self.named_parameters()), set()
        for name, tensor in weights:
            target = name.removeprefix("language_model.").replace("gate_proj", "up_proj")
            target = target.replace("up_proj", "gate_up_proj").replace("attention", "qkv_proj")
            if target not in parameters:
                continue
            loaded.add(target)
            share = slice(None)
            if "attention" in name:
                of_heads = tensor.view(HEADS + 2, EACH, -1)
                mine = HEADS // self.number
                q = of_heads[1 + self.rank * mine :][:mine]
                tensor = torch.cat([q, of_heads[:1], of_heads[-1:]]).reshape(-1, tensor.shape[1])
            elif "o_proj" in name:
                tensor = tensor.chunk(self.number, dim=1)[self.rank]
            elif "gate_proj" in name or "up_proj" in name:
                tensor = tensor.chunk(self.number)[self.rank]
                share = slice(0, len(tensor)) if "gate_proj" in name else slice(len(tensor), None)
            parameters[target].data[share].copy_(tensor)
        return loaded


def checkpoint(num_layers=2):
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "attention": ((HEADS + 2) * EACH, WIDTH), "o_proj": (WIDTH, HEADS * EACH), "gate_proj": (HIDDEN, WIDTH),
        "up_proj": (HIDDEN, WIDTH), "norm": (WIDTH,),
    }  # fmt: skip
    return {
        f"language_model.model.layers.{i}.{name}.weight": torch.randn(shape, generator=generator) * shape[-1] ** -0.5
        for i in range(num_layers)
        for name, shape in shapes.items()
    }


def expected(x, maps, layers=range(2)):
    """These layers of the same model written out, with `maps[site](values)` at each site."""
    tensors = checkpoint(layers.stop)
    weights = {name.split("layers.")[1].removesuffix(".weight"): w for name, w in tensors.items()}

    def at(site, values):
        return maps.get(f"model.layers.{site}", lambda v: v)(values)

    for i in layers:
        residual = x
        normed = at(f"{i}.norm", x * weights[f"{i}.norm"])
        qkv = at(f"{i}.attention", at(f"{i}.attention:input", normed) @ weights[f"{i}.attention"].T)
        k, *q, v = qkv.split(EACH, dim=-1)
        mixed = torch.cat(q, -1) * k.repeat(1, HEADS) + v.repeat(1, HEADS)
        heads = at(f"{i}.o_proj", at(f"{i}.o_proj:input", mixed) @ weights[f"{i}.o_proj"].T)
        gate, up = (at(f"{i}.{n}", heads @ weights[f"{i}.{n}"].T) for n in ("gate_proj", "up_proj"))
        x = at(f"{i}", heads + (torch.tanh(gate) * up)[:, :WIDTH] + residual)
    return x


WIDTHS = {
    "norm": WIDTH, "attention": (HEADS + 2) * EACH, "attention:input": WIDTH, "o_proj": WIDTH,
    "o_proj:input": HEADS * EACH, "gate_proj": HIDDEN, "up_proj": HIDDEN, "": WIDTH,
}  # fmt: skip


def intervention_at(places, gate, num_layers=2):
    """Random maps of these places of all layers, and site → the map in float32."""
    rng, scales, shifts, gates, maps = np.random.default_rng(1), {}, {}, {}, {}
    for place in places:
        for i in range(num_layers):
            site, width = f"model.layers.{i}.{place}".rstrip("."), WIDTHS[place]
            scales[site] = rng.uniform(0, 1, width).astype(np.float32)
            shifts[site] = rng.normal(size=width).astype(np.float32)
            if gate is not None:
                parts = GATES[gate].parts.items()
                gates[site] = Gate(gate, {n: rng.normal(size=width if e else 1).astype(np.float32) for n, e in parts})

            def change(z, site=site):
                g = torch.from_numpy(gates[site].values(z.numpy())).float() if site in gates else 1
                return z + g * ((torch.from_numpy(scales[site]) - 1) * z + torch.from_numpy(shifts[site]))

            maps[site] = change
    return Intervention(scales, shifts, {}, gates), maps


def served(number, partial, intervention, strength=1.0, tensors=None, stage=None, said=None, of_rows=None):
    """The output of each rank, and the layings; of all two layers, or of a stage of four. `said` gets the reports.

    `of_rows` has requests, their numbers of tokens, and the strengths that some of them ask for.
    """
    meeting, outputs, errors, layings = Meeting(number), [None] * number, [], [None] * number
    x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(3))

    def run(rank):
        try:
            reduce = meeting.reducing(rank)
            model = Served(rank, number, reduce, partial, *((stage, 4) if stage else ()))
            ranks = Ranks(
                rank, number, reduce, whole_model=stage is None,
                partial=lambda m: getattr(m, "is_partial", False), is_linear=lambda m: isinstance(m, Split),
            )  # fmt: skip
            strengths = Strengths(strength, 1 if of_rows is None else 8)
            layings[rank] = Laying(model, intervention, strengths, ranks)
            given = tensors or checkpoint(4 if stage else 2)
            model.load_weights(layings[rank].watched(given.items(), model.load_weights))
            report = layings[rank].lay()
            if said is not None:
                said.append(report)
            if of_rows is not None:
                ask(strengths, *of_rows)
            outputs[rank] = model(x)
        except Exception as error:
            errors.append(error)
            meeting.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for error in errors:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    return x, outputs, layings


def scheduled(tokens, asked=None, new=(), finished=()):
    """What the plugin reads of vLLM's `SchedulerOutput`."""
    extra = {request: {ASKED: strength} for request, strength in (asked or {}).items()}
    each = [SimpleNamespace(req_id=r, sampling_params=SimpleNamespace(extra_args=extra.get(r))) for r in new]
    return SimpleNamespace(
        finished_req_ids=set(finished), scheduled_new_reqs=each, total_num_scheduled_tokens=sum(tokens.values())
    )


def ask(strengths, tokens, asked):
    strengths.follow(scheduled(tokens, asked, new=tokens))
    strengths.write(list(tokens), np.array(list(tokens.values())))
    strengths.check_written()


@pytest.mark.parametrize("gate", [None, *GATES])
@pytest.mark.parametrize(("number", "partial"), [(1, False), (2, True)])
def test_a_request_may_have_a_strength_of_its_own(number, partial, gate):
    """Its tokens are mapped at that strength, those of the others at the server's, which may be 0."""
    intervention, _ = intervention_at([p for p in WIDTHS if p != "attention:input"], gate)
    tokens = {"a": 2, "b": 1, "c": 2}
    x, mixed, _ = served(number, partial, intervention, 0.0, of_rows=(tokens, {"a": 1, "c": 0.25}))
    for rows, strength in ((slice(0, 2), 1.0), (slice(2, 3), 0.0), (slice(3, 5), 0.25)):
        _, outputs, _ = served(number, partial, intervention, strength)
        for output, wanted in zip(mixed, outputs, strict=True):
            assert torch.allclose(output[rows], wanted[rows], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(mixed[0], expected(x, {}), rtol=1e-2)


def test_strengths_follow_requests_until_they_are_finished():
    strengths = Strengths(0.5, 6)
    ask(strengths, {"a": 2, "b": 1}, {"b": 2})
    assert strengths.of_tokens.tolist() == [0.5, 0.5, 2, 0.5, 0.5, 0.5]
    strengths.follow(scheduled({"b": 1, "a": 1}))
    with pytest.raises(ModelError, match="expected vLLM to say the order of its tokens before a forward, got none"):
        strengths.check_written()
    strengths.write(["b", "a"], np.array([1, 1]))
    strengths.check_written()
    assert strengths.of_tokens.tolist() == [2, 0.5, 0.5, 0.5, 0.5, 0.5]
    strengths.follow(scheduled({"a": 1, "c": 3}, {"c": 0.0}, new=["c"], finished=["b"]))
    strengths.write(["c", "a"], np.array([3, 1]))
    assert strengths.of_tokens.tolist() == [0, 0, 0, 0.5, 0.5, 0.5]
    strengths.follow(scheduled({"a": 1}, finished=["c"]))
    strengths.write(["a"], np.array([1]))
    assert strengths.of_tokens.tolist() == [0.5] * 6
    strengths.follow(scheduled({}, finished=["a"]))
    strengths.check_written()
    ask(strengths, {"a": 3}, {"a": 1})
    ask(strengths, {"a": 2}, {})  # the next part of a session, which asks for none
    assert strengths.of_tokens.tolist() == [0.5] * 6
    for strength in (1, 2):  # the same request and number of tokens, and another strength
        ask(strengths, {"a": 2, "b": 1}, {"a": strength, "b": 3})
        assert strengths.of_tokens.tolist() == [strength, strength, 3, 0.5, 0.5, 0.5]
    strengths.follow(scheduled({}, finished=["a", "b"]))
    for odd in (True, "0.5", -1, math.nan, math.inf, 1e9, None, []):
        with pytest.raises(ConfigError, match="aura_strength: expected a number from 0 to 1000, got"):
            strengths.follow(scheduled({"b": 1}, {"b": odd}, new=["b"]))
    with pytest.raises(ModelError, match="expected no request with it where all have one strength"):
        Strengths(0.5).follow(scheduled({"b": 1}, {"b": 0.1}, new=["b"]))


def config(**parts):
    """What the plugin reads of vLLM's configuration, by vLLM's names."""
    default = {
        "model_config": {"has_inner_state": False, "use_mla": False, "using_transformers_backend": lambda: False},
        "parallel_config": {
            "use_ubatching": False, "use_sequence_parallel_moe": False, "prefill_context_parallel_size": 1,
        },
        "cache_config": {"kv_sharing_fast_prefill": False},
    }  # fmt: skip
    of = {name: SimpleNamespace(**values | parts.pop(name, {})) for name, values in default.items()}
    none = dict.fromkeys(("speculative_config", "kv_transfer_config", "ec_transfer_config"))
    return SimpleNamespace(**of, **none | parts)


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({"speculative_config": object()}, "drafts are decoded speculatively"),
        ({"parallel_config": {"use_ubatching": True}}, "forwards are cut into parts"),
        ({"parallel_config": {"use_sequence_parallel_moe": True}}, "forwards are cut into parts"),
        ({"parallel_config": {"prefill_context_parallel_size": 2}}, "forwards are cut into parts"),
        ({"model_config": {"has_inner_state": True}}, "modules see tokens in other orders"),
        ({"model_config": {"use_mla": True}}, "modules see tokens in other orders"),
        ({"cache_config": {"kv_sharing_fast_prefill": True}}, "modules see tokens in other orders"),
        ({"kv_transfer_config": object()}, "keys and values of other servers are read"),
        ({"ec_transfer_config": object()}, "keys and values of other servers are read"),
        ({"model_config": {"using_transformers_backend": lambda: True}}, "the model runs on vLLM's transformers back"),
    ],
)
def test_where_all_requests_have_one_strength(parts, reason):
    plain = Intervention({"model.layers.0.o_proj": np.zeros(8, np.float32)}, {}, {})
    mixture = Intervention({EXPERTS: np.zeros(8, np.float32)}, {}, {})
    assert one_strength_because(config(), plain) is None
    assert one_strength_because(config(), mixture) == "maps of experts are in the weights"
    assert one_strength_because(config(**parts), plain).startswith(reason)


def test_requests_of_another_front_end_have_one_strength(monkeypatch):
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    plain = Intervention({"model.layers.0.o_proj": np.zeros(8, np.float32)}, {}, {})
    assert one_strength_because(config(), plain) == "requests do not come through Python"


def test_a_residual_stream_is_mapped_once_although_weights_are_loaded_twice():
    intervention, maps = intervention_at([""], None)
    x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(3))
    model = Served(0, 1, lambda v: v, False)
    ranks = Ranks(0, 1, lambda v: v, whole_model=True, partial=lambda m: False, is_linear=lambda m: False)
    laying = Laying(model, intervention, Strengths(1.0), ranks)
    for _ in range(2):
        model.load_weights(laying.watched(checkpoint(2).items(), model.load_weights))
        laying.lay()
    assert torch.allclose(model(x), expected(x, maps), rtol=1e-4, atol=1e-4)


def test_a_module_whose_weights_a_kernel_takes_is_an_error():
    intervention, _ = intervention_at(["o_proj"], None)
    model = Served(0, 1, lambda v: v, False)
    ranks = Ranks(
        0, 1, lambda v: v, whole_model=True, partial=lambda m: False, is_linear=lambda m: False,
        takes_weights=lambda m: True,
    )  # fmt: skip
    laying = Laying(model, intervention, Strengths(1.0), ranks)
    model.load_weights(laying.watched(checkpoint(2).items(), model.load_weights))
    with pytest.raises(ModelError, match="expected a module that vLLM calls for every token, got one whose weights"):
        laying.lay()


@pytest.mark.parametrize("gate", [None, *GATES])
@pytest.mark.parametrize(("number", "partial"), [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize("places", [[place] for place in WIDTHS] + [[p for p in WIDTHS if p != "attention:input"]])
def test_maps_are_those_of_the_whole_model(places, number, partial, gate):
    CALLED.clear()
    intervention, maps = intervention_at(places, gate)
    x, outputs, layings = served(number, partial, intervention)
    wanted = expected(x, maps)
    assert not torch.allclose(wanted, expected(x, {}), rtol=1e-2), "the maps act"
    for output, laying in zip(outputs, layings, strict=True):
        assert torch.allclose(output, wanted, rtol=1e-4, atol=1e-4)
        laying.check_called(checked_before=False)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("stage", [range(2), range(2, 4)])
@pytest.mark.parametrize(("number", "partial"), [(1, False), (2, True)])
@pytest.mark.parametrize("places", [[place] for place in WIDTHS] + [[p for p in WIDTHS if p != "attention:input"]])
def test_each_stage_of_a_pipeline_maps_its_own_layers(places, number, partial, stage, reverse):
    CALLED.clear()
    intervention, maps = intervention_at(places, None, num_layers=4)
    tensors = list(checkpoint(4).items())
    said = []
    x, outputs, layings = served(
        number, partial, intervention, tensors=dict(tensors[::-1] if reverse else tensors), stage=stage, said=said
    )
    wanted = expected(x, maps, stage)
    assert not torch.allclose(wanted, expected(x, {}, stage), rtol=1e-2), "the maps act"
    for output, laying, report in zip(outputs, layings, said, strict=True):
        assert torch.allclose(output, wanted, rtol=1e-4, atol=1e-4)
        assert report.startswith(f"laid maps of {2 * len(places)} sites on ")
        laying.check_called(checked_before=False)


@pytest.mark.parametrize("stage", [range(2), range(2, 4)])
@pytest.mark.parametrize(
    "site",
    [
        "model.layers.7",
        "model.layers.7.o_proj",  # not in the checkpoint
        "model.layers.4.o_proj",  # in the checkpoint, and of no layer of the model
        "model.layers.0.down_proj",
        "model.layers.2.down_proj",
        "model.layers",
    ],
)
def test_what_no_stage_has_is_an_error(site, stage):
    with pytest.raises(ModelError, match=f"'{site}' of 8 units: expected it in the served model Served"):
        served(1, False, Intervention({site: np.zeros(8, np.float32)}, {}, {}), tensors=checkpoint(5), stage=stage)


def test_a_module_that_a_layer_of_the_stage_lacks_is_an_error_of_that_stage():
    tensors = checkpoint(4) | {"model.layers.2.extra.weight": torch.zeros(8, 8)}
    intervention = Intervention({"model.layers.2.extra": np.zeros(8, np.float32)}, {}, {})
    served(1, False, intervention, tensors=tensors, stage=range(2))
    with pytest.raises(ModelError, match=r"'model.layers.2.extra' of 8 units: expected it in the served model Served"):
        served(1, False, intervention, tensors=tensors, stage=range(2, 4))


def test_strength_zero_changes_no_class():
    intervention, _ = intervention_at(list(WIDTHS), None)
    x, (output,), (laying,) = served(1, False, intervention, 0.0)
    assert torch.equal(output, expected(x, {})) or torch.allclose(output, expected(x, {}), rtol=1e-6)
    assert not any("aura" in name for name, _ in laying.model.named_modules())


@pytest.mark.parametrize(
    ("site", "width", "message"),
    [
        (
            "model.layers.0.down_proj",
            8,
            "'model.layers.0.down_proj' of 8 units: expected it in the served model Served",
        ),
        ("model.layers.7.o_proj", 8, "'model.layers.7.o_proj' of 8 units: expected it in the served model"),
        ("model.layers.0.o_proj", 6, "'model.layers.0.o_proj' of 6 units: expected it in the served model"),
        ("model.layers.0.gate_proj:input", 8, "expected an input that one linear layer reads, got one that vLLM reads"),
        ("model.layers", 8, "'model.layers' of 8 units: expected it in the served model"),
    ],
)
def test_what_the_served_model_lacks_is_an_error(site, width, message):
    with pytest.raises(ModelError, match=message):
        served(1, False, Intervention({site: np.zeros(width, np.float32)}, {}, {}))


def test_a_module_that_is_not_called_is_an_error():
    CALLED.clear()
    _, _, (laying,) = served(1, False, intervention_at(["norm", "o_proj"], None)[0])
    CALLED.discard("model.layers.1.norm")
    with pytest.raises(ModelError, match=r"'model.layers.1.norm' was not called in the forward pass"):
        laying.check_called(checked_before=True)
    CALLED.clear()
    laying.check_called(checked_before=True)
    with pytest.raises(ModelError, match="was not called"):
        laying.check_called(checked_before=False)


@pytest.mark.parametrize(
    ("one", "of_all"),
    [
        ("model.layers.0.mlp.experts.{}.down_proj.weight", False),
        ("model.layers.0.mlp.experts.down_proj", True),
        ("model.layers.0.block_sparse_moe.experts.{}.w2.weight", False),  # as checkpoints of Mixtral have it
    ],
)
def test_scales_of_experts_go_into_their_down_projections(one, of_all):
    scale = np.random.default_rng(0).uniform(0, 1, 12).astype(np.float32)
    down = torch.randn(3, 5, 4)
    prefix = "model.layers.0.mlp.experts"
    tensors = {one: down} if of_all else {one.format(e): down[e] for e in range(3)}
    ranks = Ranks(0, 1, lambda v: v, whole_model=True, partial=lambda m: False, is_linear=lambda m: False)
    laying = Laying(nn.Module(), Intervention({prefix: scale}, {}, {}), Strengths(1.0), ranks)
    found = dict(laying.watched(tensors.items(), lambda weights: None))
    made = found[one] if of_all else torch.stack(list(found.values()))
    assert torch.allclose(made, down * torch.from_numpy(scale).view(3, 1, 4))
    laying.lay()
    half = Laying(nn.Module(), Intervention({prefix: scale}, {}, {}), Strengths(0.5), ranks)
    found = dict(half.watched(tensors.items(), lambda weights: None))
    made = found[one] if of_all else torch.stack(list(found.values()))
    assert torch.allclose(made, down * (1 + 0.5 * (torch.from_numpy(scale).view(3, 1, 4) - 1)))
    shifted = Laying(nn.Module(), Intervention({prefix: scale}, {prefix: scale}, {}), Strengths(1.0), ranks)
    with pytest.raises(ModelError, match="expected a map of experts that only scales"):
        list(shifted.watched(tensors.items(), lambda weights: None))


def test_experts_of_a_layer_with_two_mixtures_are_found_by_their_names():
    scale = np.full(12, 0.5, np.float32)
    both = {f"model.layers.0.{mixture}.experts": scale for mixture in ("mlp", "other")}
    ranks = Ranks(0, 1, lambda v: v, whole_model=True, partial=lambda m: False, is_linear=lambda m: False)
    laying = Laying(nn.Module(), Intervention(both, {}, {}), Strengths(1.0), ranks)
    down = torch.ones(3, 5, 4)
    for mixture, size in (("mlp", 0.5), ("other", 0.5), ("block_sparse_moe", 1.0)):
        given = {f"model.layers.0.{mixture}.experts.down_proj": down}
        assert torch.equal(dict(laying.watched(given.items(), lambda weights: None)).popitem()[1], size * down)


EXPERTS = "model.layers.0.mlp.experts"


class Experts(nn.Module):
    """A mixture whose down projections a rank keeps as [E, outputs, its neurons]."""

    def __init__(self, shape, rank=0, number=1, *, transposed=False):
        super().__init__()
        num_experts, num_outputs, width = shape
        self.rank, self.number, self.transposed = rank, number, transposed
        layer = nn.Module()
        layer.mlp = nn.Module()
        layer.mlp.experts = nn.Module()
        layer.mlp.experts.w2_weight = nn.Parameter(
            torch.zeros(num_experts, num_outputs, width // number, dtype=torch.bfloat16), requires_grad=False
        )
        self.model = nn.Module()
        self.model.layers = nn.ModuleList([layer])

    def load_weights(self, weights):
        name, parameter = next(iter(self.named_parameters()))
        for _, tensor in weights:
            of_rank = tensor.mT if self.transposed else tensor
            parameter.copy_(of_rank.chunk(self.number, dim=2)[self.rank])
        return {name}


def laying_experts(model, num_units, *, whole_model=True, num_experts=None):
    scale = np.random.default_rng(0).uniform(0, 1, num_units).astype(np.float32)
    ranks = Ranks(
        0, 1, lambda v: v, whole_model=whole_model, partial=lambda m: False, is_linear=lambda m: False,
        num_experts=num_experts,
    )  # fmt: skip
    return Laying(model, Intervention({EXPERTS: scale}, {}, {}), Strengths(1.0), ranks), torch.from_numpy(scale)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("number", "rank"), [(1, 0), (2, 0), (2, 1)])
@pytest.mark.parametrize("num_outputs", [4, 6])
def test_neurons_of_square_experts_are_those_of_the_served_model(num_outputs, number, rank, transposed):
    down = torch.randn(3, num_outputs, 4).bfloat16()
    model = Experts(down.shape, rank, number, transposed=transposed)
    laying, scale = laying_experts(model, 12)
    given = {f"{EXPERTS}.down_proj": down.mT.contiguous() if transposed else down}
    model.load_weights(laying.watched(given.items(), model.load_weights))
    laying.lay()
    wanted = (down.float() * scale.view(3, 1, 4)).bfloat16().chunk(number, dim=2)[rank]
    assert torch.equal(model.model.layers[0].mlp.experts.w2_weight, wanted)


def test_square_experts_that_cannot_be_told_are_an_error():
    given = {f"{EXPERTS}.down_proj": torch.ones(3, 4, 4)}
    laying, _ = laying_experts(nn.Module(), 12)
    with pytest.raises(ModelError, match=r"expected weights of experts whose neurons can be told .* got square ones"):
        list(laying.watched(given.items(), lambda weights: None))


def read_and_lay(laying, tensors):
    list(laying.watched(tensors.items(), lambda weights: None))
    laying.lay()


def one_by_one(num_experts, num_outputs=5, width=4):
    return {f"{EXPERTS}.{e}.down_proj.weight": torch.ones(num_outputs, width) for e in range(num_experts)}


@pytest.mark.parametrize(
    ("tensors", "num_experts", "found"),
    [
        (one_by_one(4), None, "expert 3 with weights of shape (5, 4)"),
        (one_by_one(2), None, "2 experts with 8 neurons"),
        (one_by_one(3, width=5), None, "expert 0 with weights of shape (5, 5)"),
        (one_by_one(2), 4, "expert 0 of 4 with weights of shape (5, 4)"),
        ({f"{EXPERTS}.down_proj": torch.ones(4, 5, 4)}, None, "experts with weights of shape (4, 5, 4)"),
        ({f"{EXPERTS}.down_proj": torch.ones(2, 5, 4)}, None, "experts with weights of shape (2, 5, 4)"),
        ({f"{EXPERTS}.down_proj": torch.ones(2, 4, 4)}, None, "experts with weights of shape (2, 4, 4)"),
        ({f"{EXPERTS}.down_proj": torch.ones(3, 5, 5)}, None, "experts with weights of shape (3, 5, 5)"),
        ({f"{EXPERTS}.w2": torch.ones(12, 5)}, None, "experts with weights of shape (12, 5)"),
    ],
)
def test_other_experts_than_those_of_the_intervention_are_an_error(tensors, num_experts, found):
    laying, _ = laying_experts(nn.Module(), 12, num_experts=num_experts)
    message = re.escape(f"'{EXPERTS}' of 12 units: expected as many neurons of experts in the served model Module, ")
    with pytest.raises(ModelError, match=f"{message}found {re.escape(found)}"):
        read_and_lay(laying, tensors)


def test_a_rank_may_read_a_share_of_the_experts():
    laying, scale = laying_experts(nn.Module(), 12, num_experts=3)
    share = {name: tensor for name, tensor in one_by_one(3).items() if ".0." not in name.removeprefix(EXPERTS)}
    (_, one), (_, two) = laying.watched(share.items(), lambda weights: None)
    assert torch.equal(torch.stack([one[0], two[0]]), scale.view(3, 4)[1:])
    assert laying.lay().endswith("scaled the weights of 1 sites of experts")


def test_experts_of_another_stage_stay_as_they_are():
    model = Experts((3, 5, 4))
    model.model.layers[0] = nn.Identity()
    laying, _ = laying_experts(model, 12, whole_model=False)
    given = one_by_one(3)
    assert all(found is given[name] for name, found in laying.watched(given.items(), lambda weights: None))
    assert laying.lay() == "laid maps of 0 sites on 0 modules of this rank"


def test_the_variable_names_a_directory_and_maybe_a_strength(tmp_path, monkeypatch, capsys):
    for name in ("aura", "with@sign"):
        intervention_at(["norm"], None)[0].save(tmp_path / name)
    for given, strength in (("aura", 1.0), ("aura@0.5", 0.5), ("with@sign", 1.0), ("with@sign@2", 2.0)):
        intervention, found = chosen(f"{tmp_path}/{given}")
        assert (found, len(intervention.sites)) == (strength, 2)
    for given, message in (
        ("none", "expected a directory that `fit` wrote, found none at"),
        ("aura@0.5@0.7", "expected DIR@STRENGTH with one strength, got '0.5' too"),
        ("aura@strong", "expected DIR@STRENGTH with one strength from 0 to 1000, got 'strong'"),
        ("aura@-1", "expected DIR@STRENGTH with one strength from 0 to 1000, got -1.0"),
    ):
        monkeypatch.setenv("AURA_INTERVENTION", f"{tmp_path}/{given}")
        with pytest.raises(SystemExit) as ended:
            register()
        assert ended.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: AURA_INTERVENTION=")
        assert message in line
    monkeypatch.delenv("AURA_INTERVENTION")
    register()
