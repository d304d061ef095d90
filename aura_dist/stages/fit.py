"""fit: a scored store → an intervention directory. Imports torch for what runs the model alone."""

from functools import partial
from pathlib import Path

from aura_dist.config.verbs import FitConfig
from aura_dist.errors import ConfigError
from aura_dist.interventions.artifact import Intervention
from aura_dist.interventions.fitting import Fit, check_out, earlier_intervention, finish, fit_intervention
from aura_dist.interventions.methods import FromModel, find_method
from aura_dist.ranks.world import is_first_process
from aura_dist.scoring.scores import read_scores
from aura_dist.store.access import open_group
from aura_dist.store.schema import StoreSpec


def run(config: FitConfig) -> None:
    """Write the intervention of `config.method`; with `config.onto`, that after the earlier one, as one."""
    if not config.out:  # `fit` would write nothing
        raise ConfigError("--out: expected the directory to write the intervention to, got ''")
    fit(config)


def fit(config: FitConfig) -> Intervention:
    """The same intervention, written only if `config.out` names a directory.

    In a launch of several processes every rank fits, those of a trained method together, and the first alone writes.
    """
    group = open_group(config.store)
    if config.out:
        check_out(config.out, config.onto)
    spec = StoreSpec.of(group)
    earlier = earlier_intervention(config.store, spec, config.onto)
    out = Path(config.out).resolve()
    is_trained = isinstance(find_method(config.method), FromModel)
    state = out.parent / f"{out.name}.training" if config.out and is_trained else None
    options, gate = config.options, config.gate_fit
    wanted = Fit(
        config.method, config.concept, config.modules, config.strength, options, gate, state, config.sharding
    )  # fmt: skip
    fitted = fit_intervention(group, spec, wanted, partial(read_scores, group, spec), earlier)
    first = is_first_process()
    finished = finish(fitted, config.method, earlier, config.onto, config.out if first else "")
    if first and state is not None:
        state.unlink(missing_ok=True)
    return finished
