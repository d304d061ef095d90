"""The settings of every verb, as frozen dataclasses: the one place where names, types, defaults and help stand.

The command line is generated from them and a YAML file is checked against them (`settings.resolve`). Only the
stages and the command line read this module.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from msgspec import Meta

from aura_dist.config.settings import flag, option
from aura_dist.errors import ConfigError

Dtype = Literal["float32", "bfloat16", "float16"]
Pooling = Literal["max", "mean", "min", "last", "absmax"]
Method = Literal["aura", "damp", "det0", "mean-act", "linear-act"]
# dask-jobqueue's SLURMCluster takes these; see its documentation
SlurmOption = Literal[
    "queue", "account", "walltime", "cores", "memory", "processes", "interface", "host", "python", "protocol",
    "security", "shared_temp_directory", "local_directory", "log_directory", "job_name", "job_cpu", "job_mem",
    "job_extra_directives", "job_directives_skip", "job_script_prologue", "worker_extra_args", "death_timeout",
    "scheduler_options", "dashboard_address",
]  # fmt: skip

PositiveInt = Annotated[int, Meta(ge=1)]
Seed = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Strength = Annotated[float, Meta(ge=0.0, le=1000.0)]
Share = Annotated[float, Meta(ge=0.0, le=1.0)]
Temperature = Annotated[float, Meta(ge=0.0)]


DEFAULT_ALPHA = 0.5
# below it float32 logits overflow
MIN_TEMPERATURE = 1e-3


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model, and how it is loaded."""

    model: str = option("model: a local directory or a Hugging Face hub name")
    revision: str | None = option("revision of a hub model", None)
    dtype: Dtype = option("dtype of weights and activations", "float32")
    sharding: str = option(
        "how the model is spread over processes: replicate, fsdp[=K], tensor[=K], fsdp=N,tensor=K, zero3, dispatch",
        "replicate",
    )
    offload: str = option("zero3: where weights lie between uses: none, cpu or nvme:PATH", "none")
    max_memory: list[str] = option("dispatch: largest memory of devices, such as 0=70GiB cpu=200GiB", [])
    offload_folder: str | None = option("dispatch: directory for the weights that go to disk", None)
    tensor_plan: str | None = option("tensor: YAML file of module names and styles", None)
    device: Literal["auto", "cpu", "cuda"] = option("where the forward runs; auto takes a GPU if there is one", "auto")


@dataclass(frozen=True, kw_only=True)
class InterventionOptions:
    """Which intervention is laid over the model, and how strongly."""

    intervention: str | None = option("intervention directory written by `fit`", None)
    strength: Strength = option("strength s of the intervention: each scale becomes 1 + s (scale - 1)", 1.0)


@dataclass(frozen=True, kw_only=True)
class CollectConfig(ModelOptions, InterventionOptions):
    """Run labelled text through the model and store every neuron's pooled response."""

    data: str = option("labelled text: .csv, .tsv, .jsonl or .parquet file, or a hub data set")
    split: str = option("split of a hub data set", "train")
    text_column: str = option("column that holds the text", "text")
    concepts: list[str] = option("label columns: 0/1, true/false, or scores together with --threshold", distinct=True)
    threshold: float | None = option("label columns are scores: positive from this value on", None)
    clean_negatives: list[str] = option(
        "leave out rows that are negative for the first concept but positive in one of these columns (Jigsaw's rule)",
        [],
    )
    num_positive: PositiveInt | None = option("sample this many positives of the first concept", None)
    num_negative: PositiveInt | None = option("sample this many negatives of the first concept", None)
    match_length: bool = option("draw the negatives with the positives' distribution of token lengths", False)
    seed: Seed = option("seed of the sampling", 0)
    max_tokens: PositiveInt = option("tokens per text; longer texts are cut", 128)
    modules: list[str] = option("modules: mlp, attention, norm, all, or name patterns (globs)", ["mlp"], distinct=True)
    pooling: list[Pooling] = option("how a text's tokens become a neuron's value; one or more", ["max"], distinct=True)
    skip_special_tokens: bool = option("leave special tokens (BOS, EOS, ...) out of the pooling", False)
    store: str = option("the store to write: a .zarr directory, or a URL such as s3://bucket/run.zarr")
    overwrite: bool = option("delete a store that is already there", False)
    tokens_per_batch: PositiveInt = option("upper bound on padded tokens in one forward", 4096)
    max_attempts: Annotated[int, Meta(ge=0)] = option(
        "stop if so many launches in all died in the same task; 0 goes on for ever", 3
    )


