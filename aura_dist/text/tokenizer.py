"""Loading a checkpoint's tokenizer, and the digest of what it does."""

import hashlib
import json
from typing import TYPE_CHECKING, Any

from aura_dist.errors import AuraError, ModelError, brief
from aura_dist.text.own_code import load_with

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(
    model: str, revision: str | None = None, *, trust_remote_code: bool = False
) -> "PreTrainedTokenizerBase":
    """The tokenizer of a local directory or hub name; ModelError if it cannot be loaded.

    OwnCodeError if it needs code that comes with it, unless `trust_remote_code`.
    """
    from transformers import AutoTokenizer

    def load(trust: bool) -> Any:
        return AutoTokenizer.from_pretrained(model, revision=revision, trust_remote_code=trust)

    try:
        what = f"the tokenizer of --model {model!r}"
        tokenizer: PreTrainedTokenizerBase = load_with(load, what, trusted=trust_remote_code)
    except AuraError:
        raise
    except Exception as error:  # the library raises many kinds, the tokenizer's backend a bare Exception
        raise ModelError(f"--model {model!r}: its tokenizer cannot be loaded: {brief(error)}") from error
    return tokenizer


def tokenizer_digest(tokenizer: "PreTrainedTokenizerBase") -> str:
    """sha256 of what determines a tokenizer's output: backend or vocabulary, special ids, and the side that is cut."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and hasattr(backend, "to_str"):
        document = json.loads(backend.to_str())
        for name in ("padding", "truncation"):  # the last call set these
            document.pop(name, None)
        text = json.dumps(document, sort_keys=True)
    else:
        text = repr(sorted(tokenizer.get_vocab().items()))
    settings = (sorted(tokenizer.all_special_ids), tokenizer.truncation_side)
    return hashlib.sha256(f"{text}{settings}".encode()).hexdigest()
