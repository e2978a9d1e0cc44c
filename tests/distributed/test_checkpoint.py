"""Checkpoints over real gloo ranks: equal bytes at every world size, bounded memory, kills at any moment."""

from __future__ import annotations

import ctypes
import functools
import os
import random
import signal
import threading
from pathlib import Path

import pytest
import torch
from harness import run_distributed, start_distributed

from ftlaunch.distributed import storage
from ftlaunch.distributed.checkpoint.commit import latest, list_commits
from ftlaunch.distributed.checkpoint.fragments import Fragment, TensorSpec
from ftlaunch.distributed.checkpoint.layout import DTYPE_OF_TORCH
from ftlaunch.distributed.checkpoint.peers import Peers
from ftlaunch.distributed.checkpoint.reader import CheckpointReader
from ftlaunch.distributed.checkpoint.save import CheckpointWriter, Content
from ftlaunch.distributed.checkpoint.verify import verify_checkpoint


def tensors(step=0):
    """Odd shapes, a scalar, an empty one, two dtypes; large enough for several chunks and files."""
    generator = torch.Generator().manual_seed(step)
    shapes = [(1001, 33), (), (0, 4), (7,), (3, 5, 7), (257, 129), (2, 2), (99_991,), (640, 640)]
    values = [torch.randn(shape, generator=generator) for shape in shapes]
    return {f"layer.{i}": value.bfloat16() if i % 3 == 2 else value for i, value in enumerate(values)}