@dataclass(frozen=True, kw_only=True)
class PlanConfig(CollectConfig):
    """Say what a collection takes, in bytes and seconds, and refuse what cannot fit; reads no weights."""

    data: str = option("labelled text; without it, --num-positive and --num-negative texts of --max-tokens", "")
    concepts: list[str] = option("label columns; without them, of all rows the longest", [], distinct=True)
    store: str = option("the store that would be written (not touched)", "")
    world_size: PositiveInt = option("ranks of the launch", 1)
    ranks_per_host: PositiveInt | None = option("ranks that share one machine's memory (default: all, at most 8)", None)
    device_memory: str | None = option("memory of one GPU, such as 80GB; plans for a GPU wherever it is run", None)
    host_memory: str | None = option("memory of one machine, such as 512GB", None)
    tflops: Annotated[float, Meta(gt=0.0)] | None = option(
        "sustained TFLOP/s of one rank (default: 120 on a GPU in 16 bits, 12 in float32; 0.15 on a CPU)", None
    )
    json: bool = option("print JSON instead of tables", False)


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """Compute every statistic of every neuron of a store, out of core."""

    store: str = option("the store that `collect` wrote")
    dask: str = option("where the work runs: threads, processes, slurm, or the tcp://HOST:PORT of a cluster", "threads")
    num_workers: PositiveInt | None = option(
        "workers (default: the processor cores this process may use; 2 under slurm)", None
    )
    memory_limit: str = option("memory per worker, such as 4GB", "4GB")
    statistics: list[str] = option("statistics to compute (default: all)", [], distinct=True)
    partial: bool = option("score the rows that are there, if the store is not finished", False)
    overwrite: bool = option("delete scores that are already there, damaged ones too", False)
    slurm: dict[SlurmOption, Any] = option(
        "options of dask-jobqueue's SLURMCluster, such as queue=main cores=2; in a file, keys and values", {}
    )


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """Turn scores into an intervention."""

    store: str = option("a store that has been scored")
    concept: str = option("concept to whisper down")
    method: Method = option(
        "aura scales by expertise; damp and det0 scale the top units; mean-act and linear-act move the responses to "
        "texts with the concept to where those without it are",
        "aura",
    )
    pooling: Pooling | None = option(
        "pooling whose scores are used (default: max for aura, damp and det0, mean for mean-act and linear-act)", None
    )
    modules: list[str] = option("only these of the store's modules: mlp, attention, norm, all, or name patterns", [])
    top_k: PositiveInt | None = option(
        "only the k units of highest AUROC (default: all above 1/2; all units under mean-act and linear-act)", None
    )
    max_q: Share | None = option("only units whose q-value (false discovery rate) is at most this", None)
    alpha: Share = option("scale of the selected units under damp", DEFAULT_ALPHA)
    strength: Strength = option("strength s: each scale becomes 1 + s (scale - 1), each shift s shift", 1.0)
    onto: str | None = option("intervention that the store was collected under: the result does both", None)
    out: str = option("directory to write the intervention to")

    def __post_init__(self) -> None:
        """Refuse a setting that the method would not look at."""
        if self.method != "damp" and self.alpha != DEFAULT_ALPHA:
            raise ConfigError(f"--alpha: expected it with --method damp alone, got it with {self.method}; leave it out")


