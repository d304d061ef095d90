"""Which strategy `--sharding` means, on which ranks; which options it looks at, for every verb; where torch runs."""

from dataclasses import dataclass

import pytest
import torch

from aura_dist.cli import main
from aura_dist.config.settings import flag, resolve
from aura_dist.config.verbs import VERBS
from aura_dist.errors import ConfigError
from aura_dist.models.strategies import table
from aura_dist.models.strategies.replicate import Replicate
from aura_dist.models.strategies.strategy import Spread
from aura_dist.models.strategies.table import STRATEGIES, parse_sharding, sharding_of
from aura_dist.ranks.device import accelerator, backend_of, pick_device, wants_gpu
from aura_dist.ranks.layout import Layout

# every verb that loads or plans a model → its required settings, which name nothing that is there
VERB_SETTINGS = {
    "collect": {"model": "none/such", "data": "none.csv", "concepts": ["toxic"], "store": "none.zarr"},
    "plan": {"model": "none/such", "num_positive": 1},
    "generate": {"model": "none/such", "prompt": ["You"]},
    "evaluate": {"model": "none/such", "perplexity_texts": "none.csv", "out": "none.json"},
}
# option → a value, as flags have it, and what its strategy makes of it
OPTIONS = {
    "offload": (["cpu"], "cpu"),
    "max_memory": (["0=1GiB", "cpu=2000"], {0: 2**30, "cpu": 2000}),
    "offload_folder": (["offloaded"], "offloaded"),
    "layer_cache": (["copies"], "copies"),
    "tensor_plan": (["plan.yaml"], "plan.yaml"),
}


def words(verb, **settings):
    """A command line."""
    flags = {**VERB_SETTINGS[verb], **settings}
    return [
        verb,
        *(
            w
            for name, value in flags.items()
            for w in (flag(name), *map(str, value if isinstance(value, list) else [value]))
        ),
    ]


# those that a verb takes
VERBS_AND_STRATEGIES = [
    (verb, name) for verb in VERB_SETTINGS for name, row in STRATEGIES.items() if verb != "generate" or row.generates
]


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(("verb", "strategy"), VERBS_AND_STRATEGIES)
def test_every_verb_refuses_options_that_its_strategy_would_not_look_at(verb, name, strategy, capsys):
    value, parsed = OPTIONS[name]
    if name in STRATEGIES[strategy].options:
        given = value[0] if isinstance(parsed, str) else value
        config = resolve(VERBS[verb].config, {**VERB_SETTINGS[verb], "sharding": strategy, name: given})
        assert sharding_of(config).options == {name: parsed}
        return
    users = " or ".join(s.name for s in STRATEGIES.values() if name in s.options)
    assert main(words(verb, sharding=strategy, **{name: value})) == 2
    message = f"error: {flag(name)}: expected with --sharding {users}, got --sharding {strategy}; leave it out\n"
    assert capsys.readouterr().err == message


@pytest.mark.parametrize(("verb", "strategy"), VERBS_AND_STRATEGIES)
def test_options_that_are_not_set_are_not_refused(verb, strategy):
    config = resolve(VERBS[verb].config, {**VERB_SETTINGS[verb], "sharding": strategy, "offload": "none"})
    assert sharding_of(config).options == {}


def test_every_option_belongs_to_a_strategy():
    assert set(OPTIONS) <= {name for strategy in STRATEGIES.values() for name in strategy.options}


def test_new_strategy_is_a_row(monkeypatch):
    """Its own option is refused elsewhere, and others' options with it, without another change."""

    class Waves(Replicate):
        name = "waves"
        spellings = ("waves",)
        options = ("wave_height",)

    @dataclass(frozen=True)
    class Settings:
        sharding: str
        wave_height: int = 5
        offload: str = "none"

    monkeypatch.setitem(table.STRATEGIES, "waves", Waves())
    assert sharding_of(Settings("waves", 7)).options == {"wave_height": 7}
    assert sharding_of(Settings("waves")).layout(3) == Layout("waves", 3)
    with pytest.raises(ConfigError, match="--wave-height: expected with --sharding waves, got --sharding fsdp=2"):
        sharding_of(Settings("fsdp=2", 7))
    with pytest.raises(ConfigError, match="--offload: expected with --sharding zero3, got --sharding waves"):
        sharding_of(Settings("waves", offload="cpu"))


