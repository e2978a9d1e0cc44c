"""What is handed to a driver elsewhere, and what a run directory knows of it afterwards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console
from tiny import recipe_for, write_recipe

from ftlaunch.cluster.restarts import EARLY, LEFT, LEFT_EARLY
from ftlaunch.distributed.run_directory import Process, RunDirectory
from ftlaunch.launcher import cli, job_state, submissions
from ftlaunch.launcher.handover import pack, unpack
from ftlaunch.launcher.log_copy import LogCopy
from ftlaunch.launcher.plan import default_keys
from ftlaunch.launcher.restarted import LOST, answer_before, earlier_of, why_again
from ftlaunch.launcher.submit import follow, need_of
from ftlaunch.recipes.errors import InfrastructureError, UserError
from ftlaunch.recipes.load import load_recipe


def loaded(tmp_path: Path, **changes: object):
    (tmp_path / "model").mkdir()  # only its name is looked at
    path = write_recipe(tmp_path / "r.yaml", recipe_for(tmp_path, **changes))
    return load_recipe(path, ["track.wandb.project=${API_KEY}"], environ={"API_KEY": "k3y"})


def test_a_recipe_survives_the_way(tmp_path):
    before = loaded(tmp_path, cluster={"type": "ssh", "hosts": ["a"], "env": ["A_*"]})
    after = unpack(json.loads(json.dumps(pack(before))))
    assert after == before
    assert list(default_keys(after.recipe)) == list(default_keys(before.recipe))
    assert after.secrets == ("k3y",)


def test_what_nodes_must_have(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = loaded(tmp_path, checkpoint={"path": "./runs"}, model={"tokenizer": "org/name"}).recipe
    need = need_of(recipe, {"A": "b"})
    assert need.shared == str(tmp_path / "runs")
    assert set(need.paths) == {"model.path", "data.train.0.path", "data.train.1.path", "data.eval.0.path"}
    assert need.paths["model.path"] == str(tmp_path / "model")
    elsewhere = recipe.model_copy(update={"checkpoint": recipe.checkpoint.model_copy(update={"path": "s3://a/runs"})})
    assert need_of(elsewhere, {}).shared is None


def test_attempts_of_a_job_that_was_ended_are_over_when_it_starts_again(tmp_path):
    run = RunDirectory(str(tmp_path / "bot"))
    record = {"job": "7", "cluster": {"type": "slurm"}, "ends_first": True}
    submissions.expect(run, record)
    elsewhere = run.claim_attempt(world_size=1, command=(), process=Process("another-host", 1, 0.0))
    assert earlier_of(run, "7") is None  # it has not begun; what lives is somebody else's
    run.finish_attempt(elsewhere, "finished")
    submissions.register(run, record)
    run.claim_attempt(world_size=1, command=(), process=Process("n1", 1, 0.0))
    assert answer_before(run, earlier_of(run, "7")) is None
    assert run.live_attempt() is None
    assert earlier_of(run, "8") is None
    submissions.finish(run, submissions.newest(run).name, 0)
    assert answer_before(run, earlier_of(run, "7")) == 0


def test_why_a_cluster_has_started_a_driver_again(tmp_path):
    """On the run's budget, unless it was asked to leave. A driver that has begun is not over because of an earlier
    one."""
    run, record = RunDirectory(str(tmp_path / "bot")), {"job": "7", "cluster": {"type": "kubernetes"}}
    name = submissions.register(run, record)
    assert why_again(earlier_of(run, "7")) == LOST
    for code, why in ((LEFT, ""), (LEFT_EARLY, EARLY)):
        submissions.leave(run, name, code)
        assert why_again(earlier_of(run, "7")) == why
    assert submissions.register(run, record) == name
    assert why_again(earlier_of(run, "7")) == LOST
    for code, why in ((2, "its driver ended with exit code 2"), (130, "")):
        submissions.finish(run, name, code)
        assert (why_again(earlier_of(run, "7")), answer_before(run, earlier_of(run, "7"))) == (why, None)
    began_at = submissions.newest(run).record["began_at"]
    assert submissions.register(run, record) == name
    assert submissions.newest(run).exit_code is None
    assert submissions.newest(run).record["began_at"] == began_at
    submissions.finish(run, name, 0)
    assert submissions.newest(run).exit_code == 0


def test_a_job_that_ended_without_a_word_is_over(tmp_path, monkeypatch):
    run, now_s, stands = RunDirectory(str(tmp_path / "bot")), [0.0], ["waits"]
    submissions.expect(run, {"job": "7", "cluster": {"type": "slurm"}})

    def ask(submission: submissions.Submission) -> str | None:
        assert submission.record["job"] == "7"
        if not stands:
            raise InfrastructureError("no answer")
        return stands[0] or None

    monkeypatch.setattr(job_state, "ask", ask)
    is_over = job_state.IsOver(run, lambda: now_s[0])
    for standing, over in ((["waits"], False), ([], False), ([""], True)):
        stands[:] = standing
        assert not is_over()  # nobody is asked too often
        now_s[0] += job_state.ASK_S
        assert is_over() is over
    submissions.finish(run, submissions.register(run, {"job": "7", "cluster": {"type": "slurm"}}), 0)
    assert is_over()


def test_submissions_of_a_run(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = RunDirectory(str(tmp_path / "runs" / "bot"))
    run.store_recipe("name: bot\n")
    with pytest.raises(UserError, match="was not submitted to a cluster"):
        submissions.newest(run)
    assert cli.main(["logs", "bot"]) == 1
    assert "keeps nothing that rank 0 printed; ranks under torchrun print where they run" in " ".join(
        capsys.readouterr().err.split()
    )
    log = tmp_path / "driver.log"
    log.write_text("one\n")
    first = submissions.register(run, {"job": "ffff", "cluster": {"type": "ssh"}})
    submissions.finish(run, first, 1)
    second = submissions.register(run, {"job": "0000", "cluster": {"type": "ssh"}})
    newest = submissions.newest(run)
    record = {"job": "0000", "cluster": {"type": "ssh"}, "began_at": newest.record["began_at"]}
    assert newest == submissions.Submission(second, record, None)
    copy = LogCopy(submissions.log_url(run, second), log)
    log.write_text("one\ntwo\n")
    copy.close()
    submissions.finish(run, second, 130)
    assert submissions.newest(run).exit_code == 130
    capsys.readouterr()
    assert cli.main(["logs", "-f", "bot"]) == 0
    assert capsys.readouterr().out == "one\ntwo\n"
    assert cli.main(["attach", "bot"]) == 130


class CutOff:
    """A cluster whose driver has ended well, one of whose nodes does not answer any more."""

    def follow(self, show):
        show(b"finished\n")
        return 0

    def stop(self, how):
        raise InfrastructureError(f"host beta: ssh ended with 255 ({how})")


def test_a_node_that_does_not_answer_at_the_end_says_nothing_of_the_run(tmp_path, capsys):
    run, record = RunDirectory(str(tmp_path / "bot")), {"job": "7", "cluster": {"type": "ssh"}}
    submissions.register(run, record)
    assert follow(CutOff(), run, record, Console(width=200)) == 0
    said = capsys.readouterr().out
    assert "finished" in said and "host beta" in said
    assert submissions.latest(run).exit_code == 0
