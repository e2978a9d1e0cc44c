"""The command line, from words to exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ftlaunch.launcher import cli
from ftlaunch.launcher.arguments import OPTIONS_WITH_VALUES, arrange
from ftlaunch.recipes.errors import InfrastructureError, Interrupted, UserError


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command line."""
    code = cli.main(words)
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_help_lists_every_verb(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    assert [verb for verb in cli.VERBS if verb not in out] == []


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_help(capsys, verb):
    code, out, _ = run(capsys, verb, "--help")
    assert code == 0
    assert f"ftlaunch {verb}" in out


def test_verbs_are_the_commands():
    assert set(cli.VERBS) == {name for name in cli.app if not name.startswith("-")}


def test_options_before_a_verb_know_which_take_a_value():
    apps = [cli.app, *(cli.app[verb] for verb in cli.VERBS)]
    arguments = [argument for app in apps for argument in app.assemble_argument_collection()]
    with_value = {name for each in arguments for name in each.names if name.startswith("--") and each.token_count()[0]}
    assert with_value == OPTIONS_WITH_VALUES


def test_version(capsys):
    from importlib.metadata import version

    assert run(capsys, "--version")[:2] == (0, version("ftlaunch") + "\n")


def test_no_words_show_help_but_are_no_success(capsys):
    code, out, _ = run(capsys)
    assert code == 1
    assert "Commands" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["plna", "bot.yaml"], "did you mean plan?"),
        (["bto.yaml"], "did you mean bot.yaml?"),
        (["plna", "--help"], "did you mean plan?"),
        (["--nodes", "2", "chek"], "did you mean check or"),
        (["base"], "base is a folder"),
        (["plan"], "requires an argument"),
        (["plan", "bot.yaml", "--bogus"], "Unknown option"),
        (["--nodes", "two", "bot.yaml"], "two"),
        (["pull", "only-one"], "FOLDER"),
        (["plan", "missing.yaml"], "missing.yaml"),
    ],
)
def test_usage_errors_are_exit_1_with_a_remedy(capsys, place, words, said):
    code, out, err = run(capsys, *words)
    assert code == 1
    assert out == ""
    assert said in err


def test_a_verb_may_come_after_options():
    words = ["--nodes", "2", "--json", "plan", "r.yaml"]
    assert arrange(words, cli.VERBS, Path()) == ["plan", "--nodes", "2", "--json", "r.yaml"]


def test_options_before_a_verb_reach_it(capsys, place):
    code, out, _ = run(capsys, "--nodes", "2", "--json", "plan", "bot.yaml", "train.max_steps=5")
    assert code == 0
    plan = json.loads(out)
    assert plan["world"] == {**plan["world"], "nodes": 2, "ranks_per_node": 1}
    assert plan["recipe"]["cluster"]["nodes"] == 2
    assert plan["recipe"]["train"]["max_steps"] == 5


def test_a_file_named_like_a_verb_can_be_run(place):
    (place / "plan").write_text("")
    assert arrange(["./plan"], cli.VERBS, place) == ["./plan"]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("[bold]mend[/bold] it"), 1),
        (InfrastructureError("gone"), 2),
        (Interrupted("saved"), 130),
        (KeyboardInterrupt(), 130),
    ],
)
def test_errors_have_their_exit_codes(capsys, monkeypatch, error, code):
    def fail(_words: list[str]) -> int:
        raise error

    monkeypatch.setattr(cli, "_dispatch", fail)
    got, _, err = run(capsys, "schema")
    assert got == code
    assert str(error) in err
    assert "Traceback" not in err


def test_a_bug_is_exit_2_with_a_traceback(capsys, monkeypatch):
    monkeypatch.setattr(cli, "_dispatch", lambda _words: 1 // 0)
    code, _, err = run(capsys, "schema")
    assert code == 2
    assert "ZeroDivisionError" in err
    assert "please report it" in err


def test_secrets_do_not_appear_in_errors(capsys, place, monkeypatch):
    monkeypatch.setenv("TOKEN", "s3cr3t-value")
    (place / "bot.yaml").write_text("model: {path: base}\ndata: {train: [{path: 'gone-${TOKEN}/*.jsonl'}]}\n")
    code, _, err = run(capsys, "plan", "bot.yaml")
    assert code == 1
    assert "gone-REDACTED" in err
    assert "s3cr3t" not in err


def test_a_deepspeed_config_against_the_recipe_and_what_zero_3_cannot_do_are_told_at_once(capsys, place):
    """Before anything is started, with where it was written."""
    strategy = (
        "strategy={type: deepspeed, stage: 3, deepspeed_config: {train_batch_size: 7, zero_optimization: {stage: 2}}}"
    )
    words = [strategy, "train.compile=true", "train.optimizer=muon", "adapter={type: qlora}"]
    code, out, err = run(capsys, "plan", "bot.yaml", *words)
    said = " ".join(err.split())
    assert code == 1 and out == ""
    assert "strategy.deepspeed_config.train_batch_size: 7 contradicts train.global_batch_size, which makes it 4" in said
    assert "strategy.deepspeed_config.zero_optimization.stage: 2 contradicts strategy.stage, which makes it 3" in said
    assert "train.compile: not together with DeepSpeed's stage 3" in said
    assert "train.optimizer: DeepSpeed holds tensors in flat pieces, which only adamw is made for" in said
    assert "adapter.type: a base in 4 bits is not laid out by DeepSpeed" in said


def test_schema_is_json(capsys):
    code, out, _ = run(capsys, "schema")
    assert code == 0
    assert "model" in json.loads(out)["properties"]


def test_recipes_are_listed_printed_and_copied_but_never_over_a_file(capsys, place):
    from ftlaunch.launcher.catalogue import packaged_recipes

    name, text = next(iter(packaged_recipes().items()))
    assert name in run(capsys, "recipes")[1]
    assert run(capsys, "recipes", name)[:2] == (0, text)
    assert run(capsys, "recipes", name, "mine.yaml")[0] == 0
    assert (place / "mine.yaml").read_text().startswith("# yaml-language-server: $schema=./recipe.schema.json")
    assert json.loads((place / "recipe.schema.json").read_text())["title"] == "Recipe"
    assert (place / "mine.yaml").read_text() == text
    code, _, err = run(capsys, "recipes", name, "bot.yaml")
    assert code == 1
    assert "not overwritten" in err
    assert "global_batch_size: 4" in (place / "bot.yaml").read_text()
    assert run(capsys, "recipes", name, "no/folder.yaml")[0] == 1


def test_an_unknown_recipe_suggests_near_ones(capsys):
    from ftlaunch.launcher.catalogue import packaged_recipes

    name = next(iter(packaged_recipes()))
    code, _, err = run(capsys, "recipes", name[:-1])
    assert code == 1
    assert name in err


def test_the_console_script_works(tmp_path):
    script = Path(sys.executable).with_name("ftlaunch")
    done = subprocess.run([script, "nonsense"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "neither a recipe file nor a command" in done.stderr


def test_a_reader_that_goes_away_is_no_bug(tmp_path):
    command = f"{sys.executable} -m ftlaunch.launcher.cli schema | head -1"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout == "{\n"
    assert done.stderr == ""
