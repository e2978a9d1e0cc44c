"""Which checkpoints exist, which one is meant, and which are deleted."""

from __future__ import annotations

import json
import shutil

import pytest

from ftlaunch.distributed.checkpoint.commit import (
    CommitRecord,
    Reference,
    best,
    commit,
    commit_url,
    directory_name,
    latest,
    latest_resumable,
    list_commits,
    parse_reference,
    resolve,
)
from ftlaunch.distributed.checkpoint.manifest import MANIFEST_NAME, STATE_PATH, Manifest, read_manifest, record_bytes
from ftlaunch.distributed.checkpoint.retention import Retention, apply_retention, orphans
from ftlaunch.distributed.checkpoint.verify import verify_checkpoint
from ftlaunch.recipes.errors import UserError


def nothing_to_report(line):
    raise AssertionError(f"reported: {line}")


def make(run, step, attempt=1, *, committed=True, resumable=True, **metrics):
    """A checkpoint of two small files."""
    directory = run / directory_name(step, attempt)
    (directory / "training").mkdir(parents=True)
    files = ("config.json", *[STATE_PATH] * resumable)
    for file in files:
        (directory / file).write_bytes(b"{}")
    manifest = Manifest(step, attempt, tuple(record_bytes(file, b"{}") for file in files))
    (directory / MANIFEST_NAME).write_bytes(manifest.to_bytes())
    record = CommitRecord(step, attempt, directory.name, "2030-01-01T00:00:00+00:00", metrics)
    return commit(str(run), record) if committed else record


def test_commits_are_listed_by_step_and_read_back(tmp_path):
    made = [make(tmp_path, step, **{"a/loss": step / 7}) for step in (1_000_000, 5, 200)]
    assert list_commits(str(tmp_path), nothing_to_report) == sorted(made, key=lambda record: record.step)
    assert latest(str(tmp_path), nothing_to_report) == made[0]
    assert best(str(tmp_path), "a/loss", nothing_to_report) == made[1]
    assert best(str(tmp_path), "b/loss", nothing_to_report) is None


def test_a_record_of_an_earlier_version_is_read(tmp_path):
    record = make(tmp_path, 5)
    path = tmp_path / "commits/step-000005.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), "recipe_digest": ""}))
    assert list_commits(str(tmp_path), nothing_to_report) == [record]


def test_a_directory_without_a_commit_does_not_exist(tmp_path):
    make(tmp_path, 5, committed=False)
    assert list_commits(str(tmp_path), nothing_to_report) == []
    assert latest(str(tmp_path), nothing_to_report) is None


def test_the_first_commit_of_a_step_counts(tmp_path):
    first = make(tmp_path, 5, attempt=1)
    assert make(tmp_path, 5, attempt=2) == first
    assert commit(str(tmp_path), first) == first


@pytest.mark.parametrize("damage", ["directory", "manifest", "cut manifest", "file", "cut file", "other step"])
def test_a_damaged_checkpoint_is_reported_and_skipped(tmp_path, damage):
    good, bad = make(tmp_path, 5), make(tmp_path, 10)
    directory = tmp_path / bad.directory
    manifest, file = directory / MANIFEST_NAME, directory / "config.json"
    match damage:
        case "directory":
            directory.rename(tmp_path / "elsewhere")
        case "manifest":
            manifest.unlink()
        case "cut manifest":
            manifest.write_bytes(manifest.read_bytes()[:20])
        case "file":
            file.unlink()
        case "cut file":
            file.write_bytes(b"{")
        case "other step":
            manifest.write_bytes((tmp_path / good.directory / MANIFEST_NAME).read_bytes())
    reported = []
    assert latest(str(tmp_path), reported.append) == good
    assert len(reported) == 1
    assert reported[0].startswith("checkpoint of step 10 is not usable: ")
    # A reference falls back to nothing: another checkpoint must be named.
    for which in (10, "latest"):
        with pytest.raises(UserError, match=r"step 10 is not usable: .*\n.* those of steps 5 \(.*/step-000005.a1"):
            resolve(str(tmp_path), which)
    assert resolve(str(tmp_path), 5) == good


def test_a_broken_record_is_reported_and_skipped(tmp_path):
    good = make(tmp_path, 5)
    (tmp_path / "commits/step-000010.json").write_text('{"step": 10')
    reported = []
    assert latest(str(tmp_path), reported.append) == good
    assert len(reported) == 1
    assert "step-000010.json is no commit record" in reported[0]
    with pytest.raises(UserError, match=r"step-000010.json is no commit record.*\n.* those of steps 5 "):
        resolve(str(tmp_path), "latest")
    assert resolve(str(tmp_path), 5) == good


