"""Sizes as people write them: `80GB`, `24 GiB`, and back."""

import re
from math import inf

from aura_dist.errors import ConfigError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15}
_BINARY = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "P": 2**50}
_SIZE = re.compile(r"\+?((?:\d+\.?\d*|\.\d+)(?:E[+-]?\d{1,2})?)([KMGTP]?)(I?)B?", re.IGNORECASE | re.ASCII)


def parse_bytes(text: str, flag: str, example: str = "80GB or 24GiB") -> int:
    """`80GB` → 80 × 10⁹, `24 GiB` → 24 × 2³⁰, `1e6` → 10⁶; ConfigError naming `flag` and `example` for others."""
    found = _SIZE.fullmatch("".join(text.split()))
    if found is None or (found[3] and not found[2]) or float(found[1]) == inf:
        raise ConfigError(f"{flag}: expected a size such as {example}, got {text!r}")
    number, unit, binary = found[1], found[2].upper(), found[3]
    return int(float(number) * (_BINARY if binary else _UNITS)[unit])


def show_bytes(size: float) -> str:
    """Bytes in decimal units with three digits: 83_660_000_000 → `83.7 GB`."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 999.5:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 99.95 else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.0f} PB"
