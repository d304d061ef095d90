"""Files of safetensors, written piece by piece, so that a tensor may be larger than memory.

The format: the header's length as little-endian uint64, the header as JSON (name → dtype, shape, place of its bytes),
then the tensors' bytes without gaps. See huggingface.co/docs/safetensors.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_NAMES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "int64": "I64", "int32": "I32", "int8": "I8", "uint8": "U8",
}  # fmt: skip
BFLOAT16 = "BF16"  # of arrays of uint16, its bits


@dataclass(frozen=True)
class Tensor:
    """A tensor to write: `pieces()` are its values along the first dim, in order."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    pieces: Callable[[], Iterable[NDArray[Any]]]
    stored_as: str = ""  # a name of the format, where it is not the dtype's

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def write_tensors(path: Path, tensors: Sequence[Tensor]) -> None:
    """Write the tensors into a new file, in the memory of one piece."""
    # the widest dtype first, so that each tensor begins at a multiple of its items
    tensors = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    header, end = {}, 0
    for tensor in tensors:
        places = [end, end := end + tensor.num_bytes]
        dtype = tensor.stored_as or _NAMES[tensor.dtype.name]
        header[tensor.name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": places}
    described = json.dumps(header).encode()
    described += b" " * (-len(described) % 8)
    with path.open("wb") as file:
        file.write(len(described).to_bytes(8, "little") + described)
        for tensor in tensors:
            begun = file.tell()
            for piece in tensor.pieces():
                file.write(np.ascontiguousarray(piece, tensor.dtype).data)
            assert file.tell() - begun == tensor.num_bytes, tensor.name
