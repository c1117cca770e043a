"""Numbers, bytes and hours as people write them: parsed with suffixes, and formatted with three significant digits."""

import re

from unclip.config import require

SUFFIXES = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


def parse_number(text: str, option: str) -> float:
    """Parse a positive number with an optional suffix k, M, G or T.

    Raises:
        ConfigError: it is none; names the option and the value.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kMGT]?)", text.strip())
    value = float(found[1]) * SUFFIXES[found[2]] if found else 0.0
    require(value > 0, option, text, "a positive number such as 650000, 500k, 100M or 1.5G")
    return value


def number(value: float) -> str:
    """Format with three significant digits: 0.012, 7.5, 1,234, 26k, 650M, 1.64G, 400T."""
    for least, factor, suffix in ((1e12, 1e12, "T"), (1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if value >= least:
            return _digits(value / factor) + suffix
    return _digits(value)


def _digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def size(value: float) -> str:
    """Format bytes in decimal units: 150 B, 42.9 kB, 1.2 TB."""
    for factor, unit in ((1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= factor:
            return f"{_digits(value / factor)} {unit}"
    return f"{value:.0f} B"


def hours(value: float) -> str:
    """Format hours; two significant digits below one hour."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2g}"
