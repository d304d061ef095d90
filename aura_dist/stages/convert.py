"""convert: the responses of a store in another form. Never imports torch."""

from aura_dist.config.verbs import ConvertConfig
from aura_dist.store.conversion import FORMS, convert, open_source


def run(config: ConvertConfig) -> None:
    """Write `config.out`.

    Raises
    ------
    ConfigError
        The target is a URL.
    InputError
        The store has no such module or pooling, or fewer tokens than a row takes.
    StoreError
        The store lacks rows or is damaged; the target exists, or cannot be written.
    """
    form = FORMS[config.to]
    source = open_source(config.store, config.modules, config.pooling, form)
    convert(source, form, config.out, config.context)
    print(f"wrote {config.out}: {len(source.samples)} texts, {source.num_arrays} arrays of responses")
