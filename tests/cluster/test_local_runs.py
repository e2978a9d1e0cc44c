"""Whole runs under `ftlaunch` on this machine: the same numbers as torchrun's, Ctrl-C, and ranks that die."""

from __future__ import annotations

import json
import re
from pathlib import Path

import chaos
import psutil
import pytest
from forked import run_forked
from processes import Command, ftlaunch, run, torchrun
from tiny import recipe_for, write_recipe
from training import Trained, read_run

from ftlaunch.distributed import entry
from ftlaunch.distributed.run_directory import RunDirectory
from ftlaunch.launcher import cli
from ftlaunch.launcher.history import read_history

STEPS = 60
"""More than pass between a signal and the step after which a run stops for it."""

TENSORS = ("model.safetensors", "training/exp_avg.safetensors", "training/exp_avg_sq.safetensors")
TWO_RANKS = "cluster.processes_per_node=2"
READERS = "data.reader_processes=1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("local-runs")


def prepare(folder: Path, name: str) -> tuple[Path, Path]:
    """A recipe, and the directory its run will have."""
    train = {"max_steps": STEPS, "lr_scheduler": "linear", "warmup_ratio": 0.1}
    recipe = recipe_for(folder, train=train, checkpoint={"every_steps": 10})
    return write_recipe(folder / f"{name}.yaml", {**recipe, "name": name}), folder / "runs" / name


def final(directory: Path) -> dict[str, bytes]:
    """The tensors of the last step's checkpoint."""
    trained = read_run(directory)
    assert trained.checkpoint.name.startswith(f"step-{STEPS:06d}")
    return {name: (trained.checkpoint / name).read_bytes() for name in TENSORS}


def committed(directory: Path) -> list[int]:
    return sorted(json.loads(path.read_text())["step"] for path in (directory / "commits").glob("*.json"))


def outcomes(directory: Path) -> list[str]:
    """How the attempts ended, "lost" for one that could not say."""
    attempts = sorted((directory / "attempts").glob("a?.json"))
    ends = [path.with_name(f"{path.stem}.end.json") for path in attempts]
    return [json.loads(end.read_text())["outcome"] if end.exists() else "lost" for end in ends]


def started_at(directory: Path, step: int) -> Command:
    """The run of `prepare` under Ray on two ranks with a reader process each, once its metrics tell of a step."""
    command = Command(ftlaunch(f"{directory.name}.yaml", TWO_RANKS, READERS), directory.parents[1])
    assert command.wait_until(lambda: reached(directory, step)), command.text
    return command


def reached(directory: Path, step: int) -> bool:
    log = directory / "metrics.jsonl"
    return log.exists() and f'"step":{step},' in log.read_text()


def family(command: Command) -> list[psutil.Process]:
    """The command and everything it has started."""
    root = psutil.Process(command.process.pid)
    return [root, *root.children(recursive=True)]


def assert_gone(processes: list[psutil.Process]) -> None:
    """Ray's own processes end within moments of the command."""
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []


def assert_closed_to_others(processes: list[psutil.Process], directory: Path) -> Path:
    """What other users of this machine could see of a run, or do to it; the folder of Ray's files."""
    tokens = {process.environ().get("RAY_AUTH_TOKEN", "") for process in processes[1:]} - {""}  # that it has started
    assert len(tokens) == 1, tokens
    [token] = tokens
    assert not any(token in " ".join(process.cmdline()) for process in processes)
    written = [path for path in directory.rglob("*") if path.is_file()]
    assert not any(token.encode() in path.read_bytes() for path in written)
    open_to_all = [path for path in directory.rglob("*") if path.stat().st_mode & 0o002]
    assert open_to_all == []
    listening = {
        (" ".join(process.cmdline()), connection.laddr.ip.removeprefix("::ffff:"))
        for process in processes
        for connection in process.net_connections(kind="tcp")
        if connection.status == psutil.CONN_LISTEN
    }
    assert len(listening) > 3
    assert {command for command, address in listening if address not in ("127.0.0.1", "::1")} == set()
    [argument] = {
        word.partition("=")[2]
        for process in processes
        for word in process.cmdline()
        if word.startswith("--temp_dir=") or word.startswith("--temp-dir=")
    }
    temporary = Path(argument).parent
    assert temporary.stat().st_mode & 0o077 == 0
    assert not any(token.encode() in path.read_bytes() for path in temporary.rglob("*.log"))
    return temporary


@pytest.fixture(scope="module")
def by_torchrun(folder) -> Trained:
    recipe, directory = prepare(folder, "by-torchrun")
    code, output = run(torchrun(2, str(recipe)), folder)
    assert code == 0, output
    return read_run(directory)


def test_two_logical_nodes_train_bitwise_as_torchrun_does(folder, by_torchrun):
    recipe, directory = prepare(folder, "by-ray")
    code, output = run(ftlaunch("--nodes", "2", str(recipe)), folder)
    assert code == 0, output
    assert "2 nodes on one machine are logical nodes" in output
    by_ray = read_run(directory)
    assert len(by_ray.losses) == STEPS
    assert by_ray.losses == by_torchrun.losses
    assert by_ray.grad_norms == by_torchrun.grad_norms
    assert final(directory) == final(by_torchrun.directory)
    assert json.loads((directory / "attempts/a1.json").read_text())["world_size"] == 2


