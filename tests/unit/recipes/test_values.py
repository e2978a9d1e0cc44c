"""YAML 1.2, variables, overrides, profiles, secrets."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ftlaunch.recipes.load import as_stored, load_recipe, parse_recipe_text
from ftlaunch.recipes.problems import Origin, RecipeError
from ftlaunch.recipes.redact import REDACTED, dump_as_written, dump_recipe, redact
from ftlaunch.recipes.scalars import core_value
from ftlaunch.recipes.schema import Data, EvalSplit, Model, Recipe, Train, TrainSource
from ftlaunch.recipes.schema_strategy import Ddp
from ftlaunch.recipes.variables import substitute

SMALLEST = "model: {path: m}\ndata:\n  train:\n    - path: rows.jsonl\n"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[("1e-4", 1e-4), ("1E3", 1000.0), (".5", 0.5), ("-1.", -1.0), ("12", 12), ("0o17", 15), ("0x1F", 31)],
        *[("017", 17), ("on", "on"), ("no", "no"), ("yes", "yes"), ("y", "y"), ("1_000", "1_000"), ("1:30", "1:30")],
        *[("2024-01-01", "2024-01-01"), ("true", True), ("FALSE", False), ("tRue", "tRue"), ("~", None), ("", None)],
        *[(".inf", math.inf), ("-.INF", -math.inf), ("e5", "e5"), ("1e", "1e"), ("9" * 5000, math.inf)],
    ],
)
def test_core_schema(text: str, value: Any) -> None:
    assert core_value(text) == value
    assert type(core_value(text)) is type(value)


def test_numbers_and_words_in_a_recipe(load: Any) -> None:
    text = "name: on\n" + SMALLEST + "train: {learning_rate: 1e-4, max_tokens: 1e9, max_grad_norm: ~}\n"
    recipe = load(text).recipe
    assert recipe.name == "on"
    assert (recipe.train.learning_rate, recipe.train.max_tokens) == (1e-4, 1_000_000_000)
    assert recipe.train.max_grad_norm is None


def test_quotes_and_str_tags_keep_text(load: Any) -> None:
    recipe = load("name: !!str 5\nmodel: {path: m, revision: '1e5'}\ndata: {train: [{path: a}]}\n").recipe
    assert (recipe.name, recipe.model.revision) == ("5", "1e5")


def test_anchors_and_aliases(load: Any) -> None:
    recipe = load("model: {path: m}\ndata: {train: [&a {path: x}], eval: [*a]}\n").recipe
    assert recipe.data.eval[0].path == "x"


# overrides


def test_overrides_are_laid_over_the_file_in_their_order(load: Any) -> None:
    overrides = ("train.learning_rate=2e-5", "train.seed=1", "train.seed=2", "data.train.0.path=s3://b/a=b.parquet")
    recipe = load(SMALLEST, *overrides, "data.train.1.path=second", "model.revision='1'", "train.max_grad_norm=").recipe
    assert (recipe.train.learning_rate, recipe.train.seed, recipe.train.max_grad_norm) == (2e-5, 2, None)
    assert [source.path for source in recipe.data.train] == ["s3://b/a=b.parquet", "second"]
    assert recipe.model.revision == "1"


def test_overrides_make_missing_sections_with_their_default_type(load: Any) -> None:
    recipe = load("{}", "model.path=m", "data.train.0.path=x", "method.train_on=all", "adapter.rank=4").recipe
    assert (recipe.method.type, recipe.method.train_on, recipe.adapter.rank) == ("sft", "all", 4)
    assert load(SMALLEST, "strategy.type=ddp").recipe.strategy == Ddp()


def test_overrides_take_lists_and_mappings(load: Any) -> None:
    recipe = load(SMALLEST, "data.eval={fraction: 0.1}", "train.betas=[0.8, 0.9]").recipe
    assert (recipe.data.eval, recipe.train.betas) == (EvalSplit(fraction=0.1), (0.8, 0.9))


@pytest.mark.parametrize(
    ("override", "key", "words"),
    [
        ("train.sed=1", "train.sed", "did you mean seed?"),
        ("train.seed=x", "train.seed", "found text 'x'"),
        ("train.seed", "train.seed", "write key.sub=value"),
        ("=1", "=1", "not an override"),
        ("train..seed=1", "train..seed=1", "not an override"),
        ("train.seed={", "train.seed", "not YAML"),
        ("data.train.7.path=x", "data.train.7.path", "its items are numbers (0 to 0, 1 appends one)"),
        ("data.train.first=x", "data.train.first", "data.train is a list"),
        ("model.path.x=1", "model.path.x", "model.path is no section"),
    ],
)
def test_mistakes_of_overrides_are_placed_on_the_command_line(
    problems: Any, override: str, key: str, words: str
) -> None:
    (problem,) = problems(SMALLEST, override)
    assert (problem.key, problem.origin) == (key, Origin("command line"))
    assert words in str(problem)


def test_an_override_mends_the_file(load: Any) -> None:
    assert load(SMALLEST + "train: {seed: x}\n", "train.seed=1").recipe.train.seed == 1


def test_problems_below_an_overridden_section_are_the_command_lines(problems: Any) -> None:
    file, command_line = problems(SMALLEST + "train: {seed: 1}\nlr: 1\n", "train={seed: x}")
    assert (file.key, file.origin) == ("lr", Origin("recipe.yaml", 6))
    assert (command_line.key, command_line.origin) == ("train.seed", Origin("command line"))


def test_nodes_and_gpus_per_node_come_last(load: Any) -> None:
    cluster = load(
        SMALLEST + "cluster: {type: ray, nodes: 2}\n", "cluster.nodes=3", nodes=4, gpus_per_node=0
    ).recipe.cluster
    assert (cluster.type, cluster.nodes, cluster.gpus_per_node) == ("ray", 4, 0)
    assert load(SMALLEST, nodes=2).recipe.cluster.type == "local"


# variables and secrets


@pytest.mark.parametrize(
    ("text", "filled"),
    [
        ("${A}/x", "1/x"),
        ("${NO:-d}", "d"),
        ("${EMPTY:-d}", "d"),
        ("${EMPTY}", ""),
        ("${NO:-}", ""),
        ("$${A}", "${A}"),
        ("$A {A}", "$A {A}"),
        ("${A}${A}", "11"),
    ],
)
def test_substitution(text: str, filled: str) -> None:
    assert substitute(text, {"A": "1", "EMPTY": ""}).text == filled


def test_variables_in_a_recipe(load: Any) -> None:
    text = SMALLEST.replace("rows.jsonl", "${BUCKET}/rows.jsonl") + "train:\n  seed: ${SEED}\n  max_steps: ${MAX:-10}\n"
    recipe = load(text, environ={"BUCKET": "s3://b", "SEED": "7"}).recipe
    assert (recipe.data.train[0].path, recipe.train.seed, recipe.train.max_steps) == ("s3://b/rows.jsonl", 7, 10)


def test_quoted_variables_stay_text_and_overrides_have_them_too(load: Any) -> None:
    recipe = load(SMALLEST + 'name: "${N}"\n', "model.revision='${N}'", environ={"N": "123"}).recipe
    assert (recipe.name, recipe.model.revision) == ("123", "123")


def test_unset_variable_is_named_once_with_its_place(problems: Any) -> None:
    seed, path = problems(SMALLEST + "train:\n  seed: ${SEED}\n", "model.path=${WHERE}")
    assert (seed.key, seed.origin, "variable SEED is not set" in seed.message) == (
        "train.seed",
        Origin("recipe.yaml", 6),
        True,
    )
    assert (path.key, path.origin) == ("model.path", Origin("command line"))


SECRETS = {"AWS_SECRET_ACCESS_KEY": "hunter2", "WANDB_PROJECT": "shown", "my_token": "hunter2-long"}


def test_values_of_secret_variables_are_remembered_and_redacted(load: Any) -> None:
    text = SMALLEST + "checkpoint: {path: 's3://u-${AWS_SECRET_ACCESS_KEY}-h/${WANDB_PROJECT}'}\nname: r-${my_token}\n"
    loaded = load(text, environ=SECRETS)
    assert sorted(loaded.secrets) == ["hunter2", "hunter2-long"]
    dumped = dump_recipe(loaded.recipe, loaded.secrets)
    assert "hunter2" not in dumped
    assert f"s3://u-{REDACTED}-h/shown" in dumped
    assert as_stored(loaded).name == f"r-{REDACTED}"


def test_secrets_do_not_appear_in_errors_and_warnings(load: Any) -> None:
    with pytest.raises(RecipeError) as caught:
        load(SMALLEST + "train: {optimizer: '${my_token}', seed: -1}\n", environ=SECRETS)
    assert "hunter2" not in str(caught.value)
    assert all("hunter2" not in problem.message for problem in caught.value.problems)
    assert REDACTED in str(caught.value)


def test_defaults_and_empty_values_are_no_secrets(load: Any) -> None:
    text = SMALLEST + "name: ${KEY:-a}\ntrack: {wandb: {project: '${TOKEN}'}}\n"
    assert load(text, environ={"TOKEN": ""}).secrets == ()


def test_redact_takes_the_longest_first() -> None:
    assert redact("ab abc a", ["ab", "abc", ""]) == f"{REDACTED} {REDACTED} a"


# storing and reading back

NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30)
RATES = st.floats(1e-300, 1e300)
SOURCES = st.builds(
    TrainSource,
    path=TEXTS | st.lists(TEXTS, max_size=2).map(tuple),
    columns=st.dictionaries(TEXTS, TEXTS, max_size=2),
    weight=st.none() | RATES,
)
RECIPES = st.builds(
    Recipe,
    name=NAMES,
    model=st.builds(Model, path=TEXTS, chat_template=st.none() | TEXTS),
    data=st.builds(Data, train=st.lists(SOURCES, min_size=1, max_size=3).map(tuple)),
    train=st.builds(Train, learning_rate=RATES, eps=RATES, seed=st.integers(0, 10**30)),
)


@given(RECIPES)
@example(Recipe(name="1e5", model=Model(path="${A}\n # x: \x85\u2028'\""), data=Data(train=(TrainSource(path="~"),))))
def test_a_dumped_recipe_reads_back_the_same(recipe: Recipe) -> None:
    assert parse_recipe_text(dump_recipe(recipe)) == recipe


TEMPLATES = [path.read_text() for path in sorted((Path(__file__).parent.parent / "data/styles").glob("*.jinja"))]


@pytest.mark.parametrize("text", [*TEMPLATES, "${HOME} $${HOME} $$${HOME} ${", "Tools\\n\n  " * 40, "\t${A:-b}\x85"])
def test_what_is_written_as_a_recipe_is_loaded_as_it_was(load: Any, text: str) -> None:
    values = load(SMALLEST).recipe.model_dump(mode="json", exclude_unset=True)
    values["model"]["chat_template"] = text
    values["cluster"] = {"type": "slurm", "env": ["A_*"]}
    recipe = load(dump_as_written(values), environ={"HOME": "/nowhere"}).recipe
    assert recipe.model.chat_template == text
    assert recipe.cluster.type == "slurm"


# cluster profiles


def test_profile_beside_the_recipe_wins_over_the_users(load: Any, problems: Any, tmp_path: Path) -> None:
    home = {"XDG_CONFIG_HOME": str(tmp_path / "config")}
    for folder, nodes in ((tmp_path / "clusters", 2), (tmp_path / "config/ftlaunch/clusters", 3)):
        folder.mkdir(parents=True)
        (folder / "big.yaml").write_text(f"type: ray\nnodes: {nodes}\naddress: ${{HEAD:-auto}}\n")
    (tmp_path / "config/ftlaunch/clusters/mine.yaml").write_text("type: local\nnods: 5\n")
    named = load(SMALLEST + "cluster: big\n", environ=home).recipe.cluster
    assert (named.type, named.nodes, named.address) == ("ray", 2, "auto")
    argument = load(SMALLEST + "cluster: mine\n", "cluster.address=h:1", environ=home, cluster="big", nodes=9)
    assert (argument.recipe.cluster.address, argument.recipe.cluster.nodes) == ("h:1", 9)
    (problem,) = problems(SMALLEST, "cluster=mine", environ=home)
    assert problem.key == "cluster.nods"
    assert problem.origin == Origin(str(tmp_path / "config/ftlaunch/clusters/mine.yaml"), 2)
    (problem,) = problems(SMALLEST + "cluster: bigg\n", environ=home)
    assert problem.origin == Origin("recipe.yaml", 5)
    assert "unknown cluster profile 'bigg'" in problem.message
    assert problem.remedy.startswith("did you mean big? there are: big, mine;")


def test_users_profiles_lie_in_the_home_folder_by_default(load: Any, tmp_path: Path) -> None:
    folder = tmp_path / ".config/ftlaunch/clusters"
    folder.mkdir(parents=True)
    (folder / "box.yaml").write_text("{type: local, nodes: 4}")
    assert load(SMALLEST + "cluster: box\n").recipe.cluster.nodes == 4


@pytest.mark.parametrize("content", ["", "- a\n", "type: [\n"])
def test_profile_that_is_none(problems: Any, tmp_path: Path, content: str) -> None:
    (tmp_path / "clusters").mkdir()
    (tmp_path / "clusters/x.yaml").write_text(content)
    (problem,) = problems(SMALLEST + "cluster: x\n")
    assert problem.key == "cluster"


def test_profile_names_are_no_paths(problems: Any, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("type: local\n")
    (problem,) = problems(SMALLEST + "cluster: ../x\n")
    assert "unknown cluster profile" in problem.message


RECIPE_FILES = sorted((Path(__file__).parents[3] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPE_FILES, ids=lambda path: path.stem)
def test_shipped_recipes_load_without_a_word(path: Path) -> None:
    loaded = load_recipe(path, environ={})
    assert loaded.warnings == ()
    assert loaded.recipe.name == path.stem
    first, *comment = path.read_text(encoding="utf-8").splitlines()
    assert first == "# yaml-language-server: $schema=./recipe.schema.json"
    assert any(line.startswith("# Hardware:") for line in comment)


def test_the_promised_recipes_are_there() -> None:
    assert {path.stem for path in RECIPE_FILES} >= {
        *(
            "llama-3.1-8b-lora",
            "llama-3.1-8b-full",
            "llama-3.1-8b-qlora",
            "qwen3-0.6b-full",
            "qwen3-8b-lora",
            "qwen3-14b-zero3",
            "mistral-7b-lora",
        ),
        *("continued-pretraining", "smallest"),
    }
