"""Lists of runs, the state of one, its logs and its recipe: all from run directories."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ftlaunch.distributed.run_directory import Process, RunDirectory
from ftlaunch.launcher import cli, submissions
from ftlaunch.launcher.overview.listing import CLUSTER, Listed, list_runs
from ftlaunch.launcher.overview.standing import standing_of
from ftlaunch.launcher.rank_log import rank_log_url
from ftlaunch.launcher.retry import enter_folder
from ftlaunch.recipes.errors import UserError
from ftlaunch.recipes.load import load_stored_recipe
from ftlaunch.recipes.problems import RecipeError
from ftlaunch.recipes.redact import dump_recipe
from ftlaunch.recipes.schema import Recipe

GONE = Process("another-host", 1, 1.7e9)


def recipe(name: str, **changes: object) -> Recipe:
    section = {"name": name, "model": {"path": "base"}, "data": {"train": [{"path": "rows.jsonl"}]}, **changes}
    return Recipe.model_validate(section)


def make_run(place: Path, name: str, **changes: object) -> RunDirectory:
    run = RunDirectory(str(place / name))
    run.store_recipe(dump_recipe(recipe(name, **changes)))
    return run


def step_line(number: int, **more: object) -> str:
    line = {"kind": "step", "step": number, "attempt": 1, "progress": number / 10, "loss": 4.0 / number, **more}
    return json.dumps({**line, "learning_rate": 1e-4, "tokens_per_s": 9.0, "memory_bytes": 1, "step_s": 1.0}) + "\n"


@pytest.fixture
def runs(tmp_path, monkeypatch) -> Path:
    """One run of every kind."""
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "runs"
    for name, outcome in (("done", "finished"), ("broke", "failed"), ("halted", "interrupted"), ("dead", None)):
        run = make_run(place, name, cluster={"type": "ssh", "hosts": ["a"]} if name == "dead" else {"type": "local"})
        number = run.claim_attempt(world_size=2, command=(), process=GONE)
        if outcome:
            run.finish_attempt(number, outcome, "the loss is nan\nat step 3" if outcome == "failed" else "")
    RunDirectory(str(place / "done")).write_result({"outcome": "stopped_early"})
    (place / "done" / "metrics.jsonl").write_text(step_line(1) + step_line(2) + '{"kind": "evaluation", "step": 2}\n')
    beat = json.dumps({"at": "2001-01-01T00:00:00+00:00", "step": 1})
    (place / "dead" / "attempts" / "a1.heartbeat").write_text(beat)
    submissions.register(RunDirectory(str(place / "dead")), {"job": "4711", "driver": "a", "cluster": {"type": "ssh"}})
    make_run(place, "alive").claim_attempt(world_size=1, command=())
    make_run(place, "fresh")
    (place / "notes").mkdir()
    (place / "readme.txt").write_text("no run")
    return place


def test_every_run_is_listed_with_how_it_stands(runs):
    found = {run.name: run for run in list_runs(str(runs))}
    states = {"done": "stopped early", "broke": "failed", "halted": "interrupted", "dead": "lost"}
    assert {name: run.state for name, run in found.items()} == states | {"alive": "running", "fresh": "unfinished"}
    done = found["done"]
    assert (done.step, done.progress, done.loss, done.cluster, done.attempts) == (2, 0.2, 2.0, "local", 1)
    assert (found["dead"].cluster, found["dead"].job) == ("ssh", "4711")
    assert found["broke"].message == "the loss is nan\nat step 3"
    assert found["fresh"] == Listed("fresh", "unfinished", cluster="local")


def test_a_run_that_waits_in_a_queue_is_listed(runs):
    """Before it has a recipe: its driver writes that."""
    run = RunDirectory(str(runs / "waits"))
    record = {"job": "99", "driver": None, "cluster": {"type": "slurm"}, "submitted_at": 1.0}
    submissions.expect(run, record)
    assert {each.name: each for each in list_runs(str(runs))}["waits"] == Listed(
        "waits", "queued", cluster="slurm", job="99"
    )
    name = submissions.register(run, record)
    assert standing_of(run).word == "starting"
    submissions.finish(run, name, 2)
    assert (standing_of(run).word, standing_of(run).message) == ("failed", "")


def test_the_list_as_table_and_as_json(runs, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    assert cli.main(["list"]) == 0
    shown = capsys.readouterr().out
    rows = {line.split()[0]: line for line in shown.splitlines()[1:]}
    assert set(rows) == {"done", "broke", "halted", "dead", "alive", "fresh"}
    for part in ("stopped early", "20.0%", "2.0000", "local", "ago"):
        assert part in rows["done"]
    assert cli.main(["list", str(runs), "--json"]) == 0
    assert {run["name"]: run["state"] for run in json.loads(capsys.readouterr().out)}["dead"] == "lost"


def test_a_broken_run_does_not_hide_the_others(runs):
    (runs / "broke" / "attempts" / "a1.json").write_text("{")
    states = {run.name: run.state for run in list_runs(str(runs))}
    assert states["broke"] == "broken"
    assert states["done"] == "stopped early"


def test_a_folder_that_is_not_there_is_an_error_and_an_empty_one_is_not(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["list", "elsewhere"]) == 1
    assert "there is no such folder" in capsys.readouterr().err
    (tmp_path / "runs").mkdir()
    assert cli.main(["list"]) == 0
    assert "no runs in runs" in capsys.readouterr().out


@pytest.mark.parametrize("section", [{"type": "ray", "address": "a:1"}, {"type": "ssh", "hosts": ["a", "b"]}])
def test_the_cluster_is_found_in_a_stored_recipe(section):
    assert CLUSTER.search(dump_recipe(recipe("bot", cluster=section)))[1] == section["type"]


def test_status_tells_attempts_ends_and_goodput(runs, capsys):
    run = RunDirectory(str(runs / "broke"))
    run.finish_attempt(run.claim_attempt(world_size=4, command=(), process=GONE), "failed", "out of memory\nmore")
    assert cli.main(["status", "broke"]) == 0
    shown = capsys.readouterr().out
    assert "unfinished (failed)\nout of memory\nmore\n" in shown
    assert "attempts: 2\n" in shown
    assert "2 ranks, rank 0 on another-host: failed: the loss is nan\n" in shown
    assert "4 ranks, rank 0 on another-host: failed: out of memory\n" in shown
    assert "goodput 0.0% of" in shown
    assert cli.main(["status", "broke", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["state"] == "failed"
    assert [attempt["world_size"] for attempt in values["attempts"]] == [2, 4]
    assert values["goodput"]["total_s"] == pytest.approx(sum(values["goodput"]["seconds"].values()))


def test_standing_of_a_run_that_goes_on_after_a_failure(runs):
    run = RunDirectory(str(runs / "broke"))
    run.claim_attempt(world_size=2, command=())
    standing = standing_of(run)
    assert (standing.word, standing.message) == ("running", "")
    assert [tried.word for tried in standing.tried] == ["failed", "running"]


# --- what ranks print -------------------------------------------------------------------------------------------------


PRINTS = """
import os, sys
from ftlaunch.distributed.run_directory import RunDirectory
from ftlaunch.launcher.rank_log import RankLog

