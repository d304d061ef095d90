"""Settings that several verbs have (which model, which texts, how continuations are drawn), and types of settings."""

from dataclasses import dataclass, fields
from pkgutil import resolve_name
from typing import Annotated, Any, Literal

from msgspec import Meta

from aura_dist.config.settings import OneOf, Settings, flag, option
from aura_dist.errors import ConfigError

# headings of `--help`, in its order; what is under `execution` says how a stage is run, not what it computes
EXECUTION = "execution"
GROUPS = (
    "model", "data", "sites", "neurons", "intervention", "training", "decoding", "toxicity", "perplexity", "tasks",
    "machine", "page", EXECUTION, "output",
)  # fmt: skip

Dtype = Literal["float32", "bfloat16", "float16"]
Pooling = Annotated[str, OneOf("aura_dist.sites.pooling.POOLINGS")]
FittedOn = Annotated[str, OneOf("aura_dist.interventions.gates.FITTED_ON")]
Kept = Annotated[str, OneOf("aura_dist.sites.pooling.kept_words")]
Form = Annotated[str, OneOf("aura_dist.store.conversion.FORMS")]
Method = Annotated[str, OneOf("aura_dist.interventions.methods.METHODS")]
GateKind = Annotated[str, OneOf("aura_dist.interventions.gates.CHOICES")]
Launcher = Annotated[str, OneOf("aura_dist.sweep.launchers.LAUNCHERS")]
Statistic = Annotated[str, OneOf("aura_dist.scoring.statistics.STATISTICS"), Meta(title="STATISTIC")]
Module = Annotated[str, OneOf("aura_dist.sites.kinds.kind_words", also="GLOB|!GLOB"), Meta(title="KIND|GLOB")]
Sharding = Annotated[str, OneOf("aura_dist.models.strategies.table.STRATEGIES", also="K, N"), Meta(title="STRATEGY")]
Quantization = Annotated[
    str, OneOf("aura_dist.models.quantization.spellings", also="NAME"), Meta(title="NAME[:OPTION]")
]
# dask-jobqueue's SLURMCluster takes these; see its documentation
SlurmOption = Literal[
    "queue", "account", "walltime", "cores", "memory", "processes", "interface", "host", "python", "protocol",
    "security", "shared_temp_directory", "local_directory", "log_directory", "job_name", "job_cpu", "job_mem",
    "job_extra_directives", "job_directives_skip", "job_script_prologue", "worker_extra_args", "death_timeout",
    "scheduler_options", "dashboard_address",
]  # fmt: skip

# a title is what `--help` shows for a value
Artifact = Annotated[str, Meta(title="DIR|NAME")]
Column = Annotated[str, Meta(title="COLUMN")]
Data = Annotated[str, Meta(title="FILE|DIR|NAME")]
Dir = Annotated[str, Meta(title="DIR")]
File = Annotated[str, Meta(title="FILE")]
Model = Annotated[str, Meta(title="PATH|NAME")]
Name = Annotated[str, Meta(title="NAME")]
Offload = Annotated[str, Meta(title="none|cpu|nvme:PATH")]
Size = Annotated[str, Meta(title="SIZE")]
Store = Annotated[str, Meta(title="PATH|URL")]

PositiveInt = Annotated[int, Meta(ge=1)]
Count = Annotated[int, Meta(ge=0)]
Seed = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Strength = Annotated[float, Meta(ge=0.0, le=1000.0)]
Positive = Annotated[float, Meta(gt=0.0)]
NotNegative = Annotated[float, Meta(ge=0.0)]
Share = Annotated[float, Meta(ge=0.0, le=1.0)]

TRUST = "run code that comes with the model, its tokenizer, the scorer or the tasks; read it first"
STRENGTH = "strength s: each scale becomes 1 + s (scale - 1), each shift s times itself"
TOKENS_PER_TASK = 4096
# below it float32 logits overflow
MIN_TEMPERATURE = 1e-3


