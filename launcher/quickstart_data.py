"""Real training data without a download: the standard library of the running Python.

Two kinds of rows come out of it. General text: the source files, cut into pages. The task: from the head of a
function's docstring, the function's name and those arguments that its docstring mentions, write its signature. Whole
files are held out, never single functions; a docstring that occurs twice, anywhere, is used once, and never in the
held-out part if any training file has it.
"""

from __future__ import annotations

import ast
import gzip
import hashlib
import json
import re
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..recipes.errors import UserError

SKIPPED_FOLDERS = frozenset(
    # Tests and editors are not library code; pydoc_data and encodings are tables; the rest is not the library.
    [
        "test",
        "tests",
        "idlelib",
        "lib2to3",
        "turtledemo",
        "pydoc_data",
        "encodings",
        "ensurepip",
        "site-packages",
        "dist-packages",
        "__pycache__",
    ]
)
HELD_OUT_SHARE = 0.1
"""Share of files held out; about 50 files."""
MIN_FILES = 100
"""Fewer than this and the standard library is not really there (stripped images, zipped libraries)."""
PAGE_CHARS = 420
"""150 to 250 tokens, so that most fit a sequence: every sequence of a step is then from another file."""
HELD_OUT_PAGES = 280
"""Keeps one evaluation at a few seconds."""
MAX_DOC_CHARS = 120
"""About 45 tokens: the names matter more, and short prompts are more prompts."""
MAX_SIGNATURE_CHARS = 120
TRAIN_SHARDS = 8
"""One per logical stream of the recipes."""
ROWS_PER_GROUP = 64
"""Small row groups: the order shuffles whole groups first."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Pair:
    """One function: what is asked, the signature that answers it, and the shown part of the docstring."""

    prompt: str
    signature: str
    docstring: str


@dataclass(frozen=True)
class Corpus:
    """Everything the quickstart trains and evaluates on. Texts are pages of files, pairs are functions; each is a
    row with the file it comes from."""

    train_text: tuple[Row, ...]
    heldout_text: tuple[Row, ...]
    train_pairs: tuple[Row, ...]
    heldout_pairs: tuple[Row, ...]


@dataclass(frozen=True)
class Counts:
    """What was written, for the screen and for the next call in the same folder."""

    python: str
    train_files: int
    heldout_files: int
    train_text: int
    heldout_text: int
    train_pairs: int
    heldout_pairs: int


def source_files(stdlib: Path) -> list[str]:
    """Paths of the library's source files, relative to `stdlib`, sorted. Raises UserError if there are too few."""
    relative = (path.relative_to(stdlib) for path in stdlib.rglob("*.py"))
    found = sorted(path.as_posix() for path in relative if not SKIPPED_FOLDERS & set(path.parts[:-1]))
    if len(found) < MIN_FILES:
        raise UserError(
            f"{stdlib}: only {len(found)} source files of Python's standard library are here, and the quickstart "
            "learns from them. Use a Python that comes with its library's sources (from python.org, pyenv, uv or your "
            "distribution's full package)."
        )
    return found


def is_held_out(relative: str) -> bool:
    """Whether a file is held out: by a hash of its path, so the split is the same for ever."""
    digest = hashlib.sha256(relative.encode()).digest()
    return int.from_bytes(digest[:8], "big") < HELD_OUT_SHARE * 2**64


def pages(source: str) -> Iterator[str]:
    """A file in pages of about PAGE_CHARS characters, cut between lines."""
    page: list[str] = []
    size = 0
    for line in source.splitlines(keepends=True):
        # A page may grow by half to end where a top-level block does.
        starts_block = not line[0].isspace() and not line.startswith((")", "]", "}", "#"))
        if page and (size > 1.5 * PAGE_CHARS or (size > PAGE_CHARS and starts_block)):
            yield "".join(page)
            page, size = [], 0
        page.append(line)
        size += len(line)
    if page:
        yield "".join(page)


def pairs(tree: ast.AST) -> Iterator[Pair]:
    """The functions of a file whose docstring says something about their signature, in file order."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            pair = make_pair(node)
            if pair is not None:
                yield pair


def make_pair(function: ast.FunctionDef | ast.AsyncFunctionDef) -> Pair | None:
    """The pair of one function; None unless its docstring mentions one of its arguments."""
    full = ast.get_docstring(function)
    if not full:
        return None
    docstring = shorten(full)
    signature = signature_of(function)
    words = set(re.findall(r"\w+", full))
    mentioned = [name for name in argument_names(function.args) if name in words]
    if len(signature) > MAX_SIGNATURE_CHARS or not mentioned or not docstring:
        return None
    kind = "method" if signature.startswith((f"def {function.name}(self", f"def {function.name}(cls")) else "function"
    # The names come last: what must be copied lies close to where it goes, which a small model learns in minutes.
    question = f"Signature of the {kind} {function.name} with {', '.join(mentioned)}?"
    return Pair(f"{docstring}\n{question}", signature, docstring)


def shorten(docstring: str) -> str:
    """The first lines of a docstring, as many as fit MAX_DOC_CHARS."""
    kept: list[str] = []
    room = MAX_DOC_CHARS
    for line in docstring.splitlines():
        room -= len(line) + 1
        if room < 0:
            break
        kept.append(line)
    return "\n".join(kept).strip()


def argument_names(arguments: ast.arguments) -> list[str]:
    """Names of all arguments but self and cls, in their order."""
    every = [*arguments.posonlyargs, *arguments.args, arguments.vararg, *arguments.kwonlyargs, arguments.kwarg]
    return [argument.arg for argument in every if argument is not None and argument.arg not in ("self", "cls")]


def signature_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """`def name(arguments):` on one line."""
    keyword = "async def" if isinstance(function, ast.AsyncFunctionDef) else "def"
    returns = f" -> {ast.unparse(function.returns)}" if function.returns else ""
    return f"{keyword} {function.name}({ast.unparse(function.args)}){returns}:"


def parses(signature: str) -> bool:
    """Whether a text is the signature of one function in Python's grammar."""
    try:
        body = ast.parse(signature.strip() + " ...").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return len(body) == 1 and isinstance(body[0], ast.FunctionDef | ast.AsyncFunctionDef)


