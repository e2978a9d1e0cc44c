"""What this machine has, found without torch."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

NVIDIA_PROC = Path("/proc/driver/nvidia/gpus")


@dataclass(frozen=True)
class Machine:
    """One machine: `gpus` that torch could use, `gpu_memory_bytes` of the smallest of them (0 where there are none
    or it is not told), `cores` this process may run on, and `memory_bytes` of the host."""

    gpus: int = 0
    gpu_memory_bytes: int = 0
    cores: int = 1
    memory_bytes: int = 0


def this_machine() -> Machine:
    """The machine this process runs on."""
    import psutil

    memories = _nvidia_smi()
    gpus = len(memories) if memories else _gpus_in_proc(NVIDIA_PROC)
    return Machine(
        gpus=gpus,
        gpu_memory_bytes=min(memories, default=0),
        cores=_cores(),
        memory_bytes=int(psutil.virtual_memory().total),
    )


def _cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS has no affinity
        return os.cpu_count() or 1


def _nvidia_smi() -> list[int]:
    """Memory of each GPU in bytes, as the driver's own tool lists them; empty without the tool or the driver."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [parse_mebibytes(line) for line in answer.stdout.splitlines() if line.strip()]


def parse_mebibytes(line: str) -> int:
    """`81559` -> bytes; 0 for `[N/A]`, which integrated GPUs answer."""
    text = line.strip()
    return int(text) << 20 if text.isdigit() else 0


def _gpus_in_proc(folder: Path) -> int:
    """GPUs the kernel driver lists, for machines (containers) that lack nvidia-smi."""
    return sum(1 for _ in folder.iterdir()) if folder.is_dir() else 0
