"""Compare what storage holds with the manifest: a sample right after a save, or everything."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from ...recipes.errors import UserError
from .. import storage
from .manifest import FileRecord, Manifest, Span, read_manifest, span_problems

SAMPLE_BYTES = 16 * 2**20
"""What a rank reads again after each save: enough to meet a systematic fault, too little to be felt."""

SAMPLE_SPANS = 64
"""At most this many reads, where spans are small."""

LOOKS_AT_ONCE = 16
"""An object store answers each question for a size in some 20 ms, and a large model has hundreds of files."""


def verify_checkpoint(directory: str) -> list[str]:
    """Every file's size and every span's checksum, against the manifest; empty when all is as it was written.

    Raises UserError when there is no readable manifest.
    """
    problems: list[str] = []
    for file in read_manifest(directory).files:
        wrong_size = size_problems(directory, [file])
        problems += wrong_size or span_problems(directory, file, file.spans)
    return problems


def size_problems(directory: str, files: Sequence[FileRecord]) -> list[str]:
    """Files that are missing or have another size than was written; reads no content."""
    with ThreadPoolExecutor(LOOKS_AT_ONCE) as pool:
        problems = pool.map(lambda file: _size_problem(storage.join(directory, file.path), file.size), files)
        return [problem for problem in problems if problem is not None]


def _size_problem(url: str, expected: int) -> str | None:
    try:
        size = storage.info(url).size
    except UserError as error:
        return str(error)
    return None if size == expected else f"{url} has {size} bytes, {expected} were written"


def sample_problems(directory: str, manifest: Manifest, *, seed: str, max_bytes: int = SAMPLE_BYTES) -> Iterator[str]:
    """Read a random sample of spans again. `seed` makes ranks and saves sample differently."""
    draw = random.Random(seed)  # noqa: S311 - a sample, no secret
    spans = [(file, span) for file in manifest.files for span in file.spans]
    for file, span in _up_to(draw.sample(spans, min(SAMPLE_SPANS, len(spans))), max_bytes):
        yield from span_problems(directory, file, (span,))


def _up_to(sample: Sequence[tuple[FileRecord, Span]], max_bytes: int) -> Iterator[tuple[FileRecord, Span]]:
    read = 0
    for file, span in sample:
        if read + span.length <= max_bytes or read == 0:
            read += span.length
            yield file, span
