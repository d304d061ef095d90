"""Copies to the host are asynchronous only where something waits for them."""

from dataclasses import replace
from typing import ClassVar

import numpy as np
import torch

from aura_dist.collecting.capture import Capture
from aura_dist.sites.find import find_sites
from aura_dist.sites.ownership import plan_columns
from aura_dist.sites.pooling import POOLINGS
from aura_dist.text.tokens import TokenizedTexts
from tests.models import tiny_causal


class OnXpu(torch.Tensor):
    """A host tensor that says that it is on an Intel GPU, and notes how it is copied."""

    copies: ClassVar[list[bool]] = []
    device = property(lambda self: torch.device("xpu"))

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.Tensor.copy_:
            cls.copies.append(kwargs["non_blocking"])
        return super().__torch_function__(function, types, args, kwargs or {})


def test_copies_from_a_gpu_without_streams_of_ours_block(monkeypatch):
    model, site = tiny_causal("llama"), "model.layers.0.mlp.up_proj"
    sites = find_sites(model).select([site])
    plans = {site: plan_columns(sites[0].width, 16, [((0, sites[0].width),)])[0]}
    tokens = TokenizedTexts([np.arange(3, 8), np.arange(4, 12)], np.array([0]), skip_special=False)
    expected, buffer = ({(site, "max"): np.full((2, sites[0].width), np.nan, np.float32)} for _ in range(2))

    def run(into):
        capture = Capture(model.base_model, sites, plans, ["max"], "cpu")
        with capture.listening():
            capture.run(tokens.batch(slice(0, 2)), into, 0)
        capture.copied()()

    run(expected)
    pool = POOLINGS["max"].pool
    there = replace(POOLINGS["max"], pool=lambda mask, acts: pool(mask, acts).as_subclass(OnXpu))
    monkeypatch.setitem(POOLINGS, "max", there)
    run(buffer)
    assert OnXpu.copies == [False]
    np.testing.assert_array_equal(buffer[site, "max"], expected[site, "max"])
