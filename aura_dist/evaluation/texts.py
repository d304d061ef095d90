"""The `perplexity` section of the results: a file of texts, labelled or not, after a pre-prompt or not."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aura_dist.evaluation.perplexity import both_sides, negative_log_likelihoods, summary
from aura_dist.evaluation.preprompt import Prefix
from aura_dist.interventions.use import LoadedModel
from aura_dist.models.load import check_positions, check_vocabulary
from aura_dist.text.labels import check_classes, check_texts, parse_labels
from aura_dist.text.table import read_table
from aura_dist.text.tokens import TokenizedTexts, tokenize


@dataclass(frozen=True)
class TextFile:
    """Texts whose perplexity is measured.

    Attributes
    ----------
    source, column, label_column, sha256
        Where they stand, and the digest of the file.
    texts
        N texts.
    labels
        [N] int8, 1, 0 or -1 (not labelled); None without a label column.
    """

    source: str
    column: str
    label_column: str | None
    sha256: str
    texts: list[str]
    labels: NDArray[np.int8] | None


def read_texts(source: str, column: str, label_column: str | None) -> TextFile:
    """Read a file of texts; InputError unless `read_table` and `check_texts` take it, with texts of both labels."""
    labels = [] if label_column is None else [label_column]
    table = read_table(source, [column, *labels])
    parsed = parse_labels(table, labels) if labels else None
    if parsed is not None:
        check_classes(parsed, labels, source)
    own = None if parsed is None else parsed[:, 0]
    return TextFile(source, column, label_column, table.sha256, check_texts(table, column), own)


def tokenize_texts(file: TextFile, loaded: LoadedModel, prefix: Prefix | None, max_tokens: int) -> TokenizedTexts:
    """Token ids, each text cut at `max_tokens` and then put after the pre-prompt.

    Raises
    ------
    InputError
        A text that the tokenizer cannot take.
    ConfigError
        Texts are longer than the model's positions.
    ModelError
        The tokenizer is another model's.
    """
    tokens = tokenize(file.texts, loaded.tokenizer, max_tokens=max_tokens, skip_special=False, source=file.source)
    tokens = tokens if prefix is None else prefix.before(tokens)
    check_positions(loaded.model.config, int(tokens.num_tokens.max()), "--max-tokens")
    check_vocabulary(loaded.model.config, tokens.largest_id)
    return tokens


def measure(
    file: TextFile, loaded: LoadedModel, tokens: TokenizedTexts, prefix: Prefix | None, tokens_per_batch: int
) -> dict[str, Any]:
    """The section; on all ranks alike, whose forwards may be collective.

    Raises
    ------
    InputError
        No text, or none of one label, has a token that is predicted.
    """
    num_context = 1 if prefix is None else prefix.num_context
    sums, counts = negative_log_likelihoods(loaded.model, tokens, tokens_per_batch, num_context=num_context)
    section: dict[str, Any] = {"texts": file.source, "column": file.column, "sha256": file.sha256}
    if file.labels is not None:
        section |= {"labels": file.label_column, **both_sides(sums, counts, file.labels)}
    return {**section, **asdict(summary(sums, counts))}
