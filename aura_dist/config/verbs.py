"""The settings of every verb, as frozen dataclasses: the one place for names, types, defaults and help.

The command line is made from them, and a YAML file is checked against them (`settings.resolve`). Only stages, sweeps,
the demo and the command line read this module.
"""

from collections.abc import Mapping
from dataclasses import Field, dataclass, fields
from pkgutil import resolve_name
from typing import Annotated, Any, ClassVar, Literal

from msgspec import Meta

from aura_dist.config.options import (
    EXECUTION,
    STRENGTH,
    TRUST,
    Artifact,
    Column,
    Count,
    Data,
    DecodingOptions,
    Dir,
    Dtype,
    File,
    FittedOn,
    Form,
    GateKind,
    Kept,
    Launcher,
    LoadOptions,
    Method,
    Model,
    ModelOptions,
    Module,
    Name,
    NotNegative,
    Pooling,
    Positive,
    PositiveInt,
    Seed,
    ServerOptions,
    Sharding,
    Share,
    Size,
    SlurmOption,
    Statistic,
    Store,
    Strength,
    TextOptions,
)
from aura_dist.config.settings import Settings, flag, option
from aura_dist.errors import ConfigError

# settings of `collect` that texts without labels do not have
OF_LABELS = {"concepts", "threshold", "clean_negatives", "num_positive", "num_negative", "match_length", "seed"}


@dataclass(frozen=True, kw_only=True)
class CollectConfig(TextOptions, ModelOptions):
    """Run labelled text through the model and store every neuron's pooled response."""

    labels_needed: ClassVar[bool] = True  # unless `unlabelled`

    concepts: list[Column] = option(
        "data",
        "label columns: 0/1, true/false, or scores with --threshold",
        [],
        unset="required, unless --unlabelled",
        distinct=True,
    )
    unlabelled: bool = option(
        "data", "run all texts, without labels: to convert their responses, or for `fit --control`; not to score", False
    )
    modules: list[Module] = option(
        "sites", "kinds of modules, or name patterns; with ! in front: left out", ["mlp"], distinct=True
    )
    pooling: list[Kept] = option("sites", "how a text's tokens become a neuron's value", ["max"], distinct=True)
    keep_tokens: list[Module] = option(
        "sites",
        "modules, as for --modules, whose values are kept token by token beside the poolings",
        [],
        distinct=True,
    )
    overwrite: bool = option(EXECUTION, "delete a store that is already there", False)
    max_attempts: Count = option(EXECUTION, "stop once this many launches in all died in the same task; 0: never", 3)
    store: Store = option("output", "the store to write: a .zarr directory, or a URL such as s3://bucket/run.zarr")

    def __post_init__(self) -> None:
        """Refuse texts with neither concepts nor --unlabelled, or both; and modules for tokens where all are chosen."""
        super().__post_init__()
        if self.unlabelled:
            for spec in fields(self):
                if spec.name in OF_LABELS and self.is_set(spec):
                    raise ConfigError(
                        f"{flag(spec.name)}: expected it without --unlabelled, because all texts are run then, without "
                        "labels; leave one of the two out"
                    )
        elif self.labels_needed and not self.concepts:
            raise ConfigError(
                "--concepts: expected at least one value, got none; name the label columns, or collect texts without "
                "labels with --unlabelled"
            )
        resolve_name("aura_dist.sites.pooling:check_kept")(self.pooling, self.keep_tokens)


