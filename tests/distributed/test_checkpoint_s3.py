"""Checkpoints on an object store: moto speaks S3 over HTTP in a process of its own."""

from __future__ import annotations

import functools
import socket
import subprocess
import sys
import time
import urllib.request
import zlib

import pytest
import torch
from faulty_proxy import FaultyProxy
from harness import run_distributed

from ftlaunch.distributed import storage, storage_retry
from ftlaunch.distributed.checkpoint.commit import CommitRecord, commit, latest, list_commits
from ftlaunch.distributed.checkpoint.fragments import Fragment, TensorSpec
from ftlaunch.distributed.checkpoint.peers import Peers
from ftlaunch.distributed.checkpoint.reader import CheckpointReader, read_whole
from ftlaunch.distributed.checkpoint.retention import Retention, apply_retention, drop_unfinished_uploads
from ftlaunch.distributed.checkpoint.save import CheckpointWriter, Content
from ftlaunch.distributed.checkpoint.verify import verify_checkpoint
from ftlaunch.distributed.run_directory import RunDirectory
from ftlaunch.distributed.storage_parts import PART_BYTES, PartUploads

TENSORS = {f"w{i}": torch.arange(3000.0) + i for i in range(5)}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def server():
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while True:
            try:
                urllib.request.urlopen(f"{url}/moto-api/", timeout=1).close()
                break
            except OSError:
                assert process.poll() is None, "moto did not start"
                time.sleep(0.1)
        yield url
        process.terminate()


