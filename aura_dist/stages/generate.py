"""generate: continuations of prompts, with and without an intervention side by side."""

from aura_dist.config import GenerateConfig
from aura_dist.errors import ConfigError
from aura_dist.evaluation.generation import Decoding, continuations
from aura_dist.model.sharding import ModelSource, pick_device, sharding_options
from aura_dist.model.use import load_for_use
from aura_dist.runtime.launch import start_team
from aura_dist.runtime.log import configure_rank
from aura_dist.runtime.world import World

# below it float32 logits overflow
MIN_TEMPERATURE = 1e-3


def run(config: GenerateConfig) -> list[dict[str, list[str]]]:
    """Print the continuations of each prompt; returns, per prompt, variant → continuations."""
    if 0 < config.temperature < MIN_TEMPERATURE:
        raise ConfigError(f"--temperature: expected 0 or at least {MIN_TEMPERATURE}, got {config.temperature}")
    with start_team(config.sharding, pick_device(config.device)) as team:
        configure_rank(team.world.global_rank, team.world.layout.world_size)
        return _generate(config, team.world)


def _generate(config: GenerateConfig, world: World) -> list[dict[str, list[str]]]:
    """On every rank alike, as a sharded forward needs them all; rank 0 prints."""
    source = ModelSource(config.model, config.revision, config.dtype)
    loaded = load_for_use(source, world, config.intervention, sharding_options(config))
    how = Decoding(config.num_samples, config.max_new_tokens, config.temperature, config.top_p, config.seed)
    results = []
    for prompt in config.prompt:
        variants = {"plain": continuations(loaded.model, loaded.tokenizer, prompt, how)}
        if loaded.intervention is not None:
            with loaded.intervened(config.strength):
                method = str(loaded.intervention.meta.get("method", "intervened"))
                variants[method] = continuations(loaded.model, loaded.tokenizer, prompt, how)
        results.append(variants)
        if world.is_first:
            _show(prompt, variants)
    return results


def _show(prompt: str, variants: dict[str, list[str]]) -> None:
    print(f"\n{prompt}")
    width = max(map(len, variants))
    for name, texts in variants.items():
        for text in texts:
            print(f"  {name:<{width}} |{' '.join(text.splitlines())}")