def test_one_process_differs_by_rounding_only(folder, by_torchrun):
    # 20 steps: after that, rounding has grown through the steps themselves.
    recipe, directory = prepare(folder, "alone")
    assert entry.main([str(recipe)]) == 0
    alone = read_run(directory)
    assert alone.losses[:20] == pytest.approx(by_torchrun.losses[:20], rel=1e-6)


def test_ctrl_c_saves_and_a_retry_goes_on_from_there(folder, by_torchrun, tmp_path):
    _, directory = prepare(folder, "interrupted")
    command = started_at(directory, 3)
    processes = family(command)
    command.interrupt()
    assert command.wait() == 130, command.text
    assert_gone(processes)
    [step] = committed(directory)[-1:]
    assert 3 <= step < STEPS
    assert f"stopped after step {step}; the same command continues from there" in command.text
    assert outcomes(directory) == ["interrupted"]

    code, output = run(ftlaunch("retry", str(directory)), tmp_path)  # by the recipe that the run keeps
    assert code == 0, output
    assert f"continuing run interrupted from step {step}" in output
    assert [line["step"] for line in read_run(directory).steps] == list(range(1, STEPS + 1))
    assert final(directory) == final(by_torchrun.directory)


def test_a_second_ctrl_c_stops_at_once(folder):
    _, directory = prepare(folder, "interrupted-twice")
    command = started_at(directory, 1)
    processes = family(command)
    temporary = assert_closed_to_others(processes, directory)
    command.interrupt()
    assert command.wait_until(lambda: "again: at once" in command.text), command.text
    command.interrupt()
    assert command.wait() == 130, command.text
    assert_gone(processes)
    assert "Traceback" not in command.text
    assert STEPS not in committed(directory)
    assert not temporary.exists()


def test_sigterm_saves_under_torchrun(folder, by_torchrun):
    recipe, directory = prepare(folder, "terminated")
    command = Command(torchrun(2, str(recipe)), folder)
    assert command.wait_until(lambda: reached(directory, 3)), command.text
    ranks = psutil.Process(command.process.pid).children()
    assert len(ranks) == 2
    for rank in ranks:
        rank.terminate()
    command.wait()
    assert outcomes(directory) == ["interrupted"]
    [step] = committed(directory)[-1:]
    assert 3 <= step < STEPS
    code, output = run_forked(2, [str(recipe)], folder)
    assert code == 0, output
    assert final(directory) == final(by_torchrun.directory)


def test_a_rank_that_dies_is_started_again(folder, by_torchrun):
    _, directory = prepare(folder, "killed-rank")
    command = started_at(directory, 12)
    ranks = chaos.ranks(family(command))
    assert len(ranks) == 2
    readers = [child for child in ranks[0].children() if "reader_process" in " ".join(child.cmdline())]
    assert len(readers) == 1
    ranks[0].kill()
    assert_gone(readers)
    assert command.wait() == 0, command.text
    said = " ".join(command.text.split())
    assert re.search(r"rank [01] on \S+: the process was killed; all ranks are started again, from", said)
    events = [json.loads(line) for line in (directory / "events.jsonl").read_text().splitlines()]
    assert {event["attempt"] for event in events} == {1, 2}
    assert outcomes(directory)[1:] == ["finished"]
    assert final(directory) == final(by_torchrun.directory)
    ledger = read_history(RunDirectory(str(directory))).ledger
    # Not "down": Ray may give a rank a process that it had started a moment before the other died.
    assert [part for part in ("training", "start-up", "lost work", "saving") if ledger.seconds[part] <= 0] == []
    assert "Where the time went" in (directory / "report.html").read_text()
    logs = sorted(path.name for path in (directory / "logs").iterdir())
    assert logs == [f"a{attempt}.rank-0000{rank}.log" for attempt in (1, 2) for rank in (0, 1)]
    code, output = run(ftlaunch("logs", str(directory), "--rank", "1"), folder)
    assert code == 0, output
    assert "rank 1 of attempt 2, on " in output


def test_what_was_trained_is_shown_and_asked(folder, by_torchrun, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert cli.main(["status", "by-torchrun"]) == 0
    shown = capsys.readouterr().out
    assert "by-torchrun: finished" in shown
    assert "goodput " in shown
    assert cli.main(["list"]) == 0
    assert "by-torchrun" in capsys.readouterr().out
    assert f"checkpoints: {STEPS - 10}, {STEPS}" in shown
    answer = ["generate", "by-torchrun", "alpha beta", "--max-new-tokens", "8"]
    assert cli.main(answer) == 0
    first = capsys.readouterr().out
    assert first.strip()
    assert cli.main([*answer, "--temperature", "0"]) == 0
    assert capsys.readouterr().out == first
    assert cli.main(["generate", "by-torchrn", "alpha"]) == 1
    assert "did you mean by-torchrun" in " ".join(capsys.readouterr().err.split())
    assert cli.main(["check", "by-torchrun.yaml"]) == 0
    shown = capsys.readouterr().out
    assert "chat" in shown
    assert "alpha" in shown
