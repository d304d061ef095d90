"""Errors of remote stores: which may pass by themselves, and what to tell the user of the others."""

from aura_dist.errors import StoreError, brief

# repeating the same request gives the same answer
_PERMANENT = (
    FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError,
    TypeError, ValueError, LookupError, NotImplementedError, ImportError, AssertionError,
)  # fmt: skip
# what the kind of an error says in the drivers' own hierarchies: none of them could be imported here
_NO_CREDENTIALS = (
    "NoCredentials",
    "PartialCredentials",
    "CredentialRetrieval",
    "DefaultCredentials",
    "ProfileNotFound",
)
_DRIVERS = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}


def driver(scheme: str) -> str:
    """The package that serves a scheme of URLs, and how it is installed."""
    if scheme not in _DRIVERS:
        return f"the fsspec driver of {scheme}://"
    extra = "'aura-dist[s3]'" if _DRIVERS[scheme] == "s3fs" else _DRIVERS[scheme]
    return f"{_DRIVERS[scheme]} (pip install {extra})"


def is_transient(error: Exception) -> bool:
    """Whether the same request may succeed later: errors of connections, servers and their libraries, not of code."""
    if isinstance(error, (StoreError, *_PERMANENT)) or _lacks_credentials(error):
        return False
    if isinstance(error, (OSError, EOFError)):
        return True
    return type(error).__module__.split(".")[0] not in ("builtins", "zarr", "aura_dist")


def _lacks_credentials(error: BaseException) -> bool:
    return any(name in type(error).__name__ for name in _NO_CREDENTIALS)


def told(error: BaseException) -> str:
    """The kind and the text of an error, in one line."""
    return f"{type(error).__name__}: {brief(error)}" if str(error) else type(error).__name__


def advice(error: BaseException) -> str:
    """What the user may change, or nothing."""
    if _lacks_credentials(error):
        return (
            "; give credentials where the driver looks for them (for s3://: AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE)"
        )
    if isinstance(error, PermissionError):
        return "; expected credentials that may list, read, write and delete there"
    if isinstance(error, FileNotFoundError):
        return "; make the bucket first, or choose another"
    return ""
