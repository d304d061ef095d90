"""The store on disk (Zarr v3): what it holds, how it is made, and the settings that fix its numbers.

```
STORE.zarr                             attributes: see `StoreSpec`; `created`, written last
  at_work-ID                           a launch that is at work (see `launches.py`)
  samples/{row, num_tokens, label}     [sample], [sample], [sample, concept]
  samples/{offset, place}              [sample + 1], [sample], where tokens are kept, as the next two; see `tokens.py`
  tokens/{input_ids, sample, position, counted}   [token]
  activations/<site>/tokens            [place, neuron], in shards: a file holds a batch, or a part of one
  activations/<site>/<pooling>         [sample, neuron], in shards: a file holds a row chunk of all or many columns
  progress/done                        [task] uint8, one chunk each
  progress/attempts                    [task] uint8, one chunk each: launches that died in it (see `record.py`)
  progress/nonfinite                   [task, response array] int64, one chunk a task: NaN and infinite responses
  progress/first_token                 [task, rank, unit] uint32, where the first token counts (see `first_token.py`)
  progress/first_token_<pooling>       [unit] uint32, of a pooling that was made from tokens
  scores/<site>/<pooling>              [statistic, concept, neuron]   (see `scores.py`)
```
"""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from math import ceil, prod
from pathlib import PurePosixPath
from typing import Any

import msgspec
import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.abc.buffer import Buffer
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec
from zarr.storage import MemoryStore

from aura_dist.errors import InputError, StoreError, brief
from aura_dist.sites.pooling import POOLINGS, TOKENS
from aura_dist.sites.site import Site
from aura_dist.store.access import FORMAT, SCHEMA_VERSION, clear, errors_of_writing, get_array, get_sharded, store_at
from aura_dist.store.grid import (
    TOKENS_PER_CHUNK,
    Task,
    TokenGrid,
    columns_per_chunk,
    columns_per_shard,
    columns_per_token_chunk,
    make_tasks,
    rows_per_chunk,
    token_grid,
)
from aura_dist.store.zarr_adapter import description, fast_codecs, run_in_zarr

DONE, ATTEMPTS, NONFINITE = "progress/done", "progress/attempts", "progress/nonfinite"
FIRST_TOKEN = "progress/first_token"
# Fields of a store's identity that earlier stores lack: written only where they differ from their default.
ADDED = ("skip_first_tokens", "tokens", "repooled")
MAX_TENSOR_RANKS = 64  # of larger splits, the first tokens are not counted
# one number a token: name → dtype
TOKEN_FIELDS = {"input_ids": "int32", "sample": "int32", "position": "int32", "counted": "uint8"}
_TOKENS_OF_A_CHUNK = 2**20  # of such numbers
_NAN_BITS = 0x7FC0  # bfloat16


@dataclass(frozen=True)
class StoreSpec:
    """The settings that fix the numbers of a store; compared field by field before a store is continued.

    The identities of model, tokenizer and data hold names for people and digests for comparison.
    """

    model: Mapping[str, Any]
    tokenizer: Mapping[str, Any]
    dtype: str  # of the forward
    max_tokens: int
    tokens_per_batch: int
    skip_special_tokens: bool
    poolings: tuple[str, ...]  # in the order of the flags; then those that were made from tokens later
    concepts: tuple[str, ...]  # likewise; none where the texts have no labels
    data: Mapping[str, Any]
    sites: tuple[Site, ...]  # in model order
    uncaptured: tuple[str, ...] = ()  # names of parameters that no site covers (experts of a mixture)
    intervention: Mapping[str, Any] | None = None  # `Intervention.identity` of the one that was over the model
    skip_first_tokens: int = 0
    tokens: tuple[str, ...] = ()  # names of the sites whose values are stored token by token
    repooled: tuple[str, ...] = ()  # poolings that were made from the tokens of a finished store

    @property
    def collected(self) -> tuple[str, ...]:
        """The poolings that `collect` stores."""
        return tuple(pooling for pooling in self.poolings if pooling not in self.repooled)

    @property
    def token_sites(self) -> tuple[Site, ...]:
        """The sites whose values are stored token by token."""
        return tuple(site for site in self.sites if site.name in self.tokens)

    def check_labelled(self, store: str) -> None:
        """InputError if the texts have no labels."""
        if not self.concepts:
            raise InputError(
                f"--store {store!r}: expected texts with labels, got a collection of --unlabelled; collect with "
                "--concepts into another store"
            )

    def index_of(self, concept: str, store: str) -> int:
        """The place of a concept's labels; InputError if there are none."""
        self.check_labelled(store)
        if concept not in self.concepts:
            raise InputError(f"--concept: expected one of {', '.join(self.concepts)}, got {concept!r}")
        return self.concepts.index(concept)

    def to_attributes(self) -> dict[str, Any]:
        left_out = [name for name in ADDED if getattr(self, name) == self.__dataclass_fields__[name].default]
        values = {**asdict(self), "poolings": self.collected}
        return {n: list(v) if isinstance(v, tuple) else v for n, v in values.items() if n not in left_out}

    @classmethod
    def of(cls, group: zarr.Group) -> "StoreSpec":
        """The spec of an open store; StoreError if its attributes are damaged."""
        return cls.from_attributes(group.attrs, str(group.store_path))

    @classmethod
    def from_attributes(cls, attributes: Mapping[str, Any], store: str = "") -> "StoreSpec":
        """The spec of a store that has these attributes; StoreError if they cannot be one's."""
        try:
            spec = msgspec.convert(dict(attributes), cls)
        except msgspec.ValidationError as error:
            raise _unusable(store, brief(error)) from error
        spec = replace(spec, poolings=(*spec.poolings, *spec.repooled))
        stored = (*spec.poolings, *spec.tokens)
        if not (spec.sites and stored and set(spec.poolings) <= POOLINGS.keys()):
            raise _unusable(store, f"{len(spec.sites)} sites, poolings {spec.poolings}")
        return spec


