"""Whole checkpoints: written, verified, committed; and what verification finds."""

from __future__ import annotations

import json
import random

import pytest
import torch

from ftlaunch.distributed import storage
from ftlaunch.distributed.checkpoint.commit import latest, list_commits
from ftlaunch.distributed.checkpoint.manifest import MANIFEST_NAME, read_manifest
from ftlaunch.distributed.checkpoint.peers import Peers
from ftlaunch.distributed.checkpoint.reader import CheckpointReader, read_whole
from ftlaunch.distributed.checkpoint.save import CheckpointWriter, Content
from ftlaunch.distributed.checkpoint.verify import verify_checkpoint
from ftlaunch.recipes.errors import InfrastructureError, Superseded, UserError

TENSORS = {f"layer.{i}.weight": torch.arange(50.0 + i).reshape(-1, 1) for i in range(9)}


class Events(list):
    def __call__(self, kind, **fields):
        self.append({"kind": kind, **fields})


def content_of(fragments, **more):
    parts = {"model": fragments.__iter__, "exp_avg": fragments.__iter__}
    return Content(parts, {"config.json": b"{}", "chat/template.jinja": b"x"}, {"step": 5}, **more)


def save(run, threads, fragmented, *, size=2, attempt=1, step=5, events=None):
    fragments = fragmented(TENSORS, size, 3)

    def work(peers):
        announce = Events() if events is None else events
        writer = CheckpointWriter(str(run), attempt, announce, peers, max_file_bytes=500)
        return writer.save(step, content_of(fragments[peers.rank], metrics={"m": 1.0}))

    results, _ = threads(size, work)
    return results


def test_a_checkpoint_is_whole(tmp_path, threads, fragmented):
    events = Events()
    records = save(tmp_path, threads, fragmented, events=events)
    assert records[0] == records[1] == list_commits(str(tmp_path), events.append)[0]
    assert (records[0].metrics, records[0].directory) == ({"m": 1.0}, "step-000005.a1")
    assert [event["kind"] for event in events] == ["checkpoint_committed"]
    directory = tmp_path / "step-000005.a1"
    assert verify_checkpoint(str(directory)) == []
    stored = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}
    assert stored == {file.path for file in read_manifest(str(directory)).files} | {MANIFEST_NAME}
    assert {"model.safetensors.index.json", "training/exp_avg.safetensors.index.json"} <= stored
    assert json.loads((directory / "training/state.json").read_bytes()) == {"step": 5}
    for reader in (CheckpointReader(str(directory)), CheckpointReader(str(directory / "training"), "exp_avg")):
        assert all(torch.equal(read_whole(reader, name), tensor) for name, tensor in TENSORS.items())


def test_a_rank_that_is_lost_in_the_commit_takes_nothing_back(tmp_path, fragmented):
    """The record is there when the others are told of it; what it names stays, whatever comes of that."""

    def lost(kind, **_):
        raise InfrastructureError(f"the connection to another rank broke: {kind}")

    writer = CheckpointWriter(str(tmp_path), 1, lost, max_file_bytes=500)
    with pytest.raises(InfrastructureError, match="broke: checkpoint_committed"):
        writer.save(5, content_of(fragmented(TENSORS, 1, 3)[0]))
    record = latest(str(tmp_path), pytest.fail)
    assert record is not None and record.step == 5
    assert verify_checkpoint(str(tmp_path / record.directory)) == []


def test_spans_cover_every_byte(tmp_path, threads, fragmented):
    save(tmp_path, threads, fragmented)
    for file in read_manifest(str(tmp_path / "step-000005.a1")).files:
        ends = [0] + [span.offset + span.length for span in file.spans]
        assert [span.offset for span in file.spans] == ends[:-1]
        assert ends[-1] == file.size


def test_any_flipped_bit_and_any_cut_is_found(tmp_path, threads, fragmented):
    save(tmp_path, threads, fragmented)
    directory = tmp_path / "step-000005.a1"
    draw = random.Random(0)
    for file in read_manifest(str(directory)).files:
        path = directory / file.path
        whole = path.read_bytes()
        flipped = bytearray(whole)
        position = draw.randrange(len(whole))
        flipped[position] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        (problem,) = verify_checkpoint(str(directory))
        assert file.path in problem
        assert "are not what was written" in problem
        path.write_bytes(whole[: draw.randrange(len(whole))])
        (problem,) = verify_checkpoint(str(directory))
        assert f"{len(whole)} were written" in problem
        path.unlink()
        assert "not found" in verify_checkpoint(str(directory))[0]
        path.write_bytes(whole)
    assert verify_checkpoint(str(directory)) == []


def test_storage_that_keeps_other_bytes_is_found_before_the_commit(tmp_path, threads, fragmented, monkeypatch):
    read_range = storage.read_range
    monkeypatch.setattr(storage, "read_range", lambda url, start, stop: read_range(url, start, stop)[::-1])
    results = save(tmp_path, threads, fragmented)
    assert [type(result) for result in results] == [InfrastructureError] * 2
    assert "does not read back" in str(results[0])
    assert list_commits(str(tmp_path), pytest.fail) == []


