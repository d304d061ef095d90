"""Write a new weight file: some tensors folded, the rest copied block by block at the disk's speed.

The headers alone fix the layout of the new file. The work is a list of independent blocks; one thread reads, changes
and writes each. A thread holds a few blocks, whatever the size of a tensor.
"""

import errno
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial, reduce
from math import prod
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aura_dist.errors import ModelError
from aura_dist.interventions.export.fold import FoldPlan, changed
from aura_dist.models.weights import FLOATS, Source, Stored, as_bytes, header, open_weights, write_all
from aura_dist.sites.tap import Fold, Vector

# float32 bytes of a block that stays in the processor's cache: 4 times as fast as 8 MB
BLOCK_BYTES = 2 << 20
COPY_BYTES = 64 << 20
NUM_THREADS = 4


@dataclass(frozen=True)
class Target:
    """One tensor of the new file; `source` is None for an added bias, whose values are `values`."""

    stored: Stored
    source: Stored | None
    folds: tuple[Fold, ...] = ()
    values: NDArray[np.float32] | None = None

    @property
    def is_copy(self) -> bool:
        return not self.folds and self.source is not None and self.source.dtype == self.stored.dtype


def layout(tensors: Sequence[Stored], plan: FoldPlan, *, as_float32: bool) -> list[Target]:
    """The new file's tensors in the old order, added biases after their weights; offsets count from the header's end.

    Wider dtypes come first, as safetensors writes them, so that each tensor starts at a multiple of its element's
    size. An added bias replaces a tensor of the same name, which no module used.
    """
    new_names = {name for name, _ in plan.added.values()}
    found: list[tuple[int, Target]] = []  # with the bytes of an element
    for tensor in tensors:
        if tensor.name in new_names:
            continue
        item = (tensor.stop - tensor.start) // max(1, prod(tensor.shape))
        dtype = tensor.dtype
        if as_float32 and dtype in ("F16", "BF16"):
            dtype, item = "F32", 4
        found.append((item, Target(replace(tensor, dtype=dtype), tensor, plan.folds.get(tensor.name, ()))))
        if tensor.name in plan.added:
            name, values = plan.added[tensor.name]
            found.append((item, Target(Stored(name, dtype, values.shape, 0, 0), None, (), values)))
    placed, at = [], 0
    for item, target in sorted(found, key=lambda f: -f[0]):
        source = target.source
        # elements of some dtypes take less than a byte, so a kept dtype keeps its size
        if source is not None and source.dtype == target.stored.dtype:
            stop = at + source.stop - source.start
        else:
            stop = at + prod(target.stored.shape) * item
        placed.append(replace(target, stored=replace(target.stored, start=at, stop=stop)))
        at = stop
    return placed


