"""Compiled: the runs of a column, its distinct values in ascending order, by counting or from sorted pairs.

Names by shape: K rows ranked, R runs of one column. `run_K` is the run of every row, `rest_R` the rows of every run.
"""

from __future__ import annotations

import numpy as np
from numpy import int32, uint32
from numpy.typing import NDArray

from aura_dist.scoring.auroc_kernels import BLOCK_SIZE, TABLE_SIZE, U32, U64, jit

I32 = NDArray[np.int32]
F64 = NDArray[np.float64]


@jit
def runs_by_counting(
    keys_K: U32, table: U32, block_used: NDArray[np.bool_], run_K: I32, keys_R: U32, rest_R: I32
) -> int:
    """Runs of a column whose keys differ in their upper 16 bits alone; the number of runs.

    `table` and `block_used` must be all zero, and are all zero again afterwards.
    """
    for i in range(keys_K.size):
        key = keys_K[i] >> uint32(16)
        table[key] += uint32(1)
        block_used[key // uint32(BLOCK_SIZE)] = True
    num_runs = 0
    for block in range(block_used.size):
        if block_used[block]:
            for key in range(block * BLOCK_SIZE, (block + 1) * BLOCK_SIZE):
                count = table[key]
                # Written for every key and kept for those that occur: a branch would be mispredicted.
                # A negative number's key is its complement: the lower bits, all 0 in the number, are 1.
                keys_R[num_runs] = (uint32(key) << uint32(16)) | uint32(0 if key >= TABLE_SIZE // 2 else 0xFFFF)
                rest_R[num_runs] = int32(count)
                table[key] = uint32(num_runs)
                num_runs += count > uint32(0)
    for i in range(keys_K.size):
        run_K[i] = int32(table[keys_K[i] >> uint32(16)])
    for block in range(block_used.size):
        if block_used[block]:
            block_used[block] = False
            table[block * BLOCK_SIZE : (block + 1) * BLOCK_SIZE] = uint32(0)
    return num_runs


@jit
def runs_of_sorted(pairs_K: U64, run_K: I32, keys_R: U32, rest_R: I32) -> int:
    """Runs of a column from its sorted pairs (key << 32 | row); the number of runs."""
    run = 0
    previous = uint32(pairs_K[0] >> np.uint64(32))
    keys_R[0], start = previous, 0
    for i in range(pairs_K.size):
        key = uint32(pairs_K[i] >> np.uint64(32))
        is_new = key != previous
        rest_R[run] = int32(i - start)  # final once the next run begins
        run += is_new
        start = i if is_new else start
        keys_R[run] = key
        run_K[pairs_K[i] & np.uint64(0xFFFFFFFF)] = int32(run)
        previous = key
    rest_R[run] = int32(pairs_K.size - start)
    return run + 1


@jit
def values_of_runs(
    keys_R: U32, num_runs: int, nan_above: int, is_half: bool, values_R: F64, nan_R: NDArray[np.bool_]
) -> None:
    """Numbers behind the keys, undoing `to_keys`; a NaN becomes 0 and is marked."""
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
