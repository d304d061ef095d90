"""Loading a checkpoint's tokenizer, the checks that it is the one that the checkpoint means, and what identifies it.

A tokenizer can be wrong without an error: transformers rebuilds many tokenizers instead of reading `tokenizer.json` as
it is, and makes one without a vocabulary where files are missing.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from inspect import signature
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from aura_dist.errors import AuraError, ConfigError, ModelError, brief
from aura_dist.text.own_code import load_with

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

JSON_FILE, CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"
# other files that transformers reads a vocabulary from
_VOCABULARY_FILES = (
    "tokenizer.model", "tiktoken.model", "tekken.json", "spiece.model", "sentencepiece.bpe.model", "vocab.json",
    "merges.txt", "vocab.txt",
)  # fmt: skip
# number of the rule of `tokenizer_digest`: digests of two rules cannot be compared
DIGEST_RULE = 2
# a tokenizer with fewer entries beside special tokens is one whose files are missing
MIN_ENTRIES = 8
# texts on which two tokenizers usually differ
PROBES = (
    "The cat sat on the mat.", "You're such a FOOL, aren't you?!", " leading space", "trailing space ",
    "several   spaces    in a     row", "tabs\tand\nnewlines\n\n\nand\r\nboth", "don't WON'T I'll they've",
    "0 1 23 456 7890 12345678 3.14 -1e-5", "café naïve façade Ångström", "cafe\u0301 nai\u0308ve A\u030angstro\u0308m",
    "ﬁne ½ № ①", "你好，世界。今天天气很好", "こんにちは世界 カタカナ", "안녕하세요 세계", "Привет, мир",
    "Γειά σου Κόσμε", "नमस्ते दुनिया", "مرحبا بالعالم", "שלום עולם", "🙂🙂 👩\u200d👩\u200d👧 🇫🇷 ❤️",
    "\u00a0no\u2009break\u200bzero\u3000wide", "def f(x):\n    return x**2 + y[0] != 'a_b'  # {note}",
    "<b>bold</b> &amp; https://example.org/?q=1&r=2", "aaaaaaaaaaaaaaaaaaaa ---------- ........",
)  # fmt: skip
# texts of the same shape; a tokenizer that tells apart none of these pairs takes all that it sees for unknown
_PAIRS = (
    ("the cat went up", "you old fool go"), ("THE CAT WENT UP", "YOU OLD FOOL GO"), ("GATTACA", "CTCCGTT"),
    ("12 345", "90 678"), ("привет мир", "сказка дом"), ("你好世界", "今天天气"), ("مرحبا", "صديقي"), ("नमक", "दुधर"),
)  # fmt: skip
_ADDED_PROBES = 64  # added tokens that are tried
# what is loaded rather than how it acts: it would pass by our own flags, or by the checks
_NOT_OPTIONS = (
    "trust_remote_code", "revision", "token", "config", "cache_dir", "subfolder", "gguf_file", "tokenizer_file",
    "vocab_file", "merges_file", "tokenizer_object", "tokenizer_type",
)  # fmt: skip
# options that transformers looks at, but neither names in a signature nor keeps as an attribute
_HIDDEN_OPTIONS = ("fix_mistral_regex", "mistral_format", "use_fast")

Ids = list[int] | None  # None where a tokenizer cannot take the text


@dataclass(frozen=True)
class TokenizerSettings:
    """Whose ids count where `tokenizer.json` and the loaded tokenizer differ, and options for `from_pretrained`."""

    ids: str | None = None  # "file" or "loaded"; None: they must not differ
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """ConfigError for an option that would not be looked at, or that is not about how a tokenizer acts."""
        for name in self.options:
            if name in _NOT_OPTIONS:
                raise ConfigError(f"--tokenizer-option: expected how the tokenizer acts, got {name!r}; leave it out")
            if self.ids == "file":
                raise ConfigError(
                    f"--tokenizer-option: expected none, because --tokenizer-ids file takes {JSON_FILE} as it is, got "
                    f"{name!r}; leave one of both out"
                )

    @classmethod
    def of(cls, settings: Any) -> "TokenizerSettings":
        """The tokenizer's part of a verb's settings."""
        return cls(settings.tokenizer_ids, settings.tokenizer_option)


def load_tokenizer(
    model: str,
    revision: str | None = None,
    settings: TokenizerSettings | None = None,
    *,
    trust_remote_code: bool = False,
) -> "PreTrainedTokenizerBase":
    """The tokenizer of a local directory or hub name, checked.

    ModelError if it cannot be loaded, has no vocabulary, or its ids are not those of its `tokenizer.json` and no
    setting says which ones count; ConfigError for an option that it does not know; OwnCodeError if it needs code that
    comes with it, unless `trust_remote_code`.
    """
    ids, options = (None, {}) if settings is None else (settings.ids, settings.options)
    what = f"--model {model!r}"
    own = _ids_of_file(model, revision, what)  # first, so that memory holds one tokenizer at a time
    if ids == "file" and own is None:
        raise ModelError(f"--tokenizer-ids file: expected {what} to have a {JSON_FILE}, found none; leave the flag out")

    @cache
    def load(*names: str) -> "PreTrainedTokenizerBase":
        try:
            if ids == "file":
                return _as_in_file(model, revision)
            from transformers import AutoTokenizer

            more = {name: options[name] for name in names}
            loaded: PreTrainedTokenizerBase = load_with(
                lambda trust: AutoTokenizer.from_pretrained(model, revision=revision, trust_remote_code=trust, **more),
                f"the tokenizer of {what}",
                trusted=trust_remote_code,
            )
        except AuraError:  # a signal, or code of its own
            raise
        except Exception as error:  # the library raises many kinds, the tokenizer's backend a bare Exception
            raise ModelError(f"{what}: its tokenizer cannot be loaded: {_why(model, revision, error)}") from error
        return loaded

    tokenizer = load(*options)
    check_has_vocabulary(tokenizer, what, revision)
    _check_options(tokenizer, options, load)
    if own is not None and ids != "loaded":
        found = _difference(own, tokenizer)
        if found and options:  # a difference that comes from the options is wanted
            found = _difference(own, load()) and found
        if found:
            raise ModelError(
                f"{what}: expected the ids of its {JSON_FILE}, but transformers' {type(tokenizer).__name__} makes "
                f"others: {found}; choose with --tokenizer-ids file or --tokenizer-ids loaded"
            )
    _warn_of_ends(tokenizer, revision, options, what)
    return tokenizer


def difference_from_file(tokenizer: "PreTrainedTokenizerBase", model: str, what: str) -> str:
    """The first text to which a loaded tokenizer gives other ids than its `tokenizer.json`, and some of both.

    Empty where all agree, or there is no such file; `what` is the flag that named it.
    """
    own = _ids_of_file(model, None, what)
    return "" if own is None else _difference(own, tokenizer)


def _as_in_file(model: str, revision: str | None) -> "PreTrainedTokenizerBase":
    """The tokenizer that `tokenizer.json` describes, with the names of special tokens and the template of the rest."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    settings = dict(PreTrainedTokenizerFast.from_pretrained(model, revision=revision).init_kwargs)
    for name in ("added_tokens_decoder", "tokenizer_file"):  # the first would change tokens of the file
        settings.pop(name, None)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_file(str(_find(model, revision, JSON_FILE))), **settings
    )