def write(source: Source, path: Path, targets: Sequence[Target], metadata: Mapping[str, str]) -> None:
    """Write the file; the first error of a block stops the others.

    Raises
    ------
    OSError
        The disk is full, or the file cannot be written.
    ModelError
        The source ends early, or a folded float16 value overflows.
    """
    head = header([target.stored for target in targets], metadata)
    file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    try:
        write_all(file, memoryview(head), 0)
        os.ftruncate(file, len(head) + max((t.stored.stop for t in targets), default=0))
        # each thread has its block, so that torch's own threads would only wait for each other
        with ThreadPoolExecutor(NUM_THREADS, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            futures = [pool.submit(job) for job in _jobs(source, file, targets, len(head))]
            try:
                for future in futures:
                    future.result()
            finally:
                pool.shutdown(cancel_futures=True)
    finally:
        os.close(file)
        torch.set_num_threads(torch.get_num_threads())  # part of the setting is the process's


def product(file: Path, matrix: Stored, vector: Vector, dim: int) -> Vector:
    """The product of a matrix in a weight file with a vector along `dim`, summed in float64, some rows at a time."""
    rows, columns = matrix.shape
    dtype, along = FLOATS[matrix.dtype], torch.from_numpy(vector).double()
    out, step = torch.zeros(columns if dim == 0 else rows, dtype=torch.float64), max(1, BLOCK_BYTES // (8 * columns))
    with open_weights(file) as source:
        for start in range(0, rows, step):
            part = slice(start, min(start + step, rows))
            raw = torch.empty((part.stop - start) * columns, dtype=dtype)
            source.read(matrix.start + start * columns * dtype.itemsize, raw.view(torch.uint8))
            wide = raw.view(-1, columns).double()
            if dim == 0:
                out += along[part] @ wide
            else:
                out[part] = wide @ along
    return out.float().numpy()


def _jobs(source: Source, file: int, targets: Sequence[Target], base: int) -> Iterator[Callable[[], None]]:
    """Independent pieces of the work, in the order of the new file."""
    for run in _runs(targets, joined=source.descriptor is not None):
        first, last, at = run[0], run[-1].source, base + run[0].stored.start
        if first.source is None or last is None:
            assert first.values is not None
            values = torch.from_numpy(first.values).to(FLOATS[first.stored.dtype])
            if not values.isfinite().all():
                raise _overflow(first)
            yield partial(write_all, file, as_bytes(values), at)
        elif first.is_copy:
            for start in range(first.source.start, last.stop, COPY_BYTES):
                stop = min(start + COPY_BYTES, last.stop)
                yield partial(_copy, source, start, stop, file, at + start - first.source.start)
        else:
            rows, columns = _matrix(first)
            step = max(1, BLOCK_BYTES // (4 * columns))
            for start in range(0, rows, step):
                stop = min(start + step, rows)
                yield partial(_change, source, first, slice(start, stop), columns, file, at)


def _runs(targets: Sequence[Target], *, joined: bool) -> Iterator[list[Target]]:
    """Tensors one by one; those that are only copied and are neighbours in both files come together."""
    run: list[Target] = []
    for target in targets:
        before = run[-1].source if run and joined and run[-1].is_copy and target.is_copy else None
        if run and (before is None or target.source is None or target.source.start != before.stop):
            yield run
            run = []
        run.append(target)
    if run:
        yield run


def _matrix(target: Target) -> tuple[int, int]:
    """Rows and columns of a tensor's blocks: a vector, or a tensor that is only converted, has one column."""
    shape = target.stored.shape
    return (prod(shape[:-1]), shape[-1]) if target.folds and len(shape) > 1 else (prod(shape), 1)


def _copy(source: Source, start: int, stop: int, file: int, at: int) -> None:
    """Copy bytes [start, stop) of the source to `at`, within the kernel where it can."""
    while source.descriptor is not None and start < stop:
        try:
            count = os.copy_file_range(source.descriptor, file, stop - start, start, at)
        except OSError as error:
            if error.errno not in _CANNOT_COPY:
                raise
            break
        if not count:
            break  # the file ends, or the file system copies nothing: reading shows which
        start, at = start + count, at + count
    for begin in range(start, stop, BLOCK_BYTES):
        buffer = _BUFFERS.take("raw", min(BLOCK_BYTES, stop - begin), torch.uint8)
        source.read(begin, buffer)
        write_all(file, as_bytes(buffer), at + begin - start)


def _change(source: Source, target: Target, rows: slice, columns: int, file: int, at: int) -> None:
    """Read some rows of a tensor, fold, convert and write them; `at` is where the new tensor begins."""
    assert target.source is not None
    old, new = FLOATS[target.source.dtype], FLOATS[target.stored.dtype]
    count = (rows.stop - rows.start) * columns
    raw = _BUFFERS.take("raw", count, old)
    source.read(target.source.start + rows.start * columns * old.itemsize, raw.view(torch.uint8))
    folded = _folded(raw, target.folds, rows, columns) if target.folds else raw
    if folded.dtype != new:
        folded = _BUFFERS.take("out", count, new).copy_(folded)
    if new == torch.float16 and not folded.isfinite().all() and raw.isfinite().all():
        raise _overflow(target)
    write_all(file, as_bytes(folded), at + rows.start * columns * new.itemsize)


def _folded(raw: Tensor, folds: Sequence[Fold], rows: slice, columns: int) -> Tensor:
    """The folded values before rounding to the tensor's dtype: float32 products, or float64 where there is a sum."""
    if columns == 1 and all(fold.dim == 0 for fold in folds):
        return reduce(lambda values, fold: changed(values, fold, rows), folds, raw)
    wide = raw if raw.dtype.itemsize >= 4 else _BUFFERS.take("wide", raw.numel(), torch.float32).copy_(raw)
    for fold in folds:
        if fold.scale.ndim == 3:  # one row of scales for each of the matrices that the tensor stacks
            of_row = np.arange(rows.start, rows.stop) // fold.scale.shape[1]
            scale = torch.from_numpy(fold.scale[of_row, 0])
        else:
            scale = torch.from_numpy(fold.scale) if fold.dim else torch.from_numpy(fold.scale[rows])[:, None]
        wide.view(-1, columns).mul_(scale)
    return wide


def _overflow(target: Target) -> ModelError:
    return ModelError(f"tensor {target.stored.name!r} overflows float16 when folded; export with --dtype float32")


class _Buffers(threading.local):
    """A thread's working memory, kept from block to block because fresh pages would cost more than the work."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def take(self, name: str, count: int, dtype: torch.dtype) -> Tensor:
        num_bytes = count * dtype.itemsize
        if name not in self._held or self._held[name].numel() < num_bytes:
            self._held[name] = torch.empty(num_bytes, dtype=torch.uint8)
        return self._held[name][:num_bytes].view(dtype)


_BUFFERS = _Buffers()
_CANNOT_COPY = {errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM}
