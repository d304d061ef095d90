"""Every rank of a launch runs this: the logits of each model under each of its interventions, under one strategy."""

import itertools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aura_dist.interventions.artifact import Intervention
from aura_dist.interventions.gates import GATES, Gate
from aura_dist.interventions.hooks import intervene
from aura_dist.models.load import ModelSource, load_causal, load_config, skeleton
from aura_dist.models.strategies.table import parse_sharding
from aura_dist.ranks.launch import start_team
from aura_dist.sites.find import find_sites
from aura_dist.sites.kinds import KINDS

PROMPT = [[5, 90, 33, 120, 7, 250, 14]]
NUM_NEW = 3
Seen = dict[str, tuple[np.ndarray, list[int]]]


def random_map(model: str) -> Intervention:
    """Scales and shifts for every site of a model that can be changed."""
    rng = np.random.default_rng(0)
    sites = find_sites(skeleton(load_config(ModelSource(model, None, "float32")))).sites
    sites = [s for s in sites if KINDS[s.kind].acts]
    scale = {s.name: rng.uniform(0.2, 1.2, s.width).astype(np.float32) for s in sites}
    shift = {s.name: rng.normal(0, 0.1, s.width).astype(np.float32) for s in sites[::2]}
    return Intervention(scale, shift)


def random_gate(rng: np.random.Generator, kind: str, width: int) -> Gate:
    """A gate that is neither open nor closed at most tokens."""
    size = {"weight": width**-0.5, "bias": 0.5, "quadratic": 0.3, "linear": 1.0, "constant": 0.5}
    shapes = {name: width if each else 1 for name, each in GATES[kind].parts.items()}
    return Gate(kind, {n: rng.normal(0, size[n], num).astype(np.float32) for n, num in shapes.items()})


def random_gates(model: str) -> Intervention:
    """`random_map` with a gate at every site, of each kind in turn."""
    moved, rng = random_map(model), np.random.default_rng(1)
    kinds = zip(moved.sites, itertools.cycle(GATES))
    return replace(moved, gate={s: random_gate(rng, kind, len(moved.scale[s])) for s, kind in kinds})


@torch.no_grad()
def logits_and_greedy(model: str, maps: Mapping[str, str], sharding: str, options: Mapping[str, Any]) -> Seen:
    """Map → [T, V] logits of the prompt under it, and the tokens that greedy decoding adds."""
    seen: Seen = {}
    spread = parse_sharding(sharding, options)
    with start_team(spread, "cpu") as team:
        loaded = load_causal(ModelSource(model, None, "float32"), team.world, spread.options)
        if "max_memory" in options:
            places = {place for module, place in loaded.hf_device_map.items() if module[-1].isdecimal()}
            assert places == {"cpu", "disk"}, f"some layers lie in memory and some on disk: {loaded.hf_device_map}"
        for name, directory in maps.items():
            with intervene(loaded, Intervention.load(directory)):
                ids, tokens = torch.tensor(PROMPT), list[int]()
                logits = last = loaded(input_ids=ids, use_cache=False).logits[0]
                while True:
                    tokens.append(int(last[-1].argmax()))
                    if len(tokens) == NUM_NEW:
                        break
                    ids = torch.tensor([PROMPT[0] + tokens])
                    last = loaded(input_ids=ids, use_cache=False).logits[0]
            seen[name] = logits.float().numpy(), tokens
    return seen


def run_plan(arguments: Sequence[str]) -> int:
    """Write what this rank sees of each model of the plan, under each of its maps."""
    plan = json.loads(Path(arguments[0]).read_text())
    for name, (model, maps, options) in plan["models"].items():
        for kind, (logits, tokens) in logits_and_greedy(model, maps, plan["sharding"], options).items():
            np.savez(Path(plan["out"]) / f"{name}-{kind}-{os.environ['RANK']}.npz", logits=logits, tokens=tokens)
    return 0
