"""A sweep of real runs: one has a mistake that only its ranks find, the others end with the weights of runs alone."""

from __future__ import annotations

import json

from processes import ftlaunch, run
from tiny import recipe_for, write_recipe
from training import read_run, train


def test_a_sweep_with_a_run_that_fails(tmp_path):
    """A mistake that its ranks find ends it at once, and leaves its reason where their words are; the other is
    trained."""
    two_ranks = {"type": "local", "processes_per_node": 2, "gpus_per_node": 0}
    made = recipe_for(tmp_path, train={"max_steps": 4, "max_grad_norm": None}, cluster=two_ranks)
    recipe = {**made, "name": "bot"}
    write_recipe(tmp_path / "bot.yaml", recipe)
    words = ["batch", "bot.yaml", "--sweep", "train.learning_rate=1e30,1e-3", "--sweep", "train.seed=3"]
    code, said = run(ftlaunch(*words), tmp_path)
    assert code == 1, said
    assert "batch bot-sweep: 2 runs, 1 at once" in said
    table = json.loads((tmp_path / "batches/bot-sweep/comparison.json").read_text())
    states = {row["name"]: (row["state"], row["exit_code"]) for row in table}
    assert states == {
        f"bot-learning_rate-{rate}-seed-3": ended
        for rate, ended in (("1e-3", ("finished", 0)), ("1e30", ("failed", 1)))
    }
    assert table[0]["state"] == "finished"  # the best first
    assert "train.learning_rate" in table[1]["message"]
    failed = tmp_path / "runs/bot-learning_rate-1e30-seed-3"
    assert json.loads((failed / "attempts/a1.end.json").read_text())["outcome"] == "failed"
    assert "train.learning_rate" in (failed / "logs/a1.rank-00000.log").read_text()
    assert not list(failed.glob("failures/*"))
    assert "Traceback" not in said
    page = (tmp_path / "batches/bot-sweep/comparison.html").read_text()
    assert "bot-learning_rate-1e-3-seed-3" in page

    section = {**recipe["train"], "learning_rate": 1e-3, "seed": 3}
    alone = train({**recipe, "name": "alone", "train": section}, 2)
    swept = read_run(tmp_path / "runs" / "bot-learning_rate-1e-3-seed-3")
    assert swept.losses == alone.losses
    [row] = [row for row in table if row["name"] == "bot-learning_rate-1e-3-seed-3"]
    assert row["loss"] == alone.losses[-1]

    code, said = run(ftlaunch(*words[:2], "--sweep", "train.learning_rate=1e-3", "--sweep", "train.seed=3"), tmp_path)
    assert code == 0, said  # it is finished, and nothing is trained again
    assert len(list((swept.directory / "attempts").glob("a?.json"))) == 1
