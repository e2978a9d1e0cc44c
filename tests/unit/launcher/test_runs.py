"""Running a recipe again: every branch of the decision."""

from __future__ import annotations

from pathlib import Path

import pytest

from ftlaunch.distributed.again import Facts, Flags, decide, gather
from ftlaunch.distributed.run_directory import AttemptInfo, Process, RunDirectory
from ftlaunch.launcher.runs import find_run, fresh_name
from ftlaunch.recipes.errors import UserError
from ftlaunch.recipes.load import LoadedRecipe, as_stored, load_recipe
from ftlaunch.recipes.redact import dump_recipe
from ftlaunch.recipes.schema import Recipe


def recipe(**train: object) -> Recipe:
    return Recipe.model_validate(
        {"name": "bot", "model": {"path": "base"}, "data": {"train": [{"path": "rows.jsonl"}]}, "train": train}
    )


ALIVE = AttemptInfo(3, Process("gpu-17", 4711, 0.0), "2026-01-01T00:00:00+00:00", 8, ())


def test_nothing_there_is_a_new_run():
    assert decide(Facts(), recipe(), Flags()).action == "new"


def test_an_unfinished_run_continues_and_says_from_which_step():
    decision = decide(Facts(recipe(), step=200), recipe(), Flags())
    assert decision.action == "continue"
    assert decision.message == "continuing run bot from step 200"
    assert decision.trains


def test_a_run_without_a_checkpoint_begins_at_its_beginning():
    assert "no checkpoint yet" in decide(Facts(recipe()), recipe(), Flags()).message


def test_layout_changes_continue_and_are_listed():
    decision = decide(Facts(recipe(), step=5), recipe(micro_batch_size=4), Flags())
    assert decision.action == "continue"
    assert [str(change) for change in decision.changes] == ["train.micro_batch_size: 1 -> 4"]


def test_training_changes_stop_with_a_diff_and_both_ways_out():
    decision = decide(Facts(recipe(), step=5), recipe(learning_rate=1e-3), Flags())
    assert decision.action == "stop"
    assert not decision.trains
    wanted = ["train.learning_rate: 2e-05 -> 0.001", "--fresh", "--accept-changes"]
    assert [part for part in wanted if part not in decision.message] == []


def test_accepted_changes_continue():
    decision = decide(Facts(recipe(), step=5), recipe(learning_rate=1e-3), Flags(accept_changes=True))
    assert decision.action == "continue"
    assert [change.key for change in decision.changes] == ["train.learning_rate"]


def test_a_finished_run_is_not_trained_again():
    decision = decide(Facts(recipe(), step=9, finished=True), recipe(), Flags())
    assert decision.action == "finished"
    assert not decision.trains


def test_more_epochs_extend_a_finished_run():
    decision = decide(Facts(recipe(num_epochs=1), step=9, finished=True), recipe(num_epochs=2), Flags())
    assert decision.action == "extend"
    assert decision.message == "extending run bot from step 9"


def test_more_epochs_with_other_numbers_still_stop():
    facts = Facts(recipe(num_epochs=1), step=9, finished=True)
    assert decide(facts, recipe(num_epochs=2, seed=1), Flags()).action == "stop"
    assert decide(facts, recipe(num_epochs=2, seed=1), Flags(accept_changes=True)).action == "extend"


@pytest.mark.parametrize("flags", [Flags(), Flags(accept_changes=True)])
def test_a_run_that_is_alive_is_refused_with_host_and_attempt(flags: Flags):
    decision = decide(Facts(recipe(), step=1, alive=ALIVE), recipe(), flags)
    assert decision.action == "alive"
    assert "attempt 3 on gpu-17" in decision.message


@pytest.mark.parametrize(
    ("name", "taken", "free"),
    [
        ("bot", set(), "bot"),
        ("bot", {"bot"}, "bot-2"),
        ("bot", {"bot", "bot-2"}, "bot-3"),
        ("bot-2", {"bot", "bot-2"}, "bot-3"),
        ("llama-3", {"other"}, "llama-3"),
    ],
)
def test_a_fresh_run_gets_the_next_free_name(name: str, taken: set[str], free: str):
    assert fresh_name(name, taken) == free


def run_with(folder: Path, stored: Recipe) -> RunDirectory:
    run = RunDirectory(str(folder))
    run.store_recipe(dump_recipe(stored))
    return run


def test_facts_are_read_from_the_directory(tmp_path):
    assert gather(RunDirectory(str(tmp_path / "none")), print) == Facts()
    run = run_with(tmp_path / "bot", recipe())
    attempt = run.claim_attempt(world_size=1, command=())
    alive = gather(run, print)
    assert alive.recipe == recipe()
    assert alive.alive is not None and alive.alive.number == attempt
    run.finish_attempt(attempt, "finished")
    run.write_result({})
    assert gather(run, print) == Facts(recipe(), step=None, finished=True)


def test_a_secret_is_no_change(tmp_path):
    path = tmp_path / "bot.yaml"
    path.write_text("model: {path: base}\ndata: {train: [{path: 's3://bucket/${TOKEN}/rows.jsonl'}]}\n")
    loaded = load_recipe(path, environ={"TOKEN": "s3cr3t-value"})
    stored = RunDirectory(str(tmp_path / "runs" / "bot"))
    stored.store_recipe(dump_recipe(loaded.recipe, loaded.secrets))
    assert "s3cr3t" not in (stored.read_recipe() or "")
    facts = gather(stored, print)
    again = load_recipe(path, environ={"TOKEN": "another-value"})
    assert decide(facts, as_stored(again), Flags()).changes == ()


def test_a_run_is_found_by_name_path_and_url(tmp_path):
    run_with(tmp_path / "runs" / "bot", recipe())
    wanted = str(tmp_path / "runs" / "bot")
    assert find_run("bot", tmp_path) == wanted
    assert find_run("runs/bot", tmp_path) == wanted
    assert find_run(wanted, Path("/")) == wanted
    assert find_run(f"file://{wanted}", Path("/")) == f"file://{wanted}"


def test_a_run_that_is_not_there_suggests_near_ones(tmp_path):
    run_with(tmp_path / "runs" / "support-bot", recipe())
    with pytest.raises(UserError, match="did you mean support-bot"):
        find_run("suport-bot", tmp_path)
    with pytest.raises(UserError, match="holds none"):
        find_run("bot", tmp_path / "elsewhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no run"):
        find_run(f"file://{tmp_path}/empty", tmp_path)


def test_the_stored_recipe_is_the_loaded_one():
    assert as_stored(LoadedRecipe(recipe(), "bot.yaml", (), ())) == recipe()
