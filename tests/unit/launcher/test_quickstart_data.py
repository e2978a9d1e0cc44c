"""The quickstart's data, made from this Python's library: held out by file, no docstring twice, the same every time."""

from __future__ import annotations

import ast
import sysconfig
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from ftlaunch.launcher import quickstart_data as data
from ftlaunch.recipes.errors import UserError

STDLIB = Path(sysconfig.get_paths()["stdlib"])


@pytest.fixture(scope="module")
def corpus() -> data.Corpus:
    return data.build_corpus(STDLIB)


@pytest.fixture(scope="module")
def small_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough files to be accepted, some of which are not Python in UTF-8."""
    folder = tmp_path_factory.mktemp("library")
    for number in range(120):
        docstring = "Shared by all: takes value." if number % 10 == 0 else f"Docstring {number} of value."
        (folder / f"m{number:03d}.py").write_text(f'def f{number}(value, n={number}):\n    """{docstring}"""\n')
    (folder / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\nname = '\xe9'\n")
    (folder / "template.py").write_text("def {name}(:\n")
    (folder / "test").mkdir()
    (folder / "test" / "test_m.py").write_text("def skipped(value):\n    'Names value, but is a test.'\n")
    return folder


def files(rows: tuple[data.Row, ...]) -> set[str]:
    return {row["file"] for row in rows}


def test_no_file_is_in_both_parts(corpus: data.Corpus) -> None:
    train = files(corpus.train_text) | files(corpus.train_pairs)
    held_out = files(corpus.heldout_text) | files(corpus.heldout_pairs)
    assert train and held_out
    assert not train & held_out
    assert all(data.is_held_out(name) for name in held_out)


def test_there_is_enough_to_learn_from(corpus: data.Corpus) -> None:
    assert len(corpus.train_text) > 1000
    assert len(corpus.heldout_text) > 50
    assert len(corpus.train_pairs) > 500
    assert len(corpus.heldout_pairs) > 40


def test_no_docstring_occurs_twice(corpus: data.Corpus) -> None:
    prompts = [row["messages"][0]["content"] for row in corpus.train_pairs + corpus.heldout_pairs]
    assert len(prompts) == len(set(prompts))


def test_no_heldout_docstring_stands_in_a_training_file(corpus: data.Corpus) -> None:
    trained_on: set[str] = set()
    for name in files(corpus.train_text):
        trained_on |= set(data.all_docstrings(ast.parse((STDLIB / name).read_text(encoding="utf-8"))))
    for name in files(corpus.heldout_pairs):
        tree = ast.parse((STDLIB / name).read_text(encoding="utf-8"))
        asked = {row["messages"][0]["content"] for row in corpus.heldout_pairs if row["file"] == name}
        shared = [pair for pair in data.pairs(tree) if data.normalised(pair.docstring) in trained_on]
        assert not [pair for pair in shared if pair.prompt in asked]


def test_every_answer_is_python_and_every_prompt_names_its_function(corpus: data.Corpus) -> None:
    for row in corpus.train_pairs + corpus.heldout_pairs:
        asked, answered = (message["content"] for message in row["messages"])
        assert data.parses(answered), row
        function = ast.parse(answered + " ...").body[0]
        assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        assert f" {function.name} with " in asked


def test_small_library(small_library: Path) -> None:
    corpus = data.build_corpus(small_library)
    every = corpus.train_pairs + corpus.heldout_pairs
    assert len(every) == 120 - 11  # the shared docstring counts once
    assert "test/test_m.py" not in files(corpus.train_text + corpus.heldout_text)
    assert not {"latin.py", "template.py"} & files(corpus.train_text + corpus.heldout_text)
    assert not [row for row in corpus.heldout_pairs if "Shared" in row["messages"][0]["content"]]


def test_built_twice_it_is_the_same_bytes_and_then_left_alone(small_library: Path, tmp_path: Path) -> None:
    counts = [data.build_data(tmp_path / name, small_library) for name in ("one", "two")]
    assert counts[0] == counts[1]
    shards = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert len(shards) == 2 * (data.TRAIN_SHARDS + 1) + 1
    for shard in shards:
        assert (tmp_path / "one" / shard).read_bytes() == (tmp_path / "two" / shard).read_bytes(), shard
    assert data.build_data(tmp_path / "one", tmp_path / "no such library") == counts[0]


def test_an_interrupted_build_begins_again(small_library: Path, tmp_path: Path) -> None:
    counts = data.build_data(tmp_path, small_library)
    (tmp_path / "counts.json").unlink()
    (tmp_path / "task/heldout.jsonl.gz").write_bytes(b"cut short")
    assert data.build_data(tmp_path, small_library) == counts
    assert len(data.read_jsonl_gz(tmp_path / "task/heldout.jsonl.gz")) == counts.heldout_pairs


def test_shards_hold_every_row_once(small_library: Path, tmp_path: Path) -> None:
    counts = data.build_data(tmp_path, small_library)
    texts = data.read_texts(tmp_path)
    assert len(texts) == counts.train_text
    tasks = [row for path in sorted(tmp_path.glob("task/train-*")) for row in data.read_jsonl_gz(path)]
    assert len({row["messages"][0]["content"] for row in tasks}) == counts.train_pairs
    assert pq.read_table(tmp_path / "general/heldout.parquet").num_rows == counts.heldout_text


def test_a_library_without_sources_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="only 0 source files"):
        data.build_corpus(tmp_path)


def test_pages_cut_between_lines_and_lose_nothing() -> None:
    source = "".join(f"def f{number}():\n    return {number}\n\n" for number in range(500))
    pages = list(data.pages(source))
    assert "".join(pages) == source
    assert len(pages) > 5
    assert all(page.startswith("def ") and len(page) <= 1.5 * data.PAGE_CHARS + 100 for page in pages)


@pytest.mark.parametrize(
    ("source", "prompt", "signature"),
    [
        (
            'class A:\n    def get(self, key, default=None):\n        """Return the value of key."""\n',
            "Return the value of key.\nSignature of the method get with key?",
            "def get(self, key, default=None):",
        ),
        (
            'async def send(data: bytes, *, to) -> int:\n    """Send data, then\n    tell to."""\n',
            "Send data, then\ntell to.\nSignature of the function send with data, to?",
            "async def send(data: bytes, *, to) -> int:",
        ),
    ],
)
def test_pair(source: str, prompt: str, signature: str) -> None:
    assert [(pair.prompt, pair.signature) for pair in data.pairs(ast.parse(source))] == [(prompt, signature)]


@pytest.mark.parametrize(
    "source", ["def f(key): pass\n", 'def f(key):\n    """Names nothing: keys."""\n', 'def f():\n    """None."""\n']
)
def test_no_pair(source: str) -> None:
    assert not list(data.pairs(ast.parse(source)))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("def f(a, b=1):", True),
        ("async def f(): ", True),
        ("def f(a, a):", True),  # grammar, not meaning
        ("def f(a", False),
        ("x = 1", False),
        ("", False),
        ("def f(): pass\ndef g():", False),
        ("class A:", False),
        ("\0", False),
    ],
)
def test_parses(text: str, expected: bool) -> None:
    assert data.parses(text) is expected
