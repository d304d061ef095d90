"""Consolidated metadata of a finished store: the root's `zarr.json` holds the descriptions of all groups and arrays.

So whoever opens the store at a URL reads them in one request. They would go stale, so whoever adds to a finished store
removes them first and writes them again at the end. Writers open the store without them (`open_group(to_write=True)`).
"""

import asyncio
import json
import logging
from typing import Any

import zarr
from zarr.buffer import cpu, default_buffer_prototype

from aura_dist.errors import StoreError, brief
from aura_dist.store.access import MEMBERS, is_current
from aura_dist.store.launches import others_at_work
from aura_dist.store.record import unfinished
from aura_dist.store.zarr_adapter import run_in_zarr

logger = logging.getLogger(__name__)

_KEY, _FILE = "consolidated_metadata", "zarr.json"


def consolidate(group: zarr.Group) -> None:
    """Write the metadata of a finished store, unless they are there or another launch scores it.

    A failure is only noted, because the store is as good without them.
    """
    try:
        if is_current(group) and not unfinished(group) and not others_at_work(group.store, "score"):
            run_in_zarr(_consolidate(group))
    except (OSError, ValueError, StoreError) as error:
        logger.debug("%s: its metadata are not consolidated: %s", group.store_path, brief(error))


def forget_consolidated(group: zarr.Group) -> None:
    """Remove the metadata, because they are about to change."""
    run_in_zarr(_forget(group))


async def _consolidate(group: zarr.Group) -> None:
    root = await _read(group, "")
    if root is None or _KEY in root:
        return
    found: dict[str, Any] = {}
    await asyncio.gather(*(_gather(group, name, found) for name in MEMBERS))
    metadata = {name: found[name] for name in sorted(found, key=lambda name: (name.count("/"), name))}
    root[_KEY] = {"kind": "inline", "must_understand": False, "metadata": metadata}
    await _write(group, root)


async def _gather(group: zarr.Group, name: str, found: dict[str, Any]) -> None:
    """Add the descriptions of a node and of all that is in it."""
    node = await _read(group, name)
    if node is None:
        return
    found[name] = node
    if node["node_type"] == "group":
        node[_KEY] = {"kind": "inline", "must_understand": False, "metadata": {}}  # all that is in it is here too
        children = [child.strip("/") async for child in group.store.list_dir(name)]
        await asyncio.gather(*(_gather(group, f"{name}/{c}", found) for c in children if c != _FILE))


async def _forget(group: zarr.Group) -> None:
    root = await _read(group, "")
    if root is not None and root.pop(_KEY, None) is not None:
        await _write(group, root)


async def _read(group: zarr.Group, name: str) -> dict[str, Any] | None:
    content = await group.store.get(f"{name}/{_FILE}".lstrip("/"), default_buffer_prototype())
    node: dict[str, Any] | None = None if content is None else json.loads(content.to_bytes())
    return node


async def _write(group: zarr.Group, root: dict[str, Any]) -> None:
    await group.store.set(_FILE, cpu.Buffer.from_bytes(json.dumps(root, indent=2).encode()))
