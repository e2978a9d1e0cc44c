"""Storage on local disk and in memory; S3 and HTTP are in tests/unit/data/test_remote.py."""

from __future__ import annotations

import json
import os
import sys
import threading

import pytest
from fsspec.registry import _registry

from ftlaunch.distributed import storage, storage_read, storage_retry, storage_throttle
from ftlaunch.distributed.storage import LineLog, RetryPolicy
from ftlaunch.recipes.errors import InfrastructureError, UserError


@pytest.fixture(params=["local", "memory"])
def root(request, tmp_path):
    if request.param == "local":
        yield str(tmp_path / "wörk space")
        return
    yield "memory://bucket/wörk space"
    storage.delete_tree("memory://bucket")


def test_a_file_comes_back_as_written(root):
    url = storage.join(root, "a", "b.bin")
    storage.write_bytes(url, b"0123456789")
    storage.write_bytes(url, b"abcdefghij")
    assert storage.read_bytes(url) == b"abcdefghij"
    assert storage.read_range(url, 2, 5) == b"cde"
    assert storage.read_range(url, 5, 5) == b""
    assert storage.exists(url)
    assert not storage.exists(url + "x")
    assert storage.info(url).size == 10
    assert storage.list_names(storage.join(root, "a")) == ["b.bin"]
    assert storage.list_names(storage.join(root, "none")) == []
    storage.delete_tree(root)
    storage.delete_tree(root)
    assert not storage.exists(url)


def test_the_etag_follows_the_content(tmp_path):
    url = str(tmp_path / "x")
    storage.write_bytes(url, b"one")
    before = storage.info(url).etag
    os.utime(url, ns=(1, 1))
    assert storage.info(url).etag != before


def test_listing_leaves_hidden_files_out_and_sorts(root):
    for name in ("b.jsonl", "a.jsonl", ".hidden.jsonl", "_SUCCESS", "sub/c.jsonl", "_tmp/d.jsonl", "readme.md"):
        storage.write_bytes(storage.join(root, name), b"x")

    def names(pattern, suffixes=()):
        return [info.url.rpartition("wörk space/")[2] for info in storage.list_files(pattern, suffixes)]

    assert names(root, (".jsonl",)) == ["a.jsonl", "b.jsonl", "sub/c.jsonl"]
    assert names(storage.join(root, "*.jsonl")) == ["a.jsonl", "b.jsonl"]
    assert names(storage.join(root, "**/*.jsonl")) == ["a.jsonl", "b.jsonl", "sub/c.jsonl"]
    assert names(storage.join(root, "a.jsonl")) == ["a.jsonl"]
    assert names(storage.join(root, "none*")) == []


def test_a_name_with_glob_characters_is_a_name_first(tmp_path):
    url = str(tmp_path / "a[1].jsonl")
    storage.write_bytes(url, b"x")
    assert [info.url for info in storage.list_files(url)] == [url]