def check_has_vocabulary(tokenizer: "PreTrainedTokenizerBase", what: str, revision: str | None = None) -> None:
    """ModelError that names the missing files, if a tokenizer has no vocabulary; `what` is the flag that named it."""
    missing, without_merges = _missing_files(tokenizer, revision)
    if (num_entries := len(tokenizer) - len(special_ids(tokenizer))) < MIN_ENTRIES:
        fault = f"has no vocabulary: {max(num_entries, 0)} entries beside special tokens"
    elif without_merges:
        fault = f"has no merges: {without_merges} is missing or empty"
    elif not any(_ids(tokenizer, first) != _ids(tokenizer, second) for first, second in _PAIRS):
        fault = "maps {!r} and {!r} to the same ids, {}".format(*_PAIRS[0], _ids(tokenizer, _PAIRS[0][0]))
    else:
        return
    looked = f"{type(tokenizer).__name__} did not find {' and '.join(missing)}; " if missing else ""
    raise ModelError(f"{what}: its tokenizer {fault}; {looked}copy its files from where the checkpoint comes from")


def special_ids(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The ids that `decode(skip_special_tokens=True)` drops, ascending: named tokens, and added ones marked special."""
    added = tokenizer.added_tokens_decoder.items()
    return sorted({*tokenizer.all_special_ids, *(i for i, token in added if token.special)})


def tokenizer_digest(tokenizer: "PreTrainedTokenizerBase") -> str:
    """sha256 of what a tokenizer does, whatever its name and files.

    That is vocabulary, merges, normaliser, pre-tokenizer, post-processor, decoder and added tokens; for a tokenizer in
    Python, its class, vocabulary files and ids of some texts. Beside these: which special tokens there are, the side
    that is cut, what decoding cleans up, and the chat template.
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    acts = json.loads(backend.to_str()) if hasattr(backend, "to_str") else _python_tokenizer(tokenizer)
    for name in ("padding", "truncation", "version"):  # the last call set the first two
        acts.pop(name, None)
    settings = ("truncation_side", "split_special_tokens", "clean_up_tokenization_spaces", "chat_template")
    special = {name: getattr(tokenizer, f"{name}_id", None) for name in tokenizer.SPECIAL_TOKENS_ATTRIBUTES}
    described = [acts, special, special_ids(tokenizer), [getattr(tokenizer, name, None) for name in settings]]
    return hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()


def _python_tokenizer(tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    """What tells tokenizers in Python apart: files and behaviour, because they cannot describe themselves."""
    with TemporaryDirectory() as directory:
        with suppress(Exception):  # some cannot be saved
            tokenizer.save_vocabulary(directory)
        files = sorted(hashlib.sha256(file.read_bytes()).hexdigest() for file in Path(directory).iterdir())
    added = sorted((i, repr(token)) for i, token in tokenizer.added_tokens_decoder.items())
    ids = [_ids(tokenizer, text) for text in PROBES]
    return {
        "class": type(tokenizer).__name__,
        "files": files,
        "vocab": tokenizer.get_vocab(),
        "added": added,
        "ids": ids,
    }


def _ids(tokenizer: "PreTrainedTokenizerBase", text: str) -> Ids:
    with suppress(Exception):  # a tokenizer's backend raises a bare Exception
        return list(tokenizer(text, verbose=False)["input_ids"])
    return None


def _ids_of_file(model: str, revision: str | None, what: str) -> dict[str, Ids] | None:
    """Probe text → the ids that `tokenizer.json` itself gives it; None where there is no such file."""
    from tokenizers import Tokenizer

    path = _find(model, revision, JSON_FILE, local_files_only=False)
    if path is None:
        return None
    try:
        file = Tokenizer.from_file(str(path))
    except Exception as error:  # a bare Exception
        raise ModelError(f"{what}: its tokenizer cannot be loaded: {JSON_FILE}: {brief(error)}") from error
    file.no_truncation()
    file.no_padding()
    added = [token.content for _, token in sorted(file.get_added_tokens_decoder().items())[:_ADDED_PROBES]]
    found: dict[str, Ids] = {}
    for text in (*PROBES, *(f"a {token} b{token}c" for token in added)):
        found[text] = None
        with suppress(Exception):  # as in `_ids`
            found[text] = file.encode(text).ids
    return found


def _difference(own: Mapping[str, Ids], tokenizer: "PreTrainedTokenizerBase") -> str:
    """The first text whose ids differ, and some of both; empty where all agree."""
    for text, theirs in own.items():
        if (ours := _ids(tokenizer, text)) != theirs:
            pairs = zip(theirs or [], ours or [], strict=False)
            at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(theirs or []), len(ours or [])))
            shown = ["none" if ids is None else f"{ids[at : at + 6]}" for ids in (theirs, ours)]
            return f"from token {at} of {text!r} on, the file has {shown[0]}, the loaded tokenizer {shown[1]}"
    return ""


