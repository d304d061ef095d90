"""Hidden states that wait for the next layer: on the device, in host memory, and beyond a limit in a file."""

import os
import tempfile
from collections import Counter, defaultdict
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from aura_dist.errors import ModelError
from aura_dist.models.weights import as_bytes
from aura_dist.ranks.device import page_locked_bytes

_DEVICE, _HOST, _FILE = "device", "host", "file"


@dataclass(frozen=True)
class _Kept:
    """A tensor, where it is and its bytes there; in the file: its form, on the meta device, and its first byte."""

    where: str
    tensor: Tensor
    nbytes: int
    offset: int = 0


class Waiting:
    """Tensors by batch and name.

    Parameters
    ----------
    device
        Where the forward takes them.
    device_bytes, host_bytes
        Most that wait on a GPU, and in host memory; what comes later waits in a file.
    folder
        Directory of that file; None is the system's for temporary files. The file ends with the process.
    """

    def __init__(self, device: str, device_bytes: float, host_bytes: float, folder: str | None = None) -> None:
        self._device = torch.device(device)
        self._limits = {_DEVICE: device_bytes if self._device.type != "cpu" else 0, _HOST: host_bytes}
        self._used: Counter[str] = Counter()
        self._kept: defaultdict[Hashable, dict[Hashable, _Kept]] = defaultdict(dict)
        self._folder = folder
        self._file: IO[bytes] | None = None
        self._free: defaultdict[int, list[int]] = defaultdict(list)
        self._end = 0

    def put(self, batch: Hashable, name: Hashable, tensor: Tensor) -> None:
        """Keep a tensor; ModelError if the file cannot be written."""
        sizes = {_DEVICE: tensor.nbytes, _HOST: tensor.nbytes, _FILE: tensor.nbytes}
        if tensor.device.type != "cpu":
            sizes[_HOST] = page_locked_bytes(tensor.nbytes)
        where = next((w for w, limit in self._limits.items() if self._used[w] + sizes[w] <= limit), _FILE)
        nbytes = sizes[where]
        if where == _FILE:
            kept = _Kept(where, tensor.to("meta"), nbytes, self._write(tensor))
        elif where == _HOST and tensor.device.type != "cpu":
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            kept = _Kept(where, host.copy_(tensor, non_blocking=True), nbytes)
        else:
            kept = _Kept(where, tensor, nbytes)
        self._used[where] += nbytes
        self._kept[batch][name] = kept

    def get(self, batch: Hashable, name: Hashable) -> Tensor:
        """A tensor that is kept, on the device."""
        kept = self._kept[batch][name]
        tensor = self._read(kept) if kept.where == _FILE else kept.tensor
        return tensor.to(self._device, non_blocking=True)

    def drop(self, batch: Hashable, name: Hashable) -> None:
        """Forget a tensor, if it is kept."""
        kept = self._kept[batch].pop(name, None)
        if kept is not None:
            self._used[kept.where] -= kept.nbytes
            if kept.where == _FILE:
                self._free[kept.nbytes].append(kept.offset)

    def drop_batch(self, batch: Hashable) -> None:
        """Forget all tensors of a batch."""
        for name in list(self._kept.get(batch, ())):
            self.drop(batch, name)
        self._kept.pop(batch, None)

    def close(self) -> None:
        """Forget everything."""
        self._kept.clear()
        if self._file is not None:
            self._file.close()

    def _write(self, tensor: Tensor) -> int:
        """Write a tensor to the file; return its offset."""
        flat: Any = as_bytes(tensor.detach().cpu().contiguous().reshape(-1))
        free = self._free[len(flat)]
        offset = free.pop() if free else self._end
        try:
            if self._file is None:
                if self._folder is not None:
                    Path(self._folder).mkdir(parents=True, exist_ok=True)
                self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115
            at = 0
            while at < len(flat):
                at += os.pwrite(self._file.fileno(), flat[at:], offset + at)
        except OSError as error:
            where = self._folder or tempfile.gettempdir()
            raise ModelError(
                f"--host-memory: hidden states that wait in a file of {where!r} cannot be written: {error}; expected "
                "room on that disk; name another with --offload-folder, or give smaller --wave-tokens"
            ) from error
        self._end = max(self._end, offset + len(flat))
        return offset

    def _read(self, kept: _Kept) -> Tensor:
        assert self._file is not None
        tensor = torch.empty(kept.tensor.shape, dtype=kept.tensor.dtype)
        flat, at = as_bytes(tensor.reshape(-1)), 0
        while at < len(flat):
            count = os.preadv(self._file.fileno(), [flat[at:]], kept.offset + at)
            assert count, "the file holds what was written"
            at += count
        return tensor