@dataclass(frozen=True, kw_only=True)
class DecodingOptions:
    """How continuations are drawn, and what stands before each prompt."""

    num_samples: PositiveInt = option("continuations per prompt", 1)
    max_new_tokens: PositiveInt = option("tokens per continuation", 20)
    temperature: Temperature = option("sampling temperature; 0 is greedy", 1.0)
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] = option("nucleus sampling: probability mass kept", 0.9)
    top_tokens: Annotated[int, Meta(ge=0)] = option("sample from the k most probable tokens alone; 0: from all", 0)
    seed: Seed = option("seed of the sampling", 0)
    preprompt: str | None = option("text, or file of a text, that is put before each prompt and is not scored", None)

    def __post_init__(self) -> None:
        """Refuse a temperature at which float32 logits overflow."""
        if 0 < self.temperature < MIN_TEMPERATURE:
            raise ConfigError(f"--temperature: expected 0 or at least {MIN_TEMPERATURE}, got {self.temperature}")


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(ModelOptions, InterventionOptions, DecodingOptions):
    """Continue prompts, with and without an intervention side by side."""

    prompt: list[str] = option("one or more prompts")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(ModelOptions, InterventionOptions, DecodingOptions):
    """Measure a model, with or without an intervention: toxicity, perplexity, zero-shot tasks."""

    toxicity_prompts: str | None = option(
        "prompts whose continuations are scored: RealToxicityPrompts' .jsonl, or a table with a column of texts", None
    )
    prompt_column: str | None = option("column of the prompts (default: prompt.text, prompt or text)", None)
    prompt_toxicity_column: str | None = option(
        "column of the prompts' own toxicity (default: prompt.toxicity or toxicity, where there is one)", None
    )
    num_samples: PositiveInt = option("continuations per prompt", 25)
    continuations_per_batch: PositiveInt = option("continuations in one forward; results do not depend on it", 128)
    scorer: str = option(
        "what says how toxic a text is: a text classification model, or profanity-check",
        "s-nlp/roberta_toxicity_classifier",
    )
    toxic_label: str | None = option("the scorer's label that means toxic (default: the one called so)", None)
    perplexity_texts: str | None = option("file of texts whose perplexity is measured", None)
    perplexity_labels: str | None = option("0/1 column of the texts: perplexity of either side too", None)
    text_column: str = option("column that holds the text", "text")
    max_tokens: PositiveInt = option("tokens per text; longer texts are cut", 128)
    tokens_per_batch: PositiveInt = option("upper bound on padded tokens in one forward", 2048)
    tasks: list[str] = option("zero-shot tasks, groups or tags of lm-eval", [], distinct=True)
    tasks_path: str | None = option("directory of YAML tasks of your own", None)
    num_fewshot: Annotated[int, Meta(ge=0)] | None = option("examples in a task's context (default: the task's)", None)
    limit: PositiveInt | None = option("only the first examples of each task", None)
    baseline: str | None = option("results of another evaluation of the same prompts, to compare with", None)
    out: str = option("JSON file to write the results to; continuations go beside it")

    def __post_init__(self) -> None:
        """Refuse to measure nothing, and a setting that would not be looked at."""
        if not (self.toxicity_prompts or self.perplexity_texts or self.tasks):
            raise ConfigError("expected at least one of --toxicity-prompts, --perplexity-texts and --tasks, got none")
        needs = {
            "toxicity_prompts": ("baseline", "prompt_column", "prompt_toxicity_column", "toxic_label"),
            "perplexity_texts": ("perplexity_labels",),
            "tasks": ("tasks_path", "num_fewshot", "limit"),
        }
        for part, names in needs.items():
            for name in names:
                if not getattr(self, part) and getattr(self, name) is not None:
                    raise ConfigError(f"{flag(name)}: expected it with {flag(part)}, got it without; leave it out")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Fold an intervention into a copy of a checkpoint, which any loader then serves at full speed."""

    model: str = option("model: a local directory or a Hugging Face hub name")
    revision: str | None = option("revision of a hub model", None)
    intervention: str = option("intervention directory written by `fit`")
    strength: Strength = option("strength s: each scale becomes 1 + s (scale - 1), each shift s shift", 1.0)
    dtype: Literal["keep", "float32"] = option("dtype of the written weights", "keep")
    out: str = option("directory to write the checkpoint to; it must not exist yet")


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """The whole pipeline on a small model and a bundled data set, in a few minutes."""

    model: str | None = option("a model of your own (default: Gemma 3 270M from the package index)", None)
    data: str | None = option("labelled text of your own (default: the bundled sentences)", None)
    text_column: str = option("column that holds the text", "text")
    concept: str = option("label column", "toxic")
    modules: list[str] = option("modules: mlp, attention, norm, all, or name patterns (globs)", ["mlp"])
    dtype: Dtype = option("dtype of weights and activations", "float32")
    out: str = option("run directory to write", "runs/demo")
    overwrite: bool = option("delete the store of an earlier run that is already there", False)


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Write one page over run directories: what was run, which neurons, what it changed."""

    run_dirs: list[str] = option("run directories", distinct=True, place="RUN_DIR")
    out: str = option("HTML file to write; its pictures go into a folder beside it")
    expert_auroc: Annotated[float, Meta(ge=0.5, lt=1.0)] = option("a neuron counts as an expert above this AUROC", 0.7)
    expert_q: Share = option("and up to this q-value (false discovery rate), where q-values are stored", 0.05)
    num_neurons: PositiveInt = option("rows of the tables of best neurons", 25)
    num_prompts: PositiveInt = option("prompts whose continuations are shown", 20)