@dataclass(frozen=True, kw_only=True)
class LoadOptions(Settings):
    """Which model, and how it is loaded."""

    model: Model = option("model", "local directory, or Hugging Face hub name")
    revision: Name | None = option("model", "revision of a hub model", None, unset="the hub's main one")
    dtype: Dtype = option("model", "dtype of weights and activations", "float32")
    tokenizer_ids: Literal["file", "loaded"] | None = option(
        "model", "whose token ids count where tokenizer.json and the loaded tokenizer differ", None,
        unset="they must not differ",
    )  # fmt: skip
    tokenizer_option: dict[str, Any] = option(
        "model", "options for loading the tokenizer, such as fix_mistral_regex=true", {}
    )
    adapter: Artifact | None = option("model", "LoRA adapter (peft) that is merged into the weights as they load", None)
    quantization: Quantization | None = option(
        "model", "store linear layers in fewer bits as the weights load; --dtype is what they compute in", None
    )
    trust_remote_code: bool = option("model", TRUST, False)
    device: Literal["auto", "cpu", "cuda"] = option(EXECUTION, "where the forward runs; auto: a GPU if any", "auto")
    sharding: Sharding = option(EXECUTION, "how the model is spread over processes; K and N count ranks", "replicate")
    offload: Offload = option(EXECUTION, "zero3: where weights are while they are not used", "none")
    max_memory: list[Annotated[str, Meta(title="DEVICE=SIZE")]] = option(
        EXECUTION, "dispatch, layers: largest memory of devices, such as 0=70GiB cpu=200GiB", [], unset="what is free"
    )
    host_memory: Size | None = option(
        EXECUTION, "layers: memory of this machine; what has no room in half of it waits in a file", None,
        unset="what is free",
    )  # fmt: skip
    offload_folder: Dir | None = option(
        EXECUTION, "dispatch: directory for the weights that go to disk; layers: for hidden states", None,
        unset="for hidden states the system's for temporary files",
    )  # fmt: skip
    wave_tokens: PositiveInt | None = option(
        EXECUTION, "layers: tokens that go through the layers together; the weights are read once for them", None,
        unset="as many as keep reading below a few percent of the time",
    )  # fmt: skip
    layer_cache: Dir | None = option(
        EXECUTION, "layers: directory on a disk of this machine for copies of layers, which later reads take", None
    )
    tensor_plan: File | None = option(EXECUTION, "tensor: YAML file of module → style", None, unset="the model's")

    def __post_init__(self) -> None:
        """Refuse an option that the strategy or the tokenizer would not look at, or weights that it cannot hold."""
        super().__post_init__()
        resolve_name("aura_dist.models.strategies.table:sharding_of")(self)
        resolve_name("aura_dist.text.tokenizer:TokenizerSettings.of")(self)
        resolve_name("aura_dist.models.quantization:settle")(self)


@dataclass(frozen=True, kw_only=True)
class ModelOptions(LoadOptions):
    """Which model, how it is loaded, and which intervention is applied to it."""

    intervention: Artifact | None = option("intervention", "intervention directory written by `fit`", None)
    strength: Strength = option("intervention", STRENGTH, 1.0)


@dataclass(frozen=True, kw_only=True)
class ServerOptions(Settings):
    """Which server continues and scores texts, in place of a model in this process."""

    server: Annotated[str, Meta(title="URL|COMMAND")] | None = option(
        "model", "OpenAI-compatible server of --model: its address, such as http://localhost:8000/v1, or a command "
        "that starts one here, such as 'vllm serve {model} --port {port}'; no weights are loaded in this process",
        None,
    )  # fmt: skip
    server_model: Name | None = option(
        "model", "what the server calls the model", None, unset="the name of --model", needs="server"
    )
    requests_in_flight: PositiveInt = option(EXECUTION, "requests that the server has at a time", 64, needs="server")

    def __post_init__(self) -> None:
        """Refuse settings of weights that are loaded here."""
        super().__post_init__()
        for spec in fields(self) if self.server else ():
            of_weights = spec.name in _OF_WEIGHTS or spec.metadata["group"] == EXECUTION
            if of_weights and spec.name not in self.kept_by_servers and self.is_set(spec):
                raise ConfigError(
                    f"{flag(spec.name)}: expected it without --server, got it with one, which has loaded the weights "
                    "in its own way; leave it out"
                )

    @property
    def kept_by_servers(self) -> frozenset[str]:
        """Settings of execution that count with a server too."""
        return frozenset({"requests_in_flight"})


