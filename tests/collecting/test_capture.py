"""Copies to the host are asynchronous, on any accelerator, and `copied` waits for them."""

from contextlib import contextmanager
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

    copies: ClassVar[list[tuple[bool, bool]]] = []
    device = property(lambda self: torch.device("xpu"))

    def record_stream(self, stream):
        stream.kept.append(self)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.Tensor.copy_:
            cls.copies.append((Xpu.active is not None, kwargs["non_blocking"]))
        return super().__torch_function__(function, types, args, kwargs or {})


class Stream:
    def __init__(self, device):
        self.waited_for, self.kept, self.events = [], [], []
        Xpu.made.append(self)

    def wait_stream(self, other):
        self.waited_for.append(other)

    def record_event(self):
        self.events.append(Event())
        return self.events[-1]


class Event:
    done = False

    def synchronize(self):
        self.done = True


class Xpu:
    """What torch has for the streams of a kind of device."""

    Stream = Stream
    active = None
    made: ClassVar[list[Stream]] = []

    @staticmethod
    def current_stream(device):
        return "of the forward"

    @staticmethod
    @contextmanager
    def stream(stream):
        Xpu.active = stream
        yield
        Xpu.active = None


def test_copies_run_beside_the_forward_on_any_accelerator(monkeypatch):
    model, site = tiny_causal("llama"), "model.layers.0.mlp.up_proj"
    sites = find_sites(model).select([site])
    plans = {site: plan_columns(sites[0].width, sites[0].width, [((0, sites[0].width),)], [0])[0]}
    tokens = TokenizedTexts([np.arange(3, 8), np.arange(4, 12)], np.array([0]), skip_special=False)
    expected, buffer = ({(site, "max"): np.full((4, sites[0].width), np.nan, np.float32)} for _ in range(2))

    def run(into):
        capture = Capture(model.base_model, sites, plans, ["max"], "cpu")
        with capture.listening():
            for at in (0, 2):
                capture.run(tokens.batch(slice(0, 2)), into, at)
        capture.copied()()

    run(expected)
    pool = POOLINGS["max"].pool
    there = replace(POOLINGS["max"], pool=lambda mask, acts: pool(mask, acts).as_subclass(OnXpu))
    monkeypatch.setitem(POOLINGS, "max", there)
    monkeypatch.setattr(torch, "get_device_module", lambda device: Xpu)
    run(buffer)
    assert OnXpu.copies == [(True, True)] * 2
    (stream,) = Xpu.made
    assert stream.waited_for == ["of the forward"] * 2
    assert len(stream.kept) == 2, "memory is not given to others while it is copied"
    assert [event.done for event in stream.events] == [True]
    np.testing.assert_array_equal(buffer[site, "max"], expected[site, "max"])