@dataclass(frozen=True, kw_only=True)
class PlanConfig(CollectConfig):
    """Say what a collection takes, in bytes and seconds, and refuse what cannot fit; reads no weights."""

    labels_needed: ClassVar[bool] = False

    data: Data = option("data", "labelled text", "", unset="--num-positive + --num-negative texts of --max-tokens each")
    concepts: list[Column] = option(
        "data", "label columns", [], unset="none; plans for the longest rows", distinct=True
    )
    world_size: PositiveInt = option("machine", "ranks of the launch", 1)
    ranks_per_host: PositiveInt | None = option("machine", "ranks that share a machine", None, unset="all, at most 8")
    device_memory: Size | None = option("machine", "memory of one GPU, such as 80GB; then the plan is for GPUs", None)
    host_memory: Size | None = option("machine", "memory of one machine, such as 512GB", None)
    tflops: Annotated[float, Meta(gt=0.0)] | None = option(
        "machine", "sustained TFLOP/s of one rank", None, unset="120 on a GPU in 16 bits, 12 in float32; 0.15 on a CPU"
    )
    disk_rate: Size | None = option("machine", "read from the disk in a second, such as 5GB", None, unset="2GB")
    copy_rate: Size | None = option(
        "machine", "copied in a second from the memory of the machine to a GPU, such as 50GB", None, unset="20GB"
    )
    json: bool = option("output", "print JSON instead of tables", False)
    store: Store = option("output", "the store that would be written (not touched)", "")


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(Settings):
    """Compute every statistic of every neuron of a store, out of core."""

    store: Store = option("data", "the store that `collect` wrote")
    partial: bool = option("data", "score the rows that are there, if the store is not finished", False)
    pooling: list[Pooling] = option(
        "neurons", "poolings to score; one that the store lacks is made from its tokens", [], unset="all of the store",
        distinct=True,
    )  # fmt: skip
    statistics: list[Statistic] = option("neurons", "statistics to compute", [], unset="all", distinct=True)
    dask: Annotated[str, Meta(title="threads|processes|slurm|tcp://HOST:PORT")] = option(
        EXECUTION, "where the work runs; an address is one of a cluster that runs already", "threads"
    )
    num_workers: PositiveInt | None = option(EXECUTION, "number of workers", None, unset="one a core; 2 under slurm")
    memory_limit: Size = option(EXECUTION, "memory per worker", "4GB")
    overwrite: bool = option(EXECUTION, "delete scores that are already there, damaged ones too", False)
    slurm: dict[SlurmOption, Any] = option(
        EXECUTION, "options of dask-jobqueue's SLURMCluster, such as queue=main cores=2; in a file, keys and values", {}
    )

    def __post_init__(self) -> None:
        """Refuse Slurm's options elsewhere."""
        super().__post_init__()
        if self.slurm and self.dask != "slurm":
            raise ConfigError(f"--slurm: expected with --dask slurm, got --dask {self.dask}; leave it out")


@dataclass(frozen=True, kw_only=True)
class FitOptions(Settings):
    """Which method, on which units, and where its intervention goes."""

    sequential: bool = option(
        "intervention", "fit each layer on responses under the maps of the layers before it, in one pass of the model",
        False,
    )  # fmt: skip
    concept: Column = option("data", "concept to whisper down")
    pooling: Pooling | None = option("neurons", "pooling whose scores are used", None, unset="the method's own")
    modules: list[Module] = option(
        "neurons", "modules, as for `collect --modules`", [], unset="all of the store; mlp with --sequential"
    )
    top_k: PositiveInt | None = option(
        "neurons", "only the k units of highest AUROC", None, unset="all, or all above 1/2, as the method does"
    )
    max_q: Share | None = option("neurons", "only units whose q-value (false discovery rate) is at most this", None)
    method: Method = option("intervention", "how a unit's statistics become its map", "aura")
    alpha: Share = option("intervention", "damp: scale of the selected units", 0.5)
    kp: float = option("intervention", "pid-act: gain of the layer's own difference", 1.0)
    ki: float = option("intervention", "pid-act: gain of the sum over the layers before it", 0.1)
    kd: float = option("intervention", "pid-act: gain of the change since the layer before it", 0.1)
    texts_per_class: PositiveInt = option("training", "lineas: texts with the concept, and as many without it", 32)
    steps: Count = option("training", "lineas: steps of gradient descent", 1000)
    learning_rate: Positive = option("training", "lineas: largest learning rate; it falls to 0", 0.1)
    sparsity: NotNegative = option("training", "lineas: weight of the sum of |ω − 1| and |b|", 0.0)
    group_sparsity: NotNegative = option("training", "lineas: weight of the group lasso; a group is a site", 0.0)
    fit_seed: Seed = option("training", "lineas: seed of the choice of texts", 0)
    recompute: bool = option("training", "lineas: compute layers twice, to hold the input of each alone", False)
    strength: Strength = option("intervention", STRENGTH, 1.0, again_in=("model", "generate", "evaluate", "export"))
    onto: Dir | None = option("intervention", "intervention that was on while collecting; the result does both", None)
    out: Dir = option("output", "directory to write the intervention to", empty_text=True)

    def __post_init__(self) -> None:
        """Refuse an option that the method does not read."""
        super().__post_init__()
        resolve_name("aura_dist.interventions.methods:settle_options")(self.method, self.options)

    @property
    def options(self) -> dict[str, Any]:
        """Options of methods that were set: name → value."""
        known = resolve_name("aura_dist.interventions.methods:method_options")()
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name in known and self.is_set(f)}


