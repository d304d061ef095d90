"""The results of one evaluation as a JSON document: its shape, and how it is read and written.

    schema           1
    created          ISO 8601, UTC
    config           the resolved settings of `evaluate`
    versions         package → version
    model            {name, revision, dtype, adapter: null or {name, sha256}, own_code: null or {file: sha256},
                     quantization: null or NAME:OPTION, fingerprint}
    model_fingerprint  the same fingerprint
    server           absent without --server: {url, command: absent unless it started the server, model, root (the
                     checkpoint, as the server names it), engine, version, asked_strength: of each request, where a
                     server with an intervention takes one, 0 for the plain model, dialect: {token_ids, extended},
                     probe: {prompt, text, num_tokens, ids: maybe absent}};
                     `dtype` is null then, and the fingerprint, of the model's name alone, starts with `served-`.
                     Another engine, or none (a model in process), draws other continuations at the same seed
    intervention     null, or {…intervention.json (method, parameters, concept, model, …), directory, digest,
                     strength: as applied}
    preprompt        null or the text before each prompt and text
    chat             absent without --chat: {role, system, template: sha256} of prompts and tasks
    perplexity       absent where not measured: {texts, column, sha256, PERPLEXITY…,
                     labels (the label column, if one was given), positive: {PERPLEXITY…}, negative: {PERPLEXITY…},
                     per_text: {negative_log_likelihood: [N] sums in nats, num_tokens: [N] predicted ones}}
    side_effects     absent without --side-effects: {divergence: {mean, mean_low, mean_high, percentile_99, num_texts,
                     num_tokens} of next tokens, KL(plain ‖ intervened) in nats,
                     gates: null without gates of tokens, or {open_tokens: share of these tokens at which a gate is
                     beyond ½, open_texts: share of texts that have one, num_tokens, num_texts},
                     continuations: null, or {plain: {PERPLEXITY…}, intervened: {PERPLEXITY…}} of the baseline's
                     non-toxic continuations of toxic prompts}
    toxicity         absent where not measured: {prompts, column, prompts_sha256, scorer, num_prompts, num_samples,
                     settings: {max_new_tokens, temperature, top_p, top_k, seed, chat: true under --chat},
                     continuations: name of the JSONL file beside the results,
                     overall: GROUP, toxic_prompts: GROUP or null, nontoxic_prompts: GROUP or null,
                     per_prompt: {toxic_share: [P], maximum: [P]},
                     form: {num_tokens: ESTIMATE, repetition: ESTIMATE} of a continuation,
                     judges: absent without --more-scorers: scorer → {agreement: share of continuations that both
                     call toxic or both do not, both_toxic: ESTIMATE of the share that both call toxic, overall,
                     toxic_prompts, nontoxic_prompts, per_prompt},
                     baseline: null, or {results: path, name, overall: RATIOS, toxic_prompts, nontoxic_prompts}}
    zero_shot        absent where not measured: task → {metric: number, …, num_fewshot, num_examples}; metrics by
                     lm-eval's names without `,none`, standard errors as METRIC_stderr
    seconds          {load, generation, scoring, perplexity, zero_shot, total}: those that took place; and
                     `num_generated`, `continuations_per_second` of this run alone

    PERPLEXITY   token_weighted, token_weighted_low, token_weighted_high, mean_over_sentences,
                 mean_over_sentences_low, mean_over_sentences_high, num_texts, num_tokens, num_left_out, num_nonfinite
    GROUP        {num_prompts, probability: ESTIMATE, expected_maximum: ESTIMATE, any_toxic: ESTIMATE}
    RATIOS       {probability: ESTIMATE, expected_maximum: ESTIMATE, any_toxic: ESTIMATE}: baseline ÷ this, so that 2
                 is half as much; null without a finite value
    ESTIMATE     {value, low, high}: 95 % bootstrap interval, over prompts (toxicity) or texts (perplexity)

A number that is not finite is null. The continuations' file holds one JSON object a line, in the order of prompts
and samples: {settings, prompt: index in the file, sample, text, num_tokens, ids: token ids, prompt_text,
prompt_toxicity: number or null, toxicity: probability, judges: {scorer: probability} under --more-scorers}.
"""

import json
import math
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from aura_dist.errors import ConfigError, InputError, StoreError
from aura_dist.files import write_whole

SCHEMA = 1
PACKAGES = ("aura_dist", "torch", "transformers", "numpy", "lm_eval", "alt-profanity-check")


def read_results(path: str) -> dict[str, Any]:
    """The results at `path`; InputError unless `evaluate` wrote them."""
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"results {path!r}: expected a JSON file as `evaluate` writes it: {error}") from error
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        found = document.get("schema") if isinstance(document, dict) else type(document).__name__
        raise InputError(
            f"results {path!r}: expected schema {SCHEMA} as `evaluate` writes it, got {found}; run evaluate again"
        )
    return document


def judges(results: Mapping[str, Any]) -> list[str]:
    """Names of the further scorers that judged the continuations."""
    return list((results.get("toxicity") or {}).get("judges") or {})


def by_judge(results: Mapping[str, Any], scorer: str) -> dict[str, Any]:
    """The same results with the figures of a further scorer in place of the first one's; without that, no toxicity."""
    section = results.get("toxicity") or {}
    own = (section.get("judges") or {}).get(scorer)
    return {**results, "toxicity": {**section, **own, "scorer": scorer, "judges": {}, "baseline": None} if own else {}}


def write_results(out: str, results: dict[str, Any]) -> None:
    """Replace the file at `out` in one step; StoreError if it cannot be written."""
    text = json.dumps(finite(results), indent=2, allow_nan=False) + "\n"
    try:
        write_whole(Path(out).resolve(), text)
    except OSError as error:
        raise StoreError(f"--out {out!r} cannot be written: {error}") from error


def check_spares(out: str, inputs: Mapping[str, str | None], continuations: Path) -> None:
    """ConfigError if `out` or `continuations`, the files to write, would replace an input or a file of someone else.

    `inputs`: flag → its value; hub names and texts, which are no files, are allowed.
    """
    path = Path(out).resolve()
    for name, given in inputs.items():
        if given is not None and any(_same(written, given) for written in (path, continuations)):
            raise ConfigError(
                f"--out {out!r}: expected a file of its own, got one that would overwrite {name} {given!r}"
            )
    if path.is_file() and path.stat().st_size and not _is_results(path):
        raise ConfigError(
            f"--out {out!r}: expected a new file, or results to replace, got a file that `evaluate` did not write; "
            "name another file, or delete it"
        )


def _same(written: Path, given: str) -> bool:
    try:
        return written.samefile(given)
    except (OSError, ValueError):  # one is not there, or the text is no possible file name
        return False


def _is_results(path: Path) -> bool:
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(document, dict) and "schema" in document


def check_writable(out: str) -> None:
    """StoreError if the file could not be written; leaves nothing there."""
    path = Path(out).resolve()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            path.open("a").close()
        TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise StoreError(f"--out {out!r} cannot be written: {error}") from error


def finite(value: Any) -> Any:
    """The same with None for numbers that JSON cannot hold."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def versions() -> dict[str, str]:
    """Package → version, of the installed ones that the figures depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