def _unusable(store: str, why: str) -> StoreError:
    return StoreError(
        f"--store {store!r}: expected attributes that `collect` wrote, found {why}; collect again with --overwrite"
    )


@dataclass(frozen=True)
class Samples:
    """The rows of a store, sorted by token count, then by row of the data set."""

    row: NDArray[np.int64]  # [N] row in the data set
    num_tokens: NDArray[np.int32]  # [N]
    label: NDArray[np.int8]  # [N, C]: 1, 0, or −1 = not labelled

    def __len__(self) -> int:
        return len(self.row)


def tasks_of(num_tokens: NDArray[np.int32], tokens_per_batch: int) -> list[Task]:
    """The tasks of a store, a pure function of stored numbers."""
    tokens = num_tokens.tolist()
    return make_tasks(tokens, rows_per_chunk(len(tokens)), tokens_per_batch)


def stored_dtype(pooling: str, forward_dtype: str) -> str:
    """float32, except float16 for poolings that select an output of a float16 model."""
    return "float16" if forward_dtype == "float16" and POOLINGS[pooling].selects else "float32"


def activation_path(site: str, pooling: str = TOKENS) -> str:
    """The path of a site's responses, or of its values token by token."""
    return f"activations/{site}/{pooling}"


def first_token_columns(spec: StoreSpec) -> dict[tuple[str, str], slice]:
    """(site, pooling) → its units in `progress/first_token`: of the poolings that may select any token."""
    columns, start = {}, 0
    for site in spec.sites:
        for pooling in spec.collected:
            if POOLINGS[pooling].of_token:
                columns[site.name, pooling] = slice(start, start := start + site.width)
    return columns


def first_token_path(pooling: str) -> str:
    """[unit] uint32, of all sites: the counts of a pooling that was made from tokens, over all texts."""
    return f"{FIRST_TOKEN}_{pooling}"


def shard_widths(group: zarr.Group, spec: StoreSpec) -> dict[str, int]:
    """Site → columns of one shard, the same for all poolings; all of a site's where there is none."""
    if not spec.poolings:
        return {site.name: site.width for site in spec.sites}
    arrays = {site.name: get_sharded(group, activation_path(site.name, spec.poolings[0])) for site in spec.sites}
    return {name: array.shards[1] for name, array in arrays.items() if array.shards is not None}


def create_store(
    path: str,
    spec: StoreSpec,
    samples: Samples,
    provenance: Mapping[str, Any],
    tokens: Mapping[str, NDArray[Any]] | None = None,
) -> None:
    """Make an empty store at a path or URL in place of one that is there; StoreError if it cannot be written.

    The attribute `created` is written last, so that a half-made store is recognised. `provenance` holds further
    attributes (package versions, resolved config) that do not fix the numbers. `tokens`, needed where `spec` has
    sites of tokens, are the arrays that say which tokens there are (`tokens.token_arrays`).
    """
    num_tasks = len(tasks_of(samples.num_tokens, spec.tokens_per_batch))
    given: dict[str, NDArray[Any]] = {
        "samples/row": samples.row,
        "samples/num_tokens": samples.num_tokens,
        "samples/label": samples.label,
    }
    given |= {name: np.zeros(num_tasks, dtype=np.uint8) for name in (DONE, ATTEMPTS)}
    if spec.tokens:
        assert tokens is not None, "a store of tokens needs to know them"
        given |= tokens
    with errors_of_writing(path), fast_codecs():
        attributes = {"format": FORMAT, "schema_version": SCHEMA_VERSION, **spec.to_attributes(), **provenance}
        clear(path)
        # not in mode "w", which would also remove the marks of launches
        root = zarr.open_group(store_at(path), mode="a", zarr_format=3, attributes=attributes)
        create_arrays(root, _layouts(spec, samples, num_tasks))
        for name, values in given.items():
            get_array(root, name)[...] = values
        root.attrs["created"] = True


