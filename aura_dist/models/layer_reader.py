"""Weights of one decoder layer at a time, from the checkpoint, by a thread of their own.

A layer's tensors go through transformers' own conversion, so that any checkpoint will do that `from_pretrained` takes.
On a CPU the weights stay in their files, which are memory-mapped, where they have the dtype of the forward. The thread
then reads them into the page cache, because a forward that waits for the disk page by page is slow.
"""

import ctypes
import mmap
import re
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel

from aura_dist.errors import ModelError, brief
from aura_dist.models.adapter import MergedWeight
from aura_dist.models.layer_cache import LayerCache, Places, Tensors
from aura_dist.ranks.torch_adapter import is_out_of_memory
from aura_dist.sites.transformers_adapter import initialize_rest, is_optional, load_tensors, loaded_names

# so much of a file is read at once
_PIECE_BYTES = 4 << 20
_MADV_COLD = 20  # of Linux; Python has no name for it


class LayerReader:
    """Loads and drops decoder layers of a model whose layers are on the meta device.

    Parameters
    ----------
    model, layers_name
        A model that has the layers, and the name of its list of them. Nobody else changes it, because the thread looks
        for parameters in it.
    tensors
        The checkpoint's tensors by name; each is read when it is indexed.
    places
        Where their bytes are.
    dtype, device
        Of the weights, for the forward.
    opened
        The checkpoint's files; they stay open until `close`.
    source
        The checkpoint's name, for errors.
    cache
        Copies of layers that have been read.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers_name: str,
        tensors: Tensors,
        places: Places,
        dtype: torch.dtype,
        device: str,
        opened: ExitStack,
        source: str,
        cache: LayerCache | None = None,
    ) -> None:
        self._source, self._cache = source, cache
        self._model, self._dtype, self._device, self._opened = model, dtype, torch.device(device), opened
        self._name = layers_name
        layers = model.get_submodule(layers_name)
        assert isinstance(layers, nn.ModuleList)
        self._layers = layers
        self._meta: list[dict[str, Tensor]] = [dict(layer.state_dict(keep_vars=True)) for layer in layers]
        self._tensors: list[dict[str, Any]] = [{} for _ in layers]
        self._places = places
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="layer-reader")
        self._coming: dict[int, Future[Any]] = {}
        self._in_files: dict[int, list[Tensor]] = {}  # tensors of safetensors that a loaded layer uses without a copy
        self._stream: Any = None
        self.waited_seconds = 0.0  # by the forward, for weights
        self.read_seconds, self._num_read = 0.0, 0  # by the thread
        self._sort(tensors)

    def _sort(self, tensors: Tensors) -> None:
        """Find the layer of each tensor; ModelError if a layer lacks a weight."""
        loaded, pattern = loaded_names(self._model), re.compile(rf"{re.escape(self._name)}\.(\d+)\.(.+)")
        there: list[set[str]] = [set() for _ in self._layers]
        converted = set()
        for name, tensor in tensors.items():
            target, changed = loaded(name)
            found = pattern.fullmatch(target)
            if found and int(found[1]) < len(self._layers):
                index = int(found[1])
                self._tensors[index][name] = tensor
                there[index].add(found[2])
                if changed:
                    converted.add(index)
        for index, names in enumerate(there):
            if index not in converted:  # what is joined or cut shows only when it is loaded
                self._check(index, [name for name in self._meta[index] if name not in names])

    def _check(self, index: int, missing: Sequence[str]) -> None:
        names = [f"{self._name}.{index}.{name}" for name in missing]
        names = [name for name in names if not is_optional(self._model, name)]
        if names:
            raise ModelError(
                f"--model {self._source!r}: the checkpoint lacks {len(names)} of the weights of a layer, "
                f"{names[0]!r} among them; use a whole checkpoint of this architecture"
            )

    def start(self, index: int) -> None:
        """Begin to load a layer, unless that has begun."""
        if index not in self._coming:
            self._coming[index] = self._pool.submit(self._load, index)

    def take(self, index: int) -> nn.Module:
        """The layer with its weights; waits for them."""
        self.start(index)
        begun = time.perf_counter()
        event = self._coming[index].result()
        self.waited_seconds += time.perf_counter() - begun
        layer = self._layers[index]
        if event is not None:
            stream = torch.get_device_module(self._device).current_stream(self._device)
            stream.wait_event(event)
            for weight in layer.state_dict(keep_vars=True).values():
                weight.record_stream(stream)
        return layer

    @contextmanager
    def lent(self, index: int, to: int) -> Iterator[nn.Module]:
        """The layer `to`, within the context with the weights of layer `index`, which is loaded, if they fit it.

        If they do not, or if its own were begun, it comes with its own.
        """
        layer, lender = self._layers[to], self._layers[index]
        own, weights = _held(layer), _held(lender)
        own_shapes, shapes = ({name: tensor.shape for name, tensor in held.items()} for held in (own, weights))
        fit = type(layer) is type(lender) and own_shapes == shapes
        if not fit or to in self._coming:
            yield self.take(to)
            return
        try:
            for name, tensor in weights.items():
                _set(layer, name, tensor)
            yield layer.eval()
        finally:
            for name, tensor in own.items():
                _set(layer, name, tensor)

    def drop(self, index: int) -> None:
        """Free a layer's weights."""
        future = self._coming.pop(index, None)
        if future is not None:
            future.result()
            _let_go(self._in_files.pop(index))
            for name, tensor in self._meta[index].items():
                _set(self._layers[index], name, tensor)

    def close(self) -> None:
        """Stop the thread and close the checkpoint's files."""
        self._pool.shutdown(cancel_futures=True)
        for index in list(self._coming):
            self._coming.pop(index)
        self._opened.close()

    @property
    def seconds_per_layer(self) -> float:
        """How long the thread takes for a layer, on average so far."""
        return self.read_seconds / max(1, self._num_read)

    @property
    def two_layers_bytes(self) -> int:
        """Bytes of the two largest layers, which are in memory at once."""
        return sum(sorted(sum(tensor.nbytes for tensor in layer.values()) for layer in self._meta)[-2:])

    @torch.no_grad()
    def _load(self, index: int) -> Any:
        """Load a layer; on a GPU, returns an event of its last copy."""
        begun = time.perf_counter()
        layer, tensors = self._layers[index], self._tensors[index]
        with ExitStack() as opened:
            copied = None if self._cache is None else self._cache.take(index, tensors, opened)
            try:
                _read_ahead(*(copied or (tensors, self._places)))
                broken = load_tensors(self._model, copied[0] if copied else tensors, self._dtype)
            except (OSError, RuntimeError, SafetensorError) as error:
                if is_out_of_memory(error):  # the stage says what fits
                    raise
                raise ModelError(f"--model {self._source!r}: layer {index} cannot be loaded: {brief(error)}") from error
        missing = [name for name, weight in layer.state_dict(keep_vars=True).items() if weight.is_meta]
        self._check(index, missing or [name.removeprefix(f"{self._name}.{index}.") for name in broken])
        initialize_rest(self._model, layer)
        if self._device.type == "cpu":
            event = None
            _touch(layer)
        else:
            event = self._to_device(layer)
        layer.eval().requires_grad_(False)
        self._in_files[index] = self._used_in_files(layer, copied[0] if copied else tensors)
        self.read_seconds += time.perf_counter() - begun
        self._num_read += 1
        if self._cache is not None:
            self._cache.keep(index, tensors, self._places)
        return event

    def _used_in_files(self, layer: nn.Module, tensors: Tensors) -> list[Tensor]:
        """Those of the checkpoint's tensors that the layer uses without a copy; the pages of others are let go.

        Only safetensors: a file in torch's own format is mapped twice, and `MergedWeight` is read, not mapped.
        """
        addresses = {held.data_ptr() for held in _held(layer).values()}
        used: list[Tensor] = []
        others: list[Tensor] = []
        for tensor in tensors.values():
            if not isinstance(tensor, MergedWeight | Tensor):
                whole = tensor[...]
                (used if whole.data_ptr() in addresses else others).append(whole)
        _let_go(others)
        return used

    def _to_device(self, layer: nn.Module) -> Any:
        """Copy a layer to the GPU through page-locked memory, beside the forward."""
        accelerator = torch.get_device_module(self._device)
        if self._stream is None:
            self._stream = accelerator.Stream(self._device)
        with accelerator.stream(self._stream):
            for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]:
                if tensor.device.type != self._device.type:  # a buffer that is not saved stays there
                    _set(layer, name, tensor.detach().pin_memory().to(self._device, non_blocking=True))
            return self._stream.record_event()