@dataclass(frozen=True, kw_only=True)
class FitConfig(FitOptions):
    """Turn scores into an intervention."""

    store: Store = option("data", "a store that has been scored")
    control: Store | None = option("data", "store of texts that must stay as they are: negatives of the gate", None)
    gate: GateKind = option("intervention", "where the map acts", "none")
    sharding: Annotated[str, Meta(title="replicate|fsdp")] = option(
        EXECUTION, "lineas: the whole model on each process, or its weights split over all of them", "replicate"
    )
    gate_pooling: FittedOn | None = option(
        "intervention", "tokens: the responses that the regression is fitted on", None, unset="mean"
    )
    gate_threshold: float | None = option(
        "intervention", "logit at which a gate is half open", None,
        unset="units: 0; tokens: in each module, so that 1 % of tokens of --control exceed it, or of texts without the "
        "concept; runs the model",
    )  # fmt: skip
    gate_sharpness: Annotated[float, Meta(gt=0.0)] | None = option(
        "intervention", "what a gate's logit is multiplied by about its threshold", None,
        unset="1; tokens without --gate-threshold: so that their mean gate is 2 % at most at the tokens that give it",
    )  # fmt: skip
    gate_min_accuracy: Share | None = option(
        "intervention", "tokens: leave out modules whose regression tells a smaller share of held-out texts", None,
        unset="three standard errors above chance",
    )  # fmt: skip

    @property
    def gate_fit(self) -> Any:
        """Which gate to fit, an `interventions.gates.GateFit`; None without one."""
        names = ("control", "gate_pooling", "gate_threshold", "gate_sharpness", "gate_min_accuracy")
        given = {name: getattr(self, name) for name in names}
        return resolve_name("aura_dist.interventions.gates:settle_gate")(self.gate, given)

    def __post_init__(self) -> None:
        """Refuse an option that the gate does not read, and what only the command line can turn into another verb."""
        super().__post_init__()
        gate = self.gate_fit
        resolve_name("aura_dist.interventions.methods:check_sharding")(self.method, self.sharding)
        if gate is not None and gate.runs_model and self.sharding != "replicate":
            raise ConfigError(
                f"--sharding: expected replicate with --gate {self.gate} without --gate-threshold, because the whole "
                f"model finds the threshold, got {self.sharding}; give --gate-threshold, or leave it out"
            )
        if self.sequential:
            raise ConfigError("--sequential: expected it with a model and its data, got it with a store; leave it out")


