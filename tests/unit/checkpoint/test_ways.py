"""Writing and reading parts: any tensors, any fragmentation, any number of ranks, the same bytes."""

from __future__ import annotations

import threading
import zlib
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ftlaunch.distributed import storage
from ftlaunch.distributed.checkpoint import reader as reader_module
from ftlaunch.distributed.checkpoint import uploads
from ftlaunch.distributed.checkpoint.dealing import by_block, by_file, by_holder
from ftlaunch.distributed.checkpoint.fragments import Fragment, TensorSpec
from ftlaunch.distributed.checkpoint.in_place import save_in_place
from ftlaunch.distributed.checkpoint.layout import plan_files, read_header
from ftlaunch.distributed.checkpoint.parts import Part, plan_part
from ftlaunch.distributed.checkpoint.peers import Peers
from ftlaunch.distributed.checkpoint.reader import CheckpointReader, read_whole
from ftlaunch.distributed.checkpoint.streams import save_streamed
from ftlaunch.distributed.checkpoint.uploads import save_uploaded
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


class Store:
    """Uploads in parts into a folder, as an object store takes them: in any order, seen only when they are finished."""

    def __init__(self):
        self.parts = {}
        self.sent = []
        self.lock = threading.Lock()

    def begin(self, url):
        with self.lock:
            name = f"upload {len(self.parts)}"
            self.parts[name] = {}
        return name

    def send(self, url, upload, number, data, crc32):
        assert zlib.crc32(data) == crc32
        self.parts[upload][number] = bytes(data)
        self.sent.append(url)
        return f"mark {number}"

    def finish(self, url, upload, marks, size):
        parts = self.parts.pop(upload)
        assert marks == [f"mark {number}" for number in range(1, len(parts) + 1)]
        data = b"".join(parts[number] for number in sorted(parts))
        assert len({len(parts[number]) for number in range(1, len(parts))}) <= 1, "all but the last are equal"
        assert len(data) == size
        Path(url).write_bytes(data)

    def abort(self, url, upload):
        self.parts.pop(upload, None)


