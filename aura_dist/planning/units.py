"""Sizes as people write them: `80GB`, `24 GiB`, and back."""

import re

from aura_dist.errors import ConfigError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15}
_BINARY = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "P": 2**50}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGTP]?)(I?)B?\s*", re.IGNORECASE)


def parse_bytes(text: str, flag: str) -> int:
    """`80GB` → 80 × 10⁹, `24GiB` → 24 × 2³⁰, `1000` → 1000; ConfigError naming `flag` for anything else."""
    found = _SIZE.fullmatch(text)
    if found is None or (found[3] and not found[2]):
        raise ConfigError(f"{flag}: expected a size such as 80GB or 24GiB, got {text!r}")
    number, unit, binary = found[1], found[2].upper(), found[3]
    return int(float(number) * (_BINARY if binary else _UNITS)[unit])


def show_bytes(size: float) -> str:
    """Bytes in decimal units with three digits: 83_660_000_000 → `83.7 GB`."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 999.5:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 99.95 else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.0f} PB"
