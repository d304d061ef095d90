"""A store in other forms: for `datasets` and pandas, as safetensors, or as a store of the present schema.

A target is written aside and then renamed: it is whole or not there. Memory is bounded by a row chunk of all modules,
or by a file of tensors.
"""

import asyncio
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from aura_dist.errors import ConfigError, InputError, StoreError, brief
from aura_dist.sites.kinds import choose
from aura_dist.sites.site import Site
from aura_dist.store.access import FORMAT, get_array, is_there, local_path, open_group, read_array, read_region
from aura_dist.store.record import unfinished
from aura_dist.store.schema import (
    ATTEMPTS,
    DONE,
    FIRST_TOKEN,
    NONFINITE,
    Samples,
    StoreSpec,
    activation_path,
    create_store,
    tasks_of,
)
from aura_dist.store.shards import shard_writes
from aura_dist.store.zarr_adapter import run_in_zarr

# of a file of tensors, unless one tensor is larger
_FILE_BYTES = 512 * 2**20
INDEX_FILE = "index.json"
_SAMPLES = ("row", "num_tokens", "label")


@dataclass(frozen=True)
class Source:
    """A store, and the parts of it to convert: N rows in the store's order."""

    path: str
    group: zarr.Group
    spec: StoreSpec
    sites: tuple[Site, ...]
    poolings: tuple[str, ...]
    samples: Samples

    @property
    def arrays(self) -> list[str]:
        """Paths of the arrays of responses, each [N, D]."""
        return [activation_path(site.name, pooling) for site in self.sites for pooling in self.poolings]

    def row_chunks(self) -> Iterator[slice]:
        """The rows of each row chunk that is collected."""
        size, left = get_array(self.group, self.arrays[0]).chunks[0], set(unfinished(self.group))
        for task in tasks_of(self.samples.num_tokens, self.spec.tokens_per_batch):
            for start in range(task.start, task.stop, size) if task.index not in left else ():
                yield slice(start, min(start + size, task.stop))

    def read(self, name: str, rows: slice) -> NDArray[Any]:
        """[n, D] of some rows, which begin with a row chunk; StoreError if a chunk is missing or damaged."""
        array = get_array(self.group, name)
        return read_region(self.group, array, (rows, slice(0, array.shape[1])), complete=True)


@dataclass(frozen=True)
class Form:
    """One form: a function that writes it into an empty directory, and whether it takes all of a store."""

    summary: str
    write: Callable[[Source, Path], None]
    whole: bool = False


def open_source(path: str, modules: Sequence[str], poolings: Sequence[str], *, whole: bool) -> Source:
    """The store at a path or URL, and what is chosen of it, by default all; of a `whole` form, rows may be missing.

    StoreError if there is no store, or rows are missing; InputError if it has no such module or pooling.
    """
    group = open_group(path)
    spec = StoreSpec.of(group)
    if not whole and (missing := len(unfinished(group))):
        raise StoreError(f"--store {path!r}: {missing} tasks are missing; run the same `collect` to finish it")
    for pooling in poolings:
        if pooling not in spec.poolings:
            raise InputError(f"--pooling: expected some of the store's {', '.join(spec.poolings)}, got {pooling!r}")
    sites = spec.sites if not modules else choose(spec.sites, modules, partial(_unmatched, spec.sites))
    samples = Samples(*(read_array(group, f"samples/{name}") for name in _SAMPLES))
    return Source(path, group, spec, sites, tuple(poolings) or spec.poolings, samples)


def _unmatched(sites: Sequence[Site], word: str) -> InputError:
    return InputError(
        f"--modules {word!r} matches none of the {len(sites)} modules of the store ({sites[0].name}, …); name others"
    )


def convert(source: Source, form: Form, out: str) -> None:
    """Write the source in this form to `out`, a directory that does not exist yet; StoreError if it cannot be."""
    with _new_directory(out) as place:
        form.write(source, place)