def _read_ahead(tensors: Tensors, places: Places) -> None:
    """Bring what will be mapped of a layer into the page cache, in the order in which it is in the files."""
    scratch = torch.empty(_PIECE_BYTES, dtype=torch.uint8)
    mapped = [places[name] for name, tensor in tensors.items() if not isinstance(tensor, MergedWeight)]
    for source, stored in sorted(mapped, key=lambda p: (id(p[0]), p[1].start)):
        for start in range(stored.start, stored.stop, _PIECE_BYTES):
            source.read(start, scratch[: min(_PIECE_BYTES, stored.stop - start)])


def _touch(layer: nn.Module) -> None:
    """Map each page of the weights, because pages that nothing maps are the first that the system drops."""
    for weight in layer.parameters():
        if weight.is_contiguous():
            weight.detach().reshape(-1).view(torch.uint8)[:: mmap.PAGESIZE].sum()


def _let_go(tensors: Sequence[Tensor]) -> None:
    """Unmap tensors of files, and have the system drop their pages first, where no other process maps them.

    Without it pages that were mapped outlive pages that were read ahead, which in little memory are then read twice.
    The tensors may be used again. Does nothing but on Linux, whose advice MADV_COLD this is (since 5.4).
    """
    if sys.platform != "linux":
        return
    for tensor in tensors:
        begin = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        size = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - begin
        if size > 0:
            _advise(begin, size, _MADV_COLD)  # first, because a page that was used lately is kept when it is unmapped
            _advise(begin, size, mmap.MADV_DONTNEED)


def _advise(begin: int, size: int, advice: int) -> int:
    """The system's `madvise`; 0 if it was taken."""
    return int(ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), advice))


def _held(layer: nn.Module) -> dict[str, Tensor]:
    """A layer's parameters and buffers, also those that no checkpoint has."""
    return {**dict(layer.named_parameters()), **dict(layer.named_buffers())}


def _set(layer: nn.Module, name: str, tensor: Tensor) -> None:
    """Replace a parameter or a buffer of a layer."""
    holder, _, own = name.rpartition(".")
    module = layer.get_submodule(holder)
    is_parameter = isinstance(getattr(module, own), nn.Parameter)
    setattr(module, own, nn.Parameter(tensor, False) if is_parameter else tensor)
