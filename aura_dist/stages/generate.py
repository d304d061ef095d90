"""generate: continuations of prompts, with and without an intervention side by side."""

from aura_dist.config.verbs import GenerateConfig
from aura_dist.evaluation.generation import continue_alike
from aura_dist.evaluation.prompts import chat_of_prompts, make_prefix, read_preprompt, tokenize_prompts
from aura_dist.evaluation.sampling import Decoding
from aura_dist.interventions.artifact import method_of
from aura_dist.interventions.use import load_for_use
from aura_dist.models.hub import downloaded
from aura_dist.models.load import source_of
from aura_dist.models.strategies.table import sharding_of
from aura_dist.planning.shortage import HOLDS, explained, smaller
from aura_dist.ranks.device import pick_device
from aura_dist.ranks.launch import start_team
from aura_dist.ranks.process import configure_rank
from aura_dist.ranks.team import Team


def run(config: GenerateConfig) -> list[dict[str, list[str]]]:
    """Print the continuations of each prompt; returns, per prompt, variant → continuations."""
    with start_team(sharding_of(config), pick_device(config.device)) as team:
        configure_rank(team.world.global_rank, team.world.layout.world_size)
        return _generate(config, team)


def _generate(config: GenerateConfig, team: Team) -> list[dict[str, list[str]]]:
    """On every rank alike, because a sharded forward needs them all; rank 0 prints."""
    preprompt = None if config.preprompt is None else read_preprompt(config.preprompt)
    source = source_of(config)
    with downloaded(team, source), explained("loading", team.world.device, lambda: HOLDS):
        loaded = load_for_use(source, team, config.intervention, sharding_of(config).options)
    how = Decoding(
        config.num_samples, config.max_new_tokens, config.temperature, config.top_p, config.seed, config.top_tokens
    )
    prefix = None if preprompt is None else make_prefix(preprompt, loaded.tokenizer)
    chat = chat_of_prompts(loaded.tokenizer, preprompt) if config.chat else None
    prompts = tokenize_prompts(config.prompt, loaded.tokenizer, loaded.model.config, how, prefix=prefix, chat=chat)
    with explained("continuing", team.world.device, lambda: smaller("--num-samples", config.num_samples)):
        variants = {"plain": continue_alike(loaded, prompts, how, team)}
        if loaded.intervention is not None:
            with loaded.intervened(config.strength):
                method = method_of(loaded.intervention.meta)
                variants["intervened" if method in variants else method] = continue_alike(loaded, prompts, how, team)
    results = [{name: texts[p] for name, texts in variants.items()} for p in range(len(config.prompt))]
    if team.world.is_first:
        for prompt, shown in zip(config.prompt, results, strict=True):
            _show(prompt, shown)
    return results


def _show(prompt: str, variants: dict[str, list[str]]) -> None:
    print(f"\n{prompt}")
    width = max(map(len, variants))
    for name, texts in variants.items():
        for text in texts:
            print(f"  {name:<{width}} |{' '.join(text.splitlines())}")
