"""How much of a machine's memory one read may take: what does not fit is refused by name, not killed by the system."""

from __future__ import annotations

from pathlib import Path

from ...recipes.errors import UserError
from ..storage import FileInfo

SHARE = 0.5
"""Of what is free now, for one block: it is held once as it was read and once decoded, beside everything else."""

CGROUP = Path("/sys/fs/cgroup")
"""Limits of the container or job (cgroup version 2), which the machine's own figures do not know."""


def free_bytes() -> int:
    """Memory that this process may still take: the machine's, or what its container leaves it."""
    import psutil

    return min(int(psutil.virtual_memory().available), _left_in_cgroup(CGROUP))


def _left_in_cgroup(folder: Path) -> int:
    """What the limit leaves. File pages that could be dropped count as free."""
    try:
        limit = (folder / "memory.max").read_text().strip()
        used = int((folder / "memory.current").read_text())
        lines = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
        droppable = next((int(value) for name, value in lines if name == "inactive_file"), 0)
    except (OSError, ValueError):
        return 2**63
    return 2**63 if limit == "max" else int(limit) - used + droppable


def allowance() -> int:
    """Bytes that one block may take when it is decoded."""
    return int(free_bytes() * SHARE)


def require_memory(file: FileInfo, nbytes: int, what: str, remedy: str, limit: int | None = None) -> None:
    """Raises UserError when a part of a file needs more than `limit` (by default the allowance as it is now)."""
    limit = allowance() if limit is None else limit
    if nbytes > limit:
        raise UserError(
            f"{file.url}: {what} takes at least {size_text(nbytes)} of memory, and one read may take "
            f"{size_text(limit)} ({SHARE:.0%} of what is free on this machine). {remedy}"
        )


def size_text(nbytes: int) -> str:
    """As people say it."""
    units = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))
    name, size = next((unit for unit in units if nbytes >= unit[1]), units[-1])
    return f"{nbytes / size:.1f} {name}"
