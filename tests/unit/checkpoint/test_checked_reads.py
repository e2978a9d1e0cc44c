"""What is read to resume is held against the checksums of the save, whatever ranges a rank takes."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from ftlaunch.distributed import storage
from ftlaunch.distributed.checkpoint import reader as reader_module
from ftlaunch.distributed.checkpoint.content import Content
from ftlaunch.distributed.checkpoint.manifest import DamagedError, read_checked, read_manifest
from ftlaunch.distributed.checkpoint.peers import Peers
from ftlaunch.distributed.checkpoint.reader import CheckpointReader, Memory, read_whole
from ftlaunch.distributed.checkpoint.save import CheckpointWriter

TENSORS = {f"w{i}": torch.arange(float(size)) + i for i, size in enumerate((0, 1, 700, 90, 1300, 7))}


@pytest.fixture
def saved(tmp_path, fragmented, monkeypatch):
    monkeypatch.setattr("ftlaunch.distributed.checkpoint.exchange.CHUNK_BYTES", 256)
    monkeypatch.setattr(reader_module, "SMALL_BYTES", 1000)
    monkeypatch.setattr(reader_module, "READ_BYTES", 512)
    writer = CheckpointWriter(str(tmp_path), 1, lambda *_, **__: None, Peers(), max_file_bytes=4000)
    plan = writer.plan(content := Content({"model": fragmented(TENSORS, 1, 0)[0].__iter__}))
    object.__setattr__(plan["model"], "chunk_bytes", 256)
    writer.save(1, content)
    directory = tmp_path / "step-000001.a1"
    return directory, {file.path: file.spans for file in read_manifest(str(directory)).files}


def ranges_of(numel, draw):
    cuts = sorted(draw.randint(0, numel) for _ in range(6))
    return [(a, b) for a, b in zip(cuts[::2], cuts[1::2], strict=True) if a < b]


def read_all(directory, spans, seed=0):
    """Read everything, in whole and in ranges; what was found damaged. Without damage all must be equal."""
    reader, draw = CheckpointReader(str(directory), spans=spans), random.Random(seed)
    equal = []
    for name, tensor in TENSORS.items():
        equal.append(torch.equal(read_whole(reader, name), tensor))
        for ranges in (ranges_of(len(tensor), draw) for _ in range(5)):
            if ranges:
                equal.append(torch.equal(reader.read(name, ranges), torch.cat([tensor[a:b] for a, b in ranges])))
    assert all(equal) or reader.damaged
    return reader.damaged


def test_any_ranges_are_read_and_checked(saved):
    directory, spans = saved
    assert max(len(of_file) for of_file in spans.values()) > 5
    for seed in range(10):
        assert read_all(directory, spans, seed) == []


def test_any_flipped_bit_is_named_where_it_is_read(saved):
    directory, spans = saved
    draw = random.Random(1)
    for path in Path(directory).glob("model*"):
        whole = path.read_bytes()
        for _ in range(12):
            flipped = bytearray(whole)
            place = draw.randrange(len(whole))
            flipped[place] ^= 1 << draw.randrange(8)
            path.write_bytes(flipped)
            try:
                problems = read_all(directory, spans)
            except DamagedError as error:  # a header or an index, which nothing can be read without
                problems = [str(error)]
            assert problems
            for problem in problems:
                begin, end = problem.removeprefix(f"{path}: bytes ").split(" are not what")[0].split(" to ")
                assert int(begin) <= place < int(end)
        path.write_bytes(whole)
    assert read_all(directory, spans) == []


def test_a_read_that_went_wrong_once_is_made_again(saved, monkeypatch):
    directory, spans = saved
    name = min(name for name in spans if name.endswith(".safetensors"))
    read_range, calls = storage.read_range, []

    def wrong_once(url, start, stop):
        calls.append(url)
        data = read_range(url, start, stop)
        return data[::-1] if len(calls) == 1 else data

    monkeypatch.setattr(storage, "read_range", wrong_once)
    assert bytes(read_checked(str(directory), name, spans[name], 3, 9)) == (directory / name).read_bytes()[3:9]
    assert len(calls) == 2
    assert read_checked(str(directory), name, spans[name], 5, 5) == b""


def test_what_is_held_is_not_read_over(saved):
    """Memory is used again only where nobody looks at it any more, not even at a part of it; readers may share it."""
    directory, spans = saved
    memory = Memory()
    readers = [CheckpointReader(str(directory), spans=spans, memory=memory) for _ in range(2)]
    kept = {name: read_whole(reader, name) for name in TENSORS for reader in readers}
    part = read_whole(readers[0], "w4")[3:5]
    assert all(torch.equal(tensor, TENSORS[name]) for name, tensor in kept.items())
    assert torch.equal(part, TENSORS["w4"][3:5])
    del kept, part
    places = {read_whole(reader, "w4").data_ptr() for reader in readers}
    assert len(places) == 1 and read_whole(readers[0], "w1").data_ptr() in places
