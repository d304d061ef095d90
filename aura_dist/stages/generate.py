"""generate: continuations of prompts, with and without an intervention side by side."""

from collections.abc import Sequence
from pathlib import Path

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from aura_dist.config.verbs import GenerateConfig
from aura_dist.evaluation.client import Client
from aura_dist.evaluation.engines import Asked
from aura_dist.evaluation.generation import continue_alike
from aura_dist.evaluation.prompts import Pair, chat_of_prompts, make_prefix, read_preprompt, tokenize_prompts
from aura_dist.evaluation.sampling import Decoding
from aura_dist.evaluation.server import check_one_process, find_server, read_expected
from aura_dist.interventions.artifact import Intervention, method_of
from aura_dist.interventions.use import load_for_use
from aura_dist.models.hub import downloaded
from aura_dist.models.load import source_of
from aura_dist.models.strategies.table import sharding_of
from aura_dist.planning.shortage import HOLDS, explained, smaller
from aura_dist.ranks.device import pick_device
from aura_dist.ranks.launch import start_team
from aura_dist.ranks.process import configure_rank, server_key
from aura_dist.ranks.team import Team
from aura_dist.serving.start import running, started_by

Variants = dict[str, list[str]]


def run(config: GenerateConfig) -> list[Variants]:
    """Print the continuations of each prompt; returns, per prompt, variant → continuations."""
    with start_team(sharding_of(config), pick_device(config.device)) as team:
        configure_rank(team.world.global_rank, team.world.layout.world_size)
        results = generate(config, team)
        if team.world.is_first:
            show(config.prompt, results)
        return results


def generate(config: GenerateConfig, team: Team) -> list[Variants]:
    """What `run` returns, on every rank alike, because a sharded forward needs them all."""
    preprompt = None if config.preprompt is None else read_preprompt(config.preprompt)
    how = Decoding(
        config.num_samples, config.max_new_tokens, config.temperature, config.top_p, config.seed, config.top_tokens
    )
    variants = (_in_process if config.server is None else _served)(config, how, preprompt, team)
    return [{name: texts[p] for name, texts in variants.items()} for p in range(len(config.prompt))]


def _in_process(config: GenerateConfig, how: Decoding, preprompt: str | None, team: Team) -> dict[str, list[list[str]]]:
    """Variant → [prompt][sample]: the plain model's, and the intervened one's if there is an intervention."""
    source = source_of(config)
    with downloaded(team, source), explained("loading", team.world.device, lambda: HOLDS):
        loaded = load_for_use(source, team, config.intervention, sharding_of(config).options)
    prompts = _asked(config, how, preprompt, loaded.tokenizer, loaded.model.config).tokens
    with explained("continuing", team.world.device, lambda: smaller("--num-samples", config.num_samples)):
        variants = {"plain": continue_alike(loaded, prompts, how, team)}
        if loaded.intervention is not None:
            with loaded.intervened(config.strength):
                variants[_name(loaded.intervention)] = continue_alike(loaded, prompts, how, team)
    return variants


def _served(config: GenerateConfig, how: Decoding, preprompt: str | None, team: Team) -> dict[str, list[list[str]]]:
    """The same of a server, with the intervention if there is one: only some servers have the plain model too."""
    assert config.server is not None
    made: dict[Pair, str] = {}

    def take(records: list[dict[str, object]]) -> None:
        made.update({(int(str(one["prompt"])), int(str(one["sample"]))): str(one["text"]) for one in records})

    check_one_process(team)
    expected = read_expected(source_of(config), config.intervention, config.strength)
    asked = _asked(config, how, preprompt, expected.tokenizer, expected.config)
    log = Path("serve.log")
    with (
        running(config.server, config.model, config.intervention, config.strength, log) as url,
        Client(url, config.requests_in_flight, server_key()) as client,
    ):
        server = find_server(
            client, expected, config.server_model,
            chat=config.chat, received=lambda: None, command=started_by(config.server),
        )  # fmt: skip
        pairs = [(p, s) for p in range(len(config.prompt)) for s in range(how.num_samples)]
        server.continue_pairs(asked, pairs, how, take)
    name = "plain" if server.intervention is None else _name(server.intervention)
    return {name: [[made[p, s] for s in range(how.num_samples)] for p in range(len(config.prompt))]}


def _asked(
    config: GenerateConfig,
    how: Decoding,
    preprompt: str | None,
    tokenizer: PreTrainedTokenizerBase,
    model: PretrainedConfig,
) -> Asked:
    prefix = None if preprompt is None else make_prefix(preprompt, tokenizer)
    chat = chat_of_prompts(tokenizer, preprompt) if config.chat else None
    return Asked(tokenize_prompts(config.prompt, tokenizer, model, how, prefix=prefix, chat=chat), config.prompt, chat)


def _name(intervention: Intervention) -> str:
    method = method_of(intervention.meta)
    return "intervened" if method == "plain" else method


def show(prompts: Sequence[str], results: Sequence[Variants]) -> None:
    """Print the variants of each prompt below it."""
    for prompt, variants in zip(prompts, results, strict=True):
        print(f"\n{prompt}")
        width = max(map(len, variants))
        for name, texts in variants.items():
            for text in texts:
                print(f"  {name:<{width}} |{' '.join(text.splitlines())}")
