"""`python -m tests.gpu`; a module of its own, because a process that is started cannot import `__main__` again."""

import sys

from tests.gpu.script import main

sys.exit(main())
