"""What can go wrong for a user, as exceptions that the command line prints in one line."""


class AuraError(Exception):
    """Base of every error that a user can put right; the command line prints it and exits with code 2.

    The message says what was expected, what came, and what to change.
    """


def brief(error: BaseException | str, limit: int = 300) -> str:
    """The start of a library's error or of a user's value, because some errors list every model there is."""
    text = " ".join(str(error).split())
    if isinstance(error, BaseException) and (not text or isinstance(error, KeyError)):
        text = f"{type(error).__name__}: {text}".removesuffix(": ")  # KeyError's text is the key alone
    return text if len(text) <= limit else text[:limit] + " …"


class ConfigError(AuraError, ValueError):
    """A flag or a key of the configuration file is unknown, missing or out of range."""


class MissingPackageError(ConfigError):
    """A package is not installed that only a part of the product needs; `extra` is what installs it."""

    def __init__(self, what: str, package: str, extra: str) -> None:
        super().__init__(f"{what} needs {package}: pip install 'aura-dist[{extra}]'")


class InputError(AuraError, ValueError):
    """The user's data cannot be used as they are: values, labels, texts or prompts."""


class MissingColumnError(InputError):
    """A table lacks a column; `row` is the first row without it, None where all rows are."""

    def __init__(self, message: str, row: int | None = None) -> None:
        super().__init__(message)
        self.row = row


class ModelError(AuraError):
    """The model cannot be loaded, or does not do what was asked of it."""


class StoreError(AuraError):
    """A store or an artifact is missing, damaged, unfinished, or of something else."""


class BudgetError(AuraError):
    """A plan needs more memory than there is."""


class ClusterError(AuraError):
    """Workers cannot be started, reached or kept."""


class ServerError(AuraError):
    """A server of a model cannot be reached, serves something else, or does not answer as it should."""


class PeerError(AuraError):
    """Another rank of the launch has failed and says why; this rank ends silently."""


class LostRankError(AuraError):
    """Another rank of the launch has died or cannot be reached."""


class RunInterruptedError(AuraError):
    """SIGTERM, SIGINT or SIGUSR1 ended the work between two batches; everything committed is kept."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number


class SweepError(AuraError):
    """Some cells of a sweep failed; the others are done."""