@dataclass(frozen=True, kw_only=True)
class SequentialConfig(FitOptions, TextOptions, LoadOptions):
    """Fit each layer on responses under the maps of the layers before it, in one pass of the model, without a store."""

    sharding: Sharding = option(EXECUTION, "how the model is spread over processes: layers alone", "layers")
    modules: list[Module] = option(
        "sites", "kinds of modules, or name patterns; with ! in front: left out", ["mlp"], distinct=True
    )

    def __post_init__(self) -> None:
        """Refuse a strategy, a method or a quantisation that does not go layer by layer."""
        if self.quantization is not None:
            raise ConfigError(
                "--quantization: expected it without --sequential, because layers are read from the checkpoint one by "
                f"one, as they are, got {self.quantization}; leave it out, or fit from a store"
            )
        super().__post_init__()
        if self.sharding != "layers" or self.wave_tokens is not None:
            name, got = ("wave_tokens", self.wave_tokens) if self.sharding == "layers" else ("sharding", self.sharding)
            raise ConfigError(
                f"--{name.replace('_', '-')}: expected --sharding layers with all texts in one wave, because "
                f"--sequential fits a layer on all texts before any goes on, got {got}; leave it out"
            )
        resolve_name("aura_dist.interventions.methods:check_sequential")(self.method)

    @property
    def concepts(self) -> list[str]:
        return [self.concept]


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(ModelOptions, DecodingOptions, ServerOptions):
    """Continue prompts, with and without an intervention side by side."""

    prompt: list[str] = option("data", "one or more prompts", empty_text=True)

    def __post_init__(self) -> None:
        """Refuse a strategy that cannot continue texts."""
        super().__post_init__()
        resolve_name("aura_dist.models.strategies.table:check_generates")(self)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(ModelOptions, DecodingOptions, ServerOptions):
    """Measure a model, with or without an intervention: toxicity, perplexity, zero-shot tasks, or several of these."""

    toxicity_prompts: File | None = option(
        "toxicity", "prompts to continue and score: RealToxicityPrompts' .jsonl, or a table of texts", None
    )
    prompt_column: Column | None = option(
        "toxicity", "column of the prompts", None, unset="prompt.text, prompt or text", needs="toxicity_prompts"
    )
    prompt_toxicity_column: Column | None = option(
        "toxicity", "column of the prompts' own toxicity", None,
        unset="prompt.toxicity or toxicity, where there is one", needs="toxicity_prompts",
    )  # fmt: skip
    num_samples: PositiveInt = option("decoding", "continuations per prompt", 25)
    continuations_per_batch: PositiveInt = option(EXECUTION, "continuations in one forward; changes no result", 128)
    scorer: Annotated[str, Meta(title="PATH|NAME|profanity-check|tox-block")] = option(
        "toxicity", "classifier of toxic texts, or a packaged one: profanity-check, tox-block",
        "s-nlp/roberta_toxicity_classifier",
    )  # fmt: skip
    more_scorers: list[Annotated[str, Meta(title="PATH|NAME|profanity-check|tox-block")]] = option(
        "toxicity", "further classifiers that judge the same continuations", [], distinct=True,
        needs="toxicity_prompts",
    )  # fmt: skip
    toxic_label: str | None = option(
        "toxicity", "the scorer's label that means toxic", None, unset="the one called toxic", needs="toxicity_prompts"
    )
    baseline: File | None = option(
        "toxicity", "results of another evaluation of the same prompts, to compare with", None, needs="toxicity_prompts"
    )
    perplexity_texts: File | None = option("perplexity", "texts whose perplexity is measured", None)
    perplexity_labels: Column | None = option(
        "perplexity", "0/1 column of the texts: perplexity of each class too", None, needs="perplexity_texts"
    )
    text_column: Column = option("perplexity", "column that holds the text", "text")
    max_tokens: PositiveInt = option("perplexity", "tokens per text; longer texts are cut", 128)
    tokens_per_batch: PositiveInt = option("perplexity", "upper bound on padded tokens in one forward", 2048)
    side_effects: bool = option(
        "perplexity", "what else the intervention changes in these texts, and in the baseline's continuations", False,
        needs="perplexity_texts",
    )  # fmt: skip
    tasks: list[str] = option("tasks", "zero-shot tasks, groups or tags of lm-eval", [], distinct=True)
    tasks_path: Dir | None = option("tasks", "directory of YAML tasks of your own", None, needs="tasks")
    num_fewshot: Count | None = option("tasks", "examples in a context", None, unset="the task's own", needs="tasks")
    limit: PositiveInt | None = option("tasks", "only the first examples of each task", None, needs="tasks")
    out: File = option("output", "JSON file to write the results to; continuations go beside it")

    def __post_init__(self) -> None:
        """Refuse to measure nothing."""
        if not (self.toxicity_prompts or self.perplexity_texts or self.tasks):
            raise ConfigError("expected at least one of --toxicity-prompts, --perplexity-texts and --tasks, got none")
        if self.chat and not (self.toxicity_prompts or self.tasks):
            raise ConfigError(
                "--chat: expected it with --toxicity-prompts or --tasks, got --perplexity-texts alone, which are "
                "measured as plain texts; leave it out"
            )
        if self.scorer in self.more_scorers:
            raise ConfigError(f"--more-scorers: expected classifiers beside --scorer, got {self.scorer!r} in both")
        super().__post_init__()
        if self.toxicity_prompts:
            resolve_name("aura_dist.models.strategies.table:check_generates")(self)
        if self.side_effects:
            self._check_side_effects()

    def _check_side_effects(self) -> None:
        """Refuse side effects of nothing, and where the model cannot be read with and without the intervention."""
        if self.intervention is None:
            raise ConfigError("--side-effects: expected it with --intervention, got none; name one, or leave it out")
        strategy = resolve_name("aura_dist.models.strategies.table:sharding_of")(self).strategy
        if self.server is not None or not strategy.generates:
            raise ConfigError(
                "--side-effects: expected a model in memory, because each batch is read with and without the "
                f"intervention, got {'--server' if self.server is not None else f'--sharding {strategy.name}'}; leave "
                "one of them out"
            )

    @property
    def kept_by_servers(self) -> frozenset[str]:
        """The scorer of continuations runs here."""
        return super().kept_by_servers | ({"device"} if self.toxicity_prompts else set())