@pytest.fixture
def run(server, monkeypatch, request):
    for name, value in {
        "AWS_ENDPOINT_URL": server,
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    bucket = request.node.name.replace("_", "-")[:60]
    urllib.request.urlopen(urllib.request.Request(f"{server}/{bucket}", method="PUT")).close()
    return f"s3://{bucket}/runs/bot"


def sharded(rank, size):
    for name, tensor in TENSORS.items():
        start, stop = rank * 3000 // size, (rank + 1) * 3000 // size
        yield Fragment(TensorSpec(name, (3000,), "F32"), ((start, stop),), tensor[start:stop])


def save(rank, size, run, attempts):
    """Each rank saves with the others, or alone when ranks are attempts of their own."""
    if len(attempts) > 1:
        peers, source = Peers(), functools.partial(sharded, 0, 1)
    else:
        peers, source = Peers(rank, size), functools.partial(sharded, rank, size)
    events = []
    attempt = attempts[rank % len(attempts)]
    writer = CheckpointWriter(run, attempt, lambda kind, **_: events.append(kind), peers, max_file_bytes=20_000)
    record = writer.save(5, Content({"model": source, "exp_avg": source}, {"config.json": b"{}"}))
    return record, events


def test_two_ranks_save_and_it_reads_back(run):
    (record, events), (other, silence) = run_distributed(save, 2, run, [1])
    assert record == other == latest(run, pytest.fail)
    assert (events, silence) == (["checkpoint_committed"], [])
    folder = storage.join(run, record.directory)
    assert verify_checkpoint(folder) == []
    for reader in (CheckpointReader(folder), CheckpointReader(storage.join(folder, "training"), "exp_avg")):
        assert len(reader.files.files) > 1
        for name, tensor in TENSORS.items():
            assert torch.equal(reader.read(name, [(7, 20), (900, 3000)]), torch.cat([tensor[7:20], tensor[900:]]))


def test_of_two_attempts_that_save_one_step_exactly_one_counts(run):
    outcomes = run_distributed(save, 2, run, [1, 2])
    assert outcomes[0][0] == outcomes[1][0] == latest(run, pytest.fail)
    assert sorted(event for _, events in outcomes for event in events) == ["checkpoint_committed", "checkpoint_kept"]


def race(rank, size, run):
    records = [CommitRecord(step, rank, f"step-{step}.a{rank}", "") for step in range(10)]
    return [commit(run, record) for record in records]


def test_of_two_committers_exactly_one_wins_each_step(run):
    first, second = run_distributed(race, 2, run)
    assert first == second == list_commits(run, pytest.fail)


def test_damage_on_the_store_is_found(run):
    record = run_distributed(save, 1, run, [1])[0][0]
    folder = storage.join(run, record.directory)
    url = storage.join(folder, next(name for name in storage.list_names(folder) if name.endswith(".safetensors")))
    data = bytearray(storage.read_bytes(url))
    data[-1] ^= 1
    storage.write_bytes(url, bytes(data))
    assert "are not what was written" in verify_checkpoint(folder)[0]
    storage.delete_tree(url)
    reported = []
    assert latest(run, reported.append) is None
    assert "not found" in reported[0]


def test_the_run_directory_and_retention_on_a_store(run):
    directory = RunDirectory(run)
    assert directory.status() == "new"
    directory.check()
    assert [directory.claim_attempt(world_size=1, command=["x"]) for _ in range(2)] == [1, 2]
    assert directory.status() == "alive"
    record = run_distributed(save, 1, run, [1])[0][0]
    storage.write_bytes(storage.join(run, "step-000006.a1", "left-over"), b"x")
    about = {"attempt": 2, "report": pytest.fail}
    assert apply_retention(run, Retention(1), alive={1}, **about) == []
    assert apply_retention(run, Retention(1), alive=set(), **about) == ["step-000006.a1"]
    assert latest(run, pytest.fail) == record


def test_what_killed_attempts_were_uploading_is_dropped(run):
    uploads = PartUploads(run)
    begun = {}
    for step, attempt in ((5, 1), (6, 2), (6, 3), (7, 4)):
        url = storage.join(run, f"step-{step:06}.a{attempt}", "model.safetensors")
        begun[attempt] = (url, uploads.begin(url))
        data = bytes(PART_BYTES)
        uploads.send(*begun[attempt], 1, data, zlib.crc32(data))
    uploads.begin(elsewhere := storage.join(run + "-2", "step-000005.a1", "model.safetensors"))
    dropped = drop_unfinished_uploads(run, attempt=3, alive={2}, report=pytest.fail)
    assert dropped == 1
    assert set(uploads.unfinished(run)) == {begun[attempt] for attempt in (2, 3, 4)}
    assert [url for url, _ in uploads.unfinished(run + "-2")] == [elsewhere]


# --- a store that fails in mid-upload -------------------------------------------------------------------------------

LARGE = torch.arange(3_000_000.0)  # 12 MB: two parts of an upload


def large(rank, size, step):
    start, stop = rank * len(LARGE) // size, (rank + 1) * len(LARGE) // size
    yield Fragment(TensorSpec("w", (len(LARGE),), "F32"), ((start, stop),), LARGE[start:stop] + step)


def save_large(rank, size, run, step):
    writer = CheckpointWriter(run, 1, lambda *_, **__: None, Peers(rank, size))
    try:
        return writer.save(step, Content({"model": functools.partial(large, rank, size, step)})).step
    except Exception as error:
        return type(error).__name__, str(error)


UPLOADS = {
    "a part": lambda method, path: method == "PUT" and "partNumber=2" in path,
    "the completion": lambda method, path: method == "POST" and "uploadId=" in path,
    "the record": lambda method, path: method == "PUT" and "/commits/" in path,
}


@pytest.mark.parametrize("what", UPLOADS)
def test_an_upload_that_fails_leaves_earlier_checkpoints_and_nothing_of_its_own(run, server, monkeypatch, what):
    run = storage.join(run, what.replace(" ", "-"))
    proxy = FaultyProxy("127.0.0.1", int(server.rpartition(":")[2]))
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    monkeypatch.setattr(storage_retry.RetryPolicy, "wait_s", lambda self, attempt, asked_for_s=0.0: 0.001)
    assert run_distributed(save_large, 2, run, 5) == [5, 5]
    proxy.applies, proxy.rates = UPLOADS[what], {"error": 1.0}
    endings = run_distributed(save_large, 2, run, 10)
    assert proxy.counts["error"] > 0
    assert [kind for kind, _ in endings] == ["InfrastructureError"] * 2, endings
    proxy.calm()
    proxy.rates = {}
    assert [record.step for record in list_commits(run, pytest.fail)] == [5]
    assert verify_checkpoint(storage.join(run, "step-000005.a1")) == []
    # A record whose answer was lost may be there all the same, so that what it would name is not taken away.
    assert (storage.list_names(storage.join(run, "step-000010.a1")) == []) == (what != "the record")
    bucket = run.removeprefix("s3://").partition("/")[0]
    unfinished = urllib.request.urlopen(f"{server}/{bucket}?uploads").read()
    assert b"<UploadId>" not in unfinished
    assert run_distributed(save_large, 2, run, 10) == [10, 10]
    assert torch.equal(read_whole(CheckpointReader(storage.join(run, "step-000010.a1")), "w"), LARGE + 10)
    proxy.stop()
