"""evaluate: perplexity of a model, with or without an intervention, as a JSON file."""

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from aura_dist import __version__
from aura_dist.config import EvaluateConfig
from aura_dist.data.labels import check_texts
from aura_dist.data.table import read_table
from aura_dist.data.tokens import tokenize
from aura_dist.errors import StoreError
from aura_dist.evaluation.perplexity import perplexity
from aura_dist.model.sharding import ModelSource, check_positions, pick_device, sharding_options
from aura_dist.model.use import load_for_use
from aura_dist.runtime.launch import start_team
from aura_dist.runtime.log import configure_rank
from aura_dist.runtime.world import World

logger = logging.getLogger(__name__)


def run(config: EvaluateConfig) -> dict[str, Any]:
    """Measure, write `config.out`, and return what was written."""
    with start_team(config.sharding, pick_device(config.device)) as team:
        configure_rank(team.world.global_rank, team.world.layout.world_size)
        return _evaluate(config, team.world)


def _evaluate(config: EvaluateConfig, world: World) -> dict[str, Any]:
    """On every rank alike, as a sharded forward needs them all; rank 0 writes and prints."""
    table = read_table(config.perplexity_texts, [config.text_column])
    texts = check_texts(table, config.text_column)
    _check_writable(config.out)
    source = ModelSource(config.model, config.revision, config.dtype)
    loaded = load_for_use(source, world, config.intervention, sharding_options(config))
    tokens = tokenize(
        texts, loaded.tokenizer, max_tokens=config.max_tokens, skip_special=False, source=config.perplexity_texts
    )
    check_positions(loaded.model.config, int(tokens.num_tokens.max()), "--max-tokens")
    with loaded.intervened(config.strength):
        measured = perplexity(loaded.model, tokens, config.tokens_per_batch)
    results = {
        "aura_dist": __version__,
        "config": asdict(config),
        "model_fingerprint": loaded.fingerprint,
        "intervention": dict(loaded.intervention.meta) if loaded.intervention else None,
        "texts_sha256": table.sha256,
        "perplexity": asdict(measured),
    }
    if not world.is_first:
        return results
    Path(config.out).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(
        f"perplexity {measured.token_weighted:.3f} (token-weighted), {measured.mean_over_sentences:.3f} "
        f"(mean over sentences), {measured.num_texts} texts, {measured.num_tokens} tokens"
    )
    logger.info("wrote %s", config.out)
    return results


def _check_writable(out: str) -> None:
    """StoreError before the model is loaded, rather than after the work."""
    path = Path(out)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        raise StoreError(f"--out {out!r} cannot be written: {error}") from error
