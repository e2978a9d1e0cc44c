"""What this machine has, found without torch."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

NVIDIA_PROC = Path("/proc/driver/nvidia/gpus")


@dataclass(frozen=True)
class Machine:
    """One machine: `gpus` that torch can use, `gpu_memory_bytes` of the smallest of them (0 where there are none
    or it is not told), `cores` this process may run on, and `memory_bytes` of the host."""

    gpus: int = 0
    gpu_memory_bytes: int = 0
    cores: int = 1
    memory_bytes: int = 0


def this_machine() -> Machine:
    """The machine this process runs on."""
    import psutil

    gpus = _nvidia_smi() or [Gpu("", 0)] * _gpus_in_proc(NVIDIA_PROC)
    gpus = visible_gpus(gpus, os.environ.get("CUDA_VISIBLE_DEVICES"))
    return Machine(
        gpus=len(gpus),
        gpu_memory_bytes=min((gpu.memory_bytes for gpu in gpus), default=0),
        cores=_cores(),
        memory_bytes=int(psutil.virtual_memory().total),
    )


def _cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS has no affinity
        return os.cpu_count() or 1


class Gpu(NamedTuple):
    """As the driver lists it: `GPU-…`, and its memory (0: not told)."""

    uuid: str
    memory_bytes: int


def visible_gpus(gpus: Sequence[Gpu], listed: str | None) -> list[Gpu]:
    """Those that CUDA_VISIBLE_DEVICES leaves, by the CUDA programming guide: numbers or beginnings of UUIDs; the first
    word that means none of them ends the list. A part of a GPU (`MIG-…`) counts as one, of unknown memory."""
    if listed is None:
        return list(gpus)
    found: list[Gpu] = []
    for word in map(str.strip, listed.split(",")):
        if word.startswith("MIG-"):
            found.append(Gpu(word, 0))
            continue
        known = [gpu for number, gpu in enumerate(gpus) if word and (word == str(number) or gpu.uuid.startswith(word))]
        if not known:
            break
        found.append(known[0])
    return found


def _nvidia_smi() -> list[Gpu]:
    """The GPUs, as the driver's own tool lists them; none without the tool or the driver."""
    command = ["nvidia-smi", "--query-gpu=uuid,memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    lines = (line.partition(",") for line in answer.stdout.splitlines() if line.strip())
    return [Gpu(uuid.strip(), parse_mebibytes(memory)) for uuid, _, memory in lines]


def parse_mebibytes(line: str) -> int:
    """`81559` -> bytes; 0 for `[N/A]`, which integrated GPUs answer."""
    text = line.strip()
    return int(text) << 20 if text.isdigit() else 0


def _gpus_in_proc(folder: Path) -> int:
    """GPUs the kernel driver lists, for machines (containers) that lack nvidia-smi."""
    return sum(1 for _ in folder.iterdir()) if folder.is_dir() else 0
