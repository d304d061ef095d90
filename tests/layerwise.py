"""Batches of token ids, and a model that runs them layer by layer."""

import torch

from aura_dist.models.layerwise import executor_of
from aura_dist.ranks.layout import Layout
from aura_dist.ranks.world import World
from tests.models import VOCAB

LAYERS = World(Layout("layers"))


def batches(seed=0):
    """Two batches of token ids, the first with padding."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for rows, tokens in ((3, 20), (2, 37)):
        ids = torch.randint(3, VOCAB, (rows, tokens), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, tokens - 4 :] = 0
        found.append({"input_ids": ids, "attention_mask": mask})
    return found


def by_layer(model, inputs):
    """What the model returns first for each batch, all of which are one wave."""
    executor = executor_of(model)
    executor.prepare(inputs[0])
    for key, given in enumerate(inputs):
        executor.record(key, given)
    for layer in executor.layers():
        held = [i for i, module in enumerate(executor._layers) if not any(p.is_meta for p in module.parameters())]
        assert layer in held
        assert set(held) <= {layer, layer + 1}, "two layers are in memory at most"
        for key in range(len(inputs)):
            executor.run(layer, key)
    return [executor.finish(key, given)[0] for key, given in enumerate(inputs)]
