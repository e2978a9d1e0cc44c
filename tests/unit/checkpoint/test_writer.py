"""Writing and reading parts: any tensors, any fragmentation, any number of ranks, the same bytes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ftlaunch.distributed import storage
from ftlaunch.distributed.checkpoint import reader as reader_module
from ftlaunch.distributed.checkpoint.fragments import Fragment, TensorSpec
from ftlaunch.distributed.checkpoint.in_place import save_part_in_place
from ftlaunch.distributed.checkpoint.layout import plan_files, read_header
from ftlaunch.distributed.checkpoint.parts import plan_part
from ftlaunch.distributed.checkpoint.peers import Peers
from ftlaunch.distributed.checkpoint.reader import CheckpointReader
from ftlaunch.distributed.checkpoint.writer import save_part
from ftlaunch.recipes.errors import InfrastructureError, UserError

DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.bool]
SHAPES = st.lists(st.integers(0, 7), max_size=3).map(tuple)
TENSORS = st.lists(st.tuples(SHAPES, st.sampled_from(DTYPES)), min_size=1, max_size=8)


def build(described):
    generator = torch.Generator().manual_seed(0)
    return {
        f"layer.{number}": torch.randint(0, 2 if dtype == torch.bool else 99, shape, generator=generator).to(dtype)
        for number, (shape, dtype) in enumerate(described)
    }


def save(fragments, folder, threads, stem="model", max_file_bytes=200, *, in_place=False):
    """Save what each rank holds, in chunks so small that tensors of a few elements have several."""

    def work(peers):
        source = fragments[peers.rank].__iter__
        plan = plan_part(source, stem, peers, max_file_bytes=max_file_bytes, in_place=in_place)
        write = save_part_in_place if in_place else save_part
        return write(source, str(folder), replace(plan, chunk_bytes=16), peers)

    return threads(len(fragments), work)


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@settings(max_examples=60)
@given(described=TENSORS, size=st.integers(1, 5), seed=st.integers(0, 2**32))
def test_any_fragmentation_gives_the_same_bytes(threads, fragmented, described, size, seed):
    tensors = build(described)
    with TemporaryDirectory() as alone, TemporaryDirectory() as together:
        save(fragmented(tensors, 1, 0), alone, threads)
        results, _ = save(fragmented(tensors, size, seed), together, threads)
        assert all(isinstance(records, list) for records in results), results
        expected = contents(alone)
        assert contents(together) == expected
        loaded = {}
        for path in Path(together).iterdir():
            loaded |= safetensors.torch.load_file(path)
        assert {n: t.dtype for n, t in loaded.items()} == {n: t.dtype for n, t in tensors.items()}
        assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
        records = {record.path: record for ranks in results for record in ranks}
        assert {name: record.size for name, record in records.items()} == {
            n: len(c) for n, c in contents(alone).items()
        }
    with TemporaryDirectory() as in_place:
        results, _ = save(fragmented(tensors, size, seed), in_place, threads, in_place=True)
        assert all(isinstance(records, list) for records in results), results
        assert contents(in_place) == expected
        assert {record.path: record for ranks in results for record in ranks} == records


@settings(max_examples=40)
@given(described=TENSORS, seed=st.integers(0, 2**32))
def test_any_ranges_are_read_back(threads, fragmented, described, seed):
    tensors = build(described)
    with TemporaryDirectory() as folder:
        save(fragmented(tensors, 1, 0), folder, threads)
        if "model.safetensors" not in contents(folder):
            (Path(folder) / "model.safetensors.index.json").write_bytes(index_of(tensors))
        reader = CheckpointReader(folder)
        assert sorted(reader.names()) == sorted(tensors)
        for fragment in (f for rank in fragmented(tensors, 3, seed) for f in rank):
            assert reader.spec(fragment.spec.name) == fragment.spec
            assert torch.equal(reader.read(fragment.spec.name, fragment.ranges), fragment.values)
        for name, tensor in tensors.items():
            assert torch.equal(reader.read_tensor(name), tensor)


def index_of(tensors):
    specs = [fragment.spec for fragment in fragments_of_one(tensors)]
    return plan_files(specs, stem="model", max_file_bytes=200).index()


def fragments_of_one(tensors):
    name = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64", torch.bool: "BOOL"}
    for key, tensor in tensors.items():
        spec = TensorSpec(key, tuple(tensor.shape), name[tensor.dtype])
        yield Fragment(spec, ((0, tensor.numel()),), tensor.reshape(-1))


def test_a_large_range_is_read_in_parts(tmp_path, threads, fragmented, monkeypatch):
    monkeypatch.setattr(reader_module, "READ_BYTES", 64)
    monkeypatch.setattr(reader_module, "SMALL_BYTES", 0)
    tensors = {"w": torch.arange(1000.0)}
    save(fragmented(tensors, 1, 0), tmp_path, threads)
    reader = CheckpointReader(str(tmp_path))
    assert torch.equal(
        reader.read("w", [(3, 500), (500, 510), (900, 1000)]), torch.cat([tensors["w"][3:510], tensors["w"][900:]])
    )
    with pytest.raises(ValueError, match="elements 0 to 1001"):
        reader.read("w", [(0, 1001)])
    with pytest.raises(KeyError):
        reader.spec("v")


def test_small_neighbours_are_read_together(tmp_path, threads, fragmented, monkeypatch):
    monkeypatch.setattr(reader_module, "SMALL_BYTES", 400)
    sizes = [100, 100, 0, 50, 101, 7, 8]
    tensors = {f"w{i}": torch.arange(float(size)) + i for i, size in enumerate(sizes)}
    save(fragmented(tensors, 1, 0), tmp_path, threads, max_file_bytes=10_000)
    reader = CheckpointReader(str(tmp_path))
    lengths = []
    read_range = storage.read_range

    def counted(url, start, stop):
        lengths.append((stop - start) // 4)
        return read_range(url, start, stop)

    monkeypatch.setattr(storage, "read_range", counted)
    for name, tensor in tensors.items():
        assert torch.equal(reader.read_tensor(name), tensor)
    assert lengths == [250, 101, 15]
    assert torch.equal(reader.read("w1", [(3, 5)]), tensors["w1"][3:5])


def test_what_the_owner_holds_itself_is_not_sent(tmp_path, threads):
    tensors = {f"w{i}": torch.arange(100.0) + i for i in range(6)}
    replicated = [list(fragments_of_one(tensors)) for _ in range(3)]
    results, hub = save(replicated, tmp_path, threads, max_file_bytes=400)
    assert all(isinstance(records, list) for records in results), results
    assert hub.sent_bytes == 0
    assert [len(records) for records in results] == [2, 2, 2]


def test_replicas_on_others_send_once(tmp_path, threads, fragmented):
    """Two of three ranks hold everything; the third owns files as well and gets each element from one of them."""
    tensors = {f"w{i}": torch.arange(100.0) + i for i in range(6)}
    whole = list(fragments_of_one(tensors))
    nothing = [Fragment(f.spec, (), f.values[:0]) for f in whole]
    results, hub = save([whole, whole, nothing], tmp_path, threads, max_file_bytes=400)
    assert hub.sent_bytes == sum(record.size for record in results[2]) - sum(header_bytes(tmp_path, results[2]))
    assert torch.equal(CheckpointReader(str(tmp_path)).read_tensor("w5"), tensors["w5"])


def header_bytes(folder, records):
    return [len(read_header(str(folder / record.path), record.path).header) for record in records]


# --- failures -------------------------------------------------------------------------------------------------------


def test_a_source_that_fails_on_one_rank_fails_on_all(tmp_path, threads, fragmented):
    fragments = fragmented({f"w{i}": torch.arange(100.0) for i in range(6)}, 3, 1)

    def work(peers):
        plan = plan_part(fragments[peers.rank].__iter__, "model", peers, max_file_bytes=400)

        def source():
            for number, fragment in enumerate(fragments[peers.rank]):
                if peers.rank == 1 and number == 2:
                    raise RuntimeError("out of memory")
                yield fragment

        return save_part(source, str(tmp_path), plan, peers)

    results, _ = threads(3, work)
    assert [type(result) for result in results] == [InfrastructureError, RuntimeError, InfrastructureError]
    assert str(results[0]) == "rank 1 failed writing model: out of memory"


def test_storage_that_fails_on_one_rank_fails_on_all(tmp_path, threads, fragmented, monkeypatch):
    fragments = fragmented({f"w{i}": torch.arange(100.0) for i in range(6)}, 3, 1)
    open_write = storage.open_write

    def full(url):
        if "00002-of" in url:
            raise UserError(f"{url}: no space")
        return open_write(url)

    monkeypatch.setattr(storage, "open_write", full)
    results, _ = save(fragments, tmp_path, threads, max_file_bytes=400)
    assert [type(result) for result in results] == [UserError] * 3
    assert all("no space" in str(result) for result in results)
    assert not any("00002" in name or name.startswith(".") for name in contents(tmp_path))


def test_ranks_that_name_other_tensors_are_told(tmp_path, threads, fragmented):
    one = fragmented({"a": torch.zeros(4)}, 1, 0)[0]
    other = fragmented({"b": torch.zeros(4)}, 1, 0)[0]
    results, _ = save([one, other], tmp_path, threads)
    assert all("same tensors of model in the same order" in str(result) for result in results)


def test_elements_that_nobody_holds_are_found(tmp_path, threads):
    spec = TensorSpec("a", (4,), "F32")
    results, _ = save([[Fragment(spec, ((0, 3),), torch.zeros(3))]], tmp_path, threads)
    assert str(results[0]) == "model, tensor a: no rank holds elements 3 to 4"


def test_a_source_that_changes_between_saves_is_found(tmp_path, fragmented):
    planned = fragmented({"a": torch.zeros(4), "b": torch.zeros(2)}, 1, 0)[0]
    plan = plan_part(planned.__iter__, "model", Peers())
    for now in (planned[:1], planned[::-1]):
        with pytest.raises(ValueError, match=r"shorter|not what was planned"):
            save_part(now.__iter__, str(tmp_path), plan, Peers())


def test_a_part_without_tensors_is_a_file_without_tensors(tmp_path):
    plan = plan_part([].__iter__, "master", Peers())
    assert [record.path for record in save_part([].__iter__, str(tmp_path), plan, Peers())] == ["master.safetensors"]
    assert CheckpointReader(str(tmp_path), "master").names() == []
