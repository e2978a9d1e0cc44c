"""The README says what is there: the smallest recipe is valid, and its tables name every command and section."""

from __future__ import annotations

import re

import pytest
from ruamel.yaml import YAML

from ftlaunch.launcher.cli import app
from ftlaunch.recipes import errors
from ftlaunch.recipes.schema import Recipe


@pytest.fixture(scope="module")
def readme(root):
    return (root / "README.md").read_text(encoding="utf-8")


def test_the_smallest_recipe_is_valid(readme):
    text = re.search(r"## The smallest recipe\n+```yaml\n(.*?)```", readme, re.DOTALL).group(1)
    recipe = Recipe.model_validate({"name": "support-bot", **YAML(typ="safe").load(text)})
    assert recipe.data.train[0].path == "tickets.jsonl"


def test_every_command_is_listed(readme):
    listed = set(re.findall(r"^\| `ftlaunch ([a-z-]+)\b", readme, re.MULTILINE))
    assert listed == {name for name in app if not name.startswith("-")}


def test_every_section_is_listed(readme):
    table = readme.partition("## The recipe's sections")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\| `([a-z]+)` \|", table, re.MULTILINE)) == set(Recipe.model_fields) - {"name"}


def test_every_exit_code_is_listed(readme):
    table = readme.partition("| Exit code | Meaning |")[2].partition("\n## ")[0]
    raised = {error.exit_code for error in (errors.UserError, errors.InfrastructureError, errors.Interrupted)}
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)} == raised | {0}