WAYS = {"in place": (by_holder, save_in_place), "streamed": (by_file, save_streamed), "uploaded": (by_block, None)}


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    """Of an upload: 136 bytes, so that files and their headers have several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "part_bytes", lambda size: 136)
        yield


def save(fragments, folder, threads, stem="model", max_file_bytes=200, *, way="streamed", store=None):
    """Save what each rank holds, in chunks so small that tensors of a few elements have several."""
    deal, write = WAYS[way]
    write = write or partial(save_uploaded, uploads=store or Store())

    def work(peers):
        source = fragments[peers.rank].__iter__
        plan = plan_part(source, stem, peers, max_file_bytes=max_file_bytes, deal=deal)
        return write([Part(source, str(folder), replace(plan, chunk_bytes=16))], peers)[stem]

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
    for way in ("in place", "uploaded"):
        with TemporaryDirectory() as folder:
            results, _ = save(fragmented(tensors, size, seed), folder, threads, way=way)
            assert all(isinstance(records, list) for records in results), results
            assert contents(folder) == expected
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
            assert torch.equal(read_whole(reader, name), tensor)


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
    read_into = storage.read_into

    def counted(url, start, target):
        lengths.append(len(target) // 4)
        read_into(url, start, target)

    monkeypatch.setattr(storage, "read_into", counted)
    for name, tensor in tensors.items():
        assert torch.equal(read_whole(reader, name), tensor)
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
    assert torch.equal(read_whole(CheckpointReader(str(tmp_path)), "w5"), tensors["w5"])


def header_bytes(folder, records):
    return [len(read_header(str(folder / record.path), record.path).header) for record in records]


# --- failures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["streamed", "uploaded"])
def test_a_source_that_fails_on_one_rank_fails_on_all(tmp_path, threads, fragmented, way):
    store = Store()
    deal, write = WAYS[way]
    write = write or partial(save_uploaded, uploads=store)
    fragments = fragmented({f"w{i}": torch.arange(100.0) for i in range(6)}, 3, 1)

    def work(peers):
        plan = plan_part(fragments[peers.rank].__iter__, "model", peers, max_file_bytes=400, deal=deal)

        def source():
            for number, fragment in enumerate(fragments[peers.rank]):
                if peers.rank == 1 and number == 2:
                    raise RuntimeError("out of memory")
                yield fragment

        return write([Part(source, str(tmp_path), plan)], peers)

    results, _ = threads(3, work)
    assert [type(result) for result in results] == [InfrastructureError, RuntimeError, InfrastructureError]
    assert str(results[0]) == "rank 1 failed writing model: out of memory"
    assert store.parts == {}  # parts that become nothing would be paid for
    assert way == "streamed" or contents(tmp_path) == {}


def test_storage_that_fails_on_one_rank_fails_on_all(tmp_path, threads, fragmented, monkeypatch):
    fragments = fragmented({f"w{i}": torch.arange(100.0) for i in range(6)}, 3, 1)
    open_write = storage.open_write

    def full(url, **options):
        if "00002-of" in url:
            raise UserError(f"{url}: no space")
        return open_write(url, **options)

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
            save_streamed([Part(now.__iter__, str(tmp_path), plan)], Peers())


def test_a_part_without_tensors_is_a_file_without_tensors(tmp_path):
    plan = plan_part([].__iter__, "master", Peers())
    records = save_streamed([Part([].__iter__, str(tmp_path), plan)], Peers())["master"]
    assert [record.path for record in records] == ["master.safetensors"]
    assert CheckpointReader(str(tmp_path), "master").names() == []


# --- uploads in parts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", ["begin", "send", "finish"])
def test_an_upload_that_fails_on_one_rank_fails_on_all_and_leaves_nothing(tmp_path, threads, fragmented, fails):
    fragments = fragmented({f"w{i}": torch.arange(100.0) for i in range(6)}, 3, 1)
    store, calls = Store(), []
    real = getattr(store, fails)

    def broken(url, *arguments):
        calls.append(url)
        if "00002-of" in url:
            raise InfrastructureError("the store has a bad day")
        return real(url, *arguments)

    setattr(store, fails, broken)
    results, _ = save(fragments, tmp_path, threads, max_file_bytes=400, way="uploaded", store=store)
    assert all(isinstance(result, InfrastructureError) and "bad day" in str(result) for result in results), results
    assert store.parts == {}
    assert "model-00002-of-00006.safetensors" not in contents(tmp_path)


def test_what_all_hold_is_sent_by_all_and_goes_nowhere_before(tmp_path, threads, monkeypatch):
    tensors = {f"w{i}": torch.arange(100.0) + i for i in range(6)}
    replicated = [list(fragments_of_one(tensors)) for _ in range(3)]
    by_rank = {rank: Store() for rank in range(3)}
    shared = by_rank[0].parts
    for store in by_rank.values():
        store.parts = shared  # one store, and who has sent how much

    def work(peers):
        source = replicated[peers.rank].__iter__
        plan = plan_part(source, "model", peers, max_file_bytes=10_000, deal=by_block)
        return save_uploaded([Part(source, str(tmp_path), plan)], peers, by_rank[peers.rank])

    results, hub = threads(3, work)
    assert not any(isinstance(result, Exception) for result in results), results
    assert hub.sent_bytes == 0
    counts = [len(store.sent) for store in by_rank.values()]
    assert max(counts) - min(counts) <= 1
    assert torch.equal(read_whole(CheckpointReader(str(tmp_path)), "w5"), tensors["w5"])


def test_blocks_are_written_by_who_holds_them(tmp_path, threads):
    """Each of three ranks holds a third of the rows: only blocks across two ranks' rows move, and never the larger
    share of one."""
    tensors = {f"w{i}": torch.arange(900.0) + i for i in range(4)}
    sharded = [
        [
            replace(f, ranges=((300 * rank, 300 * rank + 300),), values=f.values[300 * rank : 300 * rank + 300])
            for f in fragments_of_one(tensors)
        ]
        for rank in range(3)
    ]
    results, hub = save(sharded, tmp_path, threads, max_file_bytes=100_000, way="uploaded")
    assert all(isinstance(records, list) for records in results), results
    assert hub.sent_bytes <= 12 * 136 / 2 + 3 * 136  # twelve borders; a few blocks go elsewhere, for balance
    assert torch.equal(read_whole(CheckpointReader(str(tmp_path)), "w3"), tensors["w3"])


def test_few_blocks_are_in_memory(tmp_path, threads, fragmented, monkeypatch):
    """One rank fills eight files side by side; blocks on their way and those being filled are bounded."""
    tensors = {f"w{i}": torch.arange(400.0) + i for i in range(64)}
    made = []
    block = uploads._Block

    def watched(file, number, start, size, memory):
        made.append(id(memory))
        return block(file, number, start, size, memory)

    monkeypatch.setattr(uploads, "_Block", watched)
    results, _ = save(fragmented(tensors, 1, 0), tmp_path, threads, max_file_bytes=12_800, way="uploaded")
    assert isinstance(results[0], list), results
    assert len(results[0]) == 8
    assert len(set(made)) <= uploads.BLOCKS < len(made)


def test_parts_are_written_side_by_side(tmp_path, threads, fragmented):
    """Of four parts with one file each, four ranks write one each, and no part waits for the end of another."""
    tensors = {f"w{i}": torch.arange(100.0) for i in range(8)}
    stems = ["model", "master", "exp_avg", "exp_avg_sq"]
    fragments = fragmented(tensors, 4, 3)

    def work(peers):
        load = [0] * peers.size
        source = fragments[peers.rank].__iter__
        plans = [plan_part(source, stem, peers, load=load) for stem in stems]
        return save_streamed([Part(source, str(tmp_path), plan) for plan in plans], peers)

    results, _ = threads(4, work)
    assert [[stem for stem, records in result.items() if records] for result in results] == [[stem] for stem in stems]
    for stem in stems:
        assert torch.equal(read_whole(CheckpointReader(str(tmp_path), stem), "w7"), tensors["w7"])