def test_a_manifest_of_a_newer_format_is_not_guessed_at(tmp_path):
    record = make(tmp_path, 5)
    path = tmp_path / record.directory / MANIFEST_NAME
    path.write_text(json.dumps({**json.loads(path.read_bytes()), "format": 99}))
    reported = []
    assert latest(str(tmp_path), reported.append) is None
    assert "format 99" in reported[0]


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("bot", Reference("bot", "latest")),
        ("bot@latest", Reference("bot", "latest")),
        ("s3://b/runs/bot@best", Reference("s3://b/runs/bot", "best")),
        ("bot@200", Reference("bot", 200)),
        ("bot@step-000200", Reference("bot", 200)),
        ("sftp://me@host/runs/bot", Reference("sftp://me@host/runs/bot", "latest")),
    ],
)
def test_references(text, reference):
    assert parse_reference(text) == reference


@pytest.mark.parametrize("text", ["bot@", "bot@newest", "bot@-1", "@best2", "@200"])
def test_a_reference_that_means_nothing_says_what_would(text):
    with pytest.raises(UserError, match="best, latest, or a step"):
        parse_reference(text)


def test_resolve(tmp_path):
    make(tmp_path, 5, **{"a/loss": 1.0})
    make(tmp_path, 10, **{"a/loss": 2.0})
    run = str(tmp_path)
    assert resolve(run, "latest").step == 10
    assert resolve(run, "best").step == 5
    assert resolve(run, 10).step == 10
    make(tmp_path, 15, **{"a/loss": 3.0, "b/loss": 0.0})
    assert resolve(run, "best", metric="b/loss").step == 15
    with pytest.raises(UserError, match="a/loss, b/loss"):
        resolve(run, "best")
    with pytest.raises(UserError, match=r"@7\. Committed steps: 5, 10, 15"):
        resolve(run, 7)
    with pytest.raises(UserError, match="Committed steps: none"):
        resolve(str(tmp_path / "elsewhere"), "latest")


# --- retention ------------------------------------------------------------------------------------------------------


def records(losses):
    return [CommitRecord(s, 1, directory_name(s, 1), "", {} if x is None else {"m": x}) for s, x in losses.items()]


def retain(run, retention, attempt=1):
    return apply_retention(str(run), retention, attempt=attempt, alive=set(), report=nothing_to_report)


def test_the_newest_and_the_best_are_kept():
    made = records({10: 0.5, 20: 0.1, 30: 0.1, 40: 0.7, 50: None})
    assert Retention(2, metric="m", best=1).steps(made) == {20, 40, 50}
    assert Retention(1, metric="m", best=3).steps(made) == {10, 20, 30, 50}
    assert Retention(2, metric="m").steps(made) == Retention(2).steps(made) == {40, 50}
    assert Retention(9, metric="m", best=1).steps(made) == {10, 20, 30, 40, 50}
    assert Retention(1, every=20).steps(made) == {20, 40, 50}
    assert Retention(2, metric="m", best=1).steps([]) == set()


def test_orphans_are_of_older_attempts_that_are_dead():
    names = ["commits", "step-000010.a1", "step-000020.a1", "step-000020.a2", "step-000020.a3", "step-000020.a4"]
    assert orphans(names, records({10: None}), attempt=4, alive={2}) == ["step-000020.a1", "step-000020.a3"]


def test_retention_deletes_record_and_directory(tmp_path):
    for step in (10, 20, 30, 40):
        make(tmp_path, step, attempt=2, m=1.0 if step == 10 else 2.0)
    for attempt in (1, 2, 3):
        make(tmp_path, 50, attempt=attempt, committed=False)
    gone = retain(tmp_path, Retention(1, metric="m", best=1), attempt=2)
    assert sorted(gone) == ["step-000020.a2", "step-000030.a2", "step-000050.a1"]
    assert [record.step for record in list_commits(str(tmp_path), nothing_to_report)] == [10, 40]
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["commits", "step-000010.a2", "step-000040.a2", "step-000050.a2", "step-000050.a3"]


def test_what_a_newer_attempt_keeps_is_not_for_an_older_one_to_delete(tmp_path):
    """It may have slept since it asked whether it is the newest."""
    for step, attempt in ((10, 1), (20, 1), (30, 2)):
        make(tmp_path, step, attempt=attempt)
    assert retain(tmp_path, Retention(1), attempt=1) == []
    assert resumable_steps(tmp_path) == [10, 20, 30]
    assert sorted(retain(tmp_path, Retention(1), attempt=2)) == ["step-000010.a1", "step-000020.a1"]


