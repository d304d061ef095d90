"""What the ranks' common parent imports, so that starting a rank costs no import."""

import gc

import tests.distributed.loop  # noqa: F401

gc.freeze()  # a rank neither looks through what imports made nor copies it for that
