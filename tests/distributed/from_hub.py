"""Ranks of a launch run this: `aura-dist ARGUMENTS` with a hub of their own, at an address of its own for each rank."""

import os
from collections.abc import Sequence

from huggingface_hub import constants

from aura_dist.cli import main


def run_from_hub(arguments: Sequence[str]) -> int:
    """The first two arguments are the hub's address and the cache's directory, the others are the command's."""
    address, cache, *command = arguments
    constants.ENDPOINT = f"{address}/rank-{os.environ['RANK']}"
    constants.HUGGINGFACE_CO_URL_TEMPLATE = constants.ENDPOINT + "/{repo_id}/resolve/{revision}/{filename}"
    constants.HF_HUB_OFFLINE = False
    constants.HF_HUB_CACHE = cache
    code = main(command)
    assert constants.HF_HUB_OFFLINE is False, "as it was"
    return code