@dataclass(frozen=True, kw_only=True)
class ExportConfig(Settings):
    """Fold an intervention into a copy of a checkpoint, which any loader then serves at full speed."""

    model: Model = option("model", "local directory, or Hugging Face hub name")
    revision: Name | None = option("model", "revision of a hub model", None, unset="the hub's main one")
    trust_remote_code: bool = option("model", TRUST, False)
    intervention: Artifact = option("intervention", "intervention directory written by `fit`")
    strength: Strength = option("intervention", STRENGTH, 1.0)
    dtype: Literal["keep", "float32"] = option("output", "dtype of the written weights", "keep")
    out: Dir = option("output", "directory to write the checkpoint to; it must not exist yet")


@dataclass(frozen=True, kw_only=True)
class ConvertConfig(Settings):
    """Write the responses of a store in a form that other tools read, or renew a store of an earlier version."""

    store: Store = option("data", "store that `collect` wrote; finished, unless it is renewed as a store")
    to: Form = option("output", "the form to write")
    modules: list[Module] = option("sites", "modules, as for `collect --modules`", [], unset="all of the store")
    pooling: list[Kept] = option(
        "sites", "poolings, or tokens", [], unset="all poolings; tokens where there are no others", distinct=True
    )
    context: PositiveInt | None = option(
        "output", "saelens: tokens of a row; texts follow one another", None, unset="the store's --max-tokens"
    )
    out: Dir = option("output", "directory to write; it must not exist yet")

    def __post_init__(self) -> None:
        """Refuse to choose parts where all are taken, and an option that the form does not read."""
        super().__post_init__()
        forms = resolve_name("aura_dist.store.conversion:FORMS")
        if self.context is not None and not forms[self.to].contexts:
            raise ConfigError(f"--context: expected with --to saelens, got --to {self.to}; leave it out")
        given = [flag(name) for name in ("modules", "pooling") if getattr(self, name)]
        if given and forms[self.to].whole:
            raise ConfigError(
                f"{given[0]}: expected none with --to {self.to}, which takes all of a store; leave it out"
            )


@dataclass(frozen=True, kw_only=True)
class DemoConfig(Settings):
    """The whole pipeline on a small model and a bundled data set, in a few minutes."""

    model: Model | None = option("model", "a model of your own", None, unset="Gemma 3 270M from the package index")
    dtype: Dtype = option("model", "dtype of weights and activations", "float32")
    data: Data | None = option("data", "labelled text of your own", None, unset="the bundled sentences")
    text_column: Column = option("data", "column that holds the text", "text")
    concept: Column = option("data", "label column", "toxic")
    modules: list[Module] = option("sites", "kinds of modules, or name patterns; with ! in front: left out", ["mlp"])
    overwrite: bool = option(EXECUTION, "delete the store of an earlier run that is already there", False)
    out: Dir = option("output", "run directory to write", "runs/demo")


@dataclass(frozen=True, kw_only=True)
class ReportConfig(Settings):
    """Write one page over run directories: what was run, which neurons, what it changed."""

    run_dirs: list[str] = option("data", "run directories", distinct=True, place="RUN_DIR")
    expert_auroc: Annotated[float, Meta(ge=0.5, lt=1.0)] = option("page", "an expert has an AUROC above this", 0.7)
    expert_q: Share = option("page", "an expert has a q-value of at most this, if the store has q-values", 0.05)
    num_neurons: PositiveInt = option("page", "rows of the tables of best neurons", 25)
    num_prompts: PositiveInt = option("page", "prompts whose continuations are shown", 20)
    out: File = option("output", "HTML file to write; its pictures go into a folder beside it")


@dataclass(frozen=True, kw_only=True)
class StatusConfig(Settings):
    """Say what of a run is done, failed and left, from its files alone."""

    run_dir: str = option("data", "a run directory, or a directory of many", place="RUN_DIR")


