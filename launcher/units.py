"""Numbers as people read them."""

from __future__ import annotations

COUNT_UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
BYTE_UNITS = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


def count(number: float) -> str:
    """1234567 -> `1.23M`; below 10,000 the number itself."""
    if abs(number) < 10_000:
        return f"{number:,.0f}"
    scale, unit = next((scale, unit) for scale, unit in COUNT_UNITS if abs(number) >= scale)
    return f"{number / scale:.3g}{unit}"


def size(num_bytes: float) -> str:
    """1536 -> `1.5 KiB`."""
    for scale, unit in BYTE_UNITS:
        if num_bytes >= scale:
            return f"{num_bytes / scale:.3g} {unit}" if num_bytes < 1000 * scale else f"{num_bytes / scale:.0f} {unit}"
    return f"{num_bytes:.0f} B"


def duration(seconds: float) -> str:
    """3725 -> `1 h 02 min`; 65 -> `1 min 05 s`; 2.5 -> `2.5 s`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
