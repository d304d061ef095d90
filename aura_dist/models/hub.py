"""Models of the hub in a launch of several ranks."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from aura_dist.models.adapter import adapter_digest
from aura_dist.models.identity import checkpoint_files
from aura_dist.models.load import ModelSource, load_config, skeleton, tokenizer_of
from aura_dist.ranks.team import Team
from aura_dist.sites.transformers_adapter import find_file, hub_offline


@contextmanager
def downloaded(team: Team, source: ModelSource) -> Iterator[None]:
    """Context in which no rank asks the hub for a model, because one rank of each host has put its files in the cache.

    The hub limits requests, and each rank would make some for every file. ModelError if a file cannot be found.
    """
    if team.world.layout.world_size == 1 or Path(source.name).is_dir():
        yield
        return
    team.once_a_host(f"files of {source.name}", lambda: _download(source))
    with hub_offline():
        yield


def _download(source: ModelSource) -> None:
    """Put into the cache whatever loading the model asks for."""
    config = load_config(source)
    skeleton(config, source)
    tokenizer_of(source)
    checkpoint_files(source.name, source.revision, config)
    find_file(source.name, source.revision, "generation_config.json")
    if source.adapter is not None:
        adapter_digest(source.adapter)
