"""Hundreds of bad or odd inputs over all verbs and the API; prints how each kind of them ended.

    python -m tests.bad_inputs [--every N] [--only WORD] [--list]

Inputs run in a forked process, each with a limit of 60 seconds. A bad one must end with exit code 2 and one
line `error: …`, without a traceback. An odd one must end well, and its result is checked.
"""

import argparse
import json
import os
import re
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO, get_args, get_origin

import numpy as np

LIMIT_SECONDS = 60
SENTENCES = Path(__file__).parents[1] / "aura_dist" / "demo" / "sentences.csv"

Check = Callable[[Path, str], bool]


@dataclass(frozen=True)
class Case:
    """One input: a command, or a function of the API; `message` is found in the error of a bad one."""

    name: str
    run: list[str] | Callable[[Path], object]
    message: str = ""
    prepare: Callable[[Path], None] | None = None  # in a directory of its own, where `{here}` in the command points
    check: Check | None = None  # of an odd input: whether its result, and what it printed, are right


@dataclass(frozen=True)
class Outcome:
    """How a case ended."""

    what: str  # "refused" or "odd, and right" are as they should be
    seconds: float
    text: str


class Inputs:
    """A directory with everything that a command needs, in order, and the cases that spoil one thing each."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def make(self) -> None:
        """Models, texts, a scored store, an intervention and results of a tiny Llama."""
        from aura_dist.cli import main
        from tests.models import save_tiny

        root = self.root
        rows = SENTENCES.read_text().splitlines()
        (root / "texts.csv").write_text("\n".join(rows[:41] + rows[-40:]) + "\n")
        save_tiny("llama", root / "llama")
        save_tiny("gpt2", root / "gpt2")
        commands = (
            [*self.collect, "--store", f"{root}/run/store.zarr"],
            ["score", "--store", f"{root}/run/store.zarr", "--statistics", "auroc", "q_value"],
            [*self.fit, "--out", f"{root}/run/interventions/aura"],
            [*self.evaluate, "--out", f"{root}/run/results/aura.json"],
        )
        for command in commands:
            assert main(command) == 0, command
        (root / "sweep.yaml").write_text(
            f"model: {root}/llama\nout: {root}/swept\ncollect:\n  data: {root}/texts.csv\n  concepts: [toxic]\n"
            "grid:\n  method: [aura]\n"
        )

    @property
    def collect(self) -> list[str]:
        return ["collect", "--model", f"{self.root}/llama", "--data", f"{self.root}/texts.csv", "--concepts", "toxic",
            "--modules", "*.[01].mlp.up_proj",
        ]  # fmt: skip

    @property
    def fit(self) -> list[str]:
        return ["fit", "--store", f"{self.root}/run/store.zarr", "--concept", "toxic"]

    @property
    def evaluate(self) -> list[str]:
        return ["evaluate", "--model", f"{self.root}/llama", "--perplexity-texts", f"{self.root}/texts.csv"]

    def commands(self) -> dict[str, list[str]]:
        """Verb → a command that would end well."""
        root = self.root
        model = ["--model", f"{root}/llama"]
        return {
            "collect": [*self.collect, "--store", "{here}/s.zarr"],
            "plan": ["plan", *model, "--num-positive", "4", "--num-negative", "4"],
            "score": ["score", "--store", f"{root}/run/store.zarr"],
            "fit": [*self.fit, "--out", "{here}/out"],
            "generate": ["generate", *model, "--prompt", "you", "--max-new-tokens", "2"],
            "evaluate": [*self.evaluate, "--out", "{here}/r.json"],
            "export": ["export", *model, "--intervention", f"{root}/run/interventions/aura", "--out", "{here}/out"],
            "report": ["report", f"{root}/run", "--out", "{here}/page.html"],
            "status": ["status", f"{root}/run"],
            "sweep": ["sweep", "--config", f"{root}/sweep.yaml", "--dry-run"],
            "demo": ["demo", *model, "--data", f"{root}/texts.csv", "--out", "{here}/out"],
        }


def replaced(command: list[str], flag: str, *values: str) -> list[str]:
    """The command with other values of a flag, or with the flag at its end."""
    words = list(command)
    if flag in words:
        at = words.index(flag)
        stop = next((i for i in range(at + 1, len(words)) if words[i].startswith("--")), len(words))
        del words[at:stop]
    return [*words, flag, *values]


def types_and_ranges(inputs: Inputs) -> Iterator[Case]:
    """Every setting of every verb with a value that is not of its type or out of its range."""
    from aura_dist.config.settings import _leaves, flag, hints, table_of
    from aura_dist.config.verbs import VERBS

    for verb, command in inputs.commands().items():
        types = hints(VERBS[verb].config)
        for spec in fields(VERBS[verb].config):
            if spec.metadata["place"] or spec.metadata["file_only"]:
                continue
            name, hint = flag(spec.name), types[spec.name]
            inner = get_args(hint)[0] if get_origin(hint) is list else hint
            leaves, table = (
                set().union(*(_leaves(a) for a in get_args(inner) or [inner])) | _leaves(inner),
                table_of(hint),
            )
            if hint is bool:
                values = ["perhaps"]
            elif int in leaves:
                values = ["many", "-1", "1.5"]
            elif float in leaves:
                values = ["high", "nan", "-inf"]
            elif (table and not table.also) or "Literal" in str(inner):
                values = ["bogus"]
            elif get_origin(hint) is dict:
                values = ["nothing"]
            elif spec.metadata["empty_text"] and verb in ("plan", "generate"):
                values = ["a\0b"]
            else:
                values = ["", "a\0b"]
            for value in values:
                yield Case(f"{verb} {name} {value!r}", replaced(command, name, value))
    for verb, command in inputs.commands().items():
        yield Case(f"{verb} unknown flag", [*command, "--nonsense", "1"], "--nonsense")
        if verb != "demo":
            yield Case(f"{verb} no settings", [verb], "required|expected")
        yield Case(f"{verb} no config file", [*command, "--config", "{here}/no.yaml"], "no.yaml|twice")
    yield Case("no verb", [], "required")
    yield Case("unknown verb", ["colect"], "colect")


def write(name: str, content: str | bytes) -> Callable[[Path], None]:
    """Make a file of the case's directory."""

    def prepare(here: Path) -> None:
        (here / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return prepare


LONG = "word " * 300
TABLES: dict[str, tuple[str, str | bytes]] = {
    "empty file": ("d.csv", ""),
    "header alone": ("d.csv", "text,toxic\n"),
    "binary": ("d.csv", bytes(range(256)) * 4),
    "NUL bytes": ("d.csv", "text,toxic\na\0b,1\nc\0,x\n"),
    "latin-1": ("d.csv", "text,toxic\ncafé,1\nb,0\n".encode("latin-1")),
    "utf-16": ("d.csv", "text,toxic\na,1\nb,0\n".encode("utf-16")),
    "other columns": ("d.csv", "body,label\na,1\nb,0\n"),
    "ragged": ("d.csv", "text,toxic\na,1,2\nb,0\n"),
    "open quote": ("d.csv", 'text,toxic\n"a,1\nb,0\n'),
    "label too large": ("d.csv", "text,toxic\na,1\nb,0\nc,2\n"),
    "label words": ("d.csv", "text,toxic\na,yes\nb,no\n"),
    "label nan": ("d.csv", "text,toxic\na,nan\nb,0\n"),
    "one class": ("d.csv", "text,toxic\na,1\nb,1\n"),
    "no labels": ("d.csv", "text,toxic\na,\nb,\n"),
    "empty text": ("d.csv", "text,toxic\n,1\nb,0\n"),
    "column twice": ("d.csv", "text,toxic,toxic\na,1,0\nb,0,1\n"),
    "no JSON": ("d.jsonl", "text,toxic\na,1\n"),
    "JSON of lists": ("d.jsonl", '["a", 1]\n["b", 0]\n'),
    "JSON cut off": ("d.jsonl", '{"text": "a", "toxic": 1}\n{"text": "b", "tox'),
    "JSON number as text": ("d.jsonl", '{"text": 3, "toxic": 1}\n{"text": "b", "toxic": 0}\n'),
    "JSON label list": ("d.jsonl", '{"text": "a", "toxic": [1]}\n{"text": "b", "toxic": 0}\n'),
    "JSON label huge": ("d.jsonl", '{"text": "a", "toxic": 1e999}\n{"text": "b", "toxic": 0}\n'),
    "JSON lone surrogate": ("d.jsonl", '{"text": "\\ud800", "toxic": 1}\n{"text": "b", "toxic": 0}\n'),
    "parquet of text": ("d.parquet", "text,toxic\na,1\n"),
    "gzip": ("d.csv.gz", b"\x1f\x8b\x08\x00nothing"),
    "no suffix": ("data", "text,toxic\na,1\nb,0\n"),
}


def tables(inputs: Inputs) -> Iterator[Case]:
    """Data files that cannot be used, for the verbs that read one."""
    commands = inputs.commands()
    for name, (file, content) in TABLES.items():
        command = replaced(commands["collect"], "--data", f"{{here}}/{file}")
        yield Case(f"collect data: {name}", command, re.escape(file), write(file, content))
    for name in ("empty file", "binary", "utf-16", "other columns", "empty text", "no JSON", "no suffix"):
        file, content = TABLES[name]
        command = replaced(commands["evaluate"], "--perplexity-texts", f"{{here}}/{file}")
        yield Case(f"evaluate texts: {name}", command, re.escape(file), write(file, content))
        command = ["--toxicity-prompts", f"{{here}}/{file}", "--scorer", "profanity-check"]
        yield Case(
            f"evaluate prompts: {name}", [*commands["evaluate"], *command], re.escape(file), write(file, content)
        )
        command = replaced(commands["demo"], "--data", f"{{here}}/{file}")
        yield Case(f"demo data: {name}", command, re.escape(file), write(file, content))
    for verb, flag in (("collect", "--data"), ("evaluate", "--perplexity-texts"), ("demo", "--data")):
        yield Case(f"{verb} {flag}: a directory", replaced(commands[verb], flag, "{here}"), "here|directory|expected")
        yield Case(f"{verb} {flag}: missing", replaced(commands[verb], flag, "{here}/none.csv"), "none.csv")
    odd = 'text,toxic\n"NA",1\n"null\nin two lines",0\n"  spaces ",1\n"1e5",0\n'
    yield Case(
        "odd texts", replaced(commands["collect"], "--data", "{here}/d.csv"), prepare=write("d.csv", odd),
        check=lambda here, text: labels_of(here / "s.zarr") == {0: 1, 1: 0, 2: 1, 3: 0},
    )  # fmt: skip
    marked = b"\xef\xbb\xbftext,toxic\r\na,1\r\nb,0\r\n"
    yield Case(
        "byte order mark", replaced(commands["collect"], "--data", "{here}/d.csv"), prepare=write("d.csv", marked),
        check=lambda here, text: labels_of(here / "s.zarr") == {0: 1, 1: 0},
    )  # fmt: skip


def labels_of(store: Path) -> dict[int, int]:
    """Row of the data → its label in a store."""
    import aura_dist

    samples = aura_dist.open_store(store)["samples"]
    return dict(zip(samples["row"].values.tolist(), samples["label"].values[:, 0].tolist(), strict=True))


def configs(inputs: Inputs) -> Iterator[Case]:
    """Files of settings that cannot be used."""
    files: dict[str, str | bytes] = {
        "no YAML": "{{{",
        "binary": bytes(range(256)),
        "a list": "- model\n",
        "a number": "3\n",
        "tabs": "collect:\n\tdata: x\n",
        "unknown key": "modle: x\n",
        "unknown section key": "collect:\n  strength_of: 3\n",
        "key twice": "seed: 1\nseed: 2\n",
        "section of text": "collect: x\n",
        "number key": "3: 4\n",
        "deep": "a: " + "[" * 5000,
        "tag": "seed: !!python/object:os.system x\n",
        "date": "seed: 2020-01-01\n",
        "wrong type": "max_tokens: [1, 2]\n",
        "mapping": "pooling: {a: b}\n",
        "null": "max_tokens: null\n",
        "nested list": "clean_negatives: [[toxic]]\n",
        "bool for a number": "max_tokens: true\n",
        "number for a text": "text_column: 3\n",
    }
    command = inputs.commands()["collect"]
    for name, content in files.items():
        yield Case(f"collect config: {name}", [*command, "--config", "{here}/c.yaml"], "", write("c.yaml", content))
    yield Case("collect config: a directory", [*command, "--config", "{here}"], "config file")
    grids = {
        "no grid": "", "empty grid": "grid: {}\n", "a number": "grid: 3\n", "unknown axis": "grid:\n  colour: [red]\n",
        "no list": "grid:\n  method: 3\n", "empty axis": "grid:\n  method: []\n",
        "bad method": "grid:\n  method: [magic]\n",
        "bad strength": "grid:\n  method: [aura]\n  strength: [high]\n", "empty list": "grid: []\n",
        "a path": "grid:\n  method: [aura]\n  store: [x.zarr]\n", "resources": "resources: {timeout_min: x}\n",
    }  # fmt: skip
    head = f"model: {inputs.root}/llama\nout: {inputs.root}/swept\n"
    head += f"collect:\n  data: {inputs.root}/texts.csv\n  concepts: [toxic]\n"
    for name, grid in grids.items():
        command = ["sweep", "--config", "{here}/c.yaml", "--dry-run"]
        yield Case(f"sweep grid: {name}", command, "", write("c.yaml", head + grid))


def copied(inputs: Inputs, source: str, spoil: Callable[[Path], object], without: str = "") -> Callable[[Path], None]:
    """Copy a part of the inputs to the case's directory as `it`, but what is called `without`, and spoil it."""

    def prepare(here: Path) -> None:
        shutil.copytree(inputs.root / source, here / "it", ignore=shutil.ignore_patterns(without))
        spoil(here / "it")

    return prepare


def cut(name: str, share: float = 0.5) -> Callable[[Path], object]:
    return lambda it: (it / name).write_bytes((it / name).read_bytes()[: int((it / name).stat().st_size * share)])


def put(name: str, content: str | bytes) -> Callable[[Path], object]:
    return lambda it: (it / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def edit(name: str, **changed: Any) -> Callable[[Path], object]:
    """Change keys of a JSON file."""
    return lambda it: (it / name).write_text(json.dumps({**json.loads((it / name).read_text()), **changed}))


def instead(name: str) -> Callable[[Path], object]:
    """A directory in place of a file."""

    def spoil(it: Path) -> None:
        (it / name).unlink()
        (it / name).mkdir()

    return spoil


MODELS: dict[str, Callable[[Path], object]] = {
    "no configuration": lambda it: (it / "config.json").unlink(),
    "configuration cut off": cut("config.json"),
    "configuration of a list": put("config.json", "[]"),
    "configuration of text": put("config.json", "not JSON at all"),
    "configuration in utf-16": put("config.json", "{}".encode("utf-16")),
    "configuration is a directory": instead("config.json"),
    "unknown type": edit("config.json", model_type="nonsense", architectures=["Nonsense"]),
    "other widths": edit("config.json", intermediate_size=96),
    "layers as text": edit("config.json", num_hidden_layers="three"),
    "negative width": edit("config.json", hidden_size=-4),
    "heads that do not divide": edit("config.json", num_attention_heads=5, num_key_value_heads=5),
    "unknown activation": edit("config.json", hidden_act="nonsense"),
    "more layers than weights": edit("config.json", num_hidden_layers=9),
    "no weights": lambda it: (it / "model.safetensors").unlink(),
    "weights cut off": cut("model.safetensors"),
    "weights of text": put("model.safetensors", "nonsense"),
    "empty weights": put("model.safetensors", b""),
    "weights are a directory": instead("model.safetensors"),
    "no tokenizer": lambda it: [f.unlink() for f in it.glob("tokenizer*")],
    "tokenizer cut off": cut("tokenizer.json"),
    "tokenizer of a list": put("tokenizer.json", "[]"),
    "tokenizer configuration of text": put("tokenizer_config.json", "nothing"),
}


def models(inputs: Inputs) -> Iterator[Case]:
    """Model directories that cannot be used, for the verbs that load one."""
    commands = {**inputs.commands(), "plan": [*inputs.collect[3:], "--num-positive", "4"]}
    commands["collect"] = replaced(commands["collect"], "--modules", "*.up_proj")  # of all layers, so that all are read
    commands["plan"] = ["plan", "--model", "x", *inputs.collect[3:], "--num-positive", "4", "--num-negative", "4"]
    of_weights = ("weights", "more layers", "other widths")
    of_tokens = ("tokenizer",)
    for name, spoil in MODELS.items():
        for verb in ("collect", "plan", "generate", "export"):
            if verb == "plan" and any(w in name for w in of_weights):  # reads no weights
                continue
            if verb == "plan" and any(w in name for w in of_tokens):  # takes every row at --max-tokens, and says so
                continue
            if verb == "export" and any(w in name for w in of_tokens):  # copies what is there
                continue
            command = replaced(commands[verb], "--model", "{here}/it")
            yield Case(f"{verb} model: {name}", command, "", copied(inputs, "llama", spoil))
    for verb in ("collect", "plan", "generate", "export", "evaluate"):
        yield Case(f"{verb} model: missing", replaced(commands[verb], "--model", "{here}/none"), "none")
        yield Case(
            f"{verb} model: a file", replaced(commands[verb], "--model", f"{inputs.root}/texts.csv"), "texts.csv"
        )
        yield Case(f"{verb} model: an empty directory", replaced(commands[verb], "--model", "{here}"), "--model")


def each_chunk(it: Path, pattern: str, spoil: Callable[[bytes], bytes]) -> None:
    files = [f for f in sorted(it.glob(pattern)) if f.is_file()]
    assert files, pattern
    for file in files:
        file.write_bytes(spoil(file.read_bytes()))


def attribute(name: str, value: Any) -> Callable[[Path], object]:
    """Change an attribute of the store, or take it away (None)."""

    def spoil(it: Path) -> None:
        described = json.loads((it / "zarr.json").read_text())
        described["attributes"][name] = value
        if value is None:
            del described["attributes"][name]
        (it / "zarr.json").write_text(json.dumps(described))

    return spoil


RESPONSES = "activations/model.layers.1.mlp.up_proj/max"
SCORED = "scores/model.layers.1.mlp.up_proj/max"
# of a store that is to be scored
STORES: dict[str, Callable[[Path], object]] = {
    "no root": lambda it: (it / "zarr.json").unlink(),
    "root cut off": cut("zarr.json"),
    "root of a list": put("zarr.json", "[]"),
    "root of binary": put("zarr.json", bytes(range(256))),
    "no format": attribute("format", None),
    "another format": attribute("format", "theirs"),
    "never finished": attribute("created", False),
    "later schema": attribute("schema_version", 99),
    "schema of text": attribute("schema_version", "three"),
    "no sites": attribute("sites", None),
    "no sites in the list": attribute("sites", []),
    "sites of text": attribute("sites", "all"),
    "sites that lack a width": attribute("sites", [{"name": "a", "kind": "mlp", "layer": 0}]),
    "no concepts": attribute("concepts", None),
    "poolings of a number": attribute("poolings", 3),
    "unknown pooling": attribute("poolings", ["median"]),
    "tokens per batch of text": attribute("tokens_per_batch", "many"),
    "no tokens per batch": attribute("tokens_per_batch", None),
    "no samples": lambda it: shutil.rmtree(it / "samples"),
    "no responses": lambda it: shutil.rmtree(it / RESPONSES),
    "responses that lack a chunk": lambda it: next(
        f for f in sorted((it / RESPONSES).glob("c/**/*")) if f.is_file()
    ).unlink(),
    "chunks cut off": lambda it: each_chunk(it, f"{RESPONSES}/c/**/*", lambda b: b[: len(b) // 2]),
    "chunks of zeros": lambda it: each_chunk(it, f"{RESPONSES}/c/**/*", lambda b: bytes(len(b))),
    "empty chunks": lambda it: each_chunk(it, f"{RESPONSES}/c/**/*", lambda b: b""),
    "a bit is flipped": lambda it: each_chunk(
        it, f"{RESPONSES}/c/**/*", lambda b: b[:40] + bytes([b[40] ^ 1]) + b[41:]
    ),
    "labels cut off": lambda it: each_chunk(it, "samples/label/c/**/*", lambda b: b[: len(b) // 2]),
    "description of responses cut off": cut(f"{RESPONSES}/zarr.json"),
    "responses of another shape": lambda it: reshaped(it / RESPONSES / "zarr.json"),
    "progress is gone": lambda it: shutil.rmtree(it / "progress"),
    "marks are gone": lambda it: shutil.rmtree(it / "progress" / "done" / "c"),
    "first tokens are damaged": lambda it: each_chunk(it, "progress/first_token/c/**/*", lambda b: b[: len(b) // 2]),
}
# of a store that is to be fitted from
SCORES: dict[str, Callable[[Path], object]] = {
    "no scores": lambda it: shutil.rmtree(it / "scores"),
    "scores that lack a file": lambda it: next(f for f in sorted((it / SCORED).glob("c/**/*")) if f.is_file()).unlink(),
    "scores cut off": lambda it: each_chunk(it, f"{SCORED}/c/**/*", lambda b: b[: len(b) // 2]),
    "one site is not scored": lambda it: shutil.rmtree(it / Path(SCORED).parent),
    "description of scores is text": put("scores/zarr.json", "nonsense"),
    "no description of a site's scores": lambda it: (it / SCORED / "zarr.json").unlink(),
    "scores without names": lambda it: unnamed(it / SCORED / "zarr.json"),
}


def unnamed(description: Path) -> None:
    described = json.loads(description.read_text())
    described["attributes"].clear()
    description.write_text(json.dumps(described))


def reshaped(description: Path) -> None:
    described = json.loads(description.read_text())
    described["shape"][1] += 3
    description.write_text(json.dumps(described))


def stores(inputs: Inputs) -> Iterator[Case]:
    """Stores that cannot be used."""
    commands = inputs.commands()
    for name, spoil in STORES.items():
        prepare = copied(inputs, "run/store.zarr", spoil, "scores")
        yield Case(
            f"score store: {name}", replaced(commands["score"], "--store", "{here}/it"), r"\bit\b|--store", prepare
        )
    for name in (
        "no root",
        "root cut off",
        "no sites",
        "no concepts",
        "later schema",
        "no samples",
        "poolings of a number",
    ):
        prepare = copied(inputs, "run/store.zarr", STORES[name])
        collect = replaced(commands["collect"], "--store", "{here}/it")
        yield Case(f"collect into store: {name}", collect, r"\bit\b|--store", prepare)
        yield (
            Case(f"fit store: {name}", replaced(commands["fit"], "--store", "{here}/it"), r"\bit\b|--store", prepare)
            if (name not in ("no samples",))
            else Case(f"API open_store: {name}", lambda here: opened(here / "it"), "it", prepare)
        )
    for name, spoil in SCORES.items():
        prepare = copied(inputs, "run/store.zarr", spoil)
        yield Case(f"fit store: {name}", replaced(commands["fit"], "--store", "{here}/it"), r"\bit\b|--store", prepare)
        yield Case(f"API top_neurons: {name}", lambda here: top(here / "it"), "it", prepare)
    for verb in ("collect", "score", "fit"):
        yield Case(
            f"{verb} store: a file", replaced(commands[verb], "--store", f"{inputs.root}/texts.csv"), "texts.csv"
        )
        yield Case(f"{verb} store: a scheme", replaced(commands[verb], "--store", "nowhere://a/b.zarr"), "nowhere")
    yield Case("collect store: not empty", replaced(commands["collect"], "--store", f"{inputs.root}/llama"), "llama")
    yield Case(
        "collect store: in a store",
        replaced(commands["collect"], "--store", f"{inputs.root}/run/store.zarr/x"),
        "within",
    )
    prepare = copied(inputs, "run/store.zarr", lambda it: None)
    it = ["--store", "{here}/it"]
    begun = {
        "another model": ["--model", f"{inputs.root}/gpt2"], "another dtype": ["--dtype", "bfloat16"],
        "other modules": ["--modules", "attention"], "another pooling": ["--pooling", "mean"],
        "other first tokens": ["--skip-first-tokens", "1"], "other rows": ["--num-positive", "5"],
        "special tokens": ["--skip-special-tokens"], "other lengths": ["--max-tokens", "9"],
    }  # fmt: skip
    for name, more in begun.items():
        command = replaced(replaced(commands["collect"], *it), more[0], *more[1:])
        yield Case(
            f"collect into store of {name}",
            command,
            "collected under another|holds other rows|matches nothing",
            prepare,
        )


def opened(store: Path) -> object:
    import aura_dist

    return aura_dist.open_store(store)


def top(store: Path) -> object:
    import aura_dist

    return aura_dist.top_neurons(store, "toxic", 5)


def spoilt_maps(change: Callable[[dict[str, np.ndarray]], object]) -> Callable[[Path], object]:
    """Change the arrays of an intervention's file."""

    def spoil(it: Path) -> None:
        from safetensors.numpy import load_file, save_file

        arrays = load_file(it / "intervention.safetensors")
        arrays = {name: np.array(values) for name, values in arrays.items()}
        change(arrays)
        save_file(arrays, it / "intervention.safetensors")

    return spoil


def first(arrays: dict[str, np.ndarray]) -> str:
    return sorted(arrays)[0]


ARTIFACTS: dict[str, Callable[[Path], object]] = {
    "no weights": lambda it: (it / "intervention.safetensors").unlink(),
    "no description": lambda it: (it / "intervention.json").unlink(),
    "weights cut off": cut("intervention.safetensors"),
    "weights of text": put("intervention.safetensors", "nonsense"),
    "description cut off": cut("intervention.json"),
    "description of a list": put("intervention.json", "[1]"),
    "description of a number": put("intervention.json", "3"),
    "description of binary": put("intervention.json", bytes(range(128, 256))),
    "another width": spoilt_maps(lambda a: a.update({first(a): np.ones(7, np.float32)})),
    "two dimensions": spoilt_maps(lambda a: a.update({first(a): np.ones((2, 40), np.float32)})),
    "integers": spoilt_maps(lambda a: a.update({first(a): np.ones(len(a[first(a)]), np.int32)})),
    "NaN": spoilt_maps(lambda a: a[first(a)].__setitem__(3, np.nan)),
    "infinite": spoilt_maps(lambda a: a[first(a)].__setitem__(3, np.inf)),
    "a module that is not there": spoilt_maps(
        lambda a: a.update({"model.layers.77.mlp.up_proj.scale": np.ones(80, np.float32)})
    ),
    "no module": spoilt_maps(lambda a: a.clear()),
    "model of text": edit("intervention.json", model="llama"),
    "another fingerprint": edit("intervention.json", model={"name": "x", "fingerprint": "0" * 64}),
}


def artifacts(inputs: Inputs) -> Iterator[Case]:
    """Interventions that cannot be used."""
    commands = inputs.commands()
    for name, spoil in ARTIFACTS.items():
        prepare = copied(inputs, "run/interventions/aura", spoil)
        for verb in ("generate", "export"):
            yield Case(
                f"{verb} intervention: {name}", replaced(commands[verb], "--intervention", "{here}/it"), "", prepare
            )
    for verb in ("collect", "generate", "evaluate"):
        aura = ["--intervention", f"{inputs.root}/run/interventions/aura"]
        command = replaced([*commands[verb], *aura], "--model", f"{inputs.root}/gpt2")
        yield Case(
            f"{verb} intervention: of another model", command, "does not fit GPT2LMHeadModel|made for|matches nothing"
        )
        yield Case(f"{verb} intervention: missing", [*commands[verb], "--intervention", "{here}/none"], "none")
        yield Case(
            f"{verb} intervention: a file", [*commands[verb], "--intervention", f"{inputs.root}/texts.csv"], "texts.csv"
        )
        yield Case(
            f"{verb} intervention: a store",
            [*commands[verb], "--intervention", f"{inputs.root}/run/store.zarr"],
            "store.zarr",
        )
    yield Case("export out: there already", replaced(commands["export"], "--out", "{here}"), "here|exist|--out")
    yield Case("export out: the model itself", replaced(commands["export"], "--out", f"{inputs.root}/llama"), "llama")
    yield Case("fit out: a file", replaced(commands["fit"], "--out", f"{inputs.root}/texts.csv"), "texts.csv")
    yield Case("fit onto: missing", [*commands["fit"], "--onto", "{here}/none"], "none")


def results(inputs: Inputs) -> Iterator[Case]:
    """Run directories and results that cannot be used."""
    commands = inputs.commands()
    files: dict[str, str | bytes] = {
        "text": "nonsense", "a list": "[]", "a number": "3", "cut off": '{"schema": 1, "perp',
        "binary": bytes(range(256)),
        "another schema": '{"schema": 99}', "empty": "", "null": "null",
    }  # fmt: skip
    (prompts := inputs.root / "prompts.csv").write_text("text\nyou are\nthey said\n")
    toxicity = ["--toxicity-prompts", str(prompts), "--scorer", "profanity-check", "--num-samples", "2"]
    for name, content in files.items():
        command = [*commands["evaluate"], *toxicity, "--baseline", "{here}/b.json"]
        yield Case(f"evaluate baseline: {name}", command, "b.json", write("b.json", content))
    yield Case(
        "report: missing",
        ["report", "{here}/none", "--out", "{here}/p.html"],
        "none",
    )
    yield Case("report: a file", ["report", f"{inputs.root}/texts.csv", "--out", "{here}/p.html"], "texts.csv")
    yield Case("report: nothing in it", ["report", "{here}", "--out", "{here}/p.html"], "")
    yield Case(
        "report: twice the same", ["report", f"{inputs.root}/run", f"{inputs.root}/run", "--out", "{here}/p.html"], ""
    )
    yield Case("report out: a directory", replaced(commands["report"], "--out", "{here}"), "")
    yield Case("status: missing", ["status", "{here}/none"], "none")
    yield Case("status: a file", ["status", f"{inputs.root}/texts.csv"], "texts.csv")
    yield Case("status: nothing in it", ["status", "{here}"], "")
    for name in (
        "root cut off",
        "no sites",
        "sites of text",
        "no samples",
        "poolings of a number",
        "tokens per batch of text",
    ):

        def damaged(here: Path, spoil: Callable[[Path], object] = STORES[name]) -> None:
            shutil.copytree(inputs.root / "run", here / "it")
            spoil(here / "it" / "store.zarr")

        yield Case(f"report store: {name}", ["report", "{here}/it", "--out", "{here}/p.html"], "store.zarr", damaged)
        yield Case(
            f"status store: {name}",
            ["status", "{here}/it"],
            prepare=damaged,
            check=lambda here, text: "damaged" in text,
        )


def contradictions(inputs: Inputs) -> Iterator[Case]:
    """Settings that do not go together, or would not be looked at."""
    commands = inputs.commands()
    more = {
        "collect": [
            ("--sharding", "tensor=2"), ("--sharding", "fsdp=0"), ("--sharding", "tensor=x"),
            ("--sharding", "fsdp=2,fsdp=2"),
            ("--offload", "cpu"), ("--max-memory", "cpu=1GB"), ("--offload-folder", "{here}"),
            ("--tensor-plan", "{here}/p"),
            ("--skip-first-tokens", "128"), ("--max-tokens", "1"),
            ("--concepts", "toxic", "toxic"), ("--pooling", "max", "max"), ("--modules", "mlp", "mlp"),
            ("--modules", "!mlp"), ("--modules", "mlp", "!*.mamba.*"), ("--modules", "attention", "!*.mlp.*"),
            ("--modules", "lm_head"), ("--modules", ""), ("--num-positive", "9999"), ("--clean-negatives", "rude"),
            ("--match-length", "--num-negative", "9999"), ("--threshold", "7"), ("--threshold", "inf"),
            ("--skip-first-tokens", "100"),  ("--device", "cuda"),
            ("--max-tokens", "2", "--skip-special-tokens", "--skip-first-tokens", "1", "--skip-first-tokens", "2"),
        ],
        "plan": [
            ("--world-size", "3", "--sharding", "fsdp=2"), ("--ranks-per-host", "4"), ("--device-memory", "lots"),
            ("--device-memory", "0GB"), ("--host-memory", "1KB"), ("--device", "cpu", "--device-memory", "8GB"),
            ("--world-size", "5000", "--sharding", "tensor"), ("--tflops", "inf"),
        ],
        "score": [
            ("--dask", "tcp://127.0.0.1:1"), ("--dask", "tcp://"), ("--dask", "http://x"),
            ("--memory-limit", "1KB", "--overwrite"),
            ("--memory-limit", "-1GB"), ("--slurm", "queue=main"), ("--statistics", "auroc", "auroc"),
            ("--dask", "slurm", "--slurm", "colour=red"),
        ],
        "fit": [
            ("--concept", "rude"), ("--pooling", "mean"), ("--method", "damp", "--alpha", "2"), ("--alpha", "0.2"),
            ("--top-k", "99999"), ("--max-q", "1.5"), ("--modules", "norm"), ("--modules", "!*"),
            ("--method", "linear-act"),
            ("--strength", "inf"), ("--strength", "1e9"), ("--onto", "{here}"),
        ],
        "generate": [
             ("--temperature", "1e-30"), ("--temperature", "inf"), ("--top-p", "0"),
            ("--top-p", "1.1"),
            ("--max-new-tokens", "100000"), ("--prompt", LONG), ("--preprompt", ""), ("--preprompt", LONG),
            ("--sharding", "tensor=2"),  ("--device", "cuda"),
        ],
        "evaluate": [
            ("--perplexity-labels", "rude"), ("--limit", "3"), ("--num-fewshot", "1"), ("--toxic-label", "x"),
            ("--baseline", "{here}/b.json"), ("--tasks-path", "{here}"), ("--tasks", "no_such_task"),
            ("--out", "{here}"),
            ("--out", ""), ("--prompt-column", "x"), ("--text-column", "body"),
            ("--perplexity-texts", "{here}/none.csv"),
        ],
        "export": [("--strength", "-1"), ("--dtype", "float16"), ("--out", ""), ("--intervention", "")],
        "report": [("--expert-auroc", "0.2"), ("--expert-auroc", "1"), ("--num-neurons", "0")],
        "sweep": [("--launcher", "kubernetes"), ("--jobs", "0"),
        ("--retries", "-2")],
        "demo": [("--concept", "rude"), ("--modules", "none_such"), ("--modules", "!*"), ("--text-column", "body")],
    }  # fmt: skip
    for verb, found in more.items():
        for flag, *values in found:
            yield Case(f"{verb} {flag} {' '.join(v[:30] for v in values)}", replaced(commands[verb], flag, *values))
    yield Case(
        "generate an empty prompt", replaced(commands["generate"], "--prompt", ""),
        check=lambda here, text: "prompt:" in text or len(text.strip()) > 0,
    )  # fmt: skip
    for verb in ("collect", "fit", "generate"):
        yield Case(f"{verb} --strength twice", [*commands[verb], "--strength", "1", "--strength", "2"], "twice|once")


def api(inputs: Inputs) -> Iterator[Case]:
    """Arguments of the functions that cannot be used."""
    import aura_dist

    llama, texts, labels = str(inputs.root / "llama"), ["one two", "three", "four five", "six"], [0, 1, 0, 1]

    def collect(
        *, texts: Any = texts, labels: Any = labels, model: Any = llama, **more: Any
    ) -> Callable[[Path], object]:
        return lambda here: aura_dist.collect(model, texts, labels, **{"store": here / "s.zarr", **more})

    store = str(inputs.root / "run" / "store.zarr")
    calls: dict[str, Callable[[Path], object]] = {
        "collect a text": collect(texts="one two"),
        "collect no texts": collect(texts=[], labels=[]),
        "collect numbers": collect(texts=[1, 2, 3, 4]),
        "collect None": collect(texts=[None, "a", "b", "c"]),
        "collect fewer labels": collect(labels=[0, 1]),
        "collect labels of two dimensions": collect(labels=[[0, 1]] * 4),
        "collect one class": collect(labels=[1, 1, 1, 1]),
        "collect labels of words": collect(labels=["a", "b", "a", "b"]),
        "collect labels of infinity": collect(labels=[0, 1, float("inf"), 1]),
        "collect no concepts": collect(labels={}),
        "collect a model that is none": collect(model=3),
        "collect a missing model": collect(model="no/such/model"),
        "collect a setting that is none": collect(colour="red"),
        "collect max_tokens of text": collect(max_tokens="many"),
        "collect modules of a number": collect(modules=3),
        "collect a tokenizer with a name": collect(tokenizer=object()),
        "collect everything left out": collect(modules=["mlp", "!mlp"]),
        "score nowhere": lambda here: aura_dist.score(here / "none"),
        "score unknown statistics": lambda here: aura_dist.score(store, statistics=["x"]),
        "fit nowhere": lambda here: aura_dist.fit(here / "none", "toxic"),
        "fit unknown concept": lambda here: aura_dist.fit(store, "rude"),
        "fit unknown method": lambda here: aura_dist.fit(store, "toxic", "magic"),
        "fit top_k below 1": lambda here: aura_dist.fit(store, "toxic", "det0", top_k=0),
        "fit alpha of NaN": lambda here: aura_dist.fit(store, "toxic", "damp", alpha=float("nan")),
        "top_neurons k of 0": lambda here: aura_dist.top_neurons(store, "toxic", 0),
        "top_neurons unknown concept": lambda here: aura_dist.top_neurons(store, "rude", 3),
        "top_neurons unknown pooling": lambda here: aura_dist.top_neurons(store, "toxic", 3, pooling="median"),
        "open_store nowhere": lambda here: aura_dist.open_store(here / "none"),
        "Intervention nowhere": lambda here: aura_dist.Intervention.load(here / "none"),
        "auroc of other lengths": lambda here: aura_dist.auroc(np.zeros((4, 2)), np.array([0, 1, 1])),
        "auroc of one class": lambda here: aura_dist.auroc(np.zeros((4, 2)), np.ones(4)),
    }
    for name, call in calls.items():
        yield Case(f"API {name}", call)


KINDS: Mapping[str, Callable[[Inputs], Iterator[Case]]] = {
    "types and ranges": types_and_ranges,
    "tables": tables,
    "files of settings": configs,
    "models": models,
    "stores": stores,
    "interventions": artifacts,
    "results and runs": results,
    "contradictions": contradictions,
    "the API": api,
}


def _child(case: Case, here: Path) -> int:
    """Run a case in this process; its exit code."""
    from aura_dist.cli import main
    from aura_dist.errors import AuraError

    if case.prepare is not None:
        case.prepare(here)
    if callable(case.run):
        try:
            case.run(here)
        except AuraError as error:
            print("error:", " ".join(str(error).split()), file=sys.stderr)
            return 2
        return 0
    try:
        return main([word.replace("{here}", str(here)) for word in case.run])
    except SystemExit as ended:
        return int(ended.code or 0)


class Runner:
    """Runs cases one after another in a forked process, and another one when a case hangs or kills it."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._child = 0

    def __enter__(self) -> "Runner":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def run(self, case: Case, number: int, cases: Sequence[Case]) -> Outcome:
        """How `case` ends, number `number` of `cases`."""
        here = self._root / f"here-{number}"
        here.mkdir()
        begun = time.monotonic()
        if not self._child:
            self._start(cases)
        self._orders.write(f"{number}\n".encode())
        self._orders.flush()
        answer = self._answer(begun + LIMIT_SECONDS)
        text = here.with_suffix(".log").read_text(errors="replace") if here.with_suffix(".log").exists() else ""
        what = answer if isinstance(answer, str) else _judge(case, answer, text, here)
        shutil.rmtree(here)
        return Outcome(what, time.monotonic() - begun, text)

    def _answer(self, end: float) -> int | str:
        """The exit code, or what happened instead of one."""
        ready, _, _ = select.select([self._codes], [], [], max(0.0, end - time.monotonic()))
        line = self._codes.readline() if ready else b""
        if line:
            return int(line)
        self._stop()
        return "KILLED" if ready else "HANG"

    def _start(self, cases: Sequence[Case]) -> None:
        sys.stdout.flush()
        (from_us, orders), (codes, from_it) = os.pipe(), os.pipe()
        self._child = os.fork()
        if not self._child:
            try:
                os.setsid()
                _serve(self._root, cases, os.fdopen(from_us, "rb"), os.fdopen(from_it, "wb"))
            finally:
                os._exit(0)
        os.close(from_us)
        os.close(from_it)
        self._orders, self._codes = os.fdopen(orders, "wb"), os.fdopen(codes, "rb", buffering=0)

    def _stop(self) -> None:
        if self._child:
            os.killpg(self._child, signal.SIGKILL)
            os.waitpid(self._child, 0)
            self._orders.close()
            self._codes.close()
            self._child = 0


def _serve(root: Path, cases: Sequence[Case], orders: BinaryIO, codes: BinaryIO) -> None:
    """Run the cases whose numbers come, each with its output in a file."""
    devnull = os.open(os.devnull, os.O_RDONLY)
    os.dup2(devnull, 0)
    for line in orders:
        here = root / f"here-{int(line)}"
        file = os.open(here.with_suffix(".log"), os.O_WRONLY | os.O_CREAT)
        for stream in (1, 2):
            os.dup2(file, stream)
        os.close(file)
        try:
            code = _child(cases[int(line)], here)
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        codes.write(f"{code}\n".encode())
        codes.flush()


def _judge(case: Case, code: int, text: str, here: Path) -> str:
    lines = [line for line in text.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    if "Traceback (most recent call last)" in text:
        return "TRACEBACK"
    if case.check is not None:
        return "odd, and right" if code == 0 and case.check(here, text) else f"WRONG ({code})"
    if code != 2:
        return f"EXIT {code}"
    if len(lines) != 1:
        return f"{len(lines)} LINES OF ERROR"
    return "refused" if re.search(case.message, lines[0]) else "WITHOUT A NAME"


def all_cases(inputs: Inputs) -> dict[str, list[Case]]:
    return {kind: list(make(inputs)) for kind, make in KINDS.items()}


def warm_up() -> None:
    """Load what the cases need, so that forks share it; start no thread."""
    import transformers.models.llama.modeling_llama  # noqa: F401

    import aura_dist.demo.demo
    import aura_dist.scoring.worker
    from aura_dist.config.verbs import VERBS

    for verb in VERBS.values():
        __import__(f"aura_dist.{verb.stage}")
    aura_dist.scoring.worker.compile_kernels()


def in_child(work: Callable[[], object]) -> None:
    """Run `work` in a forked process, because it may start threads, which no fork survives."""
    if not (child := os.fork()):
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, "the inputs could not be made"


def run_all(root: Path, every: int = 1, only: str = "") -> dict[str, list[tuple[Case, Outcome]]]:
    """Run every N-th case of each kind, of those whose kind or name has the word."""
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    inputs = Inputs(root)
    warm_up()
    in_child(inputs.make)
    chosen = {k: [c for c in found if only in f"{k}: {c.name}"][::every] for k, found in all_cases(inputs).items()}
    cases, ended = [case for found in chosen.values() for case in found], []
    with Runner(root) as runner:
        for number, case in enumerate(cases):
            ended.append((case, runner.run(case, number, cases)))
            if not as_it_should(ended[-1][1]):
                print(f"{ended[-1][1].what}: {case.name}", file=sys.stderr, flush=True)
    of = iter(ended)
    return {kind: [next(of) for _ in found] for kind, found in chosen.items()}


def as_it_should(outcome: Outcome) -> bool:
    return outcome.what in ("refused", "odd, and right")


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--only", default="")
    settings = parser.parse_args(words)
    with tempfile.TemporaryDirectory() as root:
        found = run_all(Path(root), settings.every, settings.only)
    for kind, ended in found.items():
        counts = Counter(outcome.what for _, outcome in ended)
        print(f"{kind:18} {len(ended):4}  " + ", ".join(f"{n} {what}" for what, n in counts.most_common()))
    everything = [(case, outcome) for ended in found.values() for case, outcome in ended]
    wrong = [(case, outcome) for case, outcome in everything if not as_it_should(outcome)]
    for case, outcome in wrong:
        print(f"\n{outcome.what}: {case.name} ({outcome.seconds:.1f} s)")
        print("\n".join("    " + line[:400] for line in outcome.text.replace("\r", "\n").splitlines()[-6:]))
    slowest = max((outcome.seconds for _, outcome in everything), default=0)
    print(f"\n{len(everything)} inputs, {len(wrong)} not as they should end; the slowest took {slowest:.1f} s")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
