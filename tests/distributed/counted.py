"""Ranks of a launch run these: `aura-dist ARGUMENTS` with notes of the work that this rank did itself, or failing."""

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aura_dist.cli import main
from aura_dist.errors import ModelError
from aura_dist.evaluation import perplexity, prompts
from aura_dist.models import digests
from aura_dist.stages import evaluate


def run_counted(arguments: Sequence[str]) -> int:
    """The first argument is a directory for the notes, the others are the command's."""
    from lm_eval.models.huggingface import HFLM

    noted: dict[str, list] = {"read": [], "tokenized": [], "rows": [], "requests": []}

    def note(module, name, kind, what):
        original = getattr(module, name)

        def recorded(*given, **more):
            noted[kind] += what(*given)
            return original(*given, **more)

        setattr(module, name, recorded)

    note(perplexity, "read_table", "read", lambda source, columns: [source])
    note(prompts, "read_table", "read", lambda source, columns: [source])
    note(perplexity, "tokenize", "tokenized", lambda texts, tokenizer: texts)
    note(evaluate, "tokenize_prompts", "tokenized", lambda texts, tokenizer, config, how: texts)
    note(perplexity.Reader, "read", "rows", lambda reader, rows, piece: [[rows.start, rows.stop, piece]])
    note(HFLM, "loglikelihood", "requests", lambda model, requests: [[r.doc_id, r.idx] for r in requests])
    code = main(arguments[1:])
    (Path(arguments[0]) / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(noted))
    return code


def run_failing(arguments: Sequence[str]) -> int:
    """The first argument is the part of an evaluation in which rank 1 fails, the others are the command's."""
    from lm_eval.models.huggingface import HFLM

    owner, name = {"texts": (perplexity.Reader, "read"), "tasks": (HFLM, "loglikelihood")}[arguments[0]]
    original, begun = getattr(owner, name), Path(arguments[arguments.index("--out") + 1]).parent.with_suffix(".begun")

    def read(*given: object, **more: object) -> Any:
        if os.environ["RANK"] == "1":
            begun.touch()
            raise ModelError("this rank has had enough")
        while not begun.exists():  # on a busy machine rank 0 would claim all texts before the other comes
            time.sleep(0.01)
        return original(*given, **more)

    setattr(owner, name, read)
    return main(arguments[1:])


def run_hashed(arguments: Sequence[str]) -> int:
    """The first argument is a file for the names of the weight files that this rank hashed, without a cache."""
    original = digests._hash

    def hashed(file: Path) -> list[digests.TensorDigest]:
        with open(arguments[0], "a") as notes:
            notes.write(f"{file.name}\n")
        return original(file)

    digests._hash, digests.cache_dir = hashed, lambda: Path("/dev/null")
    return main(arguments[1:])
