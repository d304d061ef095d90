"""Requests to a store in S3: as the product makes them, through bare `obstore`, and through fsspec's driver if `s3fs`
is installed.

python -m tests.benchmarks.bench_remote [--megabytes 8] [--files 48] [--small 1000] [--repeats 3]

All talk to the tests' own server, which is a Python process of this machine, so seconds are mostly the server's: the
client's processor time says what a client costs. Needs the extras `s3` and `test`.
"""

import argparse
import asyncio
import os
import resource
import time
from collections.abc import Awaitable, Callable, Sequence
from importlib.util import find_spec
from statistics import median

import numpy as np
from obstore.store import S3Store
from zarr.abc.store import Store
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import FsspecStore, ObjectStore

from aura_dist.store.remote import NUM_CONCURRENT, open_remote
from tests.s3 import ENVIRONMENT, s3_server

PROTOTYPE = default_buffer_prototype()


async def at_most(calls: Sequence[Callable[[], Awaitable[object]]]) -> None:
    """All calls, so many at once as the product makes."""
    limit = asyncio.Semaphore(NUM_CONCURRENT)

    async def one(call: Callable[[], Awaitable[object]]) -> None:
        async with limit:
            await call()

    await asyncio.gather(*map(one, calls))


def timed(calls: Sequence[Callable[[], Awaitable[object]]]) -> tuple[float, float]:
    """Elapsed seconds and this process's processor seconds."""
    before, begun = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    sync(at_most(calls))
    after = resource.getrusage(resource.RUSAGE_SELF)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - begun, used


def measure(store: Store, args: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """What is asked → its two times."""
    large = PROTOTYPE.buffer.from_bytes(np.random.default_rng(0).bytes(args.megabytes * 10**6))
    small = PROTOTYPE.buffer.from_bytes(b"x" * 1000)
    files, keys = [f"large/{i}" for i in range(args.files)], [f"small/{i}" for i in range(args.small)]
    return {
        "write large": timed([lambda k=k: store.set(k, large) for k in files]),
        "read large": timed([lambda k=k: store.get(k, PROTOTYPE) for k in files]),
        "write small": timed([lambda k=k: store.set(k, small) for k in keys]),
        "read small": timed([lambda k=k: store.get(k, PROTOTYPE) for k in keys]),
        "ask whether there": timed([lambda k=k: store.exists(k) for k in keys]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=8)
    parser.add_argument("--files", type=int, default=48)
    parser.add_argument("--small", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    with s3_server("bucket") as endpoint:
        os.environ.update(ENVIRONMENT, AWS_ENDPOINT_URL=endpoint)
        bare = S3Store.from_url("s3://bucket/obstore", endpoint=endpoint, client_options={"allow_http": True})
        ways: dict[str, Store] = {"product": open_remote("s3://bucket/product"), "obstore": ObjectStore(bare)}
        if find_spec("s3fs"):
            ways["fsspec"] = FsspecStore.from_url("s3://bucket/fsspec", storage_options={"use_listings_cache": False})
        found = [{name: measure(store, args) for name, store in ways.items()} for _ in range(args.repeats)]
    megabytes = args.megabytes * args.files
    print(f"{args.files} files of {args.megabytes} MB, {args.small} of 1 kB; medians of {args.repeats}")
    for what in found[0]["product"]:
        amount = megabytes if "large" in what else args.small
        unit = "MB/s" if "large" in what else "requests/s"
        for name in ways:
            elapsed, used = (median(run[name][what][i] for run in found) for i in range(2))
            print(f"{what:18s} {name:8s} {amount / elapsed:8.0f} {unit}, {used:6.2f} s of the client's processor")


if __name__ == "__main__":
    main()
