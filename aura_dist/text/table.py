"""Labelled text of any usual format → columns of plain Python values.

The standard library reads CSV, TSV and JSONL, because it guesses no type: the text "NA" stays a text. TSV is quoted
like CSV, as pandas does. Parquet files are read without a cache; `datasets` reads directories and hub data sets. Errors
name rows, which count from 0 as in the store.
"""

import csv
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from aura_dist.errors import InputError, MissingColumnError, MissingPackageError

TEXT_FORMATS = (".csv", ".tsv", ".jsonl", ".json", ".ndjson")
FORMATS = (*TEXT_FORMATS, ".parquet")
DEFAULT_SPLIT = "train"
_MAX_FIELD_CHARACTERS = 2**31 - 1


@dataclass(frozen=True)
class Table:
    """The columns that were asked for, and a digest of their source."""

    source: str  # path or hub name, as given
    sha256: str  # of the file's bytes or of a directory's files, or the fingerprint of a hub data set
    columns: dict[str, list[Any]]  # name → N values; numbers of fewer than 64 bits keep their dtype, as NumPy scalars

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), []))


def read_table(source: str, columns: list[str], *, split: str = DEFAULT_SPLIT) -> Table:
    """Read `columns` of a file, a saved data set or a hub data set.

    InputError if the source cannot be found or read, is of an unknown format, lacks a column, or has no rows.
    """
    try:
        table = _read(source, columns, split)
    except (InputError, MissingPackageError):
        raise
    except Exception as error:  # the libraries raise many kinds, from OSError to pyarrow's own
        raise InputError(f"data {source!r} cannot be read: {error}") from error
    if not len(table):
        raise InputError(f"data {source!r}: expected at least one row, got none")
    return table


def _read(source: str, columns: list[str], split: str) -> Table:
    path, kind = Path(source), Path(source).suffix.lower()
    if path.is_file():
        if kind not in FORMATS:
            raise InputError(f"data {source!r}: expected a file ending in {', '.join(FORMATS)}, got {path.suffix!r}")
        if split != DEFAULT_SPLIT:
            raise InputError(f"data {source!r}: a file has no splits, got --split {split}; leave it out")
        text = kind in TEXT_FORMATS
        taken = _take(_records(path), columns, source) if text else _from_parquet(path, columns)
        return Table(source, _sha256(path), taken)
    if path.is_dir():
        taken = _from_directory(path, columns, split)  # first, because digesting files that are no data set may be long
        return Table(source, _sha256_of_files(path, split), taken)
    if kind in FORMATS:
        raise InputError(f"data {source!r}: no such file")
    try:
        dataset = _loaded(source, split)
    except MissingPackageError:
        raise
    except Exception as error:
        message = f"data {source!r}: no such file, and it cannot be loaded as a data set (split {split!r}): {error}"
        raise InputError(message) from error
    return Table(source, str(dataset._fingerprint), _columns(_arrow(dataset), columns, source))


def _take(records: Iterable[tuple[int, dict[str, Any]]], columns: list[str], source: str) -> dict[str, list[Any]]:
    taken: dict[str, list[Any]] = {name: [] for name in columns}
    for row, record in records:
        for name, values in taken.items():
            if name not in record:
                some_have_it = row > 0 or any(name in later for _, later in records)
                raise missing_column(source, name, list(record), row if some_have_it else None)
            values.append(record[name])
    return taken


def missing_column(source: str, name: str, found: list[str], row: int | None = None) -> MissingColumnError:
    """The error for a column that is missing; `row` is the first that lacks it if others have it."""
    where = "" if row is None else f" in row {row}"
    message = f"data {source!r}: expected a column {name!r}{where}, found {', '.join(found) or 'none'}"
    return MissingColumnError(message, row)


def _records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    # surrogateescape passes undecodable bytes on, so that the parser can name their row
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        yield from (_csv_rows if path.suffix.lower() in (".csv", ".tsv") else _json_rows)(file, path)


