"""Which tokens a store has, and the values that it keeps of each.

```
samples/offset     [sample + 1] int64: the tokens of row i are [offset[i], offset[i + 1]) of all tokens
samples/place      [sample] int64: where the values of the row's tokens begin in `activations/<site>/tokens`
tokens/input_ids   [token] int32, row by row, padding left out
tokens/sample      [token] int32: row of the store
tokens/position    [token] int32: place in the text, as the model sees it
tokens/counted     [token] uint8: whether poolings count it; the values of the others are stored too
```
The axis of the values has places that hold no token, because each batch begins with a shard (see `grid.TokenGrid`).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from aura_dist.store.access import get_sharded, read_array, read_region
from aura_dist.store.grid import token_grid
from aura_dist.store.schema import TOKEN_FIELDS, activation_path
from aura_dist.text.tokens import TokenizedTexts

_EXPONENT = 0x7F80  # of bfloat16's bits: all of them are set in NaN and infinities


def token_arrays(texts: TokenizedTexts, tokens_per_batch: int) -> dict[str, NDArray[Any]]:
    """Path → values of the arrays that say which tokens there are; `texts` are in store order."""
    num_tokens = texts.num_tokens.astype(np.int64)
    offset = np.concatenate([[0], np.cumsum(num_tokens)])
    place, grid = np.empty(len(num_tokens), np.int64), token_grid(num_tokens.tolist(), tokens_per_batch)
    for number, rows in enumerate(grid.blocks):
        place[rows] = number * grid.block_tokens + offset[rows] - offset[rows.start]
    sample = np.repeat(np.arange(len(num_tokens)), num_tokens)
    fields = {
        "input_ids": np.concatenate(texts.ids),
        "sample": sample,
        "position": np.arange(offset[-1]) - offset[sample],
        "counted": np.concatenate([texts.counted(rows) for rows in grid.blocks]),
    }
    stored = {f"tokens/{name}": values.astype(TOKEN_FIELDS[name]) for name, values in fields.items()}
    return {"samples/offset": offset, "samples/place": place, **stored}


@dataclass(frozen=True)
class StoredTokens:
    """The tokens of a store, row by row without gaps, and their values at each site."""

    group: zarr.Group
    offset: NDArray[np.int64]  # [N + 1]
    place: NDArray[np.int64]  # [N]
    _fields: dict[str, NDArray[Any]] = field(default_factory=dict)

    @classmethod
    def of(cls, group: zarr.Group) -> "StoredTokens":
        """Of an open store that has tokens; StoreError if it is damaged."""
        return cls(group, read_array(group, "samples/offset"), read_array(group, "samples/place"))

    @property
    def num_tokens(self) -> int:
        return int(self.offset[-1])

    def field(self, name: str) -> NDArray[Any]:
        """[token] one of `TOKEN_FIELDS`, read once."""
        if name not in self._fields:
            self._fields[name] = read_array(self.group, f"tokens/{name}", complete=True)
        return self._fields[name]

    def values(self, site: str) -> "TokenValues":
        """The values of a site; StoreError if there are none."""
        return TokenValues(self, get_sharded(self.group, activation_path(site)))

    @cached_property
    def runs(self) -> NDArray[np.int64]:
        """[run, 2] where each run of tokens without a gap between their places begins: its token, and its place."""
        gaps = np.diff(self.place) != np.diff(self.offset)[:-1]
        begins = np.concatenate([[0], np.flatnonzero(gaps) + 1])
        return np.stack([self.offset[begins], self.place[begins]], axis=1)

    def pieces(self, tokens: slice) -> Iterator[tuple[int, int, int]]:
        """The token, the place and the length of each part of a run of tokens whose places have no gap."""
        ends = [*self.runs[1:, 0].tolist(), self.num_tokens]
        first = int(np.searchsorted(self.runs[:, 0], tokens.start, side="right")) - 1
        for (begin, place), end in zip(self.runs[first:].tolist(), ends[first:], strict=True):
            start, stop = max(begin, tokens.start), min(end, tokens.stop)
            if start < stop:
                yield start, place + start - begin, stop - start
            if end >= tokens.stop:
                break


@dataclass(frozen=True)
class TokenValues:
    """One site's values, [T, D]; float32 where bits of bfloat16 are stored."""

    tokens: StoredTokens
    array: "zarr.Array[Any]"

    @property
    def shape(self) -> tuple[int, int]:
        return self.tokens.num_tokens, int(self.array.shape[1])

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(np.float32) if self.are_bits else self.array.dtype

    @property
    def are_bits(self) -> bool:
        """Whether bits of bfloat16 are stored."""
        return self.array.attrs.get("bits_of") == "bfloat16"

    def stored(self, tokens: slice, columns: slice | None = None, *, complete: bool = True) -> NDArray[Any]:
        """As `read`, in the dtype that is stored."""
        columns = columns or slice(0, self.shape[1])
        parts = [np.empty((0, columns.stop - columns.start), self.array.dtype)]
        for _, place, length in self.tokens.pieces(tokens):
            within = place % self.array.chunks[0]
            region = (slice(place - within, place + length), columns)
            parts.append(read_region(self.tokens.group, self.array, region, complete=complete)[within:])
        return np.concatenate(parts)

    def read(self, tokens: slice, columns: slice | None = None, *, complete: bool = True) -> NDArray[Any]:
        """[n, D] values of some of all tokens; `columns` begin with a chunk.

        StoreError if a shard is damaged, or is missing although `complete`; else its values are NaN.
        """
        values = self.stored(tokens, columns, complete=complete)
        return from_bits(values) if self.are_bits else values


def from_bits(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The float32 values of bfloat16's bits, which are the upper half of theirs."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def num_nonfinite(values: NDArray[Any]) -> int:
    """How many values are NaN or infinite; uint16 are bits of bfloat16."""
    if values.dtype == np.uint16:
        return int(np.count_nonzero((values & _EXPONENT) == _EXPONENT))
    return values.size - int(np.count_nonzero(np.isfinite(values)))