def test_of_many_creators_one_wins(root):
    url = storage.join(root, "commit.json")
    if storage.is_local(root):
        wins: list[int] = []
        start = threading.Barrier(8)

        def create(i):
            start.wait()
            if storage.create_exclusive(url, b"%d" % i):
                wins.append(i)

        threads = [threading.Thread(target=create, args=(i,)) for i in range(8)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        assert storage.read_bytes(url) == b"%d" % wins[0]
        assert len(wins) == 1
        assert storage.list_names(root) == ["commit.json"]
    else:
        assert storage.create_exclusive(url, b"1")
    assert not storage.create_exclusive(url, b"again")


def test_a_stream_that_fails_leaves_nothing(tmp_path):
    root = str(tmp_path / "out")
    url = storage.join(root, "big.bin")
    with storage.open_write(url) as file:
        file.write(b"x" * 1000)
    assert storage.info(url).size == 1000
    with pytest.raises(RuntimeError), storage.open_write(storage.join(root, "torn.bin")) as file:
        file.write(b"x")
        raise RuntimeError
    assert storage.list_names(root) == ["big.bin"]


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("/nowhere/at/all", "not found"),
        ("nope://bucket/key", "nope://"),
        ("gs://bucket/key", "ftlaunch[gcs]"),
    ],
)
def test_errors_name_the_place_and_the_remedy(url, words, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # as if it were not installed, nor used before
    monkeypatch.delitem(_registry, "gs", raising=False)
    with pytest.raises(UserError, match=words.replace("[", r"\[")) as caught:
        storage.read_bytes(url)
    assert url in str(caught.value)


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot write to .*file/runs"):
        storage.check_writable(str(tmp_path / "file" / "runs"))
    storage.check_writable(str(tmp_path / "runs"))
    assert storage.list_names(str(tmp_path / "runs")) == []


def test_passing_trouble_is_waited_out_with_jitter():
    waits: list[float] = []
    policy = RetryPolicy(attempts=4, base_s=1.0, cap_s=3.0, sleep=waits.append, random=lambda: 0.5)
    answers = iter([ConnectionResetError("reset"), TimeoutError(), OSError("EIO"), None])

    def call():
        if (answer := next(answers)) is not None:
            raise answer
        return "done"

    assert storage.retrying("read", "s3://b/k", call, policy) == "done"
    assert waits == [0.5, 1.0, 1.5]


def test_trouble_that_stays_is_an_infrastructure_error():
    policy = RetryPolicy(attempts=3, sleep=lambda _: None)

    def call():
        raise ConnectionResetError("reset by peer")

    with pytest.raises(InfrastructureError, match=r"reset by peer .tried 3 times"):
        storage.retrying("read", "s3://b/k", call, policy)


def test_a_short_file_is_asked_for_again_and_then_named(tmp_path):
    url = str(tmp_path / "short")
    storage.write_bytes(url, b"12345")
    with pytest.raises(InfrastructureError, match="short"):
        storage.read_range(url, 0, 10, RetryPolicy(attempts=2, sleep=lambda _: None))


def test_long_files_are_read_in_parts(root, monkeypatch):
    url = storage.join(root, "long.bin")
    data = bytes(range(256)) * 10
    storage.write_bytes(url, data)
    monkeypatch.setattr(storage_read, "PART_BYTES", 100)
    file = storage.info(url)
    assert storage.read_file(file) == data
    assert storage.read_file(file, 50, 1234) == data[50:1234]
    assert storage.read_file(file, 7, 7) == b""
    storage.write_bytes(url, data + b"!")
    with pytest.raises(UserError, match=r"long\.bin: changed while it was read"):
        storage.read_file(file)


def test_one_request_at_a_time_is_enough(root, monkeypatch):
    """Nothing waits for a place while it holds the only one."""
    gate = storage_throttle.Gate(1)
    monkeypatch.setattr(storage_retry, "gate_of", lambda url: gate)
    url = storage.join(root, "a", "b.bin")
    storage.write_bytes(url, b"0123456789")
    (file,) = storage.list_files(storage.join(root, "a"))
    assert storage.read_file(file, 2, 5) == b"234"
    assert storage.create_exclusive(url + "2", b"x")
    storage.check_writable(root)
    LineLog(url + "3").close()
    storage.delete_tree(root)


def test_a_log_is_continued_and_a_torn_line_dropped(root):
    url = storage.join(root, "metrics.jsonl")
    storage.write_bytes(url, b'{"step":1}\n{"step":2}\n{"ste')
    log = LineLog(url)
    log.append({"step": 3, "note": "naïve"})
    log.close()
    steps = [json.loads(line)["step"] for line in storage.read_bytes(url).splitlines()]
    assert steps == [1, 2, 3]


def test_a_log_on_an_object_store_is_not_written_over_by_whoever_had_it_before():
    """The one that woke up holds lines in memory, and would rewrite the whole object with them."""
    url = "memory://bucket/log.jsonl"
    storage.delete_tree("memory://bucket")
    is_newest = [True]
    first = LineLog(url, is_ours=lambda: is_newest[0])
    first.append({"n": 1})
    first.flush()
    first.append({"n": 2})
    second = LineLog(url)
    is_newest[0] = False
    second.append({"n": 3})
    second.close()
    first.append({"n": 4})
    first.close()
    assert [json.loads(line)["n"] for line in storage.read_bytes(url).splitlines()] == [1, 3]


def test_a_log_on_an_object_store_is_rewritten_at_most_every_thirty_seconds():
    now = [0.0]
    url = "memory://bucket/log.jsonl"
    storage.delete_tree("memory://bucket")
    log = LineLog(url, clock=lambda: now[0])
    log.append({"n": 1})
    assert not storage.exists(url)
    now[0] = 31.0
    log.append({"n": 2})
    assert len(storage.read_bytes(url).splitlines()) == 2
    log.append({"n": 3})
    assert len(storage.read_bytes(url).splitlines()) == 2
    log.close()
    assert len(storage.read_bytes(url).splitlines()) == 3