def _csv_rows(file: Iterable[str], path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    csv.field_size_limit(_MAX_FIELD_CHARACTERS)
    reader = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
    row = -1
    try:
        header = next(filter(None, reader), None)
        if header is None:
            raise InputError(f"data {str(path)!r}: expected a header line, got an empty file")
        _check_decodable(header, path, "the header")
        if len(set(header)) < len(header):
            raise InputError(f"data {str(path)!r}: expected distinct column names, got {', '.join(header)}")
        for values in reader:
            if not values:
                continue
            row += 1
            _check_decodable(values, path, f"row {row}")
            if len(values) != len(header):
                raise InputError(
                    f"data {str(path)!r}: row {row}: expected {len(header)} fields as in the header, got {len(values)}"
                )
            yield row, dict(zip(header, values, strict=True))
    except csv.Error as error:
        raise InputError(
            f"data {str(path)!r}: row {row + 1} cannot be parsed: {error}; a field that starts with a quotation mark "
            "must be quoted, and its marks doubled"
        ) from error


def _json_rows(file: Iterable[str], path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    row = -1
    for line in file:
        if not line.strip():
            continue
        row += 1
        _check_decodable([line], path, f"row {row}")
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"data {str(path)!r}: row {row}: expected one JSON object a line: {error}") from error
        if not isinstance(record, dict):
            raise InputError(f"data {str(path)!r}: row {row}: expected a JSON object, got {type(record).__name__}")
        yield row, _flatten(record)


def _flatten(record: dict[str, Any]) -> dict[str, Any]:
    """Nested objects become dotted columns: `{"prompt": {"text": …}}` → `prompt.text`."""
    flat: dict[str, Any] = {}
    for key, value in record.items():
        flat[key] = value
        if isinstance(value, dict):
            flat.update({f"{key}.{k}": v for k, v in _flatten(value).items()})
    return flat


def _check_decodable(values: Iterable[str], path: Path, where: str) -> None:
    for value in values:
        bad = next((c for c in value if "\udc80" <= c <= "\udcff"), None) if not value.isascii() else None
        if bad is not None:
            raise InputError(
                f"data {str(path)!r}: {where}: expected UTF-8, got the byte 0x{ord(bad) - 0xDC00:02x}; "
                "convert the file to UTF-8"
            )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _from_parquet(path: Path, columns: list[str]) -> dict[str, list[Any]]:
    """Reads no other columns than those that hold `columns`."""
    from pyarrow import parquet  # type: ignore[import-untyped]

    with parquet.ParquetFile(path) as file:
        _columns(file.schema_arrow.empty_table(), columns, str(path))  # if one is missing, the error lists all
        whole = set(file.schema_arrow.names)
        tops = {name if name in whole else name.partition(".")[0] for name in columns}
        return _columns(file.read(sorted(tops)), columns, str(path))


def _from_directory(path: Path, columns: list[str], split: str) -> dict[str, list[Any]]:
    """A directory of Parquet files, or one that `Dataset.save_to_disk` wrote.

    Parquet files are read through a temporary cache, because the shared one identifies a file by its modification time.
    """
    if list(path.glob("*.parquet")):
        with TemporaryDirectory() as cache:
            return _columns(_arrow(_loaded(str(path), split, cache_dir=cache)), columns, str(path))
    dataset = _datasets(str(path)).load_from_disk(str(path))
    if isinstance(dataset, dict):
        if split not in dataset:
            raise InputError(f"data {str(path)!r}: expected a split {split!r}, found {', '.join(dataset)}")
        dataset = dataset[split]
    return _columns(_arrow(dataset), columns, str(path))


def _loaded(source: str, split: str, **cache: str) -> Any:
    return _datasets(source).load_dataset(source, split=split, **cache)


def _datasets(source: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        what = "a directory of data" if Path(source).is_dir() else "no such file, and a hub data set"
        raise MissingPackageError(f"data {source!r}: {what}", "datasets", "datasets") from error
    datasets.disable_progress_bars()
    return datasets


def _arrow(dataset: Any) -> Any:
    return dataset.with_format("arrow")[:]


def _columns(table: Any, columns: list[str], source: str) -> dict[str, list[Any]]:
    """Columns of an Arrow table, nested ones under dotted names."""
    import pyarrow

    while any(pyarrow.types.is_struct(kind) for kind in table.schema.types):
        table = table.flatten()
    for name in columns:
        if name not in table.column_names:
            raise missing_column(source, name, table.column_names)
    return {name: _values(table.column(name)) for name in columns}


def _values(column: Any) -> list[Any]:
    """Python values, but NumPy floats for 16 and 32 bits, so that a threshold can be rounded to the column's dtype."""
    import pyarrow

    kind = column.type.value_type if pyarrow.types.is_dictionary(column.type) else column.type
    values: list[Any] = column.to_pylist()
    narrow = {"halffloat": np.float16, "float": np.float32}.get(str(kind))
    return values if narrow is None else [None if v is None else narrow(v) for v in values]


def _sha256_of_files(directory: Path, split: str) -> str:
    """Digest of the names and contents of a directory's files, and of the split that is read from them."""
    names = (p.relative_to(directory) for p in directory.rglob("*") if p.is_file())
    seen = sorted(n for n in names if not any(part.startswith(".") for part in n.parts))
    digests = [split, *(f"{n.as_posix()} {_sha256(directory / n)}" for n in seen)]
    return hashlib.sha256("\n".join(digests).encode(errors="surrogateescape")).hexdigest()
