"""Tokens' values as SAELens caches activations: a data set a module, in rows of equally many tokens.

`use_cached_activations` loads a directory with `datasets.load_from_disk`, and wants a column of the hook's name, of the
feature `Array2D((context, d))`, and `token_ids`. Training shuffles the tokens of all rows. So texts follow one another
in the rows, without padding, because that would be trained on.
"""

import json
import logging
from pathlib import Path

from aura_dist.errors import InputError, MissingPackageError
from aura_dist.store.tokens import StoredTokens

logger = logging.getLogger(__name__)

_PART_BYTES = 64 * 2**20  # of values that are in memory at once, unless one row has more
_FILE, _STATE = "data-{:05d}-of-{:05d}.arrow", "state.json"


def write_caches(tokens: StoredTokens, sites: list[str], context: int, place: Path) -> None:
    """Write PLACE/SITE for each site, in the memory of a part of it.

    InputError if all texts have fewer tokens than one row takes; MissingPackageError without `datasets`.
    """
    num_rows, left = divmod(tokens.num_tokens, context)
    if not num_rows:
        raise InputError(f"--context: expected at most the {tokens.num_tokens} tokens of all texts, got {context}")
    if left:
        logger.warning("the last %d of %d tokens do not fill a row of %d: left out", left, tokens.num_tokens, context)
    for site in sites:
        (place / site).mkdir()
        _write_cache(tokens, site, context, num_rows, place / site)


def _write_cache(tokens: StoredTokens, site: str, context: int, num_rows: int, place: Path) -> None:
    try:
        from datasets import Array2D, Dataset, Features, Sequence, Value
        from datasets.utils import disable_progress_bars
    except ImportError as error:
        raise MissingPackageError("--to saelens", "datasets", "datasets") from error

    disable_progress_bars()
    values, ids = tokens.values(site), tokens.field("input_ids")
    width = values.shape[1]
    features = Features(
        {site: Array2D((context, width), values.dtype.name), "token_ids": Sequence(Value("int32"), length=context)}
    )
    step = max(1, _PART_BYTES // (context * width * values.dtype.itemsize))
    starts = range(0, num_rows, step)
    for number, first in enumerate(starts):
        rows = min(step, num_rows - first)
        some = slice(first * context, (first + rows) * context)
        columns = {site: values.read(some).reshape(rows, context, width), "token_ids": ids[some].reshape(rows, context)}
        part = place / f"part-{number}"
        Dataset.from_dict(columns, features=features).save_to_disk(part, num_shards=1)
        _take_over(part, place, number, len(starts))


def _take_over(part: Path, place: Path, number: int, num_parts: int) -> None:
    """Make the file of a data set the file `number` of the whole, which is described once."""
    state = json.loads((part / _STATE).read_text(encoding="utf-8"))
    (part / state["_data_files"][0]["filename"]).rename(place / _FILE.format(number, num_parts))
    if number == 0:
        (part / "dataset_info.json").rename(place / "dataset_info.json")
        state["_data_files"] = [{"filename": _FILE.format(i, num_parts)} for i in range(num_parts)]
        (place / _STATE).write_text(json.dumps(state, indent=2), encoding="utf-8")
    for file in part.iterdir():
        file.unlink()
    part.rmdir()
