"""How much the attempts of a sweep's job have left: it grows as the job gets on, not as it does the same again."""

from pathlib import Path

from aura_dist.errors import AuraError


def kept(stage: str, product: Path) -> int:
    """Finished tasks of a collection, scored chunk columns, bytes of an evaluation's continuations and results.

    0 for a fit, which takes seconds; and where nothing can be read.
    """
    try:
        if stage in ("collect", "score"):
            return _in_store(stage, str(product))
        if stage == "evaluate":
            return sum(path.stat().st_size for path in product.parent.glob(f"{product.stem}.*"))
    except (AuraError, OSError):  # another rank may still put its files in order
        pass
    return 0


def _in_store(stage: str, store: str) -> int:
    import numpy as np

    from aura_dist.scoring.scores import count_columns
    from aura_dist.store.access import open_group, read_array
    from aura_dist.store.schema import DONE, StoreSpec

    group = open_group(store)
    if stage == "collect":
        return int(np.count_nonzero(read_array(group, DONE)))
    return count_columns(group, StoreSpec.from_attributes(group.attrs))[0]