def _check_options(
    tokenizer: "PreTrainedTokenizerBase",
    options: Mapping[str, Any],
    load: "Callable[..., PreTrainedTokenizerBase]",
) -> None:
    """ConfigError for an option that nothing looks at; what the others change is logged, also if it is nothing."""
    for name, value in options.items():
        without = load(*(other for other in options if other != name))
        if found := _difference({text: _ids(without, text) for text in PROBES}, tokenizer):
            found = found.replace("the file has", "without it").replace("the loaded tokenizer", "with it")
            logger.info("--tokenizer-option %s=%s: %s", name, value, found)
        elif tokenizer_digest(without) == tokenizer_digest(tokenizer):
            kinds = type(without).__mro__[:-1]
            known = name in _HIDDEN_OPTIONS or hasattr(without, name)
            if not known and not any(name in signature(kind).parameters for kind in kinds):
                raise ConfigError(f"--tokenizer-option: {kinds[0].__name__} knows no option {name!r}; leave it out")
            logger.warning("--tokenizer-option %s=%s changes nothing in this tokenizer", name, value)


def _warn_of_ends(
    tokenizer: "PreTrainedTokenizerBase", revision: str | None, options: Mapping[str, Any], what: str
) -> None:
    """Warn where `tokenizer_config.json` says that a first or last token is added, or is not, and the ids do not.

    transformers 5 follows `tokenizer.json`; earlier versions followed the configuration.
    """
    path, ids = _find(tokenizer.name_or_path, revision, CONFIG_FILE), _ids(tokenizer, "a") or [-1]
    with suppress(OSError, ValueError):
        says = {} if path is None else json.loads(path.read_text(encoding="utf-8"))
        does = {"add_bos_token": ids[0] == tokenizer.bos_token_id, "add_eos_token": ids[-1] == tokenizer.eos_token_id}
        wanted = {name: says[name] if isinstance(says.get(name), bool) else added for name, added in does.items()}
        if wanted != does and not does.keys() & options.keys():
            flags = " ".join(f"{name}={str(value).lower()}" for name, value in wanted.items())
            logger.warning("%s: %s is not followed; to follow it: --tokenizer-option %s", what, CONFIG_FILE, flags)


