"""evaluate: toxicity, perplexity and zero-shot tasks of a model, with or without an intervention, as a JSON file.

Data flow: all inputs are read and checked before the model is loaded → continuations (claimed by the ranks, appended
to files as they come, gone on with after an interruption), perplexity, tasks → rank 0 scores the continuations, draws
the intervals and writes `--out`. What the file holds: `aura_dist.evaluation.results`.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aura_dist.config import EvaluateConfig, flag
from aura_dist.data.labels import check_texts, parse_labels
from aura_dist.data.table import read_table
from aura_dist.data.tokens import tokenize, tokenizer_digest
from aura_dist.errors import ConfigError
from aura_dist.evaluation.compare import against_baseline, check_same_prompts, name_of, table
from aura_dist.evaluation.generation import generate
from aura_dist.evaluation.journal import Journal, settings_key
from aura_dist.evaluation.perplexity import both_sides, negative_log_likelihoods, summary
from aura_dist.evaluation.preprompt import Prefix, make_prefix, read_preprompt
from aura_dist.evaluation.prompts import PromptFile, TokenizedPrompts, read_prompts, tokenize_prompts
from aura_dist.evaluation.results import SCHEMA, check_writable, finite, read_results, versions, write_results
from aura_dist.evaluation.sampling import Decoding
from aura_dist.evaluation.scorers import Scorer, load_scorer
from aura_dist.evaluation.section import head, sampling_settings, score
from aura_dist.evaluation.toxicity import groups
from aura_dist.evaluation.zero_shot import ZeroShot
from aura_dist.model.sharding import ModelSource, check_positions, check_vocabulary, pick_device, sharding_options
from aura_dist.model.use import LoadedModel, load_for_use
from aura_dist.runtime.launch import start_team
from aura_dist.runtime.log import configure_rank
from aura_dist.runtime.signals import StopFlag
from aura_dist.runtime.team import Team

logger = logging.getLogger(__name__)


def run(config: EvaluateConfig) -> dict[str, Any]:
    """Measure, write `config.out`, and return what was written; other ranks than the first return nothing."""
    _check_settings(config)
    with start_team(config.sharding, pick_device(config.device)) as team, StopFlag() as stop:
        configure_rank(team.world.global_rank, team.world.layout.world_size)
        return _Evaluation(config, team, stop).run()


def _check_settings(config: EvaluateConfig) -> None:
    """ConfigError where nothing is to be measured, or a setting would not be looked at."""
    if not (config.toxicity_prompts or config.perplexity_texts or config.tasks):
        raise ConfigError("expected at least one of --toxicity-prompts, --perplexity-texts and --tasks, got none")
    needs = {
        "toxicity_prompts": ("baseline", "prompt_column", "prompt_toxicity_column", "toxic_label"),
        "perplexity_texts": ("perplexity_labels",),
        "tasks": ("tasks_path", "num_fewshot", "limit"),
    }
    for part, names in needs.items():
        for name in names:
            if not getattr(config, part) and getattr(config, name) is not None:
                raise ConfigError(f"{flag(name)}: expected it with {flag(part)}, got it without; leave it out")


@dataclass(frozen=True)
class _Texts:
    """Texts whose perplexity is measured: `labels` [N] are 1, 0 or -1, or None where there is no such column."""

    texts: list[str]
    sha256: str
    labels: NDArray[np.int8] | None


@dataclass
class _Evaluation:
    """One evaluation as one rank sees it."""

    config: EvaluateConfig
    team: Team
    stop: StopFlag
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def how(self) -> Decoding:
        c = self.config
        return Decoding(c.num_samples, c.max_new_tokens, c.temperature, c.top_p, c.seed, c.top_k)

    def run(self) -> dict[str, Any]:
        began = time.perf_counter()
        config = self.config
        check_writable(config.out)
        preprompt = None if config.preprompt is None else read_preprompt(config.preprompt)
        prompts, texts, tasks, scorer, baseline = self._inputs()
        source = ModelSource(config.model, config.revision, config.dtype)
        with self._timed("load"):
            loaded = load_for_use(source, self.team.world, config.intervention, sharding_options(config))
        prefix = None if preprompt is None else make_prefix(preprompt, loaded.tokenizer)
        results = self._about(loaded, preprompt)
        with loaded.intervened(config.strength):
            # the shortest first: what is wrong with a text shows before hours of generation
            if texts is not None:
                results["perplexity"] = self._perplexity(loaded, texts, prefix)
            journal = None if prompts is None else self._continue(loaded, prompts, prefix, preprompt)
            if tasks is not None:
                with self._timed("zero_shot"):
                    results["zero_shot"] = tasks.run(
                        loaded.model, loaded.tokenizer,
                        num_fewshot=config.num_fewshot, limit=config.limit, preprompt=preprompt,
                    )  # fmt: skip
        del loaded
        if not self.team.world.is_first:
            return {}
        if prompts is not None and journal is not None:
            assert scorer is not None
            with self._timed("scoring"):
                results["toxicity"] = score(prompts, journal, scorer, self.how)
            own = groups(prompts.toxicity)
            if baseline is not None:
                assert config.baseline is not None
                results["toxicity"]["baseline"] = against_baseline(baseline, results, config.baseline, own)
        results["seconds"] = {**self.seconds, "total": time.perf_counter() - began}
        results = {key: finite(value) for key, value in results.items()}
        write_results(config.out, results)
        _show(results, baseline, config)
        return results

    def _inputs(
        self,
    ) -> tuple[PromptFile | None, _Texts | None, ZeroShot | None, Scorer | None, dict[str, Any] | None]:
        """Everything that can be wrong before a weight is read; the scorer on the first rank alone, which uses it."""
        config = self.config
        prompts = scorer = texts = None
        if config.perplexity_texts:
            labels = [config.perplexity_labels] if config.perplexity_labels else []
            read = read_table(config.perplexity_texts, [config.text_column, *labels])
            labelled = parse_labels(read, labels)[:, 0] if labels else None
            texts = _Texts(check_texts(read, config.text_column), read.sha256, labelled)
        if config.toxicity_prompts:
            prompts = read_prompts(config.toxicity_prompts, config.prompt_column, config.prompt_toxicity_column)
        baseline = None if config.baseline is None else read_results(config.baseline)
        if baseline is not None and prompts is not None:
            assert config.baseline is not None
            check_same_prompts(baseline, {"toxicity": head(prompts, config.scorer, self.how)}, config.baseline)
        tasks = ZeroShot(config.tasks, config.tasks_path) if config.tasks else None
        if prompts is not None and self.team.world.is_first:
            scorer = load_scorer(config.scorer, config.toxic_label, self.team.world.device)
        return prompts, texts, tasks, scorer, baseline

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[part] = time.perf_counter() - start

    def _about(self, loaded: LoadedModel, preprompt: str | None) -> dict[str, Any]:
        """What was evaluated, and with what."""
        config, intervention = self.config, None
        if loaded.intervention is not None:
            intervention = {
                **loaded.intervention.meta,
                "directory": config.intervention,
                "digest": loaded.intervention.digest,
                "strength": config.strength,
            }
        return {
            "schema": SCHEMA,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "config": asdict(config),
            "versions": versions(),
            "model": {
                "name": config.model,
                "revision": config.revision,
                "dtype": config.dtype,
                "fingerprint": loaded.fingerprint,
            },
            "model_fingerprint": loaded.fingerprint,
            "intervention": intervention,
            "preprompt": preprompt,
        }

    def _perplexity(self, loaded: LoadedModel, texts: _Texts, prefix: Prefix | None) -> dict[str, Any]:
        config = self.config
        assert config.perplexity_texts is not None
        tokens = tokenize(
            texts.texts, loaded.tokenizer,
            max_tokens=config.max_tokens, skip_special=False, source=config.perplexity_texts,
        )  # fmt: skip
        tokens = tokens if prefix is None else prefix.before(tokens)
        check_positions(loaded.model.config, int(tokens.num_tokens.max()), "--max-tokens")
        check_vocabulary(loaded.model.config, tokens.largest_id)
        with self._timed("perplexity"):
            sums, counts = negative_log_likelihoods(
                loaded.model, tokens, config.tokens_per_batch, num_context=1 if prefix is None else len(prefix.ids)
            )
        measured = asdict(summary(sums, counts))
        about: dict[str, Any] = {"texts": config.perplexity_texts, "column": config.text_column, "sha256": texts.sha256}
        if texts.labels is not None:
            about |= {"labels": config.perplexity_labels, **both_sides(sums, counts, texts.labels)}
        return {**about, **measured}

    def _continue(
        self, loaded: LoadedModel, prompts: PromptFile, prefix: Prefix | None, preprompt: str | None
    ) -> Journal:
        """Make the continuations that are not there yet, by all ranks."""
        config, team = self.config, self.team
        tokenized = tokenize_prompts(
            prompts.texts, loaded.tokenizer, loaded.model.config, self.how, prefix=prefix, flag="--toxicity-prompts"
        )
        journal = Journal(config.out, settings_key(self._fixing(loaded, prompts, preprompt)))
        team.from_first("journal", lambda: _fold(journal))
        kept = journal.read().keys()
        wanted = [(p, s) for p in range(len(prompts.texts)) for s in range(config.num_samples)]
        missing = [pair for pair in wanted if pair not in kept]
        with self._timed("generation"):
            self._generate(loaded, tokenized, missing, journal)
        self.seconds["num_generated"] = len(missing)
        self.seconds["continuations_per_second"] = len(missing) / max(self.seconds["generation"], 1e-9)
        return journal

    def _generate(
        self,
        loaded: LoadedModel,
        prompts: TokenizedPrompts,
        missing: list[tuple[int, int]],
        journal: Journal,
    ) -> None:
        if not missing:
            return
        with self.stop.deferred(), journal.part(self.team.world.global_rank) as part:
            generate(
                loaded,
                prompts,
                missing,
                self.how,
                self.config.continuations_per_batch,
                self.team,
                self.stop,
                part.append,
            )

    def _fixing(self, loaded: LoadedModel, prompts: PromptFile, preprompt: str | None) -> dict[str, Any]:
        """Everything that a continuation depends on; how many there are of a prompt does not matter."""
        config, intervention = self.config, loaded.intervention
        return {
            "model": loaded.fingerprint,
            "dtype": config.dtype,
            "tokenizer": tokenizer_digest(loaded.tokenizer),
            "intervention": None if intervention is None else [intervention.digest, config.strength],
            "preprompt": preprompt,
            "prompts": prompts.sha256,
            **sampling_settings(self.how),
        }


def _fold(journal: Journal) -> int:
    kept, dropped = journal.fold()
    if kept:
        logger.info("%s: %d continuations are kept", journal.path.name, kept)
    if dropped:
        logger.info("%s: %d lines of other settings, or torn, are dropped", journal.path.name, dropped)
    return kept


def _show(results: dict[str, Any], baseline: dict[str, Any] | None, config: EvaluateConfig) -> None:
    """Warn of what is no number, and print the figures."""
    measured = results.get("perplexity")
    if measured is not None and measured["num_nonfinite"]:
        logger.warning(
            "the model's logits are NaN or infinite in %d of %d texts: their perplexity is null",
            measured["num_nonfinite"], measured["num_texts"],
        )  # fmt: skip
    elif measured is not None and None in (measured["token_weighted"], measured["mean_over_sentences"]):
        logger.warning("a perplexity is beyond what a float64 holds: null")
    shown = {} if baseline is None or config.baseline is None else {name_of(config.baseline): baseline}
    name = name_of(config.out)
    print(table({**shown, name if name not in shown else f"{name} (this)": results}))
    if measured is not None:
        print(f"{measured['num_texts']} texts, {measured['num_tokens']} tokens")
    logger.info("wrote %s", config.out)