@dataclass(frozen=True, kw_only=True)
class StatusConfig:
    """Say what of a run is done, failed and left, from its files alone."""

    run_dir: str = option("a run directory, or a directory of many", place="RUN_DIR")


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Run a grid of settings, every collection, scoring and fit once, on this machine or on Slurm."""

    grid: Any = option("setting → list of values, or a list of such grids; see configs/sweep-*.yaml", file_only=True)
    out: str = option("directory of the sweep, on a file system that all its machines see")
    launcher: Literal["local", "slurm"] = option("where the jobs run", "local")
    jobs: PositiveInt = option("local: jobs that run at the same time; they share the GPUs", 1)
    ranks: PositiveInt = option("local: processes of a collection or an evaluation, started by torchrun", 1)
    resources: dict[str, Any] = option(
        "slurm: submitit's parameters, such as timeout_min=60; in a file, a stage's own under its name", {}
    )
    retries: Annotated[int, Meta(ge=0)] = option("how often a job that failed is tried again", 2)
    dry_run: bool = option("print cells, jobs and what collections and evaluations take, and run nothing", False)


@dataclass(frozen=True)
class Verb:
    """One command: its settings, and the stage module whose `run(config)` does the work.

    The section of a settings file that belongs to the verb `inherits` counts for this one too, below its own.
    A verb that `takes_file` is called `run(config, document)`, with all that the file says.
    """

    config: type
    stage: str
    inherits: str | None = None
    takes_file: bool = False

    @property
    def summary(self) -> str:
        return (self.config.__doc__ or "").strip()


VERBS: dict[str, Verb] = {
    "plan": Verb(PlanConfig, "aura_dist.stages.plan", inherits="collect"),
    "collect": Verb(CollectConfig, "aura_dist.stages.collect"),
    "score": Verb(ScoreConfig, "aura_dist.stages.score"),
    "fit": Verb(FitConfig, "aura_dist.stages.fit"),
    "generate": Verb(GenerateConfig, "aura_dist.stages.generate"),
    "evaluate": Verb(EvaluateConfig, "aura_dist.stages.evaluate"),
    "export": Verb(ExportConfig, "aura_dist.stages.export"),
    "report": Verb(ReportConfig, "aura_dist.stages.report"),
    "status": Verb(StatusConfig, "aura_dist.stages.status"),
    "sweep": Verb(SweepConfig, "aura_dist.stages.sweep", takes_file=True),
    "demo": Verb(DemoConfig, "aura_dist.demo.demo"),
}
