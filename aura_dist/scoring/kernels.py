"""Compiled kernel behind `column_sums.sums_fast`: one ordering of a column, then the sums of every concept.

Values come as the bits of float32 numbers and are compared as unsigned integers, so that no floating-point mode
(flush to zero, fast math) can change a comparison. A column whose keys fit in 16 bits is ordered by counting, any
other by a radix sort. Nothing runs in parallel here: the GIL is released, and the caller spreads columns over threads
or processes. It is one module, because numba keeps machine code as long as the module of a function is unchanged, and
does not look at the modules of those that it calls.

An ordered column is kept as its *runs*: the distinct values, ascending, and the rows that hold each. Two counts a run,
positives and negatives, are all that a concept needs: one walk over the runs and one merge of the two classes make its
sums. Rows that a concept does not label are taken out of its counts, so that concepts with different labelled rows
share the ordering. AUROC alone needs no runs: it is the sum of the positives' mid-ranks.

Names by shape: N rows, K of them used, M columns (neurons), C concepts, R runs of one column; `pairs_K` holds a column
as (key << 32 | row), so that sorting by key carries the rows along; `order_K` holds each row's place in the order, the
index of its run or twice its mid-rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
from numpy import int32, uint32, uint64
from numpy.typing import NDArray

from aura_dist.scoring.column_sums import F64, I64, NUM_RANK_SUMS, REAL_SUMS, SCRATCH_KEYS, WHOLE_SUMS

Function = TypeVar("Function", bound=Callable[..., Any])
I32 = NDArray[np.int32]
U32 = NDArray[np.uint32]
U64 = NDArray[np.uint64]
Bools = NDArray[np.bool_]

# A radix digit: two digits take the top 22 bits that differ, three take a whole key.
DIGIT_BITS = 11
# Columns gathered at once: 64 float32 are four cache lines of a row, which spares address translation.
MAX_WIDTH, MIN_WIDTH = 64, 16
# Keys of 16 bits are counted in a table; the table is read and cleared only where it was written.
TABLE_SIZE, BLOCK_SIZE = 1 << 16, 64
# Moves per row that finishing by insertion may take before sorting the remaining bits is cheaper.
INSERTION_BUDGET = 8
_NUM_WHOLE, _NUM_REAL = len(WHOLE_SUMS), len(REAL_SUMS)


def jit(function: Function) -> Function:
    """Compile at the first call, without the GIL; keep the machine code on disk where there is a place."""
    try:
        compiled = numba.njit(cache=True, nogil=True)(function)
    except RuntimeError:  # neither the package nor the home directory can be written to
        compiled = numba.njit(nogil=True)(function)
    return cast(Function, compiled)


@jit
def _gather(bits_NM: U32, rows_K: I64, first: int, width: int, columns_WK: U32) -> None:
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
def _to_keys(column_K: U32, nan_above: int) -> tuple[int, bool]:
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
def _order_by_counting(
    keys_K: U32, ranks_only: bool, table: U32, block_used: Bools, order_K: U32, keys_R: U32, all_R: I32
) -> int:
    """Order the first `order_K.size` rows of a column whose keys differ in their upper 16 bits alone.

    Twice the mid-ranks if `ranks_only`, else the runs: their number is returned, their keys and rows are filled in.
    `table` and `block_used` must be all zero, and are all zero again afterwards.
    """
    for i in range(keys_K.size):
        key = keys_K[i] >> uint32(16)
        table[key] += uint32(1)
        block_used[key // uint32(BLOCK_SIZE)] = True
    num_runs, less = 0, uint32(0)
    for block in range(block_used.size):
        if not block_used[block]:
            continue
        first, stop = block * BLOCK_SIZE, (block + 1) * BLOCK_SIZE
        if ranks_only:
            for key in range(first, stop):
                count = table[key]
                table[key] = less + less + count + uint32(1)
                less += count
        else:
            for key in range(first, stop):
                count = table[key]
                # Written for every key and kept for those that occur: a branch would be mispredicted.
                # A negative number's key is its complement: the lower bits, all 0 in the number, are 1.
                keys_R[num_runs] = (uint32(key) << uint32(16)) | uint32(0 if key >= TABLE_SIZE // 2 else 0xFFFF)
                all_R[num_runs] = int32(count)
                table[key] = uint32(num_runs)
                num_runs += count > uint32(0)
    for i in range(order_K.size):
        order_K[i] = table[keys_K[i] >> uint32(16)]
    for block in range(block_used.size):
        if block_used[block]:
            block_used[block] = False
            table[block * BLOCK_SIZE : (block + 1) * BLOCK_SIZE] = uint32(0)
    return num_runs


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
    """Sort nearly sorted pairs by insertion; False, with the pairs left unsorted, if that takes too many moves."""
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
def _sort_pairs(keys_K: U32, pairs_K: U64, spare_K: U64, counts: U32) -> None:
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
def _ranks_of_sorted(pairs_K: U64, starts_K: U64, order_K: U32) -> None:
    """Twice the mid-rank of every row, from its sorted pairs: 2 · #smaller + #equal + 1.

    Runs of equal keys are marked in two sweeps without branches, which ties would mispredict; a column
    without ties needs neither. `starts_K` is scratch.
    """
    num_rows, row_bits, key_shift = pairs_K.size, uint64(0xFFFFFFFF), uint64(32)
    num_ties = 0
    order_K[pairs_K[0] & row_bits] = uint32(2)
    for i in range(1, num_rows):
        num_ties += (pairs_K[i] >> key_shift) == (pairs_K[i - 1] >> key_shift)
        order_K[pairs_K[i] & row_bits] = uint32(2 * i + 2)
    if num_ties == 0:
        return
    start = uint64(0)
    starts_K[0] = start
    for i in range(1, num_rows):
        start = start if (pairs_K[i] >> key_shift) == (pairs_K[i - 1] >> key_shift) else uint64(i)
        starts_K[i] = start
    last = uint64(num_rows - 1)
    order_K[pairs_K[last] & row_bits] = uint32(starts_K[last] + last + uint64(2))
    for i in range(num_rows - 2, -1, -1):
        last = last if (pairs_K[i] >> key_shift) == (pairs_K[i + 1] >> key_shift) else uint64(i)
        order_K[pairs_K[i] & row_bits] = uint32(starts_K[i] + last + uint64(2))


@jit
def _runs_of_sorted(pairs_K: U64, order_K: U32, keys_R: U32, all_R: I32) -> int:
    """Runs of a column from its sorted pairs (key << 32 | row); the number of runs."""
    run = 0
    previous = uint32(pairs_K[0] >> uint64(32))
    keys_R[0], start = previous, 0
    for i in range(pairs_K.size):
        key = uint32(pairs_K[i] >> uint64(32))
        is_new = key != previous
        all_R[run] = int32(i - start)  # final once the next run begins
        run += is_new
        start = i if is_new else start
        keys_R[run] = key
        order_K[pairs_K[i] & uint64(0xFFFFFFFF)] = uint32(run)
        previous = key
    all_R[run] = int32(pairs_K.size - start)
    return run + 1


@jit
def _values_of_runs(keys_R: U32, num_runs: int, nan_above: int, is_half: bool, values_R: F64, nan_R: Bools) -> None:
    """Numbers behind the keys, undoing `_to_keys`; a NaN becomes 0 and is marked."""
    for r in range(num_runs):
        key = keys_R[r]
        keys_R[r] = key ^ uint32(0x80000000) if key & uint32(0x80000000) else ~key
    floats_R = keys_R.view(np.float32)
    for r in range(num_runs):
        magnitude = keys_R[r] & uint32(0x7FFFFFFF)
        nan_R[r] = magnitude > uint32(nan_above)
        value = float(floats_R[r])
        if is_half:
            exponent, mantissa = np.int64(magnitude >> uint32(26)), np.int64((magnitude >> uint32(16)) & uint32(0x3FF))
            if exponent == 31:
                value = np.inf
            elif exponent == 0:
                value = mantissa * 2.0**-24
            else:
                value = (1024 + mantissa) * 2.0 ** (exponent - 25)
            if keys_R[r] >> uint32(31):
                value = -value
        values_R[r] = 0.0 if nan_R[r] else value


@jit
def _walk(
    pos_R: I32, rest_R: I32, num_runs: int, values_R: F64, whole: I64, real: F64, x_R: F64, y_R: F64, p_R: I32, q_R: I32
) -> tuple[int, int]:
    """Sums over one concept's runs in ascending order; its classes' own runs, and how many each has.

    `pos_R` counts the positives of each run and `rest_R` its labelled rows.
    """
    num_positive = num_labelled = np.int64(0)
    for r in range(num_runs):
        num_positive += pos_R[r]
        num_labelled += rest_R[r]
    num_negative = num_labelled - num_positive
    below_p = below_q = twice_u = above_aa = below_bb = num_distinct = np.int64(0)
    ties = precision = 0.0
    num_x = num_y = 0
    for r in range(num_runs):
        p, t = np.int64(pos_R[r]), np.int64(rest_R[r])
        q = t - p
        # Twice the mid-rank of a row among the other class, centred, so that its square stays small.
        a, b = 2 * below_q + q - num_negative, 2 * below_p + p - num_positive
        twice_u += p * a
        above_aa += p * a * a
        below_bb += q * b * b
        num_distinct += t > 0
        size = float(t)
        ties += size * (size * size - 1.0)
        left = num_labelled - below_p - below_q  # 0 where the last runs hold only unlabelled rows
        precision += float(p * (num_positive - below_p)) / float(left + (left == 0))
        x_R[num_x], p_R[num_x] = values_R[r], int32(p)
        num_x += int(p > 0)
        y_R[num_y], q_R[num_y] = values_R[r], int32(q)
        num_y += int(q > 0)
        below_p += p
        below_q += q
    whole[0], whole[2], whole[3], whole[4] = twice_u + num_positive * num_negative, above_aa, below_bb, num_distinct
    real[0], real[1] = ties, precision / float(num_positive)
    return num_x, num_y


@jit
def _moments(x_R: F64, p_R: I32, num_runs: int) -> tuple[float, float]:
    """Mean of a class and its sum of squared deviations, in two passes."""
    count, total = np.int64(0), 0.0
    for r in range(num_runs):
        count += p_R[r]
        total += p_R[r] * x_R[r]
    mean, squares = total / count, 0.0
    for r in range(num_runs):
        squares += p_R[r] * ((x_R[r] - mean) * (x_R[r] - mean))
    return mean, squares


@jit
def _cross(x_R: F64, p_R: I32, num_x: int, mean_x: float, y_R: F64, q_R: I32, num_y: int, mean_y: float) -> float:
    """Covariance of the classes under their monotone coupling: E[(x − x̄)(y − ȳ)], x and y rising together.

    Each class has mass 1, spread evenly over its rows; in units of 1 / (P Q) all masses are whole numbers.
    """
    num_positive = num_negative = np.int64(0)
    for r in range(num_x):
        num_positive += p_R[r]
    for r in range(num_y):
        num_negative += q_R[r]
    i = j = 0
    left_x, left_y, total = p_R[0] * num_negative, q_R[0] * num_positive, 0.0
    while True:
        mass = min(left_x, left_y)
        total += mass * ((x_R[i] - mean_x) * (y_R[j] - mean_y))
        left_x -= mass
        left_y -= mass
        if left_x == 0:
            i += 1
            if i == num_x:
                return float(total / (float(num_positive) * float(num_negative)))
            left_x = p_R[i] * num_negative
        if left_y == 0:
            j += 1
            left_y = q_R[j] * num_positive


@jit
def column_sums(
    bits_NM: U32,
    nan_above: int,
    is_half: bool,
    ranks_only: bool,
    rows_K: I64,
    num_ranked: int,
    positives: I64,
    starts_P: I64,
    unlabelled: I64,
    starts_U: I64,
) -> tuple[I64, F64]:
    """Every sum of every concept and column, or only those that ranks make.

    Parameters
    ----------
    bits_NM : uint32 [N, M], C order
        Values as the bits of float32 numbers; of float16 numbers in the upper half if `is_half`.
    nan_above : int
        Bits without the sign above this are NaN.
    ranks_only : bool
        Make the first `NUM_RANK_SUMS` of `WHOLE_SUMS` alone; every concept labels all of `rows_K`.
    rows_K : int64 [K]
        Rows that some concept labels; those that are positive for some concept come first. 0 < K < 2**31, and
        K < 2**21 where sums of squared ranks are to fit.
    num_ranked : int
        How many rows are positive for some concept.
    positives, starts_P : int64 [·], int64 [C + 1]
        The positives of concept c are rows_K[positives[starts_P[c] : starts_P[c + 1]]]; at least one.
    unlabelled, starts_U : int64 [·], int64 [C + 1]
        The rows of rows_K that concept c does not label, likewise; they leave it a negative.

    Returns
    -------
    whole : int64 [len(WHOLE_SUMS) or NUM_RANK_SUMS, C, M]
    real : float64 [len(REAL_SUMS) or 0, C, M]
        Both without meaning where `num_nan` is not 0.
    """
    num_rows, num_columns, num_concepts = rows_K.size, bits_NM.shape[1], starts_P.size - 1
    num_whole, num_real = (NUM_RANK_SUMS, 0) if ranks_only else (_NUM_WHOLE, _NUM_REAL)
    whole_SCM = np.zeros((num_whole, num_concepts, num_columns), np.int64)
    real_SCM = np.zeros((num_real, num_concepts, num_columns), np.float64)
    max_width = max(MIN_WIDTH, min(MAX_WIDTH, SCRATCH_KEYS // num_rows))
    columns_WK = np.empty((max_width, num_rows), np.uint32)
    table, block_used = np.zeros(TABLE_SIZE, np.uint32), np.zeros(TABLE_SIZE // BLOCK_SIZE, np.bool_)
    pairs_K, spare_K = np.empty(num_rows, np.uint64), np.empty(num_rows, np.uint64)
    counts, order_K = np.empty(1 << DIGIT_BITS, np.uint32), np.empty(num_rows, np.uint32)
    counted_K = order_K[:num_ranked] if ranks_only else order_K  # only the positives need a rank
    # One place more than there can be runs: some loops write a place before they know whether it is kept.
    keys_R, values_R = np.empty(num_rows + 1, np.uint32), np.empty(num_rows + 1, np.float64)
    nan_R, all_R = np.empty(num_rows + 1, np.bool_), np.empty(num_rows + 1, np.int32)
    pos_R, rest_R = np.empty(num_rows + 1, np.int32), np.empty(num_rows + 1, np.int32)
    x_R, y_R = np.empty(num_rows + 1, np.float64), np.empty(num_rows + 1, np.float64)
    p_R, q_R = np.empty(num_rows + 1, np.int32), np.empty(num_rows + 1, np.int32)
    whole, real = np.empty(_NUM_WHOLE, np.int64), np.empty(_NUM_REAL, np.float64)
    for first in range(0, num_columns, max_width):
        width = min(max_width, num_columns - first)
        _gather(bits_NM, rows_K, first, width, columns_WK)
        for j in range(width):
            keys_K, num_runs = columns_WK[j], 0
            num_nan, short = _to_keys(keys_K, nan_above)
            if short:
                num_runs = _order_by_counting(keys_K, ranks_only, table, block_used, counted_K, keys_R, all_R)
            else:
                _sort_pairs(keys_K, pairs_K, spare_K, counts)
                if ranks_only:
                    _ranks_of_sorted(pairs_K, spare_K, order_K)
                else:
                    num_runs = _runs_of_sorted(pairs_K, order_K, keys_R, all_R)
            if ranks_only:
                for c in range(num_concepts):
                    total = np.int64(0)
                    for i in range(starts_P[c], starts_P[c + 1]):
                        total += np.int64(order_K[positives[i]])
                    num_positive = starts_P[c + 1] - starts_P[c]
                    whole_SCM[0, c, first + j] = total - num_positive * (num_positive + 1)
                    whole_SCM[1, c, first + j] = num_nan
                continue
            _values_of_runs(keys_R, num_runs, nan_above, is_half, values_R, nan_R)
            for c in range(num_concepts):
                pos_R[:num_runs] = int32(0)
                rest_R[:num_runs] = all_R[:num_runs]
                for i in range(starts_P[c], starts_P[c + 1]):
                    pos_R[order_K[positives[i]]] += int32(1)
                for i in range(starts_U[c], starts_U[c + 1]):
                    rest_R[order_K[unlabelled[i]]] -= int32(1)
                num_x, num_y = _walk(pos_R, rest_R, num_runs, values_R, whole, real, x_R, y_R, p_R, q_R)
                whole[1] = 0
                if num_nan:
                    for r in range(num_runs):
                        whole[1] += rest_R[r] if nan_R[r] else 0
                real[2], real[4] = _moments(x_R, p_R, num_x)
                real[3], real[5] = _moments(y_R, q_R, num_y)
                real[6], real[7], real[8], real[9] = x_R[0], y_R[0], x_R[num_x - 1], y_R[num_y - 1]
                real[10] = _cross(x_R, p_R, num_x, real[2], y_R, q_R, num_y, real[3])
                whole_SCM[:, c, first + j] = whole
                real_SCM[:, c, first + j] = real
    return whole_SCM, real_SCM