def shares(numel, rank, size):
    """FSDP2's Shard(0) in small: contiguous, the last ranks may have less or nothing."""
    part = -(-numel // size)
    return ((min(rank * part, numel), min((rank + 1) * part, numel)),) if rank * part < numel else ()


def sharded(values, rank, size):
    for name, tensor in values.items():
        spec = TensorSpec(name, tuple(tensor.shape), DTYPE_OF_TORCH[str(tensor.dtype).removeprefix("torch.")])
        ranges = shares(tensor.numel(), rank, size)
        flat = tensor.reshape(-1)
        yield Fragment(spec, ranges, flat[ranges[0][0] : ranges[0][1]] if ranges else flat[:0])


def announce(kind, **fields):
    return None


def save(rank, size, run, attempt, step, in_place=False):
    values = tensors(step)
    source = functools.partial(sharded, values, rank, size)
    peers = Peers(rank, size)
    writer = CheckpointWriter(str(run), attempt, announce, peers, max_file_bytes=300_000, in_place=in_place)
    parts = {"model": source, "exp_avg": source}
    return writer.save(step, Content(parts, {"config.json": b"{}"}, {"step": step}))


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def read_shares(rank, size, folder):
    reader = CheckpointReader(folder)
    mine = {fragment.spec.name: fragment for fragment in sharded(tensors(5), rank, size)}
    return all(torch.equal(reader.read(name, f.ranges), f.values) for name, f in mine.items()) and len(mine)


def test_every_world_size_writes_the_same_bytes_and_reads_those_of_another(tmp_path):
    expected = None
    for size, in_place in [(1, False), (2, False), (2, True), (3, True), (3, False), (4, False), (1, True)]:
        run = tmp_path / f"{size}{'-in-place' * in_place}"
        records = run_distributed(save, size, run, 1, 5, in_place)
        assert [record.directory for record in records] == ["step-000005.a1"] * size
        folder = run / "step-000005.a1"
        assert verify_checkpoint(str(folder)) == []
        expected = expected or contents(folder)
        assert contents(folder) == expected
    assert len([name for name in expected if name.startswith("model-")]) > 4
    assert run_distributed(read_shares, 3, str(tmp_path / "2" / "step-000005.a1")) == [9, 9, 9]


# --- memory ---------------------------------------------------------------------------------------------------------

TENSOR_BYTES = 48 * 2**20


def big(rank, size):
    """Each rank holds half of every tensor, made when it is asked for, as from a device."""
    numel = TENSOR_BYTES // 4
    for number in range(6):
        ranges = shares(numel, rank, size)
        values = torch.full((ranges[0][1] - ranges[0][0],), float(number))
        yield Fragment(TensorSpec(f"w{number}", (numel,), "F32"), ranges, values)


def resident_bytes(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def growth_of_a_save(rank, size, run, in_place):
    # glibc's mallopt(M_MMAP_THRESHOLD): freed tensors go back to the system, so that what is held is what is seen.
    ctypes.CDLL(None).mallopt(-3, 2**20)
    save(rank, size, f"{run}/small", 1, 1, in_place)  # whatever is imported or set up once
    writer = CheckpointWriter(run, 1, announce, Peers(rank, size), max_file_bytes=TENSOR_BYTES, in_place=in_place)
    before = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM, the peak, back to now (proc(5))
    writer.save(1, Content({"model": lambda: big(rank, size)}))
    return resident_bytes("VmHWM") - before


@pytest.mark.parametrize("in_place", [False, True])
def test_a_rank_needs_memory_for_two_tensors_and_never_for_a_model(tmp_path, in_place):
    growths = run_distributed(growth_of_a_save, 2, str(tmp_path), in_place)
    assert verify_checkpoint(str(tmp_path / "step-000001.a1")) == []
    # On top of two tensors come chunks that wait for storage or the network; the model is six.
    assert max(growths) < 2 * TENSOR_BYTES + 32 * 2**20, growths


def live(values, rank, size):
    """The rank's half of fp32 masters, published as bf16: cast on the way."""
    for name, tensor in values.items():
        ranges = shares(tensor.numel(), rank, size)
        yield Fragment(TensorSpec(name, tuple(tensor.shape), "BF16"), ranges, tensor[ranges[0][0] : ranges[0][1]])


def growth_beside_live_masters(rank, size, run, in_place):
    ctypes.CDLL(None).mallopt(-3, 2**20)
    values = {f"w{i}": torch.full((48 * 2**20,), 1.0 + i) for i in range(3)}
    save(rank, size, f"{run}/small", 1, 1, in_place)
    writer = CheckpointWriter(run, 1, announce, Peers(rank, size), in_place=in_place)
    before = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    writer.save(1, Content({"model": lambda: live(values, rank, size)}))
    return resident_bytes("VmHWM") - before


@pytest.mark.parametrize("in_place", [False, True])
def test_a_save_of_live_masters_takes_at_most_64_mb(tmp_path, in_place):
    """Not even one tensor (96 MiB as published) is copied as a whole."""
    growths = run_distributed(growth_beside_live_masters, 2, str(tmp_path), in_place)
    assert max(growths) < 64 * 2**20, growths
    read = CheckpointReader(str(tmp_path / "step-000001.a1"))
    assert [read.read(f"w{i}", [(10**7, 10**7 + 3)]).tolist() for i in range(3)] == [[1.0 + i] * 3 for i in range(3)]


# --- kills ----------------------------------------------------------------------------------------------------------

WATCHED = {
    storage: ("write_bytes", "read_range", "read_bytes", "open_write", "create_exclusive", "info", "make_file"),
    storage.RangeFile: ("write", "close"),
    Peers: ("gather", "send", "receive"),
}


def counted(kill_at):
    """Replace everything that touches storage or another rank by a version that counts, and at the `kill_at`-th call
    kills this process; returns the counter."""
    calls = []
    lock = threading.Lock()

    def watch(call):
        @functools.wraps(call)
        def watched(*args, **kwargs):
            with lock:
                calls.append(call.__name__)
                if len(calls) == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return watched

    for owner, names in WATCHED.items():
        for name in names:
            setattr(owner, name, watch(getattr(owner, name)))
    return calls


def save_until_killed(rank, size, run, attempt, step, victim, kill_at, in_place=False):
    calls = counted(kill_at if rank == victim else None)
    save(rank, size, run, attempt, step, in_place)
    return calls


@pytest.fixture(scope="module")
def calls_of_saves(tmp_path_factory):
    """What each of three ranks calls in an undisturbed save, by whether it is in place."""
    folders = {in_place: tmp_path_factory.mktemp("run") for in_place in (False, True)}
    return {p: run_distributed(save_until_killed, 3, f, 1, 5, None, None, p) for p, f in folders.items()}


def pytest_generate_tests(metafunc):
    if "moment" in metafunc.fixturenames:
        draw = random.Random(7)
        drawn = [(round(draw.random(), 3), number % 2 == 1) for number in range(8)]
        metafunc.parametrize(("moment", "in_place"), drawn)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_kill_at_any_moment_of_a_save_leaves_the_last_commit(tmp_path, calls_of_saves, victim, moment, in_place):
    run_distributed(save, 3, tmp_path, 1, 5)
    before = contents(tmp_path / "step-000005.a1")
    # Rank 0's last calls come after its commit: the record exists then, and that is right.
    calls = calls_of_saves[in_place][victim]
    last = calls.index("create_exclusive") + 1 if victim == 0 else len(calls) - 2
    kill_at = 1 + int(moment * last)
    outcomes = start_distributed(save_until_killed, 3, tmp_path, 1, 10, victim, kill_at, in_place).join()
    assert outcomes[victim].exit_code == -signal.SIGKILL
    assert all(outcome.error is not None for outcome in outcomes)
    assert [record.step for record in list_commits(str(tmp_path), pytest.fail)] == [5]

    assert run_distributed(save, 2, tmp_path, 2, 10)[0].directory == "step-000010.a2"
    assert latest(str(tmp_path), pytest.fail).step == 10
    assert contents(tmp_path / "step-000005.a1") == before
    for name in ("step-000005.a1", "step-000010.a2"):
        assert verify_checkpoint(str(tmp_path / name)) == []


@pytest.mark.parametrize("victim", [0, 1])
def test_a_kill_at_the_commit_itself(tmp_path, calls_of_saves, victim):
    """The last call before the record exists, and the first after it."""
    calls_of_a_save = calls_of_saves[False]
    calls = calls_of_a_save[victim]
    kill_at = calls.index("create_exclusive") + 1 if victim == 0 else len(calls) - 2
    start_distributed(save_until_killed, 3, tmp_path, 1, 5, victim, kill_at).join()
    assert list_commits(str(tmp_path), pytest.fail) == []
    start_distributed(save_until_killed, 3, tmp_path, 2, 5, 0, calls_of_a_save[0].index("create_exclusive") + 2).join()
    assert latest(str(tmp_path), pytest.fail).directory == "step-000005.a2"
    assert verify_checkpoint(str(tmp_path / "step-000005.a2")) == []


# --- failures that are told -----------------------------------------------------------------------------------------


def save_with_a_full_disk_on_rank_1(rank, size, run):
    if rank == 1:
        open_write = storage.open_write

        def full(url, **options):
            if "exp_avg" in url:
                raise OSError(28, "No space left on device")
            return open_write(url, **options)

        storage.open_write = full
    try:
        save(rank, size, run, 1, 5)
    except Exception as error:
        return type(error).__name__, str(error)


def test_a_disk_that_is_full_for_one_rank_is_told_to_all(tmp_path):
    outcomes = run_distributed(save_with_a_full_disk_on_rank_1, 3, tmp_path)
    assert [kind for kind, _ in outcomes] == ["InfrastructureError", "OSError", "InfrastructureError"]
    assert all("No space left" in message for _, message in outcomes)
    assert outcomes[0][1].startswith("rank 1 failed writing model, exp_avg")
    assert list_commits(str(tmp_path), pytest.fail) == []
