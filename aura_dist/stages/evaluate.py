"""evaluate: toxicity, perplexity and zero-shot tasks of a model, with or without an intervention, as a JSON file.

Data flow: all inputs are read and checked before the model is loaded or a server is started → the ranks share the
texts of perplexity, the continuations (each kept in a file as soon as it is made, so that an interrupted run continues)
and the tasks → rank 0 scores the continuations, draws the intervals and writes `--out`. What the file holds:
`aura_dist.evaluation.results`.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from aura_dist.config.settings import flag
from aura_dist.config.verbs import EvaluateConfig
from aura_dist.evaluation.client import Client, without_user
from aura_dist.evaluation.compare import against_baseline, check_same_prompts, name_of, table
from aura_dist.evaluation.engines import Asked, Engine, InProcess
from aura_dist.evaluation.figures import groups
from aura_dist.evaluation.journal import Journal, fixing_settings, journal_path, settings_key
from aura_dist.evaluation.perplexity import TextFile, read_texts, section, tokenize_texts
from aura_dist.evaluation.prompts import (
    Prefix,
    PromptFile,
    TokenizedPrompts,
    chat_of_prompts,
    make_prefix,
    read_preprompt,
    read_prompts,
    tokenize_prompts,
)
from aura_dist.evaluation.results import (
    SCHEMA,
    check_spares,
    check_writable,
    finite,
    read_results,
    versions,
    write_results,
)
from aura_dist.evaluation.sampling import Decoding
from aura_dist.evaluation.scorers import Scorer, head, load_scorer, score
from aura_dist.evaluation.server import Expected, check_one_process, find_server, read_expected
from aura_dist.evaluation.side_effects import measure, nontoxic_continuations
from aura_dist.evaluation.zero_shot import ZeroShot
from aura_dist.interventions.use import load_for_use
from aura_dist.models.hub import downloaded
from aura_dist.models.load import source_of
from aura_dist.models.strategies.table import sharding_of
from aura_dist.planning.shortage import HOLDS, explained, smaller
from aura_dist.ranks.device import pick_device
from aura_dist.ranks.launch import start_team
from aura_dist.ranks.process import configure_rank, server_key
from aura_dist.ranks.signals import StopFlag
from aura_dist.ranks.team import Team
from aura_dist.serving.start import running, started_by
from aura_dist.text.chat import Chat
from aura_dist.text.tokens import TokenizedTexts

logger = logging.getLogger(__name__)


def run(config: EvaluateConfig) -> dict[str, Any]:
    """Measure, write `config.out`, and return what was written; other ranks than the first return nothing."""
    with StopFlag() as stop, start_team(sharding_of(config), pick_device(config.device)) as team:
        configure_rank(team.world.global_rank, team.world.layout.world_size)
        how = Decoding(
            config.num_samples, config.max_new_tokens, config.temperature, config.top_p, config.seed, config.top_tokens
        )
        return _Evaluation(config, how, team, stop).run()


@dataclass(frozen=True)
class _Inputs:
    """Everything that is read before the weights; the scorers on rank 0 alone, which uses them."""

    preprompt: str | None
    prompts: PromptFile | None
    texts: TextFile | None
    tasks: ZeroShot | None
    baseline: dict[str, Any] | None
    scorers: tuple[Scorer, ...]


def _read_inputs(config: EvaluateConfig, how: Decoding, team: Team) -> _Inputs:
    """Read and check everything but the model; files of texts and prompts once a host."""
    given = ("toxicity_prompts", "perplexity_texts", "baseline", "preprompt", "tensor_plan")
    check_spares(config.out, {flag(name): getattr(config, name) for name in given}, journal_path(config.out))
    check_writable(config.out)
    preprompt = None if config.preprompt is None else read_preprompt(config.preprompt)
    texts, prompts = team.once_a_host("data", lambda: _read_data(config))
    baseline, scorers = None, []
    if prompts is not None and config.baseline is not None:
        baseline = read_results(config.baseline)
        check_same_prompts(baseline, {"toxicity": head(prompts, config.scorer, how, chat=config.chat)}, config.baseline)
    trusted = config.trust_remote_code
    tasks = ZeroShot(config.tasks, config.tasks_path, trust_code=trusted) if config.tasks else None
    if prompts is not None and team.world.is_first:
        labels = {config.scorer: config.toxic_label, **dict.fromkeys(config.more_scorers)}
        scorers = [load_scorer(n, label, team.world.device, trust_code=trusted) for n, label in labels.items()]
    return _Inputs(preprompt, prompts, texts, tasks, baseline, tuple(scorers))


def _read_data(config: EvaluateConfig) -> tuple[TextFile | None, PromptFile | None]:
    texts = prompts = None
    if config.perplexity_texts:
        texts = read_texts(config.perplexity_texts, config.text_column, config.perplexity_labels)
    if config.toxicity_prompts:
        prompts = read_prompts(config.toxicity_prompts, config.prompt_column, config.prompt_toxicity_column)
    return texts, prompts


@dataclass
class _Evaluation:
    """One evaluation as one rank sees it; `seconds` by part."""

    config: EvaluateConfig
    how: Decoding
    team: Team
    stop: StopFlag
    seconds: dict[str, float] = field(default_factory=dict)

    def run(self) -> dict[str, Any]:
        began, first = time.perf_counter(), self.team.world.is_first
        inputs = _read_inputs(self.config, self.how, self.team)
        results, journal = self._measure(inputs)
        if not first:
            return {}
        if inputs.prompts is not None:
            assert journal is not None
            results["toxicity"] = self._toxicity(inputs, inputs.prompts, journal, results)
        results["seconds"] = {**self.seconds, "total": time.perf_counter() - began}
        results = {key: finite(value) for key, value in results.items()}
        write_results(self.config.out, results)
        _show(results, inputs.baseline, self.config)
        return results

    def _measure(self, inputs: _Inputs) -> tuple[dict[str, Any], Journal | None]:
        """Measure what needs the model; it is freed on return, before rank 0 scores."""
        config, team, prefix, journal = self.config, self.team, None, None
        with ExitStack() as opened:
            with self._timed("load"):
                model = self._model()
            if inputs.preprompt is not None:
                prefix = make_prefix(inputs.preprompt, model.tokenizer)
            chat = chat_of_prompts(model.tokenizer, inputs.preprompt) if config.chat else None
            tokens = None if inputs.texts is None else self._tokens(model, inputs.texts, prefix)
            prompts = None if inputs.prompts is None else self._tokenized(model, inputs.prompts, prefix, chat)
            with self._timed("load"):
                engine = model if isinstance(model, InProcess) else self._server(model, opened)
            results = _about(config, engine, inputs.preprompt, chat)
            if config.side_effects and tokens is not None:
                results["side_effects"] = self._side_effects(engine, inputs, tokens, prefix, prompts)
            opened.enter_context(engine.acting())
            # the shortest first, so that an error in a text shows before hours of generation
            if inputs.texts is not None and tokens is not None:
                results["perplexity"] = self._perplexity(engine, inputs.texts, tokens, prefix)
            if inputs.prompts is not None and prompts is not None:
                journal = self._continue(engine, inputs.prompts, prompts, inputs.preprompt, chat)
            if inputs.tasks is not None:
                with self._timed("zero_shot"):
                    results["zero_shot"] = inputs.tasks.run(
                        engine.harness(inputs.preprompt, chat), team=team,
                        num_fewshot=config.num_fewshot, limit=config.limit, preprompt=inputs.preprompt, chat=chat,
                    )  # fmt: skip
        return results, journal

    def _model(self) -> InProcess | Expected:
        """The model in this process, or what a server is to serve."""
        config, team, stop, source = self.config, self.team, self.stop, source_of(self.config)
        if config.server is not None:
            check_one_process(team)
            return read_expected(source, config.intervention, config.strength)
        with downloaded(team, source), explained("loading", team.world.device, lambda: HOLDS):
            loaded = load_for_use(source, team, config.intervention, sharding_of(config).options)
        limit, rows = config.tokens_per_batch, config.continuations_per_batch
        return InProcess(loaded, config.dtype, config.strength, team, stop, limit, rows)

    def _server(self, expected: Expected, opened: ExitStack) -> Engine:
        """The server, started where `--server` is a command; `opened` closes its connections and ends it."""
        config, stop = self.config, self.stop
        assert config.server is not None
        log = Path(config.out).with_name(f"{Path(config.out).stem}-server.log")
        url = opened.enter_context(running(config.server, config.model, config.intervention, config.strength, log))
        client = opened.enter_context(Client(url, config.requests_in_flight, server_key()))
        return find_server(
            client, expected, config.server_model,
            chat=config.chat, received=lambda: stop.received, command=started_by(config.server),
        )  # fmt: skip

    def _tokens(self, model: InProcess | Expected, texts: TextFile, prefix: Prefix | None) -> TokenizedTexts:
        return self.team.once_a_host(
            "tokens of texts",
            lambda: tokenize_texts(texts, model.tokenizer, model.config, prefix, self.config.max_tokens),
        )

    def _tokenized(
        self, model: InProcess | Expected, prompts: PromptFile, prefix: Prefix | None, chat: Chat | None
    ) -> TokenizedPrompts:
        return self.team.once_a_host(
            "tokens of prompts",
            lambda: tokenize_prompts(
                prompts.texts, model.tokenizer, model.config, self.how,
                prefix=prefix, chat=chat, flag="--toxicity-prompts",
            ),
        )  # fmt: skip

    def _perplexity(
        self, engine: Engine, texts: TextFile, tokens: TokenizedTexts, prefix: Prefix | None
    ) -> dict[str, Any]:
        with self._reading("perplexity"):
            sums, counts = engine.losses(tokens, 1 if prefix is None else prefix.num_context)
        return section(texts, sums, counts)

    def _side_effects(
        self,
        engine: Engine,
        inputs: _Inputs,
        tokens: TokenizedTexts,
        prefix: Prefix | None,
        prompts: TokenizedPrompts | None,
    ) -> dict[str, Any]:
        """What the intervention changes where it should not; it does not act yet."""
        assert isinstance(engine, InProcess), "the settings allow no server"
        loaded, path = engine.loaded, self.config.baseline
        continued = None
        if inputs.baseline is not None and path is not None and prompts is not None:
            continued = nontoxic_continuations(path, inputs.baseline, loaded.fingerprint, prompts)
        with self._reading("side_effects"):
            return measure(
                loaded, self.config.strength, tokens, 1 if prefix is None else prefix.num_context, continued,
                self.config.tokens_per_batch, self.team, lambda: self.stop.received,
            )  # fmt: skip

    @contextmanager
    def _reading(self, part: str) -> Iterator[None]:
        """Context of forwards of whole texts."""
        limit = self.config.tokens_per_batch
        tight = explained(part, self.team.world.device, lambda: smaller("--tokens-per-batch", limit))
        with self._timed(part), self.stop.deferred(), tight:
            yield

    def _toxicity(
        self, inputs: _Inputs, prompts: PromptFile, journal: Journal, results: dict[str, Any]
    ) -> dict[str, Any]:
        """Score and measure the continuations, and compare them with the baseline's."""
        with self._timed("scoring"):
            section = score(prompts, journal, inputs.scorers, self.how, chat=self.config.chat)
        if inputs.baseline is not None and self.config.baseline is not None:
            everything = {**results, "toxicity": section}
            own = groups(prompts.toxicity)
            section["baseline"] = against_baseline(inputs.baseline, everything, self.config.baseline, own)
        return section

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start

    def _continue(
        self,
        engine: Engine,
        prompts: PromptFile,
        tokenized: TokenizedPrompts,
        preprompt: str | None,
        chat: Chat | None,
    ) -> Journal:
        """Make the missing continuations, by all ranks."""
        config, team, how = self.config, self.team, self.how
        journal = Journal(
            config.out, settings_key(fixing_settings(engine.fixing(), preprompt, prompts, tokenized, how))
        )
        team.from_first("journal", lambda: _fold(journal))
        kept = journal.read().keys()
        missing = [(p, s) for p in range(len(prompts.texts)) for s in range(how.num_samples) if (p, s) not in kept]
        with self._timed("generation"):
            if missing:
                rows = config.continuations_per_batch
                tight = explained("continuing", team.world.device, lambda: smaller("--continuations-per-batch", rows))
                with self.stop.deferred(), tight, journal.part(team.world.global_rank) as append:
                    engine.continue_pairs(Asked(tokenized, prompts.texts, chat), missing, how, append)
        self.seconds["num_generated"] = len(missing)
        self.seconds["continuations_per_second"] = len(missing) / max(self.seconds["generation"], 1e-9)
        return journal


