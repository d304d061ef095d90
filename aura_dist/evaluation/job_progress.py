"""How much the attempts of a sweep's job have left: it grows as the job gets on, not as it does the same again."""

from pathlib import Path

from aura_dist.errors import AuraError


def kept(stage: str, product: Path) -> int:
    """Of a collection the number of finished tasks; of an evaluation the bytes of continuations and results.

    0 for the other stages, which take minutes; and where nothing can be read.
    """
    if stage == "collect":
        return _finished_tasks(product)
    if stage == "evaluate":
        return sum(path.stat().st_size for path in product.parent.glob(f"{product.stem}.*") if path.is_file())
    return 0


def _finished_tasks(store: Path) -> int:
    import numpy as np

    from aura_dist.store.access import open_group, read_array
    from aura_dist.store.schema import DONE

    try:
        return int(np.count_nonzero(read_array(open_group(str(store)), DONE)))
    except AuraError:
        return 0