# beside the settings of execution
_OF_WEIGHTS = frozenset({"dtype", "adapter", "quantization", "tokens_per_batch"})


@dataclass(frozen=True, kw_only=True)
class TextOptions(Settings):
    """Which labelled texts go through a model, and which of their tokens count."""

    data: Data = option("data", "labelled text: .csv, .tsv, .jsonl or .parquet file, or a hub data set")
    split: Name = option("data", "split of a hub data set", "train")
    text_column: Column = option("data", "column that holds the text", "text")
    threshold: float | None = option("data", "label columns are scores: positive from this value on", None)
    clean_negatives: list[Column] = option(
        "data", "leave out negatives of the first concept that are positive in one of these columns (Jigsaw's rule)", []
    )
    num_positive: PositiveInt | None = option("data", "positives of the first concept to sample", None, unset="all")
    num_negative: PositiveInt | None = option("data", "negatives of the first concept to sample", None, unset="all")
    match_length: bool = option("data", "draw the negatives with the positives' distribution of token lengths", False)
    seed: Seed = option("data", "seed of the sampling", 0)
    chat: Literal["user", "assistant"] | None = option(
        "data", "put each text into the tokenizer's chat template, as the turn of this role", None
    )
    system: str | None = option("data", "text of the system's turn before each text", None, needs="chat")
    max_tokens: PositiveInt = option("data", "tokens per text; longer texts are cut", 128)
    tokens_per_batch: PositiveInt | None = option(
        "data", "upper bound on padded tokens in one forward", None,
        unset=f"{TOKENS_PER_TASK}; where weights are read for every batch, as many as memory has room for",
    )  # fmt: skip
    skip_special_tokens: bool = option("sites", "leave special tokens (BOS, EOS, ...) out of the pooling", False)
    skip_first_tokens: Count = option(
        "sites", "leave the first N tokens of every text out of the pooling; special tokens count among them", 0
    )

    @property
    def task_tokens(self) -> int:
        """Tokens of a task at least; of a batch at most, unless the strategy runs larger ones."""
        return self.tokens_per_batch or TOKENS_PER_TASK


@dataclass(frozen=True, kw_only=True)
class DecodingOptions(Settings):
    """How continuations are drawn, and what is put before each prompt."""

    num_samples: PositiveInt = option("decoding", "continuations per prompt", 1)
    max_new_tokens: PositiveInt = option("decoding", "tokens per continuation", 20)
    temperature: Annotated[float, Meta(ge=0.0)] = option("decoding", "sampling temperature; 0 is greedy", 1.0)
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] = option("decoding", "nucleus sampling: probability mass kept", 0.9)
    top_tokens: Count = option("decoding", "sample from the k most probable tokens alone; 0: from all", 0)
    seed: Seed = option("decoding", "seed of the sampling", 0)
    preprompt: Annotated[str, Meta(title="TEXT|FILE")] | None = option(
        "decoding", "text, or file of a text, that is put before each prompt and is not scored", None
    )
    chat: bool = option(
        "decoding", "put each prompt and task into the tokenizer's chat template, the pre-prompt as the system's turn",
        False,
    )  # fmt: skip

    def __post_init__(self) -> None:
        """Refuse a temperature at which float32 logits overflow."""
        if 0 < self.temperature < MIN_TEMPERATURE:
            raise ConfigError(f"--temperature: expected 0 or at least {MIN_TEMPERATURE}, got {self.temperature}")
        super().__post_init__()