def _about(config: EvaluateConfig, engine: Engine, preprompt: str | None, chat: Chat | None) -> dict[str, Any]:
    """What was evaluated, and with what."""
    intervention = None
    if engine.intervention is not None:
        own = {"directory": config.intervention, "digest": engine.intervention.digest, "strength": config.strength}
        intervention = {**engine.intervention.meta, **own}
    engine_says = engine.about()
    named = {"name": config.model, "revision": config.revision, **engine_says.pop("model")}
    return {
        "schema": SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "config": {**asdict(config), "server": config.server and without_user(config.server)},
        "versions": versions(),
        "model": named,
        **engine_says,
        "intervention": intervention,
        "preprompt": preprompt,
        **({} if chat is None else {"chat": chat.identity}),
    }


def _fold(journal: Journal) -> int:
    kept, dropped = journal.fold()
    if kept:
        logger.info("%s: %d continuations are kept", journal.path.name, kept)
    if dropped:
        logger.warning(
            "%s: %d lines of other settings, of an earlier version, or incomplete, are made again",
            journal.path.name, dropped,
        )  # fmt: skip
    return kept


def _show(results: dict[str, Any], baseline: dict[str, Any] | None, config: EvaluateConfig) -> None:
    """Warn of perplexities that are not finite, and print the figures."""
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
