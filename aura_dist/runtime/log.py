"""Logging to standard error; results go to standard output."""

import logging


def configure_logging(*, debug: bool = False, rank: int = 0) -> None:
    """Send the package's messages to standard error, one line each, with the rank in front if it is not 0."""
    prefix = f"[rank {rank}] " if rank else ""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(f"%(asctime)s {prefix}%(message)s", datefmt="%H:%M:%S"))
    logger = logging.getLogger("aura_dist")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.DEBUG if debug else logging.INFO)
    logger.propagate = False
    # said once a process on every machine without a GPU; which device is used is our own message's matter
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator" not in record.getMessage())
