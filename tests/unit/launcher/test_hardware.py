"""Which GPUs count: those that CUDA would show to torch."""

from __future__ import annotations

import pytest

from ftlaunch.launcher import hardware
from ftlaunch.launcher.hardware import Gpu, this_machine, visible_gpus

GPUS = [Gpu(f"GPU-{letter}7e", 2**30 * (1 + number)) for number, letter in enumerate("abcd")]


@pytest.mark.parametrize(
    ("listed", "numbers"),
    [
        (None, [0, 1, 2, 3]),
        ("2,0", [2, 0]),
        (" 1 , 3 ", [1, 3]),
        ("GPU-c", [2]),
        ("GPU-d7e,0", [3, 0]),
        ("0,9,1", [0]),
        ("-1", []),
        ("", []),
    ],
)
def test_what_cuda_visible_devices_leaves(listed, numbers):
    assert visible_gpus(GPUS, listed) == [GPUS[number] for number in numbers]


def test_a_part_of_a_gpu_counts_as_one():
    assert len(visible_gpus(GPUS, "MIG-GPU-a7e/1/0,MIG-GPU-a7e/2/0")) == 2


def test_the_machine_has_what_is_visible(monkeypatch):
    monkeypatch.setattr(hardware, "_nvidia_smi", lambda: GPUS)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,3")
    machine = this_machine()
    assert (machine.gpus, machine.gpu_memory_bytes) == (2, 2**31)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert this_machine().gpus == 0


def test_the_drivers_own_list_is_read(tmp_path, monkeypatch):
    """A program of that name in front of any other, as the driver's tool answers."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU-aa, 81559'\necho 'GPU-bb, [N/A]'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert hardware._nvidia_smi() == [Gpu("GPU-aa", 81559 << 20), Gpu("GPU-bb", 0)]
    assert this_machine().gpus == 2
