"""`python -m aura_dist` and `torchrun … -m aura_dist`: the same program as `aura-dist`."""

import sys

from aura_dist.cli import main

if __name__ == "__main__":
    sys.exit(main())
