"""The store on disk (Zarr v3): what it holds, how it is made, and what must agree before it is gone on with.

```
STORE.zarr                             attributes: see `StoreSpec`; `created`, written last
  samples/{row, num_tokens, label}     [sample], [sample], [sample, concept]
  activations/<site>/<pooling>         [sample, neuron]
  progress/done                        [task] uint8, one chunk each
  progress/attempts                    [task] uint8, one chunk each: launches that died in it (see `record.py`)
  progress/nonfinite                   [task, response array] int64, one chunk a task: NaN and infinite responses
  scores/<site>/<pooling>/<statistic>  [concept, neuron]   (see `scores.py`)
```
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec
from zarr.core.group import GroupMetadata
from zarr.core.metadata import ArrayV2Metadata, ArrayV3Metadata
from zarr.storage import MemoryStore

from aura_dist.core.partition import Task, columns_per_chunk, make_tasks, rows_per_chunk
from aura_dist.core.sites import Site
from aura_dist.errors import StoreError
from aura_dist.store.access import FORMAT, SCHEMA_VERSION, clear, fast_codecs, get_array, store_at

DONE, ATTEMPTS, NONFINITE = "progress/done", "progress/attempts", "progress/nonfinite"

# poolings that return one of the layer's own outputs: exact in the layer's own dtype
SELECTING_POOLINGS = frozenset({"max", "min", "last", "absmax"})


@dataclass(frozen=True)
class StoreSpec:
    """What fixes the numbers of a store; compared field by field before a store is gone on with.

    Attributes
    ----------
    model, tokenizer, data
        Identity of each: names for people, digests for comparison.
    dtype
        Dtype of the forward.
    max_tokens, tokens_per_batch, skip_special_tokens
        How texts become batches.
    poolings, concepts
        In the order of the flags.
    sites
        In model order.
    uncaptured
        Names of parameters that no site covers (experts of a mixture).
    intervention
        Identity of what lay over the model (`Intervention.identity`), or None.
    """

    model: Mapping[str, Any]
    tokenizer: Mapping[str, Any]
    dtype: str
    max_tokens: int
    tokens_per_batch: int
    skip_special_tokens: bool
    poolings: tuple[str, ...]
    concepts: tuple[str, ...]
    data: Mapping[str, Any]
    sites: tuple[Site, ...]
    uncaptured: tuple[str, ...] = ()
    intervention: Mapping[str, Any] | None = None

    def to_attributes(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "poolings": list(self.poolings),
            "concepts": list(self.concepts),
            "sites": [asdict(s) for s in self.sites],
            "uncaptured": list(self.uncaptured),
        }

    @classmethod
    def from_attributes(cls, attributes: Mapping[str, Any]) -> "StoreSpec":
        values = {name: attributes[name] for name in cls.__dataclass_fields__}
        return cls(
            **{
                **values,
                "poolings": tuple(values["poolings"]),
                "concepts": tuple(values["concepts"]),
                "sites": tuple(Site(**s) for s in values["sites"]),
                "uncaptured": tuple(values["uncaptured"]),
            }
        )


@dataclass(frozen=True)
class Samples:
    """The rows of a store, sorted by token count, then by row of the data set.

    Attributes
    ----------
    row
        [N] int64 row in the data set.
    num_tokens
        [N] int32.
    label
        [N, C] int8: 1, 0, or −1 = not labelled.
    """

    row: NDArray[np.int64]
    num_tokens: NDArray[np.int32]
    label: NDArray[np.int8]

    def __len__(self) -> int:
        return len(self.row)


def tasks_of(num_tokens: NDArray[np.int32], tokens_per_batch: int) -> list[Task]:
    """The tasks of a store: a pure function of what is stored."""
    tokens = num_tokens.tolist()
    return make_tasks(tokens, rows_per_chunk(len(tokens)), tokens_per_batch)


def stored_dtype(pooling: str, forward_dtype: str) -> str:
    """float32, except float16 for poolings that select an output of a float16 model."""
    return "float16" if forward_dtype == "float16" and pooling in SELECTING_POOLINGS else "float32"


def activation_path(site: str, pooling: str) -> str:
    return f"activations/{site}/{pooling}"


def chunk_widths(group: zarr.Group, spec: StoreSpec) -> dict[str, int]:
    """Site → columns of one chunk, of whichever pooling."""
    return {s.name: get_array(group, activation_path(s.name, spec.poolings[0])).chunks[1] for s in spec.sites}


def create_store(path: str, spec: StoreSpec, samples: Samples, provenance: Mapping[str, Any]) -> None:
    """Make an empty store; the attribute `created` is written last, so that a half-made one is recognised.

    Parameters
    ----------
    path
        Directory or URL of the store; an existing one is replaced.
    spec, samples
        What the store will hold.
    provenance
        Further attributes (package versions, resolved config) that do not fix the numbers.

    Raises
    ------
    StoreError
        The path cannot be written.
    """
    num_rows, rows = len(samples), rows_per_chunk(len(samples))
    try:
        with fast_codecs():
            attributes = {"format": FORMAT, "schema_version": SCHEMA_VERSION, **spec.to_attributes(), **provenance}
            clear(path)
            root = zarr.open_group(store_at(path), mode="w", zarr_format=3, attributes=attributes)
            done = np.zeros(len(tasks_of(samples.num_tokens, spec.tokens_per_batch)), dtype=np.uint8)
            given: dict[str, tuple[NDArray[Any], Layout]] = {
                "samples/row": (samples.row, Layout.of(samples.row, ("sample",))),
                "samples/num_tokens": (samples.num_tokens, Layout.of(samples.num_tokens, ("sample",))),
                "samples/label": (samples.label, Layout.of(samples.label, ("sample", "concept"))),
                DONE: (done, Layout.of(done, ("task",), chunks=(1,))),
                ATTEMPTS: (done, Layout.of(done, ("task",), chunks=(1,))),
            }
            layouts = {name: layout for name, (_, layout) in given.items()}
            num_arrays = len(spec.sites) * len(spec.poolings)
            layouts[NONFINITE] = Layout((len(done), num_arrays), (1, num_arrays), "int64", ("task", "array"), 0)
            dtypes = {pooling: stored_dtype(pooling, spec.dtype) for pooling in spec.poolings}
            largest = max(np.dtype(dtype).itemsize for dtype in dtypes.values())
            for site in spec.sites:
                # alike for all poolings: a rank owns the same columns of each
                shape, chunks = (num_rows, site.width), (rows, columns_per_chunk(site.width, num_rows, largest))
                for pooling, dtype in dtypes.items():
                    name = activation_path(site.name, pooling)
                    layouts[name] = Layout(shape, chunks, dtype, ("sample", "neuron"), np.nan)
            create_arrays(root, layouts)
            for name, (values, _) in given.items():
                get_array(root, name)[...] = values
            root.attrs["created"] = True
    except OSError as error:
        raise StoreError(f"--store {path!r} cannot be written: {error}") from error


@dataclass(frozen=True)
class Layout:
    """How an array of a store lies there: shape, chunks, dtype, names of its dims, and what missing values read as."""

    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: str
    dims: tuple[str, ...]
    fill_value: float

    @classmethod
    def of(cls, values: NDArray[Any], dims: tuple[str, ...], chunks: tuple[int, ...] | None = None) -> "Layout":
        """That of `values`; one chunk by default."""
        return cls(values.shape, chunks or values.shape, values.dtype.name, dims, 0)


def create_arrays(group: zarr.Group, layouts: Mapping[str, Layout]) -> None:
    """Make arrays by their paths, without chunks, many at a time; ValueError if one is there."""
    nodes: dict[str, GroupMetadata | ArrayV2Metadata | ArrayV3Metadata]
    nodes = {name: _metadata(layout) for name, layout in layouts.items()}
    deque(zarr.create_hierarchy(store=group.store, nodes=nodes), maxlen=0)


@lru_cache(maxsize=64)
def _metadata(layout: Layout) -> ArrayV3Metadata:
    """As `zarr.json` says it: lz4 with byte shuffle, then a checksum of the compressed bytes.

    Taken from an array in memory: to make an array takes six times as long as to write its description.
    """
    array = zarr.create_array(
        MemoryStore(),
        shape=layout.shape,
        chunks=layout.chunks,
        dtype=layout.dtype,
        fill_value=layout.fill_value,
        serializer=BytesCodec(),
        compressors=(BloscCodec(cname="lz4", clevel=5, shuffle="shuffle"), Crc32cCodec()),
        dimension_names=layout.dims,
    )
    assert isinstance(array.metadata, ArrayV3Metadata)
    return array.metadata
