"""Logging to standard error; results go to standard output."""

import logging
import os


def configure_logging(*, debug: bool = False) -> None:
    """Send the package's messages to standard error, one line each; call before torch is imported."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else a lost connection is told with stack traces
    logger = logging.getLogger("aura_dist")
    logger.handlers[:] = [logging.StreamHandler()]
    logger.handlers[0].setFormatter(_format(""))
    logger.setLevel(logging.DEBUG if debug else logging.INFO)
    logger.propagate = False
    # said once a process on every machine without a GPU; which device is used is our own message's matter
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator" not in record.getMessage())


def configure_rank(rank: int, world_size: int) -> None:
    """Put the rank in front of each line, and keep all but rank 0's to warnings, where there are several."""
    logger = logging.getLogger("aura_dist")
    if world_size == 1:
        return
    for handler in logger.handlers:
        handler.setFormatter(_format(f"[rank {rank}] "))
    if rank and logger.level == logging.INFO:
        logger.setLevel(logging.WARNING)


def _format(prefix: str) -> logging.Formatter:
    return logging.Formatter(f"%(asctime)s {prefix}%(message)s", datefmt="%H:%M:%S")
