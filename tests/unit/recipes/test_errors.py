"""How mistakes read, and where they are placed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ftlaunch.recipes.errors import UserError
from ftlaunch.recipes.load import load_recipe, parse_recipe_text
from ftlaunch.recipes.problems import Origin, Problem, RecipeError

SMALLEST = "model: {path: m}\ndata:\n  train:\n    - path: rows.jsonl\n"

MANY_MISTAKES = """\
model:
  path: 5
  dtyp: bfloat16
method: {type: sft, train_on: asistant}
data:
  train:
    - path: a.jsonl
      weight: 1
    - path: b.jsonl
    - weight: -1
learning_rate: 1e-4
train:
  num_epochs: 2
  max_steps: 100
"""


def one(problems: list[Problem]) -> Problem:
    (problem,) = problems
    return problem


def test_smallest_recipe(load: Any) -> None:
    loaded = load(SMALLEST)
    assert loaded.recipe.name == "recipe"
    assert loaded.recipe.data.train[0].path == "rows.jsonl"
    assert loaded.warnings == ()
    assert loaded.path == "recipe.yaml"


def test_every_mistake_at_once_in_order_of_lines(problems: Any) -> None:
    found = [(str(problem.origin), problem.key) for problem in problems(MANY_MISTAKES)]
    assert found == [
        ("recipe.yaml:2", "model.path"),
        ("recipe.yaml:3", "model.dtyp"),
        ("recipe.yaml:4", "method.train_on"),
        ("recipe.yaml:10", "data.train.2.weight"),
        ("recipe.yaml:10", "data.train.2.path"),
        ("recipe.yaml:11", "learning_rate"),
        ("recipe.yaml:14", "train.max_steps"),
    ]


def test_message_is_a_list_that_says_place_key_expected_found_and_remedy(load: Any) -> None:
    with pytest.raises(UserError) as caught:
        load(MANY_MISTAKES)
    lines = str(caught.value).splitlines()
    assert lines[0] == "recipe.yaml: 7 problems in the recipe"
    assert lines[1] == "  recipe.yaml:2: model.path: expected text; found number 5; put it in quotes"
    assert lines[2] == "  recipe.yaml:3: model.dtyp: unknown key; did you mean dtype?"
    assert "found text 'asistant'; did you mean assistant?" in lines[3]
    assert lines[6] == "  recipe.yaml:11: learning_rate: unknown key; learning_rate belongs under train"
    assert lines[7].endswith("a second duration beside num_epochs; keep one of them")
    assert caught.value.exit_code == 1


def test_cross_section_checks_run_on_the_sections_that_are_valid(problems: Any) -> None:
    text = SMALLEST + "train: {micro_batch_size: 64}\nadapter: {typ: lora}\n"
    assert [problem.key for problem in problems(text)] == ["train.micro_batch_size", "adapter.typ"]


def test_checks_do_not_judge_by_sections_that_are_broken(problems: Any) -> None:
    text = SMALLEST + "train: {micro_batch_size: 64, global_batch_size: many}\n"
    assert one(problems(text)).key == "train.global_batch_size"


def test_duplicate_keys_show_both_lines_and_hide_nothing_else(problems: Any) -> None:
    text = (
        "model: {path: m}\ndata:\n  train: [{path: a}]\n  packing: true\n  packing: false\ntrain: {lr: 1}\nmodel: {}\n"
    )
    packing, rate, model = problems(text)
    assert (packing.key, packing.message) == ("data.packing", "duplicate key: on line 4 and again on line 5")
    assert rate.key == "train.lr"
    assert (model.key, model.message) == ("model", "duplicate key: on line 1 and again on line 7")


@pytest.mark.parametrize(
    ("line", "key", "words"),
    [
        ("method: {type: dpoo}", "method.type", "expected one of cpt, sft; found text 'dpoo'"),
        ("method: {type: sfft}", "method.type", "did you mean sft?"),
        ("method: {type: 3}", "method.type", "found number 3"),
        ("method: {train_on: all}", "method.type", "missing: which type of method this is; types are: cpt, sft"),
        ("method: {type: sft, sequence_length: 8}", "method.sequence_length", "belongs under data"),
        ("method: {type: cpt, train_on: all}", "method.train_on", "train_on belongs to method of type sft"),
        ("strategy: fsdp", "strategy", "found text 'fsdp'"),
        (
            "strategy: {type: deepspeed, offload_optimizer: nvme}",
            "strategy.offload_optimizer",
            "expected one of none, cpu; found text 'nvme'",
        ),
        ("train: {betas: [0.9]}", "train.betas", "expected a list of 2"),
        ("train: {betas: [0.9, 2]}", "train.betas.1", "below 1"),
        ("train: {learning_rate: .nan}", "train.learning_rate", "found number nan"),
        ("train: {max_steps: 1.5}", "train.max_steps", "expected a whole number, at least 1 or null"),
        ("train: {max_steps: 1_000}", "train.max_steps", "without underscores"),
        ("train: {max_steps: '1000'}", "train.max_steps", "without quotes"),
        ("train: {compile: yes}", "train.compile", "write true or false"),
        ("train:", "train", "put keys below it, or leave it out"),
        ("adapter: {target_modules: 3}", "adapter.target_modules", "expected text or a list"),
        ("adapter: {target_modules: all}", "adapter.target_modules", "write a list, [all], or all-linear"),
        ("adapter: {use_rslora: 1}", "adapter.use_rslora", "expected true or false"),
        ("adapter: {init: pisa}", "adapter.init", "did you mean pissa?"),
        ("name: 'a b'", "name", "matching"),
        ("track: {wandb: {entity: me}}", "track.wandb.project", "missing: expected text"),
        ("track: {tensorboard: 1}", "track.tensorboard", "expected true or false; found number 1"),
    ],
)
def test_one_mistake(problems: Any, line: str, key: str, words: str) -> None:
    problem = one(problems(SMALLEST + line + "\n"))
    assert problem.key == key
    assert words in str(problem)
    assert problem.origin == Origin("recipe.yaml", 5)


def test_data_that_is_no_list(problems: Any) -> None:
    problem = one(problems("model: {path: m}\ndata:\n  train: {path: a}\n"))
    assert (problem.key, problem.origin) == ("data.train", Origin("recipe.yaml", 3))
    assert "begin each item with `- `" in problem.remedy


def test_eval_as_a_mapping_is_judged_as_a_split_only(problems: Any) -> None:
    found = problems("model: {path: m}\ndata:\n  train: [{path: a}]\n  eval: {fractoin: 0.1}\n")
    assert [problem.key for problem in found] == ["data.eval.fractoin", "data.eval.fraction"]


def test_nothing_but_the_required(problems: Any) -> None:
    assert [problem.key for problem in problems("{}")] == ["model", "data"]


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no such recipe file"):
        load_recipe(tmp_path / "none.yaml", environ={})


def test_folder_and_binary_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        load_recipe(tmp_path, environ={})
    (tmp_path / "weights.yaml").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(UserError, match="not a text file in UTF-8"):
        load_recipe(tmp_path / "weights.yaml", environ={})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: {path: m\ndata: x\n", r"recipe.yaml:2: not YAML \(line 2, column 5\)"),
        ("model:\n\tpath: m\n", r"recipe.yaml:2: not YAML \(line 2, column 1\)"),
        ("model: {path: ${MODEL}}\n", r'write "\$\{VAR\}" with quotes'),
        ("a: 1\n---\nb: 2\n", "not YAML"),
        ("a: \x07\n", "not YAML"),
        ("[" * 5000, "not YAML"),
    ],
)
def test_text_that_is_no_yaml(load: Any, text: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        load(text)


@pytest.mark.parametrize("text", ["", "# only a comment\n", "- a\n- b\n", "just words\n"])
def test_top_level_must_be_keys_and_values(problems: Any, text: str) -> None:
    assert one(problems(text)).message.startswith("not a recipe: expected keys and values")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("track: !!python/object:os.system {}", "unknown YAML tag"),
        ("track: &t {wandb: *t}", "an alias .* that contains itself"),
        ("track: {<<: {tensorboard: false}}", "merge keys"),
        ("track: {[a, b]: 1}", "a list or mapping used as a key"),
        ("name: !local r", "unknown YAML tag !local"),
        (r'name: "\ud800"', "name: half a character"),
        (r'track: {"\udfff": 1}', "track: a key with half a character"),
    ],
)
def test_yaml_that_recipes_do_not_use(load: Any, line: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        load(SMALLEST + line + "\n")


def test_stored_recipe_that_no_longer_fits() -> None:
    with pytest.raises(RecipeError, match=r"runs/a/recipe.yaml:2: model.colour: unknown key"):
        parse_recipe_text("model:\n  colour: red\n", "runs/a/recipe.yaml")


@pytest.mark.parametrize(("file", "name"), [("a b.yaml", "a-b"), ("v1.2.yaml", "v1.2"), ("ä.yaml", "run")])
def test_name_is_the_files(tmp_path: Path, file: str, name: str) -> None:
    (tmp_path / file).write_text(SMALLEST)
    assert load_recipe(tmp_path / file, environ={}).recipe.name == name


def test_paths_stay_as_written(load: Any) -> None:
    recipe = load("model: {path: ./m}\ndata: {train: [{path: ../rows/*.jsonl}]}\n").recipe
    assert (recipe.model.path, recipe.data.train[0].path) == ("./m", "../rows/*.jsonl")
