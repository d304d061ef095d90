"""Compiled kernel behind `aura_dist.scoring.auroc`: mid-ranks of many columns, by counting or radix sort.

Values come as the bits of float32 numbers and are ranked as unsigned integers, so that no floating-point
mode (flush to zero, fast math) can change a comparison. Nothing runs in parallel here: the GIL is
released, and the caller spreads columns over threads or processes.

Names by shape: N rows, K of them used, M columns (neurons), C concepts; `pairs_K` holds one column as
(key << 32 | row), so that sorting it by key carries the rows along.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
from numpy import uint32, uint64
from numpy.typing import NDArray

Function = TypeVar("Function", bound=Callable[..., Any])
U32 = NDArray[np.uint32]
U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]

# A radix digit: two digits take the top 22 bits that differ, three take a whole key.
DIGIT_BITS = 11
# Columns gathered at once: 64 float32 are four cache lines of a row, which spares address translation.
MAX_WIDTH, MIN_WIDTH, SCRATCH_KEYS = 64, 16, 1 << 22
# Keys of 16 bits are counted in a table; the table is read and cleared only where it was written.
TABLE_SIZE, BLOCK_SIZE = 1 << 16, 64
# Moves per row that finishing by insertion may take before sorting the remaining bits is cheaper.
INSERTION_BUDGET = 8


def jit(function: Function) -> Function:
    """Compile at the first call, without the GIL; keep the machine code on disk where there is a place."""
    try:
        compiled = numba.njit(cache=True, nogil=True)(function)
    except RuntimeError:  # neither the package nor the home directory can be written to
        compiled = numba.njit(nogil=True)(function)
    return cast(Function, compiled)


@jit
def gather(bits_NM: U32, rows_K: I64, first: int, width: int, columns_WK: U32) -> None:
    """Copy columns first … first + width of the used rows, transposed, in tiles of eight rows."""
    whole = rows_K.size // 8 * 8
    for i in range(0, whole, 8):
        for j in range(width):
            for t in range(8):
                columns_WK[j, i + t] = bits_NM[rows_K[i + t], first + j]
    for i in range(whole, rows_K.size):
        for j in range(width):
            columns_WK[j, i] = bits_NM[rows_K[i], first + j]


@jit
def to_keys(column_K: U32, nan_above: int) -> tuple[int, bool]:
    """Turn float32 bits into keys of the same order, in place; count NaN; see whether 16 bits suffice.

    Positive numbers get their sign bit set, negative ones are inverted, −0 becomes +0.
    """
    num_nan = 0
    low = uint32(0)
    for i in range(column_K.size):
        bits = column_K[i]
        num_nan += (bits & uint32(0x7FFFFFFF)) > uint32(nan_above)
        low |= bits & uint32(0xFFFF)
    for i in range(column_K.size):
        bits = column_K[i]
        bits = uint32(0) if bits == uint32(0x80000000) else bits
        flip = uint32(0xFFFFFFFF) if bits > uint32(0x80000000) else uint32(0x80000000)
        column_K[i] = bits ^ flip
    return num_nan, low == uint32(0)


@jit
def _rank_by_counting(keys_K: U32, table: U32, block_used: NDArray[np.bool_], twice_ranks: U32) -> None:
    """Twice the mid-rank of the first `twice_ranks.size` rows; only the upper 16 bits of a key count.

    `table` and `block_used` must be all zero, and are all zero again afterwards.
    """
    for i in range(keys_K.size):
        key = keys_K[i] >> uint32(16)
        table[key] += uint32(1)
        block_used[key // uint32(BLOCK_SIZE)] = True
    less = uint32(0)
    for block in range(block_used.size):
        if block_used[block]:
            for key in range(block * BLOCK_SIZE, (block + 1) * BLOCK_SIZE):
                equal = table[key]
                table[key] = less + less + equal + uint32(1)
                less += equal
    for i in range(twice_ranks.size):
        twice_ranks[i] = table[keys_K[i] >> uint32(16)]
    for block in range(block_used.size):
        if block_used[block]:
            block_used[block] = False
            table[block * BLOCK_SIZE : (block + 1) * BLOCK_SIZE] = uint32(0)


@jit
def _radix_pass(source_K: U64, target_K: U64, shift: int, counts: U32) -> None:
    """One stable pass of a least-significant-digit radix sort on the digit at bit `shift` of the key."""
    down, mask = uint64(32 + shift), uint64((1 << DIGIT_BITS) - 1)
    counts[:] = uint32(0)
    for i in range(source_K.size):
        counts[(source_K[i] >> down) & mask] += uint32(1)
    total = uint32(0)
    for digit in range(counts.size):
        count = counts[digit]
        counts[digit] = total
        total += count
    for i in range(source_K.size):
        pair = source_K[i]
        digit_of_pair = (pair >> down) & mask
        place = counts[digit_of_pair]
        target_K[place] = pair
        counts[digit_of_pair] = place + uint32(1)


@jit
def _finish_by_insertion(pairs_K: U64) -> bool:
    """Sort what is nearly sorted by insertion; False, with the work left undone, if it is not nearly so."""
    moves, budget = 0, INSERTION_BUDGET * pairs_K.size
    for i in range(1, pairs_K.size):
        pair = pairs_K[i]
        if pair < pairs_K[i - 1]:
            j = i
            while j > 0 and pairs_K[j - 1] > pair:
                pairs_K[j] = pairs_K[j - 1]
                j -= 1
            pairs_K[j] = pair
            moves += i - j
            if moves > budget:
                return False
    return True


@jit
def sort_pairs(keys_K: U32, pairs_K: U64, spare_K: U64, counts: U32) -> None:
    """Fill `pairs_K` with (key << 32 | row), sorted.

    Two passes over the top 22 bits in which the keys differ leave few pairs out of order among real
    activations; insertion puts those right. Where it does not, three passes sort the whole key.
    """
    differ = uint32(0)
    for i in range(keys_K.size):
        differ |= keys_K[i] ^ keys_K[0]
        pairs_K[i] = (uint64(keys_K[i]) << uint64(32)) | uint64(i)
    top = 0
    while top < 32 and (differ >> uint32(top)) != uint32(0):
        top += 1
    shift = max(0, top - 2 * DIGIT_BITS)
    _radix_pass(pairs_K, spare_K, shift, counts)
    _radix_pass(spare_K, pairs_K, shift + DIGIT_BITS, counts)
    if not _finish_by_insertion(pairs_K):
        _radix_pass(pairs_K, spare_K, 0, counts)
        _radix_pass(spare_K, pairs_K, DIGIT_BITS, counts)
        _radix_pass(pairs_K, spare_K, 2 * DIGIT_BITS, counts)
        pairs_K[:] = spare_K


@jit
def _rank_sorted(pairs_K: U64, starts_K: U64, twice_ranks_K: U32) -> None:
    """Twice the mid-rank of every row, from its sorted pairs: 2 · #smaller + #equal + 1.

    Runs of equal keys are marked in two sweeps without branches, which ties would mispredict; a column
    without ties needs neither. `starts_K` is scratch.
    """
    num_rows, row_bits, key_shift = pairs_K.size, uint64(0xFFFFFFFF), uint64(32)
    num_ties = 0
    twice_ranks_K[pairs_K[0] & row_bits] = uint32(2)
    for i in range(1, num_rows):
        num_ties += (pairs_K[i] >> key_shift) == (pairs_K[i - 1] >> key_shift)
        twice_ranks_K[pairs_K[i] & row_bits] = uint32(2 * i + 2)
    if num_ties == 0:
        return
    start = uint64(0)
    starts_K[0] = start
    for i in range(1, num_rows):
        start = start if (pairs_K[i] >> key_shift) == (pairs_K[i - 1] >> key_shift) else uint64(i)
        starts_K[i] = start
    last = uint64(num_rows - 1)
    twice_ranks_K[pairs_K[last] & row_bits] = uint32(starts_K[last] + last + uint64(2))
    for i in range(num_rows - 2, -1, -1):
        last = last if (pairs_K[i] >> key_shift) == (pairs_K[i + 1] >> key_shift) else uint64(i)
        twice_ranks_K[pairs_K[i] & row_bits] = uint32(starts_K[i] + last + uint64(2))


@jit
def twice_rank_sums(
    bits_NM: U32, nan_above: int, rows_K: I64, num_ranked: int, positives: I64, starts_C1: I64
) -> tuple[I64, I64]:
    """Twice the sum of the positives' mid-ranks, for every concept and column.

    Parameters
    ----------
    bits_NM : uint32 [N, M], C order
        Values as the bits of float32 numbers.
    nan_above : int
        Bits without the sign above this are NaN: 0x7F800000 for float32.
    rows_K : int64 [K]
        Rows to rank among each other; those that are positive for some concept come first. 0 < K < 2**31.
    num_ranked : int
        How many rows that is: only they need a rank.
    positives : int64 [starts_C1[-1]]
        The positives of concept c are rows_K[positives[starts_C1[c] : starts_C1[c + 1]]].
    starts_C1 : int64 [C + 1]

    Returns
    -------
    sums_CM : int64 [C, M]
        Without meaning in a column with NaN.
    num_nan_M : int64 [M]
        NaN among the K rows.
    """
    num_rows, num_columns, num_concepts = rows_K.size, bits_NM.shape[1], starts_C1.size - 1
    sums_CM = np.zeros((num_concepts, num_columns), np.int64)
    num_nan_M = np.zeros(num_columns, np.int64)
    max_width = max(MIN_WIDTH, min(MAX_WIDTH, SCRATCH_KEYS // num_rows))
    columns_WK = np.empty((max_width, num_rows), np.uint32)
    table, block_used = np.zeros(TABLE_SIZE, np.uint32), np.zeros(TABLE_SIZE // BLOCK_SIZE, np.bool_)
    pairs_K, spare_K = np.empty(num_rows, np.uint64), np.empty(num_rows, np.uint64)
    counts, twice_ranks_K = np.empty(1 << DIGIT_BITS, np.uint32), np.empty(num_rows, np.uint32)
    for first in range(0, num_columns, max_width):
        width = min(max_width, num_columns - first)
        gather(bits_NM, rows_K, first, width, columns_WK)
        for j in range(width):
            keys_K = columns_WK[j]
            num_nan_M[first + j], short = to_keys(keys_K, nan_above)
            if short:
                _rank_by_counting(keys_K, table, block_used, twice_ranks_K[:num_ranked])
            else:
                sort_pairs(keys_K, pairs_K, spare_K, counts)
                _rank_sorted(pairs_K, spare_K, twice_ranks_K)
            for c in range(num_concepts):
                total = np.int64(0)
                for i in range(starts_C1[c], starts_C1[c + 1]):
                    total += np.int64(twice_ranks_K[positives[i]])
                sums_CM[c, first + j] = total
    return sums_CM, num_nan_M
