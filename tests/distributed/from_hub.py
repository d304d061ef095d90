"""Ranks of a launch run this: `aura-dist ARGUMENTS` with a hub of their own, where each rank tells who asks."""

import os
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import constants

from aura_dist.cli import main


def run_from_hub(arguments: Sequence[str]) -> int:
    """The first two arguments are the hub's address and the cache's directory, the others are the command's."""
    address, cache, *command = arguments
    constants.ENDPOINT = address
    constants.HUGGINGFACE_CO_URL_TEMPLATE = address + "/{repo_id}/resolve/{revision}/{filename}"
    constants.HF_HUB_OFFLINE = False
    constants.HF_HUB_CACHE = cache
    from transformers.utils import hub

    hub.http_user_agent = lambda user_agent=None: f"rank {os.environ['RANK']}"
    code = main(command)
    assert constants.HF_HUB_OFFLINE is False, "as it was"
    (Path(cache) / f"ended-{os.environ['RANK']}").touch()
    return code
