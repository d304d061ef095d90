"""What the parts' common parent imports, so that starting a part costs no import. It must not touch a device."""

import tests.gpu.table
import tests.models  # noqa: F401