log = RankLog()
print("early")
log.keep(RunDirectory(sys.argv[1]), 2, 3)
print("from Python")
os.system("echo from a child")
sys.stderr.write("an error\\n")
log.close()
print("behind")
"""


def test_what_a_rank_prints_is_kept(runs, capfd):
    done = subprocess.run([sys.executable, "-c", PRINTS, runs / "done"], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("behind\n", "")
    text = Path(rank_log_url(RunDirectory(str(runs / "done")), 2, 3)).read_text()
    assert text.startswith("early\nrank 3 of attempt 2, on ")
    assert set(text.splitlines()[2:]) == {"from Python", "from a child", "an error"}
    run = RunDirectory(str(runs / "done"))
    while len(run.attempts()) < 3:  # the third got nowhere
        run.claim_attempt(world_size=1, command=(), process=GONE)
    assert cli.main(["logs", "done", "--rank", "3"]) == 0
    assert capfd.readouterr().out == text
    assert cli.main(["logs", "done"]) == 1
    assert "keeps nothing that rank 0 printed; there are those of ranks 3" in " ".join(capfd.readouterr().err.split())


def test_a_rank_that_is_killed_leaves_one_log(runs, tmp_path):
    code = PRINTS.replace("log.close()", "sys.stdout.flush(); os.kill(os.getpid(), 9)")
    variables = {**os.environ, "TMPDIR": str(tmp_path)}
    assert subprocess.run([sys.executable, "-c", code, runs / "done"], check=False, env=variables).returncode == -9
    assert "from a child" in Path(rank_log_url(RunDirectory(str(runs / "done")), 2, 3)).read_text()
    assert list(tmp_path.glob("ftlaunch-rank-*")) == []


def test_in_an_object_store_a_copy_is_kept(tmp_path, monkeypatch):
    from ftlaunch.launcher import log_copy

    kept: dict[str, bytes] = {}
    monkeypatch.setattr(log_copy.storage, "write_bytes", kept.__setitem__)
    monkeypatch.setattr(log_copy.storage, "is_local", lambda url: "://" not in url)
    source = tmp_path / "log"
    source.write_bytes(b"one\n")
    copy = log_copy.LogCopy("s3://bucket/run/log", source)
    source.write_bytes(b"one\ntwo\n")
    copy.close()
    assert kept == {"s3://bucket/run/log": b"one\ntwo\n"}


# --- retry ------------------------------------------------------------------------------------------------------------


def test_a_stored_recipe_is_loaded_as_it_was_with_changes_laid_over(tmp_path):
    stored = recipe("bot", cluster={"type": "ssh", "hosts": ["a", "b"]}, data={"train": [{"path": "${NOT}/$${x}"}]})
    text = dump_recipe(stored)
    assert load_stored_recipe(text, "recipe.yaml", environ={}).recipe == stored
    loaded = load_stored_recipe(
        text, "s3://b/r/recipe.yaml", ["train.max_steps=${STEPS}"], environ={"STEPS": "7"}, nodes=1
    )
    assert loaded.recipe.train.max_steps == 7
    assert loaded.recipe.cluster.nodes == 1
    assert loaded.path == "s3://b/r/recipe.yaml"


def test_secrets_that_a_run_does_not_keep_are_asked_for():
    text = dump_recipe(recipe("bot", track={"wandb": {"project": "s3cr3t"}}), ["s3cr3t"])
    with pytest.raises(RecipeError, match=r"track\.wandb\.project") as raised:
        load_stored_recipe(text, "recipe.yaml", environ={})
    assert "a run does not keep" in str(raised.value)
    again = load_stored_recipe(text, "recipe.yaml", ["track.wandb.project=${API_KEY}"], environ={"API_KEY": "s3cr3t"})
    assert again.secrets == ("s3cr3t",)


def test_a_retry_goes_to_where_the_run_was_started(tmp_path, monkeypatch):
    home = tmp_path / "home"
    run = make_run(home / "runs", "bot")
    run.claim_attempt(world_size=1, command=(), process=GONE, folder=str(home))
    monkeypatch.chdir(tmp_path)
    enter_folder(run, recipe("bot"))
    assert Path.cwd() == home
    with pytest.raises(UserError, match=r"names .*/runs/other as its run"):
        enter_folder(run, recipe("other"))


def test_a_retry_of_what_was_never_started(runs, capsys):
    (runs / "notes" / "commits").mkdir()
    assert cli.main(["retry", "notes"]) == 1
    assert "nothing was started there" in capsys.readouterr().err