def test_a_step_that_is_committed_stays_as_it_is(tmp_path, threads, fragmented):
    first = save(tmp_path, threads, fragmented, attempt=1)
    before = (tmp_path / "step-000005.a1" / MANIFEST_NAME).stat().st_mtime_ns
    events = Events()
    assert save(tmp_path, threads, fragmented, attempt=2, events=events) == first
    assert [(event["kind"], event["attempt_kept"]) for event in events] == [("checkpoint_kept", 1)]
    assert not (tmp_path / "step-000005.a2").exists()
    assert save(tmp_path, threads, fragmented, attempt=1) == first
    assert (tmp_path / "step-000005.a1" / MANIFEST_NAME).stat().st_mtime_ns == before


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(tmp_path, threads, fragmented):
    """Resuming passed it over; if it were kept the run would end with a checkpoint that nobody can load."""
    save(tmp_path, threads, fragmented, attempt=1)
    max((tmp_path / "step-000005.a1").glob("*.safetensors")).unlink()
    events = Events()
    record = save(tmp_path, threads, fragmented, attempt=2, events=events)[0]
    assert record.directory == "step-000005.a2"
    assert latest(str(tmp_path), pytest.fail) == record
    assert [event["kind"] for event in events] == ["checkpoint_replaced", "checkpoint_committed"]


def test_of_two_attempts_at_once_one_wins_and_the_other_says_so(tmp_path, threads, fragmented, monkeypatch):
    """The other attempt commits the step while ours is verifying."""
    from ftlaunch.distributed.checkpoint import save as module

    verify = module.sample_problems
    events = Events()

    def other_first(directory, manifest, **more):
        if directory.endswith(".a2"):
            save(tmp_path, threads, fragmented, size=1, attempt=1)
        return verify(directory, manifest, **more)

    monkeypatch.setattr(module, "sample_problems", other_first)
    (record,) = save(tmp_path, threads, fragmented, size=1, attempt=2, events=events)
    assert record.attempt == 1
    assert not (tmp_path / "step-000005.a2").exists()
    assert [(event["kind"], event["attempt_kept"]) for event in events] == [("checkpoint_kept", 1)]


def test_an_attempt_that_is_superseded_in_mid_save_commits_nothing(tmp_path, threads, fragmented):
    """Also where another rank fails at the same time: that it is superseded is what every rank says."""
    fragments = fragmented(TENSORS, 2, 3)
    asked = []

    def fence():
        asked.append(len(list_commits(str(tmp_path), pytest.fail)))
        if len(asked) > 1:
            raise Superseded("attempt 2 goes on")

    def work(peers):
        writer = CheckpointWriter(str(tmp_path), 1, Events(), peers, max_file_bytes=500, fence=fence)
        return writer.save(5, content_of(fragments[peers.rank]))

    results, _ = threads(2, work)
    assert [(type(result), str(result)) for result in results] == [(Superseded, "attempt 2 goes on")] * 2
    assert asked == [0, 0]
    assert list(tmp_path.iterdir()) == []

    def agreed(peers):
        with peers.together("saving"):
            if peers.rank == 0:
                raise Superseded("attempt 2 goes on")
            raise InfrastructureError("no such file")

    results, _ = threads(2, agreed)
    assert [(type(result), str(result)) for result in results] == [(Superseded, "attempt 2 goes on")] * 2


def test_a_failed_save_is_not_committed_and_can_be_tried_again(tmp_path, fragmented, monkeypatch):
    fragments = fragmented(TENSORS, 1, 0)[0]
    writer = CheckpointWriter(str(tmp_path), 1, Events(), Peers(), max_file_bytes=500)

    def full(url, data):
        raise UserError("no space")

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_bytes", full)
        with pytest.raises(UserError, match="no space"):
            writer.save(5, content_of(fragments))
    assert not (tmp_path / "step-000005.a1").exists()
    (tmp_path / "step-000005.a1").mkdir()
    (tmp_path / "step-000005.a1" / "left-over").write_bytes(b"")
    assert list_commits(str(tmp_path), pytest.fail) == []
    assert writer.save(5, content_of(fragments)).step == 5
    assert not (tmp_path / "step-000005.a1" / "left-over").exists()


def test_transformers_loads_the_root_of_a_checkpoint(tmp_path):
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    from ftlaunch.distributed.checkpoint.fragments import Fragment, TensorSpec

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=64, num_key_value_heads=2))
    tensors = model.state_dict()

    def source():
        for name, tensor in tensors.items():
            yield Fragment(TensorSpec(name, tuple(tensor.shape), "F32"), ((0, tensor.numel()),), tensor.reshape(-1))

    config = json.dumps({**model.config.to_dict(), "architectures": ["LlamaForCausalLM"]}).encode()
    writer = CheckpointWriter(str(tmp_path), 1, Events(), Peers(), max_file_bytes=10_000)
    record = writer.save(1, Content({"model": source}, {"config.json": config}))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / record.directory)
    assert (tmp_path / record.directory / "model.safetensors.index.json").exists()
    tokens = torch.arange(12).reshape(1, 12)
    assert torch.equal(loaded(tokens).logits, model.eval()(tokens).logits)
