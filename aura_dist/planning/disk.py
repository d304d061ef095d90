"""Whether the disk has room for a store."""

import shutil

from aura_dist.planning.work import StoreSize
from aura_dist.store.access import local_path
from aura_dist.units import show_bytes


def shortage_of_disk(store: str, size: StoreSize, freed_bytes: int = 0) -> str:
    """Why a store of tokens has no room at a path: one line; empty if it has, or at a URL, where nobody can tell.

    `freed_bytes` are free once the store begins, or hold a part of it already.
    """
    place = local_path(store)
    if place is None or not size.num_tokens:
        return ""
    there = next(p for p in (place.resolve(), *place.resolve().parents) if p.exists())
    free = shutil.disk_usage(there).free + freed_bytes
    if size.compressed_bytes <= free:
        return ""
    return (
        f"--store {store!r}: expected room for about {show_bytes(size.compressed_bytes)}, because the values of "
        f"{size.num_tokens:,} tokens at {size.token_neurons:,} neurons are kept, found {show_bytes(free)}; keep tokens "
        "of fewer modules (--keep-tokens), run fewer texts, or write to another disk"
    )


def bytes_at(store: str) -> int:
    """Bytes of the files of a local store; 0 where there is none, and at a URL."""
    place = local_path(store)
    if place is None or not (place / "zarr.json").is_file():
        return 0
    return sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