def normalised(docstring: str) -> str:
    """A docstring as compared for duplicates: letters and digits only, in lower case."""
    return " ".join(re.findall(r"\w+", docstring.lower()))


def read_source(path: Path) -> tuple[str, ast.Module] | None:
    """A source file and its tree; None for one that is not valid Python (templates, other encodings)."""
    try:
        source = path.read_text(encoding="utf-8")
        return source, ast.parse(source)
    except (UnicodeDecodeError, SyntaxError):
        return None


def all_docstrings(tree: ast.AST) -> Iterator[str]:
    """The part that would be shown of every docstring of a file, normalised."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module):
            docstring = ast.get_docstring(node)
            if docstring:
                yield normalised(shorten(docstring))


def chat_row(relative: str, pair: Pair) -> Row:
    """A pair as a conversation."""
    messages = [{"role": "user", "content": pair.prompt}, {"role": "assistant", "content": pair.signature}]
    return {"messages": messages, "file": relative}


def build_corpus(stdlib: Path) -> Corpus:
    """Read the library; training files first, so that a shared docstring stays out of the held-out part."""
    files = source_files(stdlib)
    train = [name for name in files if not is_held_out(name)]
    held_out = [name for name in files if is_held_out(name)]
    seen: set[str] = set()
    train_text, train_pairs = read_part(stdlib, train, seen)
    heldout_text, heldout_pairs = read_part(stdlib, held_out, seen)
    return Corpus(
        tuple(shuffled(train_text)),
        tuple(shuffled(heldout_text)[:HELD_OUT_PAGES]),
        tuple(shuffled(train_pairs)),
        tuple(shuffled(heldout_pairs)),
    )


def read_part(stdlib: Path, files: Sequence[str], seen: set[str]) -> tuple[list[Row], list[Row]]:
    """Text rows and task rows of some files. `seen` holds the docstrings met so far, and grows: by every docstring
    of these files, whether or not it became a row."""
    text_rows: list[Row] = []
    pair_rows: list[Row] = []
    for relative in files:
        read = read_source(stdlib / relative)
        if read is None:
            continue
        source, tree = read
        text_rows += [{"text": page, "file": relative} for page in pages(source)]
        for pair in pairs(tree):
            key = normalised(pair.docstring)
            if key not in seen:
                seen.add(key)
                pair_rows.append(chat_row(relative, pair))
        seen.update(all_docstrings(tree))
    return text_rows, pair_rows


def shuffled(rows: Iterable[Row]) -> list[Row]:
    """Rows in the order of a hash of their content: mixed, and the same every time."""
    return sorted(rows, key=lambda row: hashlib.sha256(json.dumps(row, sort_keys=True).encode()).digest())


def build_data(folder: Path, stdlib: Path | None = None) -> Counts:
    """Write the shards into `folder`, unless they are there already; returns what they hold."""
    marker = folder / "counts.json"
    if marker.exists():
        return Counts(**json.loads(marker.read_text()))
    corpus = build_corpus(stdlib or Path(sysconfig.get_paths()["stdlib"]))
    for index in range(TRAIN_SHARDS):
        write_parquet(folder / f"general/train-{index:02d}.parquet", corpus.train_text[index::TRAIN_SHARDS])
        write_jsonl_gz(folder / f"task/train-{index:02d}.jsonl.gz", corpus.train_pairs[index::TRAIN_SHARDS])
    write_parquet(folder / "general/heldout.parquet", corpus.heldout_text)
    write_jsonl_gz(folder / "task/heldout.jsonl.gz", corpus.heldout_pairs)
    counts = count(corpus)
    # Written last: a call that was interrupted before this line begins again.
    marker.write_text(json.dumps(asdict(counts), indent=2) + "\n")
    return counts


def count(corpus: Corpus) -> Counts:
    """How many rows and files each part has."""

    def files(*parts: Sequence[Row]) -> int:
        return len({row["file"] for part in parts for row in part})

    return Counts(
        python=sysconfig.get_python_version(),
        train_files=files(corpus.train_text, corpus.train_pairs),
        heldout_files=files(corpus.heldout_text, corpus.heldout_pairs),
        train_text=len(corpus.train_text),
        heldout_text=len(corpus.heldout_text),
        train_pairs=len(corpus.train_pairs),
        heldout_pairs=len(corpus.heldout_pairs),
    )


def write_parquet(path: Path, rows: Sequence[Row]) -> None:
    """A shard as parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), path, row_group_size=ROWS_PER_GROUP, compression="zstd")


def write_jsonl_gz(path: Path, rows: Sequence[Row]) -> None:
    """A shard as gzipped JSON lines; no time stamp inside, so equal rows give equal files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(gzip.compress(lines.encode(), mtime=0))


def read_jsonl_gz(path: Path) -> list[Row]:
    """The rows of a shard."""
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().split("\n")[:-1]]


def read_texts(folder: Path) -> list[str]:
    """The general training text, for the tokenizer; held-out files have no part in it."""
    import pyarrow.parquet as pq

    shards = sorted((folder / "general").glob("train-*.parquet"))
    return [text for shard in shards for text in pq.read_table(shard, columns=["text"])["text"].to_pylist()]