@dataclass(frozen=True, kw_only=True)
class SweepConfig(Settings):
    """Run a grid of settings, every collection, scoring and fit once, on this machine or on Slurm."""

    grid: Any = option("data", "setting → values, or a list of such grids; see configs/sweep-*.yaml", file_only=True)
    launcher: Launcher = option(EXECUTION, "where the jobs run", "local")
    jobs: PositiveInt = option(EXECUTION, "local: jobs that run at the same time; they share the GPUs", 1)
    ranks: PositiveInt = option(EXECUTION, "local: processes of a collection or an evaluation, started by torchrun", 1)
    resources: dict[str, Any] = option(
        EXECUTION, "slurm: submitit's parameters, such as timeout_min=60; in a file, a stage's own under its name", {}
    )
    retries: Count = option(EXECUTION, "how often a job that failed is tried again", 2)
    out: Dir = option("output", "directory of the sweep, on a file system that all its machines see")
    dry_run: bool = option("output", "print cells, jobs and what they cost, and run nothing", False)


@dataclass(frozen=True)
class Verb:
    """One command: its settings, and flags as an example; `run(config)` of the module `aura_dist.STAGE` does the work.

    The section of a settings file that belongs to the verb `inherits` counts for this one too, below its own.
    A verb that `takes_file` is called `run(config, document)`, with all that the file says.
    """

    config: type[Settings]
    stage: str
    example: str
    inherits: str | None = None
    takes_file: bool = False
    # of what it inherits, settings that mean something else here
    not_inherited: frozenset[str] = frozenset()
    # settings that it takes from its own section alone: on top of a file they are for other verbs
    unshared: frozenset[str] = frozenset()
    # a setting that turns the verb, where it is true, into another one: its name, and that verb
    other: "tuple[str, Verb] | None" = None

    @property
    def summary(self) -> str:
        return (self.config.__doc__ or "").strip()

    @property
    def settings(self) -> dict[str, "Field[Any]"]:
        """All settings that the verb or the other one has, by name."""
        own = {spec.name: spec for spec in fields(self.config)}
        return own if self.other is None else {**self.other[1].settings, **own}

    def chosen(self, given: Mapping[str, Any]) -> "Verb":
        """This verb, or the other one if its setting is true among those that are given."""
        if self.other is None or str(given.get(self.other[0])).lower() not in ("true", "1"):  # as settings are read
            return self
        return self.other[1]


_COLLECTED = "--model openai-community/gpt2 --data comments.csv --concepts toxic --store runs/gpt2/store.zarr"
_TEXTS = "--model openai-community/gpt2 --data comments.csv --out runs/gpt2/sequential"
_FITTED = "--model openai-community/gpt2 --intervention runs/gpt2/aura"
_PLANNED = "--config configs/falcon-40b.yaml --world-size 8 --device-memory 80GB"
VERBS: dict[str, Verb] = {
    "plan": Verb(PlanConfig, "stages.plan", _PLANNED, inherits="collect"),
    "collect": Verb(CollectConfig, "stages.collect", _COLLECTED),
    "score": Verb(ScoreConfig, "stages.score", "--store runs/gpt2/store.zarr"),
    "fit": Verb(
        FitConfig,
        "stages.fit",
        "--store runs/gpt2/store.zarr --concept toxic --out runs/gpt2/aura",
        unshared=frozenset({"sharding"}),
        other=(
            "sequential",
            Verb(
                SequentialConfig,
                "stages.sequential",
                f"--sequential --method linear-act --concept toxic {_TEXTS}",
                inherits="collect",
                not_inherited=frozenset({"pooling", "strength"}),
            ),
        ),
    ),
    "generate": Verb(GenerateConfig, "stages.generate", f"{_FITTED} --prompt 'You are such a'"),
    "evaluate": Verb(
        EvaluateConfig, "stages.evaluate", f"{_FITTED} --perplexity-texts texts.csv --out runs/gpt2/aura.json"
    ),
    "export": Verb(ExportConfig, "stages.export", f"{_FITTED} --out gpt2-whispered"),
    "convert": Verb(ConvertConfig, "stages.convert", "--store runs/gpt2/store.zarr --to datasets --out runs/gpt2/data"),
    "report": Verb(ReportConfig, "stages.report", "runs/gpt2 --out runs/gpt2/report.html"),
    "status": Verb(StatusConfig, "stages.status", "runs/gpt2"),
    "sweep": Verb(SweepConfig, "stages.sweep", "--config configs/sweep-gemma.yaml --dry-run", takes_file=True),
    "demo": Verb(DemoConfig, "demo.demo", "--out runs/demo"),
}


def execution_settings() -> frozenset[str]:
    """Names of the settings that say how a stage is run, not what it computes."""
    return frozenset(f.name for v in VERBS.values() for f in fields(v.config) if f.metadata["group"] == EXECUTION)
