"""generate: continuations of prompts, with and without an intervention side by side."""

from aura_dist.config import GenerateConfig
from aura_dist.errors import ConfigError
from aura_dist.evaluation.generation import Decoding, continuations
from aura_dist.model.sharding import ModelSource, pick_device
from aura_dist.model.use import load_for_use
from aura_dist.runtime.world import world_from_environment

# below it float32 logits overflow
MIN_TEMPERATURE = 1e-3


def run(config: GenerateConfig) -> list[dict[str, list[str]]]:
    """Print the continuations of each prompt; returns, per prompt, variant → continuations."""
    if 0 < config.temperature < MIN_TEMPERATURE:
        raise ConfigError(f"--temperature: expected 0 or at least {MIN_TEMPERATURE}, got {config.temperature}")
    world = world_from_environment(config.sharding, pick_device(config.device))
    loaded = load_for_use(ModelSource(config.model, config.revision, config.dtype), world, config.intervention)
    how = Decoding(config.num_samples, config.max_new_tokens, config.temperature, config.top_p, config.seed)
    results = []
    for prompt in config.prompt:
        variants = {"plain": continuations(loaded.model, loaded.tokenizer, prompt, how)}
        if loaded.intervention is not None:
            with loaded.intervened(config.strength):
                method = str(loaded.intervention.meta.get("method", "intervened"))
                variants[method] = continuations(loaded.model, loaded.tokenizer, prompt, how)
        results.append(variants)
        _show(prompt, variants)
    return results


def _show(prompt: str, variants: dict[str, list[str]]) -> None:
    print(f"\n{prompt}")
    width = max(map(len, variants))
    for name, texts in variants.items():
        for text in texts:
            print(f"  {name:<{width}} |{' '.join(text.splitlines())}")
