"""A store in other forms: for `datasets` and pandas, for SAELens, as safetensors, or as a store of the present schema.

A target is written aside and then renamed: it is whole or not there. Memory is bounded by a row chunk of all modules,
or by a batch of all modules where there are tokens.
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
from aura_dist.sites.pooling import TOKENS, poolings_of
from aura_dist.sites.site import Site
from aura_dist.store.access import FORMAT, get_array, is_there, local_path, open_group, read_array, read_region
from aura_dist.store.grid import make_batches, row_chunks, rows_per_chunk
from aura_dist.store.record import unfinished
from aura_dist.store.saelens import write_caches
from aura_dist.store.schema import (
    ATTEMPTS,
    DONE,
    FIRST_TOKEN,
    NONFINITE,
    TOKEN_FIELDS,
    ArrayLayout,
    Samples,
    StoreSpec,
    activation_path,
    create_arrays,
    create_store,
    first_token_path,
    tasks_of,
)
from aura_dist.store.shards import shard_writes
from aura_dist.store.tensor_file import BFLOAT16, Tensor, write_tensors
from aura_dist.store.tokens import StoredTokens
from aura_dist.store.zarr_adapter import run_in_zarr

# of a file of tensors, unless one tensor is larger
_FILE_BYTES = 512 * 2**20
INDEX_FILE = "index.json"
_TOKENS_AT_ONCE = 4096
_SAMPLES = ("row", "num_tokens", "label")


@dataclass(frozen=True)
class Source:
    """A store, and the parts of it to convert: N rows in the store's order.

    `poolings` may have `TOKENS` among them; `tokens` are all of the store's, None if it has none.
    """

    path: str
    group: zarr.Group
    spec: StoreSpec
    sites: tuple[Site, ...]
    poolings: tuple[str, ...]
    samples: Samples
    tokens: StoredTokens | None

    @property
    def pooled(self) -> list[tuple[str, str]]:
        """(site, pooling) of the arrays of responses, each [N, D]."""
        return [(site.name, pooling) for site in self.sites for pooling in poolings_of(self.poolings)]

    @property
    def token_sites(self) -> list[str]:
        """Sites whose values at each token are converted."""
        return [s.name for s in self.sites if TOKENS in self.poolings and s.name in self.spec.tokens]

    @property
    def num_arrays(self) -> int:
        return len(self.pooled) + len(self.token_sites)

    def row_chunks(self) -> Iterator[slice]:
        """The rows of each row chunk that is collected."""
        size, left = rows_per_chunk(len(self.samples)), set(unfinished(self.group))
        for task in tasks_of(self.samples.num_tokens, self.spec.tokens_per_batch):
            yield from row_chunks(task, size) if task.index not in left else ()

    def batches(self) -> Iterator[slice]:
        """The rows of each batch that is collected."""
        num_tokens = self.samples.num_tokens.tolist()
        for rows in self.row_chunks():
            yield from make_batches(num_tokens, rows, self.spec.tokens_per_batch)

    def read(self, name: str, rows: slice) -> NDArray[Any]:
        """[n, D] of some rows, which begin with a row chunk; StoreError if a chunk is missing or damaged."""
        array = get_array(self.group, name)
        return read_region(self.group, array, (rows, slice(0, array.shape[1])), complete=True)


@dataclass(frozen=True)
class Form:
    """One form: a function that writes it into an empty directory, and whether it takes all of a store.

    `contexts`: it takes tokens alone, in rows of equally many, and `write` is called with how many.
    """

    summary: str
    write: Callable[..., None]
    whole: bool = False
    contexts: bool = False


def open_source(path: str, modules: Sequence[str], poolings: Sequence[str], form: Form) -> Source:
    """The store at a path or URL, and what is chosen of it, by default all; of a whole form, rows may be missing.

    StoreError if there is no store, or rows are missing; InputError if it has no such module or pooling.
    """
    group = open_group(path)
    spec = StoreSpec.of(group)
    if not form.whole and (missing := len(unfinished(group))):
        raise StoreError(f"--store {path!r}: {missing} tasks are missing; run the same `collect` to finish it")
    held = (*spec.poolings, *([TOKENS] if spec.tokens else []))
    for pooling in poolings:
        if pooling not in held:
            raise InputError(f"--pooling: expected some of the store's {', '.join(held)}, got {pooling!r}")
    chosen = tuple(poolings) or spec.poolings or (TOKENS,)
    if form.contexts:
        chosen = _tokens_alone(path, spec, poolings)
    every = spec.sites if chosen != (TOKENS,) else spec.token_sites
    sites = every if not modules else choose(every, modules, partial(_unmatched, every))
    samples = Samples(*(read_array(group, f"samples/{name}") for name in _SAMPLES))
    return Source(path, group, spec, sites, chosen, samples, StoredTokens.of(group) if spec.tokens else None)


def _tokens_alone(path: str, spec: StoreSpec, poolings: Sequence[str]) -> tuple[str, ...]:
    if others := poolings_of(poolings):
        raise InputError(f"--pooling: expected {TOKENS} alone with --to saelens, got {others[0]!r}; leave it out")
    if not spec.tokens:
        raise StoreError(
            f"--store {path!r}: expected a store of tokens for --to saelens, found {', '.join(spec.poolings)} alone; "
            f"collect with --pooling {TOKENS}, or with --keep-tokens"
        )
    return (TOKENS,)


def _unmatched(sites: Sequence[Site], word: str) -> InputError:
    return InputError(
        f"--modules {word!r} matches none of the {len(sites)} modules of the store ({sites[0].name}, …); name others"
    )


def convert(source: Source, form: Form, out: str, context: int | None = None) -> None:
    """Write the source in this form to `out`, a directory that does not exist yet; StoreError if it cannot be.

    `context`: tokens of a row, for forms that have such rows; by default as many as a text may have.
    """
    more = {"context": context or source.spec.max_tokens} if form.contexts else {}
    with _new_directory(out) as place:
        form.write(source, place, **more)


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
    """A Parquet file a row chunk, in its memory; columns: row, num_tokens, the concepts, and SITE/POOLING.

    Where the store has tokens, there is a column `input_ids`, and SITE/tokens is a list a token. A part of a file then
    holds the rows of a batch, because all modules of it are in memory at once.
    """
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    names = {"row", "num_tokens", *(["input_ids"] if source.tokens is not None else [])}
    if taken := sorted(names & set(source.spec.concepts)):
        raise InputError(
            f"--to datasets: expected no concept of the name of a column, got {taken[0]!r}; take safetensors"
        )
    (place / "data").mkdir()
    chunks = list(source.row_chunks())
    parts = list(source.batches()) if source.token_sites else chunks
    for number, rows in enumerate(chunks):
        file = place / "data" / f"train-{number:05d}-of-{len(chunks):05d}.parquet"
        writer = None
        for part in (p for p in parts if rows.start <= p.start < rows.stop):
            table = _table(source, rows, part)
            writer = writer or pq.ParquetWriter(file, table.schema, compression="zstd")
            writer.write_table(table)
        assert writer is not None
        writer.close()


def _table(source: Source, chunk: slice, rows: slice) -> Any:
    """The Arrow table of some rows of a row chunk."""
    import pyarrow as pa

    samples = source.samples
    columns = {"row": pa.array(samples.row[rows]), "num_tokens": pa.array(samples.num_tokens[rows])}
    for c, concept in enumerate(source.spec.concepts):
        labels = samples.label[rows, c]
        columns[concept] = pa.array(labels, mask=labels < 0)
    for site, pooling in source.pooled:
        values = source.read(activation_path(site, pooling), chunk)[rows.start - chunk.start : rows.stop - chunk.start]
        columns[f"{site}/{pooling}"] = _lists(values)
    if source.tokens is not None:
        offset = source.tokens.offset[rows.start : rows.stop + 1]
        of_rows, places = slice(int(offset[0]), int(offset[-1])), pa.array((offset - offset[0]).astype(np.int32))
        ids = pa.array(source.tokens.field("input_ids")[of_rows])
        columns["input_ids"] = pa.ListArray.from_arrays(places, ids)
        for site in source.token_sites:
            columns[f"{site}/{TOKENS}"] = pa.ListArray.from_arrays(
                places, _lists(source.tokens.values(site).read(of_rows))
            )
    return pa.table(columns)


def _lists(values_ND: NDArray[Any]) -> Any:
    """An Arrow array of N lists of D values."""
    import pyarrow as pa

    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(values_ND).reshape(-1)), values_ND.shape[1])


def _to_saelens(source: Source, place: Path, context: int) -> None:
    """A directory a module, as `saelens.py` describes it."""
    assert source.tokens is not None
    write_caches(source.tokens, source.token_sites, context, place)


def _to_safetensors(source: Source, place: Path) -> None:
    """SITE/POOLING [N, D], SITE/tokens [T, D], samples/… and tokens/…, in files of 512 MB or one tensor."""
    files: list[list[Tensor]] = [[]]
    for tensor in _values(source):
        if files[-1] and sum(one.num_bytes for one in files[-1]) + tensor.num_bytes > _FILE_BYTES:
            files.append([])
        files[-1].append(tensor)
    files[0] += _about(source)
    file_of: dict[str, str] = {}
    for number, tensors in enumerate(files, start=1):
        file = f"responses-{number:05d}-of-{len(files):05d}.safetensors"
        write_tensors(place / file, tensors)
        file_of |= {tensor.name: file for tensor in tensors}
    index = {"metadata": {"concepts": list(source.spec.concepts), "format": FORMAT}, "weight_map": file_of}
    (place / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _values(source: Source) -> Iterator[Tensor]:
    for site, pooling in source.pooled:
        name = activation_path(site, pooling)
        array = get_array(source.group, name)
        pieces = partial(map, partial(source.read, name), list(source.row_chunks()))
        yield Tensor(f"{site}/{pooling}", array.shape, array.dtype, pieces)
    for site in source.token_sites:
        assert source.tokens is not None
        values = source.tokens.values(site)
        parts = [
            slice(a, min(a + _TOKENS_AT_ONCE, values.shape[0])) for a in range(0, values.shape[0], _TOKENS_AT_ONCE)
        ]
        stored_as = BFLOAT16 if values.are_bits else ""
        pieces = partial(map, values.stored, parts)
        yield Tensor(f"{site}/{TOKENS}", values.shape, values.array.dtype, pieces, stored_as)


def _about(source: Source) -> list[Tensor]:
    """Which rows and which tokens there are."""
    arrays: dict[str, NDArray[Any]] = {f"samples/{name}": getattr(source.samples, name) for name in _SAMPLES}
    if source.tokens is not None:
        arrays["samples/offset"] = source.tokens.offset
        arrays |= {f"tokens/{name}": source.tokens.field(name) for name in TOKEN_FIELDS}
    return [Tensor(name, values.shape, values.dtype, partial(iter, [values])) for name, values in arrays.items()]


def _to_store(source: Source, place: Path) -> None:
    """The same responses in the present schema, a row chunk of an array at a time; scores are not taken along.

    An unfinished store stays one, which `collect` can finish.
    """
    spec_fields = {*StoreSpec.__dataclass_fields__, "format", "schema_version", "created", "consolidated_metadata"}
    provenance = {name: value for name, value in source.group.attrs.items() if name not in spec_fields}
    place.rmdir()
    about = None
    if source.tokens is not None:
        names = ("samples/offset", "samples/place", *(f"tokens/{name}" for name in TOKEN_FIELDS))
        about = {name: read_array(source.group, name) for name in names}
    create_store(str(place), source.spec, source.samples, provenance, about)
    group = open_group(str(place))
    for name in (activation_path(*key) for key in source.pooled):
        array = get_array(group, name)
        for rows in source.row_chunks():
            run_in_zarr(_all(list(shard_writes(array, (rows.start, 0), source.read(name, rows)))))
    if source.tokens is not None:
        _copy_tokens(source, source.tokens, group)
    for name in (ATTEMPTS, NONFINITE, FIRST_TOKEN, DONE):  # the mark of finished tasks last
        if is_there(source.group, name):
            values = read_array(source.group, name)
            if values.shape == get_array(group, name).shape:
                get_array(group, name)[...] = values


def _copy_tokens(source: Source, tokens: StoredTokens, group: zarr.Group) -> None:
    """Copy the values of every site's tokens, a batch at a time."""
    for site in source.spec.token_sites:
        array, values = get_array(group, activation_path(site.name)), tokens.values(site.name)
        for rows in source.batches():
            some = slice(int(tokens.offset[rows.start]), int(tokens.offset[rows.stop]))
            start = (int(tokens.place[rows.start]), 0)
            run_in_zarr(_all(list(shard_writes(array, start, values.stored(some), ragged=True))))
    for pooling in source.spec.repooled:
        if is_there(source.group, first_token_path(pooling)):
            counts = read_array(source.group, first_token_path(pooling))
            layout = ArrayLayout(counts.shape, counts.shape, "uint32", ("unit",), 0)
            create_arrays(group, {first_token_path(pooling): layout})
            get_array(group, first_token_path(pooling))[...] = counts


async def _all(writes: Sequence[Callable[[], Any]]) -> None:
    await asyncio.gather(*(write() for write in writes))


FORMS: dict[str, Form] = {
    "datasets": Form("Parquet that `datasets` and pandas load: a row a text, a list of numbers a module", _to_datasets),
    "saelens": Form("what SAELens' `use_cached_activations` reads: a directory a module", _to_saelens, contexts=True),
    "safetensors": Form("a tensor [text, neuron] a module, in files with an index of names", _to_safetensors),
    "store": Form("the same store in the present schema, without scores", _to_store, whole=True),
}
