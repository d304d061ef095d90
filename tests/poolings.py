"""Every pooling the plain way, for one sentence; poolings that are not here are compared with themselves, unpadded."""

from collections.abc import Callable

import numpy as np
import torch

from aura_dist.sites.pooling import POOLINGS, TokenMask

PLAIN: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "max": lambda acts_TD: acts_TD.max(dim=0).values,
    "mean": lambda acts_TD: acts_TD.mean(dim=0),
    "min": lambda acts_TD: acts_TD.min(dim=0).values,
    "last": lambda acts_TD: acts_TD[-1],
    "absmax": lambda acts_TD: acts_TD.abs().max(dim=0).values,
    "mean_square": lambda acts_TD: acts_TD.square().mean(dim=0),
}


def pool_plainly(acts_TD: torch.Tensor, pooling: str, ids_T: torch.Tensor | None = None) -> torch.Tensor:
    """[D] from one sentence's counted tokens, and their ids for `drawn`."""
    if pooling == "drawn":
        num, key = len(acts_TD), len(acts_TD) + (0 if ids_T is None else int(ids_T.sum()))
        return acts_TD[0 if num == 1 else 1 + int((num - 1) * (key * 1.618033988749895 % 1))]
    if pooling in PLAIN:
        return PLAIN[pooling](acts_TD)
    alone = TokenMask.build(np.ones((1, len(acts_TD)), dtype=np.bool_), acts_TD.device)
    return POOLINGS[pooling].pool(alone, acts_TD[None])[0]