@pytest.mark.parametrize("keep_last", [1, 2])
def test_checkpoints_that_are_gone_push_no_whole_one_out(tmp_path, keep_last):
    """The user deleted the two newest, and the best, and the run went on from the one before them."""
    for step in (800, 1000, 1200):
        make(tmp_path, step, m=step / 1e6)
    make(tmp_path, 700, m=0.0)
    for step in (700, 1000, 1200):
        shutil.rmtree(tmp_path / directory_name(step, 1))
    make(tmp_path, 900, attempt=2, m=2.0)
    retain(tmp_path, Retention(keep_last, metric="m", best=1, resumable=2), attempt=2)
    said = []
    assert latest(str(tmp_path), said.append).step == 900
    assert best(str(tmp_path), "m", said.append).step == 800


def test_a_crash_within_retention_leaves_no_commit_without_files(tmp_path, monkeypatch):
    for step in (10, 20):
        make(tmp_path, step)
    from ftlaunch.distributed import storage

    delete_tree = storage.delete_tree

    def crash_at_directories(url):
        if "/commits/" not in url:
            raise KeyboardInterrupt
        delete_tree(url)

    monkeypatch.setattr(storage, "delete_tree", crash_at_directories)
    with pytest.raises(KeyboardInterrupt):
        retain(tmp_path, Retention(1))
    monkeypatch.undo()
    assert latest(str(tmp_path), nothing_to_report).step == 20
    # A later attempt clears the orphan away.
    gone = retain(tmp_path, Retention(1), attempt=2)
    assert gone == ["step-000010.a1"]
    assert commit_url(str(tmp_path), 20).endswith("commits/step-000020.json")


# --- weights only ---------------------------------------------------------------------------------------------------


def resumable_steps(run):
    records = list_commits(str(run), nothing_to_report)
    return [record.step for record in records if read_manifest(str(run / record.directory)).is_resumable]


@pytest.mark.parametrize("keep", [1, 2, 9])
def test_older_checkpoints_keep_their_weights_only(tmp_path, keep):
    for step in (10, 20, 30, 40):
        make(tmp_path, step)
        assert retain(tmp_path, Retention(9, resumable=keep)) == []
    steps = [10, 20, 30, 40]
    assert resumable_steps(tmp_path) == steps[-keep:]
    for step in steps:
        directory = tmp_path / directory_name(step, 1)
        assert (directory / "training").exists() == (step in steps[-keep:])
        assert (directory / "config.json").exists()
        assert verify_checkpoint(str(directory)) == []
    assert latest_resumable(str(tmp_path), nothing_to_report).step == 40


def test_where_the_newest_is_damaged_the_next_with_a_training_state_is_taken_and_that_is_said(tmp_path):
    for step in (10, 20, 30, 40):
        make(tmp_path, step, resumable=step != 30)
    (tmp_path / directory_name(40, 1) / STATE_PATH).unlink()
    said = []
    assert latest_resumable(str(tmp_path), said.append).step == 20
    assert "checkpoint of step 40 is not usable" in said[0]
    assert said[1] == "checkpoint of step 30 holds its weights only: training cannot go on from it"
    assert latest(str(tmp_path), said.append).step == 30


def test_a_damaged_checkpoint_takes_no_training_state_from_others(tmp_path):
    for step in (10, 20, 30):
        make(tmp_path, step)
    shutil.rmtree(tmp_path / directory_name(30, 1))
    retain(tmp_path, Retention(9, resumable=1))
    said = []
    assert latest_resumable(str(tmp_path), said.append).step == 20


def test_a_crash_while_training_state_goes_leaves_whole_weights(tmp_path, monkeypatch):
    from ftlaunch.distributed import storage

    for step in (10, 20):
        make(tmp_path, step)

    def crash(url):
        raise KeyboardInterrupt

    monkeypatch.setattr(storage, "delete_tree", crash)
    with pytest.raises(KeyboardInterrupt):
        retain(tmp_path, Retention(9, resumable=1))
    monkeypatch.undo()
    assert resumable_steps(tmp_path) == [20]
    assert verify_checkpoint(str(tmp_path / directory_name(10, 1))) == []
    retain(tmp_path, Retention(9, resumable=1))
    assert not (tmp_path / directory_name(10, 1) / "training").exists()