@contextmanager
def _new_directory(out: str) -> Iterator[Path]:
    """A directory to fill, beside `out`, which it becomes at the end; it goes if there is an error."""
    target = Path(out)
    if local_path(out) != target:
        raise ConfigError(f"--out: expected a local directory, got the URL {out!r}; give its path")
    if target.exists() or target.is_symlink():
        raise StoreError(f"--out: expected a directory that does not exist yet, {out!r} does")
    place = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        place.mkdir(parents=True)
        yield place
        place.rename(target)
    except OSError as error:
        raise StoreError(f"--out {out!r} cannot be written: {brief(error)}") from error
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _to_datasets(source: Source, place: Path) -> None:
    """A Parquet file a row chunk, in its memory; columns: row, num_tokens, the concepts, and SITE/POOLING."""
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    samples, taken = source.samples, sorted({"row", "num_tokens"} & set(source.spec.concepts))
    if taken:
        raise InputError(
            f"--to datasets: expected no concept of the name of a column, got {taken[0]!r}; take safetensors"
        )
    (place / "data").mkdir()
    chunks = list(source.row_chunks())
    for number, rows in enumerate(chunks):
        columns = {"row": pa.array(samples.row[rows]), "num_tokens": pa.array(samples.num_tokens[rows])}
        for c, concept in enumerate(source.spec.concepts):
            labels = samples.label[rows, c]
            columns[concept] = pa.array(labels, mask=labels < 0)
        for site in source.sites:
            for pooling in source.poolings:
                values = source.read(activation_path(site.name, pooling), rows)
                flat = pa.array(np.ascontiguousarray(values).reshape(-1))
                columns[f"{site.name}/{pooling}"] = pa.FixedSizeListArray.from_arrays(flat, site.width)
        name = f"train-{number:05d}-of-{len(chunks):05d}.parquet"
        pq.write_table(pa.table(columns), place / "data" / name, compression="zstd")


def _to_safetensors(source: Source, place: Path) -> None:
    """SITE/POOLING [N, D] and samples/…, in files of 512 MB or one tensor, in the memory of one file."""
    from safetensors.numpy import save_file

    samples: dict[str, NDArray[Any]] = {f"samples/{name}": getattr(source.samples, name) for name in _SAMPLES}
    arrays = {name: get_array(source.group, name) for name in source.arrays}
    sizes = {name: array.size * array.dtype.itemsize for name, array in arrays.items()}
    files: list[list[str]] = [[]]
    for name, size in sizes.items():
        if files[-1] and sum(sizes[one] for one in files[-1]) + size > _FILE_BYTES:
            files.append([])
        files[-1].append(name)
    file_of: dict[str, str] = {}
    every = slice(0, len(source.samples))
    for number, names in enumerate(files, start=1):
        file = f"responses-{number:05d}-of-{len(files):05d}.safetensors"
        tensors = {name.removeprefix("activations/"): source.read(name, every) for name in names}
        tensors |= samples if number == 1 else {}
        save_file({name: np.ascontiguousarray(values) for name, values in tensors.items()}, place / file)
        file_of |= dict.fromkeys(tensors, file)
    index = {"metadata": {"concepts": list(source.spec.concepts), "format": FORMAT}, "weight_map": file_of}
    (place / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _to_store(source: Source, place: Path) -> None:
    """The same responses in the present schema, a row chunk of an array at a time; scores are not taken along.

    An unfinished store stays one, which `collect` can finish.
    """
    spec_fields = {*StoreSpec.__dataclass_fields__, "format", "schema_version", "created", "consolidated_metadata"}
    provenance = {name: value for name, value in source.group.attrs.items() if name not in spec_fields}
    place.rmdir()
    create_store(str(place), source.spec, source.samples, provenance)
    group = open_group(str(place))
    for name in source.arrays:
        array = get_array(group, name)
        for rows in source.row_chunks():
            run_in_zarr(_all(list(shard_writes(array, (rows.start, 0), source.read(name, rows)))))
    for name in (ATTEMPTS, NONFINITE, FIRST_TOKEN, DONE):  # the mark of finished tasks last
        if is_there(source.group, name):
            values = read_array(source.group, name)
            if values.shape == get_array(group, name).shape:
                get_array(group, name)[...] = values


async def _all(writes: Sequence[Callable[[], Any]]) -> None:
    await asyncio.gather(*(write() for write in writes))


FORMS: dict[str, Form] = {
    "datasets": Form("Parquet that `datasets` and pandas load: a row a text, a list of numbers a module", _to_datasets),
    "safetensors": Form("a tensor [text, neuron] a module, in files with an index of names", _to_safetensors),
    "store": Form("the same store in the present schema, without scores", _to_store, whole=True),
}
