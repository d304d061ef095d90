"""What the ranks' common parent imports, so that starting a rank costs no import."""

import tests.distributed.loop  # noqa: F401
