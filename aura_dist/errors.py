"""What can go wrong for a user, as exceptions that the command line prints in one line."""


class AuraError(Exception):
    """Base of every error that a user can mend; the command line prints it and exits with code 2.

    The message says what was expected, what came, and what to change.
    """


def brief(error: BaseException, limit: int = 300) -> str:
    """The first lines of a library's error, for our own: some list every model there is."""
    text = " ".join(str(error).split())
    return text if len(text) <= limit else text[:limit] + " …"


class ConfigError(AuraError, ValueError):
    """A flag or a key of the configuration file is unknown, missing or out of range."""


class InputError(AuraError, ValueError):
    """The user's data cannot be used as they are: values, labels, texts or prompts."""


class ModelError(AuraError):
    """The model cannot be loaded, or does not do what was asked of it."""


class StoreError(AuraError):
    """A store or an artifact is missing, damaged, unfinished, or of something else."""


class BudgetError(AuraError):
    """What was planned does not fit into the memory that there is."""
