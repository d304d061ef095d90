"""Every rank of a launch runs this: the logits of each model under an intervention, under one strategy."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from aura_dist.model.intervene import intervene
from aura_dist.model.sharding import ModelSource, ShardingOptions, load_causal, load_config, skeleton
from aura_dist.model.sites import find_sites
from aura_dist.runtime.launch import start_team
from aura_dist.store.artifact import Intervention

PROMPT = [[5, 90, 33, 120, 7, 250, 14]]
NUM_NEW = 6


def random_map(model: str) -> Intervention:
    """Scales and shifts for every linear layer and norm of a model."""
    rng = np.random.default_rng(0)
    sites = find_sites(skeleton(load_config(ModelSource(model, None, "float32")))).sites
    scale = {s.name: rng.uniform(0.2, 1.2, s.width).astype(np.float32) for s in sites}
    shift = {s.name: rng.normal(0, 0.1, s.width).astype(np.float32) for s in sites[::2]}
    return Intervention(scale, shift)


@torch.no_grad()
def logits_and_greedy(model: str, sharding: str) -> tuple[np.ndarray, list[int]]:
    """[T, V] logits of the prompt, and the tokens that greedy decoding adds."""
    with start_team(sharding, "cpu") as team:
        loaded = load_causal(ModelSource(model, None, "float32"), team.world, ShardingOptions())
        with intervene(loaded, random_map(model)):
            ids = torch.tensor(PROMPT)
            logits = loaded(input_ids=ids, use_cache=False).logits[0]
            for _ in range(NUM_NEW):
                last = loaded(input_ids=ids, use_cache=False).logits[0, -1]
                ids = torch.cat([ids, last.argmax()[None, None]], dim=1)
        return logits.float().numpy(), ids[0, len(PROMPT[0]) :].tolist()


def run_plan(arguments: Sequence[str]) -> int:
    """Write what this rank sees of each model of the plan."""
    plan = json.loads(Path(arguments[0]).read_text())
    for name, model in plan["models"].items():
        logits, tokens = logits_and_greedy(model, plan["sharding"])
        np.savez(Path(plan["out"]) / f"{name}-{os.environ['RANK']}.npz", logits=logits, tokens=tokens)
    return 0
