"""evaluate: perplexity of a model, with or without an intervention, as a JSON file."""

import json
import logging
import math
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from aura_dist import __version__
from aura_dist.config import EvaluateConfig
from aura_dist.data.labels import check_texts
from aura_dist.data.table import read_table
from aura_dist.data.tokens import tokenize
from aura_dist.errors import StoreError
from aura_dist.evaluation.perplexity import Perplexity, perplexity
from aura_dist.model.sharding import ModelSource, check_positions, check_vocabulary, pick_device, sharding_options
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
    check_vocabulary(loaded.model.config, tokens.largest_id)
    with loaded.intervened(config.strength):
        measured = perplexity(loaded.model, tokens, config.tokens_per_batch)
    results = {
        "aura_dist": __version__,
        "config": asdict(config),
        "model_fingerprint": loaded.fingerprint,
        "intervention": dict(loaded.intervention.meta) if loaded.intervention else None,
        "texts_sha256": table.sha256,
        "perplexity": {k: v if math.isfinite(v) else None for k, v in asdict(measured).items()},
    }
    if not world.is_first:
        return results
    _warn_of_nonfinite(measured)
    _write(config.out, json.dumps(results, indent=2) + "\n")
    print(
        f"perplexity {measured.token_weighted:.3f} (token-weighted), {measured.mean_over_sentences:.3f} "
        f"(mean over sentences), {measured.num_texts} texts, {measured.num_tokens} tokens"
    )
    logger.info("wrote %s", config.out)
    return results


def _warn_of_nonfinite(measured: Perplexity) -> None:
    if measured.num_nonfinite:
        logger.warning(
            "the model's logits are NaN or infinite in %d of %d texts: their perplexity is null",
            measured.num_nonfinite, measured.num_texts,
        )  # fmt: skip
    elif not math.isfinite(measured.token_weighted + measured.mean_over_sentences):
        logger.warning("a perplexity is beyond what a float64 holds: null")


def _check_writable(out: str) -> None:
    """StoreError before the model is loaded, rather than after the work; nothing is left there."""
    path = Path(out).resolve()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            path.open("a").close()
        TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise StoreError(f"--out {out!r} cannot be written: {error}") from error


def _write(out: str, text: str) -> None:
    """Write aside, then rename: what stands at `out` is whole at any time."""
    path = Path(out).resolve()
    aside = path.with_name(f".{path.name}.part")
    try:
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        raise StoreError(f"--out {out!r} cannot be written: {error}") from error
