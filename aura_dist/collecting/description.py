"""Which texts run through which model, and the description that fixes their responses."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aura_dist.models.load import check_positions, check_vocabulary
from aura_dist.models.on_disk import Subject
from aura_dist.sites.find import SiteTable
from aura_dist.sites.site import Site
from aura_dist.store.schema import Samples, StoreSpec
from aura_dist.text.chat import make_chat
from aura_dist.text.selection import Selection, select
from aura_dist.text.table import Table, read_table
from aura_dist.text.tokenizer import DIGEST_RULE, tokenizer_digest
from aura_dist.text.tokens import TokenizedTexts

logger = logging.getLogger(__name__)

Identity = dict[str, Any]  # of tokenizer and data


def load_samples(
    settings: Any, subject: Subject, table: Table | None = None
) -> tuple[Samples, TokenizedTexts, Identity]:
    """The rows to run, their token ids, and what identifies tokenizer and data; all of it can be pickled.

    `settings` says which rows of which data; `table` holds the data, if they are not to be read. ConfigError or
    ModelError if the texts do not suit the model, and errors of `read_table` and `select`.
    """
    which = Selection.of(settings)
    if table is None:
        table = read_table(settings.data, which.columns, split=settings.split)
    row, label, tokens = select(table, which, lambda: subject.tokenizer)
    check_vocabulary(subject.config, tokens.largest_id)
    check_positions(subject.config, int(tokens.num_tokens.max()), "--max-tokens")
    tokenizer = subject.tokenizer
    identity: Identity = {
        "tokenizer": {"name": tokenizer.name_or_path, "rule": DIGEST_RULE, "sha256": tokenizer_digest(tokenizer)},
        # token ids last, because a setting that changes them is a better name for what differs
        "data": {"path": table.source, "sha256": table.sha256, **which.identity, "token_ids": tokens.digest()},
    }
    if which.chat is not None:
        identity["tokenizer"]["chat"] = make_chat(tokenizer, which.chat, which.system).identity
    return Samples(row, tokens.num_tokens, label), tokens, identity


def describe(
    settings: Any,
    subject: Subject,
    table: SiteTable,
    sites: Sequence[Site],
    poolings: Sequence[str],
    *,
    fingerprint: str,
    under: Mapping[str, Any] | None,
    identity: Identity,
    tokens: Sequence[Site] = (),
) -> StoreSpec:
    """What fixes the responses at `sites` of `table`, all sites of the model.

    `tokens` are the sites whose values are stored token by token. `fingerprint` is the model's, `under` the identity of
    the intervention that is on, and `identity` is as from `load_samples`.
    """
    if table.experts:
        logger.warning(
            "%s computes with %d expert parameters (%s, ...) in a way of its own: they are not captured",
            table.model_class, len(table.experts), table.experts[0],
        )  # fmt: skip
    source = subject.source
    directory = Path(source.name)
    return StoreSpec(
        model={
            "name": str(directory.resolve()) if directory.is_dir() else source.name,  # where it is read from later
            "revision": source.revision,
            "class": table.model_class,
            **subject.extras(),
            "fingerprint": fingerprint,
        },
        dtype=source.dtype,
        max_tokens=settings.max_tokens,
        tokens_per_batch=settings.task_tokens,
        skip_special_tokens=settings.skip_special_tokens,
        skip_first_tokens=settings.skip_first_tokens,
        poolings=tuple(poolings),
        concepts=tuple(settings.concepts),
        sites=tuple(sites),
        uncaptured=table.experts,
        intervention=under,
        tokens=tuple(site.name for site in tokens),
        **identity,
    )
