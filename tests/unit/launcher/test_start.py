"""`ftlaunch recipe.yaml` up to the ranks: what is decided, said, written and returned. The ranks themselves are not
started here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ftlaunch.cluster import existing
from ftlaunch.cluster.existing import Offer
from ftlaunch.distributed.run_directory import RunDirectory
from ftlaunch.launcher import cli, runs, start, supervisor
from ftlaunch.launcher.control import Ending
from ftlaunch.launcher.hardware import Machine
from ftlaunch.recipes.load import LoadedRecipe
from ftlaunch.recipes.redact import dump_recipe

STEP = {"kind": "step", "step": 3, "attempt": 1, "progress": 1.0, "loss": 1.5, "learning_rate": 1e-4, "tokens": 192}
STEP |= {"tokens_per_s": 10.0, "memory_bytes": 1 << 20, "step_s": 1.0, "data_wait_s": 0.0, "grad_norm": 1.0}
EVALUATIONS = [
    {"kind": "evaluation", "step": step, "attempt": 1, "losses": {"held-out/loss": loss}}
    for step, loss in ((0, 4.0), (3, 3.0))
]


class Supervisor:
    """Stands for the ranks: writes what they would, and ends as it is told."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []
        self.ending = Ending("finished")

    def __call__(self, loaded: LoadedRecipe, nodes: object, view: object) -> Ending:
        recipe = loaded.recipe
        run = RunDirectory(f"{recipe.checkpoint.path}/{recipe.name}")
        self.seen.append((recipe.name, nodes.demand.ranks))
        number = run.claim_attempt(world_size=1, command=())
        run.replace_recipe(dump_recipe(recipe, loaded.secrets), number)
        (Path(run.url) / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in [STEP, *EVALUATIONS]))
        run.finish_attempt(number, self.ending.outcome)
        if self.ending.exit_code == 0:
            run.write_result({"outcome": "finished"})
        view.update(STEP)
        return self.ending


@pytest.fixture
def ranks(place: Path, monkeypatch: pytest.MonkeyPatch) -> Supervisor:
    fake = Supervisor()
    monkeypatch.setattr(supervisor, "supervise", fake)
    monkeypatch.setattr(start, "this_machine", lambda: Machine(gpus=0, cores=2))
    return fake


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    code = cli.main(["bot.yaml", *words])
    shown = capsys.readouterr()
    return code, shown.out + shown.err


def test_a_new_run_trains_reports_and_sums_up(capsys, place, ranks):
    code, said = run(capsys)
    assert code == 0
    wanted = ["new run bot", "step      3", "3 steps, 192 tokens", "held-out/loss  4.0000  3.0000  -25.0%"]
    assert [part for part in wanted if part not in said] == []
    assert "-25.0%" in (place / "runs" / "bot" / "report.html").read_text()


def test_a_finished_run_answers_with_its_summary(capsys, place, ranks):
    run(capsys)
    code, said = run(capsys)
    assert code == 0
    assert "run bot is finished" in said
    assert "192 tokens" in said
    assert len(ranks.seen) == 1


def test_more_steps_extend_it(capsys, place, ranks):
    run(capsys)
    code, said = run(capsys, "train.max_steps=9")
    assert code == 0
    assert "extending run bot" in said
    assert "changed: train.max_steps: 3 -> 9" in said
    assert len(ranks.seen) == 2


def test_other_numbers_stop_with_a_diff(capsys, place, ranks):
    run(capsys)
    code, said = run(capsys, "train.seed=7")
    assert code == 1
    assert "train.seed: 0 -> 7" in said
    assert len(ranks.seen) == 1
    assert run(capsys, "train.seed=7", "train.max_steps=4", "--accept-changes")[0] == 0
    assert len(ranks.seen) == 2


def test_fresh_begins_beside_the_old_one(capsys, place, ranks):
    run(capsys)
    assert "new run bot-2" in run(capsys, "--fresh", "train.seed=7")[1]
    run(capsys, "--fresh")
    assert [name for name, _ in ranks.seen] == ["bot", "bot-2", "bot-3"]


def test_a_run_that_is_alive_is_refused(capsys, place, ranks):
    folder = RunDirectory(str(place / "runs" / "bot"))
    folder.claim_attempt(world_size=1, command=())
    code, said = run(capsys)
    assert code == 1
    assert "attempt 1 on" in said
    assert ranks.seen == []


@pytest.mark.parametrize(
    ("ending", "message"),
    [
        (Ending("interrupted", "stopped after step 3", 130), "stopped after step 3"),
        (Ending("failed", "the loss is nan at step 3", 1), "the loss is nan"),
        (Ending("failed", "a node went away", 2), "a node went away"),
    ],
)
def test_how_it_ended_is_said_and_returned(capsys, place, ranks, ending, message):
    ranks.ending = ending
    code, said = run(capsys)
    assert code == ending.exit_code
    assert message in said
    assert "next" not in said
    assert ending.outcome in (place / "runs" / "bot" / "report.html").read_text()


def test_an_unfinished_run_continues(capsys, place, ranks):
    ranks.ending = Ending("interrupted", "stopped", 130)
    run(capsys)
    ranks.ending = Ending("finished")
    code, said = run(capsys, "train.micro_batch_size=2")
    assert code == 0
    assert "continuing run bot" in said
    assert "changed: train.micro_batch_size: 1 -> 2" in said


def test_nodes_become_ranks_with_a_warning(capsys, place, ranks):
    code, said = run(capsys, "--nodes", "3")
    assert code == 0
    assert ranks.seen == [("bot", 3)]
    assert "3 ranks share 2 cores" in said


def test_more_gpus_than_exist_are_refused_before_anything_is_written(capsys, place, ranks):
    code, said = run(capsys, "--gpus-per-node", "2")
    assert code == 1
    assert "this machine has 0" in said
    assert not (place / "runs").exists()


@pytest.mark.parametrize(("offer", "nodes", "wanted"), [(Offer(4, 64), 2, 8), (Offer(0, 8), 2, 2)])
def test_a_running_cluster_is_asked_what_it_has(capsys, place, ranks, monkeypatch, offer, nodes, wanted):
    monkeypatch.setattr(existing, "ask", lambda config: offer)
    code, _ = run(capsys, f"cluster={{type: ray, nodes: {nodes}}}")
    assert code == 0
    assert ranks.seen == [("bot", wanted)]


def test_a_place_that_cannot_be_written_is_found_first(capsys, place, ranks):
    (place / "runs").write_text("a file")
    code, said = run(capsys)
    assert code == 1
    assert "runs" in said
    assert ranks.seen == []


def test_runs_elsewhere_are_called_by_their_url(place):
    assert runs.short_name("./runs/bot") == "bot"
    assert runs.short_name(f"{place}/runs/bot") == "bot"
    assert runs.short_name("elsewhere/bot") == "elsewhere/bot"
    assert runs.short_name("s3://acme/runs/bot") == "s3://acme/runs/bot"


@pytest.mark.parametrize("key", ["data.train.0.path", "data.eval.0.path"])
def test_a_mistake_in_a_path_leaves_no_run_behind(place, ranks, capsys, key):
    code, said = run(capsys, f"{key}=nowhere.jsonl")
    assert code == 1
    assert "nowhere.jsonl: no data files found" in said
    assert not (place / "runs/bot").exists()
    assert ranks.seen == []