def _find(model: str, revision: str | None, file: str, *, local_files_only: bool = True) -> Path | None:
    """A file of a local directory or hub name; None where it is missing. The hub is asked only if that is said."""
    from transformers.utils import cached_file

    path = None
    with suppress(OSError, ValueError):  # ValueError: a name that is none of the hub's
        path = cached_file(model, file, revision=revision, local_files_only=local_files_only)
    return None if path is None else Path(path)


def _missing_files(tokenizer: "PreTrainedTokenizerBase", revision: str | None) -> tuple[list[str], str]:
    """The files that a tokenizer's class did not find, and its file of merges if that alone is missing or empty."""
    place, names = tokenizer.name_or_path, type(tokenizer).vocab_files_names
    files = {name: _find(place, revision, name) for name in (*names.values(), JSON_FILE)}
    if files[JSON_FILE] is not None or not place:
        return [], ""
    merges = names.get("merges_file", "")
    lines = path.read_text(encoding="utf-8").splitlines() if (path := files.get(merges)) else []
    has_merges = any(line and not line.startswith("#version") for line in lines)
    missing = [name for name, path in files.items() if path is None]
    return missing, "" if has_merges or len(missing) == len(files) else merges


def _why(model: str, revision: str | None, error: Exception) -> str:
    """Why a tokenizer cannot be loaded: the file or package that is missing, because transformers may name another."""
    found = {name: path for name in _VOCABULARY_FILES if (path := _find(model, revision, name))}
    if _find(model, revision, JSON_FILE) or isinstance(error, ImportError) or "trust_remote_code" in str(error):
        return brief(error)
    for name, path in found.items():
        missing = _missing_packages(path) if name.endswith(".model") else []
        if missing:
            return f"{name} takes {' and '.join(missing)} to read: pip install {' '.join(missing)}"
    if len(alone := {"vocab.json", "merges.txt"} & found.keys()) == 1:
        return f"expected {JSON_FILE}, or vocab.json and merges.txt, found {alone.pop()} alone; copy what is missing"
    if ("backend tokenizer" in str(error) or not found) and (found or Path(model).is_dir()):
        there = " and ".join(found) or "none"
        return f"expected {JSON_FILE}, found {there}; copy it from where the checkpoint comes from"
    return brief(error)


def _missing_packages(path: Path) -> list[str]:
    """The packages that are not installed of those that read a `.model` file: sentencepiece's, or tiktoken's."""
    with path.open("rb") as file:
        start = file.readline(1000)
    is_text = start.strip().rpartition(b" ")[2].isdigit()  # tiktoken: a token in base64 and its rank
    needed = ["tiktoken"] if is_text else ["sentencepiece", "protobuf"] if start.startswith(b"\n") else []
    return [package for package in needed if not _installed(package)]


def _installed(package: str) -> bool:
    with suppress(PackageNotFoundError):
        return bool(version(package))
    return False