@pytest.mark.parametrize("name", STRATEGIES)
def test_what_a_strategy_offers_is_spelled_as_it_is_read(name):
    for spread in STRATEGIES[name].offers(1 if name == "dispatch" else 8, gpu=True, splits=True):
        assert spread.layout.strategy == name
        spelled, _, options = table.title(spread).partition(" --offload ")
        again = parse_sharding(spelled, {"offload": options} if options else {})
        assert Spread(again.layout(spread.layout.world_size), again.options) == spread


def test_collective_forwards_need_a_process_group():
    def collective(sharding, size):
        spread = parse_sharding(sharding)
        return spread.collective(spread.layout(size))

    assert not collective("replicate", 4)
    assert not collective("dispatch", 1)
    assert not collective("fsdp=1", 2)
    assert all(collective(s, 2) for s in ("fsdp", "tensor", "zero3"))
    assert collective("zero3", 1), "DeepSpeed's engine asks for a group of one rank too"


@pytest.mark.parametrize(
    ("found", "device", "backend"),
    [("cuda", "cuda", "nccl"), ("xpu", "xpu", "xccl"), ("mps", "cpu", "gloo"), (None, "cpu", "gloo")],
)
def test_every_accelerator_whose_collectives_are_known_is_used(found, device, backend, monkeypatch):
    there = None if found is None else torch.device(found)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: there)
    assert pick_device("auto") == device == (accelerator() or "cpu")
    assert pick_device("cpu") == "cpu"
    assert backend_of(f"{device}:1") == backend
    assert (wants_gpu("auto"), wants_gpu("cuda"), wants_gpu("cpu")) == (device != "cpu", True, False)


@pytest.mark.parametrize(
    ("sharding", "size", "expected"),
    [
        ("replicate", 3, Layout("replicate", 3)),
        ("fsdp", 4, Layout("fsdp", 4, fsdp=4)),
        ("fsdp=2", 4, Layout("fsdp", 4, fsdp=2)),
        ("tensor", 4, Layout("tensor", 4, tensor=4)),
        ("fsdp=2,tensor=2", 4, Layout("tensor", 4, fsdp=2, tensor=2)),
        ("fsdp,tensor=2", 8, Layout("tensor", 8, fsdp=4, tensor=2)),
        ("fsdp=2,tensor", 8, Layout("tensor", 8, fsdp=2, tensor=4)),
        ("zero3", 2, Layout("zero3", 2, fsdp=2)),
        ("dispatch", 1, Layout("dispatch")),
    ],
)
def test_layouts(sharding, size, expected):
    assert parse_sharding(sharding).layout(size) == expected


@pytest.mark.parametrize(
    ("sharding", "size", "message"),
    [
        ("fsdp=3", 4, "fsdp 3 = 3 ranks a replica to divide the 4"),
        ("fsdp=2,tensor=4", 12, "fsdp 2 × tensor 4 = 8 ranks a replica to divide the 12"),
        ("fsdp,tensor=8", 4, "fsdp 0 × tensor 8 = 0"),
        ("dispatch", 2, "expected one process"),
        ("fsdp,tensor", 4, "a number for one of the axes"),
        ("fsdp=0", 1, "expected one of replicate"),
        ("fsdp=", 1, "expected one of replicate"),
        ("fsdp=2,fsdp=2", 4, "expected one of replicate"),
        ("fsdp=²", 2, "expected one of replicate"),
        ("", 1, "expected one of replicate"),
    ],
)
def test_impossible_layouts_name_the_factors(sharding, size, message):
    with pytest.raises(ConfigError, match=message):
        parse_sharding(sharding).layout(size)
