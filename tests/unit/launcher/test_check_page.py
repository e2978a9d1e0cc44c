"""The page of `ftlaunch check`: whole, self-contained, and safe whatever stands in the data."""

from __future__ import annotations

from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tiny import chat_rows, make_tokenizer, write_jsonl, write_recipe

from ftlaunch.distributed.data.template import load_tokenizer
from ftlaunch.launcher import cli
from ftlaunch.launcher.check_page import token_texts
from ftlaunch.launcher.check_plot import histogram_svg
from ftlaunch.launcher.check_tally import histogram, quantile
from ftlaunch.launcher.check_view import bars_text

HOSTILE = '</span></pre><script>alert(1)</script><img src=x onerror=alert(2)>" onmouseover="alert(3)\' {{ 7 * 7 }}'


class Tags(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.open: list[str] = []
        self.attributes: set[str] = set()
        self.tokens: list[tuple[str, str]] = []
        """(text, title) of the samples' tokens."""
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes |= {name for name, _ in attrs}
        if tag not in ("meta", "line", "rect", "br"):
            self.open.append(tag)
        if dict(attrs).get("class") in ("t", "t s") and "title" in dict(attrs):
            self.tokens.append(("", str(dict(attrs)["title"])))

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("line", "rect"):
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open and self.open[-1] == "span" and self.open[-2:-1] == ["pre"]:
            self.tokens[-1] = (data, self.tokens[-1][1])


@pytest.fixture
def folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    make_tokenizer(tmp_path / "model")
    turns = [{"role": "user", "content": HOSTILE}, {"role": "assistant", "content": HOSTILE + " \ufffd ärger 日本"}]
    rows = [*chat_rows(30), {"messages": turns}, {"messages": HOSTILE}]
    source = write_jsonl(tmp_path / "data" / "<b>rows&.jsonl", rows)
    recipe = {
        "name": "hostile",
        "model": {"path": str(tmp_path / "model")},
        "data": {"sequence_length": 1024, "train": [{"path": str(source)}]},
        "checkpoint": {"path": str(tmp_path / "runs")},
    }
    write_recipe(tmp_path / "recipe.yaml", recipe)
    cli.main(["check", str(tmp_path / "recipe.yaml"), "--samples", "99"])
    capsys.readouterr()
    return tmp_path


@pytest.fixture
def page(folder: Path) -> str:
    return (folder / "runs" / "hostile" / "check.html").read_text(encoding="utf-8")


def test_data_cannot_become_markup(page):
    seen = Tags(page)
    assert seen.open == []
    assert seen.tags["script"] == seen.tags["img"] == 0
    assert not [name for name in seen.attributes if name.startswith("on")]
    assert "{{ 7 * 7 }}" in seen.text
    assert HOSTILE in "".join(text for text, _ in seen.tokens)


def test_nothing_comes_from_outside(page):
    seen = Tags(page)
    assert not {"src", "href", "action", "data", "srcset"} & seen.attributes
    assert not {"link", "script", "img", "iframe", "object", "form", "base"} & set(seen.tags)
    assert "url(" not in page
    assert "@import" not in page


def test_the_page_has_figures_plots_findings_and_samples(page):
    seen = Tags(page)
    for part in (
        "malformed-row",
        "replacement-character",
        "Lengths: b-rows",
        "Supervised share",
        "How full",
        "<b>rows&",
    ):
        assert part in seen.text
    assert seen.tags["svg"] == 1
    assert seen.tags["rect"] > 5
    assert seen.text.count(" supervised\n") == 31


def test_tokens_say_their_number_and_whether_they_are_learned(folder, page):
    tokenizer = load_tokenizer(str(folder / "model")).tokenizer
    for text, title in Tags(page).tokens:
        number = int(title.split("id ")[1].split()[0])
        if text and text.isascii():
            assert tokenizer.decode([number], skip_special_tokens=False) == text
    learned = [text for text, title in Tags(page).tokens if title.endswith("supervised")]
    assert "<|im_end|>" in learned
    assert "<|im_start|>" not in learned


@pytest.mark.parametrize("text", ["", "plain", "ärger, 日本語 und 🙂🙂 genug", "\ufffd\ufffd", "a\nb\n\n c\t"])
def test_the_tokens_texts_are_the_text(tmp_path, text):
    encoder = load_tokenizer(str(make_tokenizer(tmp_path / "model")))
    ids = encoder.tokenizer.encode(text).ids
    assert "".join(token_texts(ids, encoder)) == text


def test_the_tokens_texts_are_the_text_where_a_beginning_is_special(place):
    encoder = load_tokenizer("base")  # words, decoded with blanks between them
    ids = encoder.tokenizer.encode("what is one plus two ?").ids
    assert token_texts(ids, encoder) == ["what", " is", " one", " plus", " two", " ?"]


@pytest.mark.parametrize("lengths", [[5], [5] * 9, list(range(1, 100)), [1, 2, 50_000], [10, 11], [8] * 5 + [9]])
def test_a_histogram_counts_every_length_once(lengths: list[int]):
    shown = histogram(lengths)
    assert shown.counts.sum() == len(lengths)
    assert (shown.edges[0], shown.edges[-1]) == (min(lengths), max(lengths) + 1)
    assert len(shown.counts) <= 32
    assert len(bars_text(shown).split("│")[1]) == len(shown.counts)


def test_every_bar_and_the_limit_are_drawn():
    shown = histogram([*range(10, 90), 400])
    svg = histogram_svg(shown, 50, alarming=True)
    assert svg.count("<rect") == (shown.counts > 0).sum()
    assert svg.count('class="bar beyond"') == (shown.counts[shown.edges[:-1] > 50] > 0).sum() > 0
    assert "sequence length 50" in svg
    assert "beyond" not in histogram_svg(shown, 50, alarming=False)
    assert "sequence length" not in histogram_svg(shown, 1000, alarming=True)


def test_quantiles_are_lengths_that_are_there():
    assert [quantile([1, 5, 9, 100], share) for share in (0.5, 0.75, 1.0)] == [5, 9, 100]
