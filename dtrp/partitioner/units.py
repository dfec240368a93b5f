"""Numbers for people: bytes, counts, seconds."""

from __future__ import annotations


def size(n: float) -> str:
    """Bytes for people: ``1536`` -> ``"1.5 kB"``."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(n) < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} TB"


def count(n: float) -> str:
    """A number of things: ``1536`` -> ``"1.54 k"``."""
    for unit in ("", " k", " M", " G"):
        if abs(n) < 1000:
            return f"{n:.0f}" if not unit else f"{n:.3g}{unit}"
        n /= 1000
    return f"{n:.3g} T"


def duration(seconds: float) -> str:
    """Seconds for people: ``0.0123`` -> ``"12.3 ms"``."""
    for factor, unit in ((1, "s"), (1e3, "ms")):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"
