"""Fingerprints of models as text: which rule made one, and how two of different rules are compared. No torch.

A fingerprint starts with `RULE` if every byte of the weights and every field of the configuration that can change a
number are in it. Earlier versions wrote plain sha256 digests, of a checkpoint's shape and of the ends of its tensors.
"""

import hashlib
import logging
from collections.abc import Callable

logger = logging.getLogger(__name__)

RULE = "v2-"
# of a model that a server has loaded: its name alone, because nobody here has read its weights
SERVED = "served-"
# the field of config.json in which `export` records the interventions that a checkpoint carries; its weights show them
FOLDED = "aura_dist_folded"


def marked(text: str) -> str:
    """A fingerprint, 64 characters, of a text that holds all that counts."""
    return (RULE + hashlib.sha256(text.encode()).hexdigest())[:64]


def is_earlier(fingerprint: str | None) -> bool:
    """Whether an earlier version made this fingerprint."""
    return bool(fingerprint) and not str(fingerprint).startswith((RULE, SERVED))


def comparable(recorded: str | None, found: str, earlier: Callable[[], str], what: str) -> str:
    """The model's fingerprint by the rule that made `recorded`: `found`, or what `earlier` computes.

    If an earlier rule made `recorded`, and it agrees, a warning says what could not be checked. `what` names the store
    or the intervention.
    """
    if not is_earlier(recorded):
        return found
    value = earlier()
    if value == recorded:
        logger.warning(
            "%s: its fingerprint of the model is of an earlier version. It agrees, but of a checkpoint it covers only "
            "the shape and both ends of each tensor; all else could not be checked",
            what,
        )
    return value