@dataclass(frozen=True)
class ArrayLayout:
    """Shape, chunks, dtype and names of the dims of an array of a store, and the value that missing chunks read as.

    `shards`: chunks are in files of this shape; None: each chunk is a file. `names`: of the first dim's places, an
    attribute of the array that is called as the dim in the plural. `num_written`: files that are ever written, where
    these are not all. `bits_of`: an attribute, the dtype whose bits the values are.
    """

    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: str
    dims: tuple[str, ...]
    fill_value: float
    shards: tuple[int, ...] | None = None
    names: tuple[str, ...] = ()
    num_written: int | None = None
    bits_of: str = ""

    @property
    def num_files(self) -> int:
        """Files when all of it is written, and one that describes it."""
        if self.num_written is not None:
            return 1 + self.num_written
        return 1 + prod(ceil(n / size) for n, size in zip(self.shape, self.shards or self.chunks, strict=True))


def _layouts(spec: StoreSpec, samples: Samples, num_tasks: int) -> dict[str, ArrayLayout]:
    """Path → layout of every array that `collect` fills."""
    counted, kept = not spec.skip_first_tokens, len(spec.tokens)
    layouts = progress_layouts(
        spec.sites, spec.collected, samples.label.shape, num_tasks, first_tokens=counted, num_token_sites=kept
    )
    layouts |= response_layouts(spec.sites, spec.poolings, spec.dtype, len(samples))
    if spec.tokens:
        layouts |= token_layouts(spec.token_sites, spec.dtype, samples.num_tokens.tolist(), spec.tokens_per_batch)
    return layouts


def response_paths(spec: StoreSpec) -> list[str]:
    """Paths of the arrays that `collect` fills, in model order: a site's poolings, and all sites' tokens at the end."""
    pooled = [activation_path(site.name, pooling) for site in spec.sites for pooling in spec.collected]
    return [*pooled, *(activation_path(site.name) for site in spec.token_sites)]


def progress_layouts(
    sites: Sequence[Site],
    poolings: Sequence[str],
    labels: tuple[int, ...],
    num_tasks: int,
    *,
    first_tokens: bool,
    num_token_sites: int = 0,
) -> dict[str, ArrayLayout]:
    """Path → layout of the arrays of `samples` and `progress`.

    `labels` is [rows, concepts]; `first_tokens` says whether these are counted; `num_token_sites` sites have values of
    tokens.
    """
    num_arrays, num_rows = len(sites) * len(poolings) + num_token_sites, labels[0]
    found = {
        "samples/row": ArrayLayout((num_rows,), (num_rows,), "int64", ("sample",), 0),
        "samples/num_tokens": ArrayLayout((num_rows,), (num_rows,), "int32", ("sample",), 0),
        "samples/label": ArrayLayout(labels, (num_rows, max(labels[1], 1)), "int8", ("sample", "concept"), 0),
        DONE: ArrayLayout((num_tasks,), (1,), "uint8", ("task",), 0),
        ATTEMPTS: ArrayLayout((num_tasks,), (1,), "uint8", ("task",), 0),
        NONFINITE: ArrayLayout((num_tasks, num_arrays), (1, num_arrays), "int64", ("task", "array"), 0),
    }
    num_units = sum(site.width for site in sites) * sum(POOLINGS[pooling].of_token is not None for pooling in poolings)
    if num_units and first_tokens:
        shape, dims = (num_tasks, MAX_TENSOR_RANKS, num_units), ("task", "rank", "unit")
        found[FIRST_TOKEN] = ArrayLayout(shape, (1, 1, num_units), "uint32", dims, 0)
    return found


def response_layouts(
    sites: Sequence[Site], poolings: Sequence[str], dtype: str, num_rows: int
) -> dict[str, ArrayLayout]:
    """Path → layout of the responses' arrays; `dtype` is the forward's."""
    found = {}
    dtypes = {pooling: stored_dtype(pooling, dtype) for pooling in poolings}
    largest = max((np.dtype(stored).itemsize for stored in dtypes.values()), default=1)
    for site in sites:
        # the same for all poolings, because a rank owns the same columns of each
        rows, columns = rows_per_chunk(num_rows), columns_per_chunk(site.width, num_rows, largest)
        shards, dims = (rows, columns_per_shard(site.width, columns, rows, largest)), ("sample", "neuron")
        for pooling, stored in dtypes.items():
            layout = ArrayLayout((num_rows, site.width), (rows, columns), stored, dims, np.nan, shards)
            found[activation_path(site.name, pooling)] = layout
    return found


