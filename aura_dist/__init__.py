"""aura_dist: which neurons of a language model tell two classes of text apart, and how to whisper them down.

Importing this package imports neither torch nor transformers; each public name loads its module at
first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from aura_dist.api import collect, fit, score
    from aura_dist.interventions.artifact import Intervention
    from aura_dist.interventions.hooks import intervene
    from aura_dist.scoring.columns import auroc
    from aura_dist.scoring.tables import top_neurons
    from aura_dist.scoring.view import open_store

_HOME_OF = {
    "collect": "aura_dist.api",
    "score": "aura_dist.api",
    "fit": "aura_dist.api",
    "auroc": "aura_dist.scoring.columns",
    "open_store": "aura_dist.scoring.view",
    "top_neurons": "aura_dist.scoring.tables",
    "Intervention": "aura_dist.interventions.artifact",
    "intervene": "aura_dist.interventions.hooks",
}

__all__ = [
    "Intervention", "__version__", "auroc", "collect", "fit", "intervene", "open_store", "score", "top_neurons",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'aura_dist' has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
