"""Who computes what: samples → row chunks → tasks and batches; neurons → chunk columns, in shards and spans.

Pure functions of numbers. Samples are sorted by token count; a *row chunk* is the rows of one Zarr chunk,
a *batch* never leaves its row chunk, and a *task* is a run of whole row chunks: the unit of balance,
commit and resume. A *shard* is a file: a row chunk of a run of whole chunk columns. A *span* is the run of chunk
columns whose scores are in one file. None of it depends on ranks or sharding, so that any launch can finish any store.

Where the values of single tokens are stored, a *block* is the tokens of one batch. All blocks have places for equally
many tokens on the axis of the values, so no shard has tokens of two blocks. Shards without tokens are not written.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil

MIN_ROWS_PER_CHUNK = 32
SMALL_STORE_ROWS = 128
FEW_ROWS_PER_CHUNK = 100
MAX_ROWS_PER_CHUNK = 256
MAX_COLUMNS_PER_CHUNK = 1024
MAX_BYTES_PER_CHUNK_COLUMN = 256_000_000
MAX_BYTES_PER_SHARD = 64 * 2**20
MIN_COLUMNS_PER_SPAN = 4096
TOKENS_PER_CHUNK = 64
MAX_COLUMNS_PER_TOKEN_CHUNK = 4096
ALIGNED_RANKS = 16
# Cost of a forward beside its tokens, in tokens: launches, and reading the weights once.
BATCH_OVERHEAD_TOKENS = 64


@dataclass(frozen=True)
class Task:
    """Rows [start, stop) of the store, in whole row chunks, and the tokens in them."""

    index: int
    start: int
    stop: int
    num_tokens: int


def rows_per_chunk(num_rows: int) -> int:
    """Rows of one chunk: as even a cut as there is into chunks of at most `num_rows` / 32, between 100 and 256.

    So there is work for many ranks in a large store. A small store, whose time goes into making files (one for every
    row chunk, chunk column and site), has few chunks, none of only a few rows. Below 128 rows, chunks are of 32.
    """
    if num_rows < SMALL_STORE_ROWS:
        return MIN_ROWS_PER_CHUNK
    most = min(max(FEW_ROWS_PER_CHUNK, num_rows // 32), MAX_ROWS_PER_CHUNK)
    return ceil(num_rows / ceil(num_rows / most))


def columns_per_chunk(width: int, num_rows: int, item_bytes: int) -> int:
    """Columns of one chunk: the largest divisor of ⌈width / 16⌉ that is not too large.

    Not above 1,024, and small enough that all rows × one chunk column take at most 256 MB. Divisors of a
    sixteenth of the width align with the columns of up to 16 tensor-parallel ranks. Where such a divisor
    would make chunks tiny (⌈width / 16⌉ is a large prime, say), alignment is given up for size.
    """
    share = ceil(width / ALIGNED_RANKS)
    limit = max(1, min(MAX_COLUMNS_PER_CHUNK, MAX_BYTES_PER_CHUNK_COLUMN // max(1, num_rows * item_bytes)))
    best = max(c for c in range(1, min(share, limit) + 1) if share % c == 0)
    return best if 8 * best >= min(share, limit) else min(share, limit)


def columns_per_shard(width: int, chunk: int, rows_chunk: int, item_bytes: int) -> int:
    """Columns of one shard, in whole chunks of `chunk` columns: all of a site's, in even cuts of at most 64 MiB."""
    num_chunks = ceil(width / chunk)
    most = max(1, MAX_BYTES_PER_SHARD // (rows_chunk * item_bytes * chunk))
    return chunk * ceil(num_chunks / ceil(num_chunks / most))


def columns_per_span(width: int, chunk: int) -> int:
    """Columns whose scores are in one file, in whole chunks: 4,096 or a few more, or all of a narrower site's."""
    num_chunks = ceil(width / chunk)
    least = ceil(MIN_COLUMNS_PER_SPAN / chunk)
    return chunk * ceil(num_chunks / max(1, num_chunks // least))


def make_tasks(num_tokens: Sequence[int], rows_chunk: int, tokens_per_batch: int) -> list[Task]:
    """Cut the rows into tasks: runs of whole chunks of `rows_chunk` rows, with `tokens_per_batch` tokens or more each.

    `num_tokens` are the rows' token counts, [N] in store order. A remainder of fewer tokens joins the last task.
    """
    cuts, tokens = [0], 0
    for begin in range(0, len(num_tokens), rows_chunk):
        stop = min(begin + rows_chunk, len(num_tokens))
        tokens += sum(num_tokens[begin:stop])
        if tokens >= tokens_per_batch:
            cuts.append(stop)
            tokens = 0
    if len(cuts) == 1:
        cuts.append(len(num_tokens))
    cuts[-1] = len(num_tokens)
    return [
        Task(index, start, stop, int(sum(num_tokens[start:stop]))) for index, (start, stop) in enumerate(pairwise(cuts))
    ]


def row_chunks(task: Task, rows_chunk: int) -> Iterator[slice]:
    """The row chunks of a task, in store order."""
    for start in range(task.start, task.stop, rows_chunk):
        yield slice(start, min(start + rows_chunk, task.stop))


def make_batches(
    num_tokens: Sequence[int], chunk: slice, tokens_per_batch: int, overhead_tokens: int = BATCH_OVERHEAD_TOKENS
) -> list[slice]:
    """Cut a row chunk into batches of at most `tokens_per_batch` tokens, padding included, in store order.

    Rows ascend in length, so a batch of rows [a, b) takes (b − a) × num_tokens[b − 1] tokens. The cut is the cheapest
    (exact, by dynamic programming), where a batch costs its tokens and `overhead_tokens` more. A row longer than
    the budget is a batch of its own.
    """
    start, stop = chunk.start, chunk.stop
    least, cut = {start: 0}, {}
    for b in range(start + 1, stop + 1):
        length = num_tokens[b - 1]
        first = max(start, b - max(1, tokens_per_batch // max(1, length)))
        least[b], cut[b] = min((least[a] + (b - a) * length + overhead_tokens, a) for a in range(first, b))
    cuts = [stop]
    while cuts[-1] > start:
        cuts.append(cut[cuts[-1]])
    return [slice(a, b) for a, b in pairwise(reversed(cuts))]


@dataclass(frozen=True)
class TokenGrid:
    """Places of tokens on the axis of their values: `block_tokens` for each block, a power of two times 64.

    `blocks` are the rows of each block, in store order.
    """

    blocks: tuple[slice, ...]
    block_tokens: int

    @property
    def num_places(self) -> int:
        """Length of the axis, of which only the beginning of each block holds tokens."""
        return len(self.blocks) * self.block_tokens

    def tokens_per_shard(self, width: int, item_bytes: int) -> int:
        """Tokens of one shard, which has all of a site's columns: a block's, halved until they take at most 64 MiB."""
        tokens = self.block_tokens
        while tokens > TOKENS_PER_CHUNK and tokens * width * item_bytes > MAX_BYTES_PER_SHARD:
            tokens //= 2
        return tokens

    def num_shards(self, num_tokens: Sequence[int], width: int, item_bytes: int) -> int:
        """Shards of a site that are written; `num_tokens` are the rows' token counts."""
        shard = self.tokens_per_shard(width, item_bytes)
        return sum(ceil(sum(num_tokens[block]) / shard) for block in self.blocks)


def token_grid(num_tokens: Sequence[int], tokens_per_batch: int) -> TokenGrid:
    """The grid of tokens of a store, from the rows' token counts, [N] in store order."""
    size, blocks = rows_per_chunk(len(num_tokens)), []
    for start in range(0, len(num_tokens), size):
        blocks += make_batches(num_tokens, slice(start, min(start + size, len(num_tokens))), tokens_per_batch)
    longest = max(sum(num_tokens[block]) for block in blocks)
    return TokenGrid(tuple(blocks), TOKENS_PER_CHUNK * 2 ** (ceil(longest / TOKENS_PER_CHUNK) - 1).bit_length())


def columns_per_token_chunk(width: int) -> int:
    """Columns of one chunk of tokens: all, or an even cut, because they are read together."""
    return ceil(width / ceil(width / MAX_COLUMNS_PER_TOKEN_CHUNK))
