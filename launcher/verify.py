"""`ftlaunch verify RUN|CHECKPOINT`: every byte against the manifest, and the model against itself."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import psutil

from ..distributed import storage
from ..distributed.checkpoint.examine import Findings, examine
from ..distributed.checkpoint.manifest import MANIFEST_NAME, read_manifest
from ..distributed.model_files import SMALL_FILES, ModelFolder
from ..distributed.reopen import adapter_config, base_folder, needed_bytes, own_logits, plain_logits
from ..recipes.errors import UserError
from . import units
from .check_progress import Counted, byte_progress
from .locate import Located, locate_all
from .pull import COPY_BYTES, copy_checkpoint

LOGIT_TOLERANCE = 1e-5
"""Largest difference, in units of the largest logit: the same weights in fp32, whose sums may be added up in another
order by another kernel (fp32 has 6e-8, over some hundred layers)."""

SHOWN = 8

DAMAGED = (
    "if it is a copy, pull or copy it again: the original may be whole",
    "running the recipe again goes on from the newest checkpoint that is whole and has its training state",
)
NOT_FINITE = "NaN or infinite values: take an earlier checkpoint, and lower train.learning_rate before training on"
OTHERWISE = "what is said above has to be mended; ftlaunch verify --no-logits leaves the model closed"


@dataclass(frozen=True)
class Verdict:
    """What is said about one checkpoint: lines, what is wrong with it, and what to do then."""

    lines: list[str]
    problems: list[str]
    advice: tuple[str, ...] = ()


def verify(reference: str, *, logits: bool) -> int:
    """Say for each checkpoint what holds and what does not; 0 when all are whole. Raises UserError where there is
    none."""
    unreadable: list[str] = []
    advice: list[str] = []
    located = locate_all(reference, unreadable.append)
    whole: list[str] = []
    for problem in unreadable:
        print(f"record    {problem}")
    for one in located:
        print(one.directory)
        verdict = verify_one(one, logits=logits)
        print("\n".join(f"  {line}" for line in verdict.lines))
        print("  whole" if not verdict.problems else "\n".join(f"  PROBLEM   {text}" for text in verdict.problems))
        whole += [] if verdict.problems else [one.directory]
        advice += verdict.advice
    damaged = [one for one in located if one.directory not in whole]
    if not damaged and not unreadable:
        return 0
    print(_what_to_do(damaged, whole, advice))
    return 1


def verify_one(one: Located, *, logits: bool) -> Verdict:
    """One checkpoint. Raises InfrastructureError for storage that cannot be read."""
    try:
        manifest = read_manifest(one.directory)
    except UserError as error:
        return Verdict([], [str(error)], DAMAGED)
    progress = byte_progress()
    counted = Counted(progress, "reading", sum(file.size for file in manifest.files))
    try:
        findings = examine(one.directory, manifest, counted.advance)
    finally:
        progress.done()
    lines, problems = _said(findings, resumable=manifest.is_resumable)
    if not findings.is_whole:
        lines.append("logits    not compared: the files have to be whole for that")
    elif logits:
        said, wrong = _compare(one.directory)
        lines.append(f"logits    {said}")
        problems += wrong
    advice = (*(() if findings.is_whole else DAMAGED), *((NOT_FINITE,) if findings.not_finite else ()))
    return Verdict(lines, problems, advice)


def _said(found: Findings, *, resumable: bool) -> tuple[list[str], list[str]]:
    training = "with training state" if resumable else "weights only"
    lines = [f"files     {found.files}, {units.size(found.num_bytes)}, {found.spans} spans with checksums; {training}"]
    if found.tensors:
        where = f"{found.weight_files} file{'s' * (found.weight_files > 1)}"
        state = "headers and index agree" if not found.headers else "headers or index are wrong"
        lines.append(f"weights   {found.tensors} tensors in {where}; {state}")
        lines.append("numbers   " + ("NaN or infinite values" if found.not_finite else "all finite"))
    if found.unlisted:
        lines.append(f"besides   {', '.join(found.unlisted[:SHOWN])}: not of this checkpoint")
    return lines, list(_wrong(found))


def _wrong(found: Findings) -> Iterator[str]:
    yield from _some([f"{path} is missing" for path in found.missing])
    yield from _some([str(damage) for damage in found.damaged])
    yield from _some(list(found.headers))
    yield from _some(
        [f"{name} has {number} values that are NaN or infinite" for name, number in found.not_finite.items()]
    )


def _some(lines: list[str]) -> Iterator[str]:
    yield from lines[:SHOWN]
    if len(lines) > SHOWN:
        yield f"… and {len(lines) - SHOWN} more of this kind"


def _compare(directory: str) -> tuple[str, list[str]]:
    """What is said about the logits, and what is wrong with them."""
    config = adapter_config(directory)
    try:
        base = base_folder(config) if config else None
        needed, free = needed_bytes([directory, *([base.url] if base else [])]), psutil.virtual_memory().available
        if needed > free:
            return f"not compared: that takes {units.size(needed)} of memory, {units.size(free)} are free", []
        with ExitStack() as stack:
            plain = plain_logits(_here(directory, stack), _here(base.url, stack) if base else None)
        own = own_logits(directory, base, config)
    except UserError as error:
        return "not compared", [f"the model cannot be opened: {error}"]
    difference, largest = float((plain - own).abs().max()), float(plain.abs().max())
    library = "peft" if config else "transformers"
    if not difference <= LOGIT_TOLERANCE * largest:  # NaN too
        wrong = f"logits of {library} and ours differ by {difference:.3g}, of values up to {largest:.3g}"
        return "differ", [wrong]
    near = (
        "the very same" if difference == 0 else f"within {difference:.1g} of each other, of values up to {largest:.2g}"
    )
    return f"{near} by from_pretrained ({library}) and by the engine, in float32", []


def _here(url: str, stack: ExitStack) -> Path:
    """A local folder with what is at a URL; a copy for as long as `stack` lives."""
    if storage.is_local(url):
        return storage.local_path(url)
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ftlaunch-"))) / "model"
    if storage.exists(storage.join(url, MANIFEST_NAME)):
        copy_checkpoint(url, folder, training=False, say=lambda _line: None)
    else:
        _copy_base(ModelFolder(url), folder)
    return folder


def _copy_base(base: ModelFolder, folder: Path) -> None:
    """A base that no manifest describes: the files that transformers may open."""
    folder.mkdir()
    for name in base.names:
        if name.endswith(".safetensors") or SMALL_FILES.match(name):
            url = storage.join(base.url, name)
            size = storage.info(url).size
            with (folder / name).open("wb") as out:
                for start in range(0, size, COPY_BYTES):
                    out.write(storage.read_range(url, start, min(start + COPY_BYTES, size)))


def _what_to_do(damaged: list[Located], whole: list[str], advice: list[str]) -> str:
    names = ", ".join(one.directory.rpartition("/")[2] for one in damaged) or "a commit record"
    lines = [f"take another checkpoint that is whole: {whole[0]}"] if whole else []
    lines += dict.fromkeys(advice)
    return f"not whole: {names}. What to do:\n" + "\n".join(f"  {line}" for line in lines or [OTHERWISE])
