"""Tiny tokenizers of six families, each with the files that a checkpoint of its family has."""

import base64
import json
import struct
from collections.abc import Callable
from pathlib import Path

import transformers as hf
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,?!'"
TEXTS = ["the cat sat on the mat", "you are an old fool", "12345 12345 678 678", "def f(x): return x", "a  b   c"] * 5
LLAMA_SPECIALS = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
PIECES = ["▁", *LETTERS, "th", "the", "▁the", "▁c", "▁ca", "▁cat", "12", "34"]


def byte_level(*, special: str = "<|endoftext|>") -> Tokenizer:
    """GPT-2's way: bytes as letters, merges within words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=[special], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def _gpt2(directory: Path) -> None:
    byte_level().model.save(str(directory))
    tokenizer = hf.GPT2Tokenizer(str(directory / "vocab.json"), str(directory / "merges.txt"))
    tokenizer.save_pretrained(directory)


def _pieces(directory: Path, file: str, kind: int) -> dict[str, int]:
    """A sentencepiece model of unigrams (`kind` 1) or BPE (2), written by hand because the package may be missing."""
    types = {"<unk>": 2, "<s>": 3, "</s>": 3}
    pieces = [*LLAMA_SPECIALS, *PIECES]

    def length_first(field: bytes, content: bytes) -> bytes:
        size = len(content)
        return field + (bytes([size]) if size < 128 else bytes([size & 127 | 128, size >> 7])) + content

    message = b""
    for i, piece in enumerate(pieces):
        number = types.get(piece, 6 if piece.startswith("<0x") else 1)
        content = length_first(b"\n", piece.encode()) + b"\x15" + struct.pack("<f", -i) + b"\x18" + bytes([number])
        message += length_first(b"\n", content)
    (directory / file).write_bytes(message + length_first(b"\x12", b"\x18" + bytes([kind])))
    return {piece: i for i, piece in enumerate(pieces)}


def _merges(vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    splits = ((piece[:at], piece[at:]) for piece in vocabulary for at in range(1, len(piece)) if piece in PIECES)
    return [pair for pair in splits if vocabulary.keys() >= set(pair)]


def _llama(directory: Path) -> None:
    vocabulary = _pieces(directory, "tokenizer.model", 2)
    hf.LlamaTokenizer(vocabulary, _merges(vocabulary), add_bos_token=True).save_pretrained(directory)


def _gemma(directory: Path) -> None:
    vocabulary = _pieces(directory, "tokenizer.model", 2)
    vocabulary = {{"<unk>": "<pad>", "<s>": "<eos>", "</s>": "<bos>"}.get(p, p): i for p, i in vocabulary.items()}
    vocabulary |= {"<unk>": len(vocabulary), "<mask>": len(vocabulary) + 1}
    hf.GemmaTokenizer(vocabulary, _merges(vocabulary)).save_pretrained(directory)


def _bert(directory: Path) -> None:
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *LETTERS.lower(),
        *(f"##{c}" for c in LETTERS.lower()),
        "cat",
    ]
    words = list(dict.fromkeys(words))
    (directory / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    hf.BertTokenizer({word: i for i, word in enumerate(words)}).save_pretrained(directory)


def _t5(directory: Path) -> None:
    _pieces(directory, "spiece.model", 1)
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((p, -float(i)) for i, p in enumerate(PIECES))]
    hf.T5Tokenizer(vocabulary, extra_ids=4).save_pretrained(directory)


def _tiktoken(directory: Path) -> None:
    """Llama 3's way: tiktoken's ranks, and digits in groups of three."""
    tokens = [bytes([byte]) for byte in range(256)] + [b"th", b"the", b" the", b"ca", b"cat", b"12", b"123"]
    lines = (f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(tokens))
    (directory / "tokenizer.model").write_text("\n".join(lines))
    backend = byte_level(special="<|begin_of_text|>")
    groups = pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([groups, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    hf.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|begin_of_text|>").save_pretrained(directory)


# name → a model type's configuration, what writes all files, and those that are read where tokenizer.json is missing
FAMILIES: dict[str, tuple[hf.PretrainedConfig, Callable[[Path], None], tuple[str, ...]]] = {
    "gpt2": (hf.GPT2Config(), _gpt2, ("vocab.json", "merges.txt")),
    "llama": (hf.LlamaConfig(), _llama, ("tokenizer.model",)),
    "gemma": (hf.Gemma3TextConfig(), _gemma, ("tokenizer.model",)),
    "bert": (hf.BertConfig(), _bert, ("vocab.txt",)),
    "t5": (hf.T5Config(), _t5, ("spiece.model",)),
    "tiktoken": (hf.LlamaConfig(), _tiktoken, ("tokenizer.model",)),
}


def save_family(name: str, directory: Path, keep: str = "json") -> Path:
    """A folder of the family with `keep` of its files: all, json, slow, config (that of the tokenizer), none."""
    config, write, slow = FAMILIES[name]
    directory.mkdir(parents=True, exist_ok=True)
    write(directory)
    kept = {"json": ("tokenizer.json", "tokenizer_config.json"), "slow": (*slow, "tokenizer_config.json")}
    kept |= {"config": ("tokenizer_config.json",), "none": ()}
    for file in directory.iterdir():
        if keep != "all" and file.name not in kept[keep]:
            file.unlink()
    config.save_pretrained(directory)
    return directory


def edit(directory: Path, file: str = "tokenizer.json", **values: object) -> Path:
    """Replace entries of a JSON file of a folder."""
    path = directory / file
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **values}), encoding="utf-8")
    return directory
