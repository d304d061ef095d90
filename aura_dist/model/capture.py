"""Hooks that pool every site's output on the device and put it into the store's row buffers."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from types import TracebackType

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from aura_dist.core.sites import Site
from aura_dist.data.tokens import Batch
from aura_dist.errors import ModelError
from aura_dist.model.pooling import TokenMask
from aura_dist.model.sharding import DTYPES
from aura_dist.store.schema import StoreSpec, stored_dtype
from aura_dist.store.writer import RowBuffer


def row_buffer(spec: StoreSpec, num_rows: int, device: str) -> RowBuffer:
    """An empty buffer of one row chunk for all sites; page-locked where a GPU copies into it on its own."""
    return {
        (site.name, pooling): torch.empty(
            (num_rows, site.width),
            dtype=DTYPES[stored_dtype(pooling, spec.dtype)],
            pin_memory=device != "cpu",
        ).numpy()
        for site in spec.sites
        for pooling in spec.poolings
    }


class Capture:
    """Runs batches through a base model and copies each site's pooled output to the host.

    Parameters
    ----------
    model
        Base model (no language-model head), in eval mode.
    sites
        What to capture; names as in the causal language model.
    prefix
        Name of the base model within the causal language model.
    poolings
        Methods of `TokenMask`.

    Use as a context manager: leaving it removes the hooks.
    """

    def __init__(self, model: PreTrainedModel, sites: Sequence[Site], prefix: str, poolings: Sequence[str]) -> None:
        self._model = model
        self._sites = {s.name: s for s in sites}
        self._prefix = prefix
        self._poolings = tuple(poolings)
        self._device = next(model.parameters()).device
        self._mask: TokenMask | None = None
        self._shape = (0, 0)
        self._pooled: dict[tuple[str, str], Tensor] = {}
        self._hooks = ExitStack()

    def __enter__(self) -> "Capture":
        for name in self._sites:
            module = self._model.get_submodule(name.removeprefix(f"{self._prefix}."))
            handle = module.register_forward_hook(self._hook(name))
            self._hooks.callback(handle.remove)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.close()

    @torch.no_grad()
    def run(self, batch: Batch, buffer: RowBuffer, at: int) -> None:
        """Forward `batch`; put its pooled outputs into rows [at, at + B) of `buffer`.

        On a GPU the copies are asynchronous: call `wait` before the buffer is read.

        Raises
        ------
        ModelError
            A site was not called, called twice, or gave an output of another shape.
        """
        self._mask = TokenMask.build(batch.pool_mask, self._device)
        self._shape = batch.input_ids.shape
        self._pooled.clear()
        self._model(
            input_ids=torch.from_numpy(batch.input_ids).to(self._device),
            attention_mask=torch.from_numpy(batch.attention_mask).to(self._device, torch.int64),
            use_cache=False,
        )
        if len(self._pooled) != len(self._sites) * len(self._poolings):
            missing = next(n for n in self._sites if (n, self._poolings[0]) not in self._pooled)
            raise ModelError(f"module {missing!r} was not called in the forward pass; leave it out of --modules")
        for key, pooled_BD in self._pooled.items():
            torch.from_numpy(buffer[key][at : at + len(pooled_BD)]).copy_(pooled_BD, non_blocking=True)

    def wait(self) -> None:
        """Block until the buffers given to `run` hold their values."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def _hook(self, name: str) -> Callable[[nn.Module, object, object], None]:
        site = self._sites[name]

        def pool(module: nn.Module, args: object, output: object) -> None:
            acts_BTD = _as_batch(output, self._shape, site)
            if (name, self._poolings[0]) in self._pooled:
                raise ModelError(f"module {name!r} is called twice in a forward pass; leave it out of --modules")
            assert self._mask is not None
            for pooling in self._poolings:
                self._pooled[name, pooling] = getattr(self._mask, pooling)(acts_BTD)

        return pool


def _as_batch(output: object, shape: tuple[int, int], site: Site) -> Tensor:
    """A site's output as [B, T, D]; some models flatten batch and token for a while, or add a dim of heads."""
    num_rows, num_tokens = shape
    same = (*shape, site.width), (num_rows * num_tokens, site.width), (num_rows, 1, num_tokens, site.width)
    if isinstance(output, Tensor) and output.shape in same:
        return output.reshape(*shape, site.width)
    got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    raise ModelError(f"module {site.name!r}: expected an output of shape {(*shape, site.width)}, got {got}")
