"""The documentation says what is there: the reference is the schema's, recipes load, links and commands exist."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from ftlaunch.launcher.cli import VERBS
from ftlaunch.recipes.schema import Recipe

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
NEEDED = {"name": "a", "model": {"path": "m"}, "data": {"train": [{"path": "rows.jsonl"}]}}


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as code hosts make them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_reference_is_the_schemas():
    made = runpy.run_path(str(ROOT / "docs" / "make_reference.py"))["reference"]()
    assert (ROOT / "docs" / "recipe-reference.md").read_text(encoding="utf-8") == made


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path):
    links = re.findall(r"\]\((?!https?://)([^)]+)\)", page.read_text(encoding="utf-8"))
    for link in links:
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_recipes_in_pages_are_valid(page: Path):
    for text in blocks(page, "yaml"):
        written = YAML(typ="safe").load(text)
        recipe = Recipe.model_validate({**NEEDED, **written})
        assert set(written) <= recipe.model_fields_set, text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_pages_exist(page: Path):
    lines = "\n".join([*blocks(page, "bash"), *blocks(page, "console")]).splitlines()
    commands = [line.removeprefix("$ ").split() for line in lines if line.removeprefix("$ ").startswith("ftlaunch ")]
    for _, *words in commands:
        known = [word for word in words if word in VERBS or ".yaml" in word]
        assert known or words[0].startswith("--"), words


def test_the_index_names_every_page():
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert [page.name for page in PAGES if page.parent.name == "docs" and page.name not in index] == ["index.md"]