def token_layouts(
    sites: Sequence[Site], dtype: str, num_tokens: Sequence[int], tokens_per_batch: int
) -> dict[str, ArrayLayout]:
    """Path → layout of the arrays of tokens; `sites` are those whose values are kept, `dtype` is the forward's."""
    grid, total = token_grid(num_tokens, tokens_per_batch), sum(num_tokens)
    found = {
        "samples/offset": ArrayLayout((len(num_tokens) + 1,), (len(num_tokens) + 1,), "int64", ("boundary",), 0),
        "samples/place": ArrayLayout((len(num_tokens),), (len(num_tokens),), "int64", ("sample",), 0),
    }
    for name, stored in TOKEN_FIELDS.items():
        chunk = (min(total, _TOKENS_OF_A_CHUNK),)
        found[f"tokens/{name}"] = ArrayLayout((total,), chunk, stored, ("token",), 0)
    for site in sites:
        found[activation_path(site.name)] = _values_layout(site.width, dtype, num_tokens, grid)
    return found


def _values_layout(width: int, dtype: str, num_tokens: Sequence[int], grid: TokenGrid) -> ArrayLayout:
    """Zarr has no bfloat16, so its bits are stored as uint16."""
    bits = dtype == "bfloat16"
    item_bytes, columns = 4 if dtype == "float32" else 2, columns_per_token_chunk(width)
    return ArrayLayout(
        (grid.num_places, width),
        (TOKENS_PER_CHUNK, columns),
        "uint16" if bits else dtype,
        ("place", "neuron"),
        _NAN_BITS if bits else np.nan,
        (grid.tokens_per_shard(width, item_bytes), columns * ceil(width / columns)),
        num_written=grid.num_shards(num_tokens, width, item_bytes),
        bits_of=dtype if bits else "",
    )


def num_files(layouts: Mapping[str, ArrayLayout], num_ranks: int = 1) -> int:
    """Files of these arrays, and of the groups below the root that they are in, when all is written.

    `num_ranks` ranks write first tokens. No task has attempts then, and no response is taken to be NaN or infinite.
    """
    files = {name: layout.num_files for name, layout in layouts.items()}
    files |= {name: 1 for name in (ATTEMPTS, NONFINITE) if name in files}
    if FIRST_TOKEN in files:
        files[FIRST_TOKEN] = 1 + (num_ranks * layouts[FIRST_TOKEN].shape[0] if num_ranks <= MAX_TENSOR_RANKS else 0)
    return len(_parents(layouts)) + sum(files.values())


def _parents(layouts: Iterable[str]) -> set[str]:
    return {str(parent) for name in layouts for parent in PurePosixPath(name).parents} - {"."}


def create_arrays(group: zarr.Group, layouts: Mapping[str, ArrayLayout], *, replace: bool = False) -> None:
    """Make the arrays that are not there yet, without chunks, and the groups around them; many at a time.

    `replace`: arrays that are there are described again, and keep their files.

    If some cannot be made, the first OSError is raised after all were tried.
    """
    arrays = {name: _description(layout) for name, layout in layouts.items()}

    async def make(name: str, files: Mapping[str, Buffer]) -> None:
        for file, described in files.items():
            key = "/".join(filter(None, (group.path, name, file)))
            if (replace and name in arrays) or not await group.store.exists(key):
                await group.store.set(key, described)

    async def make_all() -> None:
        for nodes in (dict.fromkeys(sorted(_parents(layouts)), description(None)), arrays):
            # all end before an error is raised
            for error in await asyncio.gather(*map(make, nodes, nodes.values()), return_exceptions=True):
                if error is not None:
                    raise error

    run_in_zarr(make_all())


@lru_cache(maxsize=64)
def _description(layout: ArrayLayout) -> dict[str, Buffer]:
    """The files that describe an array: chunks are lz4 with byte shuffle, then a checksum of the compressed bytes.

    They are taken from an array in memory, once a layout, because making an array takes six times as long as writing
    its description.
    """
    array = zarr.create_array(
        MemoryStore(),
        shape=layout.shape,
        chunks=layout.chunks,
        shards=layout.shards,
        dtype=layout.dtype,
        fill_value=layout.fill_value,
        serializer=BytesCodec(),
        compressors=(BloscCodec(cname="lz4", clevel=5, shuffle="shuffle"), Crc32cCodec()),
        dimension_names=layout.dims,
        attributes=_attributes(layout) or None,
    )
    return description(array)


def _attributes(layout: ArrayLayout) -> dict[str, Any]:
    found: dict[str, Any] = {f"{layout.dims[0]}s": list(layout.names)} if layout.names else {}
    return found | ({"bits_of": layout.bits_of} if layout.bits_of else {})
