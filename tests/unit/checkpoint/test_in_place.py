"""Ranges that several ranks write into the same files: who writes what, whose checksum, and where this may be done."""

from __future__ import annotations

import itertools
import os
import random
import zlib
from pathlib import Path

import pytest
import torch

from ftlaunch.distributed import storage, storage_in_place
from ftlaunch.distributed.checkpoint import in_place, shared
from ftlaunch.distributed.checkpoint.crc import combine_crc32
from ftlaunch.distributed.checkpoint.dealing import by_holder
from ftlaunch.distributed.checkpoint.exchange import CHUNK_BYTES, deal
from ftlaunch.distributed.checkpoint.fragments import TensorSpec
from ftlaunch.distributed.checkpoint.parts import Part, plan_part
from ftlaunch.distributed.checkpoint.peers import Peers
from ftlaunch.distributed.checkpoint.reader import CheckpointReader, read_whole
from ftlaunch.recipes.errors import InfrastructureError


def test_checksums_of_halves_are_combined():
    draw = random.Random(0)
    for _ in range(200):
        data = draw.randbytes(draw.choice([0, 1, 2, 3, 17, 255, 4096, 70_001]))
        cut = draw.randint(0, len(data))
        first, second = data[:cut], data[cut:]
        assert combine_crc32(zlib.crc32(first), zlib.crc32(second), len(second)) == zlib.crc32(data)


def test_replicas_are_dealt_by_bytes():
    """Three ranks hold all of a large tensor and of many small ones; a fourth has something of its own already."""
    elements = CHUNK_BYTES // 4
    sizes = {"large": elements * 9 + 5} | {f"small{i}": elements // 3 for i in range(30)}
    specs = [TensorSpec(name, (size,), "F32") for name, size in sizes.items()]
    load = [0, 0, CHUNK_BYTES * 4, 0]
    for spec in specs:
        whole = ((0, spec.shape[0]),)
        segments = deal([whole, whole, whole, ()], spec, load)
        assert [segments[0].start, segments[-1].stop] == [0, spec.shape[0]]
        assert all(one.stop == other.start and one.rank != other.rank for one, other in itertools.pairwise(segments))
        assert all(segment.start % elements == 0 for segment in segments)  # spans stay with one writer
    assert load[3] == 0
    assert max(load[:3]) - min(load[:3]) <= CHUNK_BYTES


def test_elements_are_dealt_only_to_who_holds_them():
    spec = TensorSpec("w", (100,), "F32")
    segments = deal([((0, 60),), ((40, 100),), ()], spec, [0, 0, 0])
    assert [tuple(segment) for segment in segments] == [(0, 40, 0), (40, 60, 1), (60, 100, 1)]
    with pytest.raises(ValueError, match="no rank holds elements 60 to 61"):
        deal([((0, 60),), ((61, 100),)], spec, [0, 0])


def run(threads, fragmented, folder, size=3, tensors=None):
    fragments = fragmented(tensors or {f"w{i}": torch.arange(100.0) + i for i in range(6)}, size, 1)

    def work(peers):
        source = fragments[peers.rank].__iter__
        plan = plan_part(source, "model", peers, max_file_bytes=400, deal=by_holder)
        return in_place.save_in_place([Part(source, str(folder), plan)], peers)["model"]

    return threads(size, work)


def test_no_byte_passes_between_ranks(tmp_path, threads, fragmented, monkeypatch):
    monkeypatch.setattr(in_place, "OPEN_FILES", 2)  # files are closed and opened again
    results, hub = run(threads, fragmented, tmp_path)
    assert hub.sent_bytes == 0
    assert sum(map(len, results)) == 6
    assert torch.equal(read_whole(CheckpointReader(str(tmp_path)), "w5"), torch.arange(100.0) + 5)


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fsync"])
def test_a_disk_that_fails_is_told_to_all(tmp_path, threads, fragmented, monkeypatch, call):
    real, calls = getattr(os, call), []

    def full(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(storage_in_place.os, call, full)
    results, _ = run(threads, fragmented, tmp_path)
    assert all(isinstance(result, Exception) and "o space" in str(result) for result in results), results


def test_a_file_system_that_cannot_reserve_is_written_all_the_same(tmp_path, threads, fragmented, monkeypatch):
    def cannot(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(storage_in_place.os, "posix_fallocate", cannot)
    run(threads, fragmented, tmp_path)
    assert torch.equal(read_whole(CheckpointReader(str(tmp_path)), "w5"), torch.arange(100.0) + 5)


def test_a_write_that_ends_early_is_continued(tmp_path, monkeypatch):
    real = os.pwrite
    monkeypatch.setattr(storage_in_place.os, "pwrite", lambda fd, data, at: real(fd, data[:7], at))
    url = str(tmp_path / "new" / "file")
    storage.make_file(url, 50)
    file = storage.RangeFile(url)
    file.write(10, memoryview(bytes(range(40))))
    file.close(sync=True)
    assert (tmp_path / "new" / "file").read_bytes() == bytes(10) + bytes(range(40))
    with pytest.raises(InfrastructureError):
        storage.make_file(url, 50)  # nobody else's file is written to


# --- where it may be done -------------------------------------------------------------------------------------------


def test_ranks_that_see_one_local_folder_share_it(tmp_path, threads):
    results, _ = threads(3, lambda peers: shared.share_local_folder(str(tmp_path), peers))
    assert results == [True] * 3
    assert list(tmp_path.iterdir()) == []
    assert shared.share_local_folder(f"file://{tmp_path}", Peers())


def test_a_bucket_is_not_shared():
    assert not shared.share_local_folder("memory://bucket/run", Peers())


def test_other_folders_of_the_same_name_are_not_shared(tmp_path, threads):
    """As on two hosts: rank 1 has a folder of that name too."""
    urls = [str(tmp_path / name) for name in ("a", "b", "a")]
    for url in urls:
        Path(url).mkdir(exist_ok=True)
    results, _ = threads(3, lambda peers: shared.share_local_folder(urls[peers.rank], peers))
    assert results == [False] * 3


@pytest.mark.parametrize("differs", ["host", "boot", "file system"])
def test_ranks_of_different_hosts_do_not_share(tmp_path, threads, monkeypatch, differs):
    """A network file system gives all hosts the same file; host names may repeat, boot ids do not."""
    calls = []

    def one_of_two(*_):
        calls.append(None)
        return f"value-{len(calls) % 2}"

    if differs == "host":
        monkeypatch.setattr(shared.socket, "gethostname", one_of_two)
    elif differs == "boot":
        boots = [tmp_path / "boot-0", tmp_path / "boot-1"]
        for boot in boots:
            boot.write_text(boot.name)
        monkeypatch.setattr(
            shared,
            "BOOT_ID",
            type(
                "Boot",
                (),
                {
                    "exists": staticmethod(lambda: True),
                    "read_text": staticmethod(one_of_two),
                },
            ),
        )
    else:
        monkeypatch.setattr(shared, "file_system", lambda _: "nfs4")
    results, _ = threads(2, lambda peers: shared.share_local_folder(str(tmp_path), peers))
    assert results == [False] * 2


def test_the_file_system_of_a_folder_is_that_of_its_mount(tmp_path):
    assert shared.file_system(Path("/proc/self/fd")) == "proc"
    assert shared.file_system(Path("/dev/shm")) == "tmpfs"
    assert shared.file_system(tmp_path) not in ("", "proc")
