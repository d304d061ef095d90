"""Digests of a checkpoint's tensors: every byte is read once, and the digests are kept in the user's cache.

An entry of the cache counts as long as its file has the same path, size, inode and times of change.
"""

import hashlib
import json
import logging
import os
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch

from aura_dist.files import write_whole
from aura_dist.models.weights import Source, as_bytes, open_weights
from aura_dist.ranks.process import cache_dir

logger = logging.getLogger(__name__)

NUM_THREADS = 8
# a tensor is hashed in pieces, so that threads share a large one; a part of this fixes the digest
PIECE_BYTES = 16 << 20
# so much stays in the processor's cache between reading and hashing
READ_BYTES = 1 << 20
SLOW_BYTES = 4 << 30
# a file that has just changed may change once more without a new time, because file systems count time in ticks
SETTLED_SECONDS = 2.0

# name, dtype as safetensors names it, shape, and the sha256 of the sha256 digests of its pieces
TensorDigest = tuple[str, str, list[int], str]
Stamp = list[str | int]


def tensor_digests(file: Path) -> list[TensorDigest]:
    """The digests of a weight file's tensors, from the cache if the file is unchanged; ModelError if it is damaged."""
    now, before = time.time_ns(), stamp(file)
    entry = _entry(file)
    kept = None if entry is None else _kept(entry, before)
    if kept is not None:
        return kept
    found = _hash(file)
    settled = now - max(int(t) for t in before[-2:]) > SETTLED_SECONDS * 1e9
    if entry is not None and settled and stamp(file) == before:
        with suppress(OSError):  # without a cache the file is read each time
            entry.parent.mkdir(parents=True, exist_ok=True)
            write_whole(entry, json.dumps({"stamp": before, "tensors": found}))
    return found


def stamp(file: Path) -> Stamp:
    """What changes if the file does, and the rule of the digests; the two times come last.

    The time of the inode's change counts too, because users can set the time of modification.
    """
    with file.open("rb") as stream:  # opening a file of a network asks for its current times
        status = os.fstat(stream.fileno())
    return [str(file.resolve()), PIECE_BYTES, status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]


def _entry(file: Path) -> Path | None:
    """The file of the cache for a weight file; None where the user has no home."""
    try:
        return cache_dir() / "digests" / f"{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:32]}.json"
    except RuntimeError:
        return None


def _kept(entry: Path, now: Stamp) -> list[TensorDigest] | None:
    try:
        document = json.loads(entry.read_text(encoding="utf-8"))
        if document["stamp"] == now:
            return [(str(name), str(dtype), list(shape), str(d)) for name, dtype, shape, d in document["tensors"]]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def _hash(file: Path) -> list[TensorDigest]:
    size = file.stat().st_size
    if size > SLOW_BYTES:
        logger.info("%s: %.1f GB are read once to identify the model", file.name, size / 1e9)
    with open_weights(file) as weights:
        pool = ThreadPoolExecutor(NUM_THREADS)
        try:
            pieces: list[list[Future[bytes]]] = []
            for tensor in weights.tensors:
                starts = range(tensor.start, tensor.stop, PIECE_BYTES)
                jobs = (partial(_piece, weights, start, min(start + PIECE_BYTES, tensor.stop)) for start in starts)
                pieces.append([pool.submit(job) for job in jobs])
            return [
                (t.name, t.dtype, list(t.shape), hashlib.sha256(b"".join(p.result() for p in mine)).hexdigest())
                for t, mine in zip(weights.tensors, pieces, strict=True)
            ]
        finally:
            pool.shutdown(cancel_futures=True)


def _piece(weights: Source, start: int, stop: int) -> bytes:
    """sha256 of bytes [start, stop) of a weight file."""
    digest, buffer = hashlib.sha256(), torch.empty(min(READ_BYTES, stop - start), dtype=torch.uint8)
    for at in range(start, stop, READ_BYTES):
        part = buffer[: min(READ_BYTES, stop - at)]
        weights.read(at, part)
        digest.update(as_bytes(part))
    return digest.digest()
