"""What is not trained is written once: later checkpoints have the same file under another name, or the store's copy."""

from __future__ import annotations

import shutil
from pathlib import Path

import fsspec
import pytest
import torch

from ftlaunch.distributed import storage
from ftlaunch.distributed.checkpoint.content import Content
from ftlaunch.distributed.checkpoint.manifest import read_manifest
from ftlaunch.distributed.checkpoint.reader import CheckpointReader, read_whole
from ftlaunch.distributed.checkpoint.save import CheckpointWriter
from ftlaunch.distributed.checkpoint.staging import Staging
from ftlaunch.distributed.checkpoint.verify import verify_checkpoint

FROZEN = {f"frozen.{i}": torch.arange(40.0 + i) for i in range(3)}


def trained(step):
    return {f"trained.{i}": torch.arange(30.0 + i) * step for i in range(4)}


def save(run, threads, fragmented, steps=(1, 2, 3), *, size=3, in_place=False, copied=False, between=None):
    """Save several steps; the frozen tensors are fragmented alike each time."""
    by_step = {step: fragmented(trained(step) | FROZEN, size, 7) for step in steps}

    def work(peers):
        writer = CheckpointWriter(run, 1, lambda *_, **__: None, peers, max_file_bytes=200, in_place=in_place)
        staging = Staging()
        for step in steps:
            parts = {"model": by_step[step][peers.rank].__iter__}
            content = Content(parts, {"config.json": b"{}"}, {"step": step}, frozen=frozenset(FROZEN))
            if copied:
                content = staging.copy(content, writer.plan(content))
                assert staging_bytes(staging) < sum(t.numel() * 4 for t in trained(1).values()) + 64 * 7
            writer.save(step, content)
            peers.gather(None)
            if between and peers.rank == 0:
                between(step)
            peers.gather(None)

    results, _ = threads(size, work)
    assert results == [None] * size, results


def staging_bytes(staging):
    return sum(len(buffer) for buffer in staging._buffers.values())


def files_of(run, step):
    directory = storage.join(run, f"step-{step:06d}.a1")
    reader = CheckpointReader(directory)
    for name, tensor in (trained(step) | FROZEN).items():
        assert torch.equal(read_whole(reader, name), tensor)
    assert verify_checkpoint(directory) == []
    frozen = {file.name for name, (file, _) in reader.files.places.items() if name in FROZEN}
    mixed = {file.name for name, (file, _) in reader.files.places.items() if name not in FROZEN}
    assert frozen
    assert not frozen & mixed
    return directory, frozen, mixed


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
def test_frozen_files_are_one_file_with_several_names(tmp_path, threads, fragmented, in_place, copied):
    save(str(tmp_path), threads, fragmented, in_place=in_place, copied=copied)
    inodes = []
    for step in (1, 2, 3):
        directory, frozen, mixed = files_of(str(tmp_path), step)
        inodes.append({name: (Path(directory) / name).stat().st_ino for name in sorted(frozen)})
        assert all((Path(directory) / name).stat().st_nlink == 1 for name in mixed)
    assert inodes[0] == inodes[1] == inodes[2]
    spans = [{f.path: f for f in read_manifest(str(tmp_path / f"step-00000{s}.a1")).files} for s in (1, 2)]
    assert all(spans[0][name] == spans[1][name] for name in frozen)


def test_a_checkpoint_stays_whole_when_the_one_it_was_linked_from_goes(tmp_path, threads, fragmented):
    save(str(tmp_path), threads, fragmented, steps=(1, 2), in_place=True)
    shutil.rmtree(tmp_path / "step-000001.a1")
    assert files_of(str(tmp_path), 2)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_what_cannot_be_linked_is_written_again(tmp_path, threads, fragmented, damage, in_place):
    def harm(step):
        if step == 1:
            directory, frozen, _ = files_of(str(tmp_path), 1)
            path = Path(directory) / min(frozen)
            path.unlink()
            if damage == "cut":
                path.write_bytes(b"short")

    save(str(tmp_path), threads, fragmented, steps=(1, 2), in_place=in_place, between=harm)
    assert files_of(str(tmp_path), 2)


def test_a_store_copies_by_itself(threads, fragmented, monkeypatch):
    uploaded = []
    open_write = storage.open_write
    monkeypatch.setattr(
        storage, "open_write", lambda url, **options: uploaded.append(url) or open_write(url, **options)
    )
    run = "memory://bucket/run"
    save(run, threads, fragmented)
    for step in (1, 2, 3):
        _, frozen, mixed = files_of(run, step)
        ours = {url.rpartition("/")[2] for url in uploaded if f"step-00000{step}" in url}
        assert ours == (mixed | frozen if step == 1 else mixed)
    fsspec.filesystem("memory").rm("/bucket", recursive=True)


def test_a_store_that_cannot_copy_gets_the_bytes_again(threads, fragmented, monkeypatch):
    monkeypatch.setattr(storage, "link", lambda source, target: False)
    save("memory://bucket/run", threads, fragmented, steps=(1, 2))
    assert files_of("memory://bucket/run", 2)
    fsspec.filesystem("memory").rm("/bucket", recursive=True)
