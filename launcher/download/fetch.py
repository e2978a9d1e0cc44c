"""Files from elsewhere into a folder of downloads, several at once; what is there already is not fetched again."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ...distributed import storage
from ...distributed.model_files import NOT_COPIED, SMALL_FILES, ModelFolder, find_model, is_hub_id, pinned_revision
from ...recipes.errors import InfrastructureError, UserError
from .. import units
from .ledger import Downloads
from .wanted import WantedFile, model_place

CHUNK_BYTES = 16 << 20
AT_ONCE = 8

Say = Callable[[str], None]


@dataclass
class Fetched:
    """Counts of what was fetched, and of what was there already."""

    files: int = 0
    bytes: int = 0
    kept_files: int = 0
    kept_bytes: int = 0

    def add(self, size: int, *, fetched: bool) -> None:
        """One file."""
        if fetched:
            self.files += 1
            self.bytes += size
        else:
            self.kept_files += 1
            self.kept_bytes += size


def fetch_files(downloads: Downloads, files: Iterable[WantedFile], say: Say) -> Fetched:
    """Raises UserError where there is no room, InfrastructureError for a file that comes short."""
    files = list({file.place: file for file in files}.values())
    missing = [file for file in files if not downloads.has(file.place, file.etag, file.size)]
    _room(downloads.folder, sum(file.size for file in missing))
    counts = Fetched()
    for file in files:
        if file not in missing:
            counts.add(file.size, fetched=False)
    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="download") as pool:
        for file, _ in zip(missing, pool.map(lambda each: _fetch(downloads, each), missing), strict=True):
            counts.add(file.size, fetched=True)
            say(f"  {units.size(file.size):>9}  {file.url}")
    return counts


def _room(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if size > free:
        raise UserError(f"--to {folder}: {units.size(size)} are to come, and {units.size(free)} are free there")


def _fetch(downloads: Downloads, file: WantedFile) -> None:
    found = storage.FileInfo(file.url, file.size, file.etag, file.options)
    with downloads.unfinished(file.place).open("wb") as out:
        for start in range(0, file.size, CHUNK_BYTES):
            out.write(_range(found, start, min(start + CHUNK_BYTES, file.size)))
    downloads.add(file.place, file.url, file.etag, file.size)


def _range(file: storage.FileInfo, start: int, stop: int) -> bytes:
    """Held against the file that was listed, as a run's own reads are."""
    data = storage.read_file(file, start, stop)
    if len(data) != stop - start:
        raise InfrastructureError(f"{file.url}: bytes {start} to {stop} came short; call it again")
    return data


def fetch_model(
    downloads: Downloads, path: str, revision: str | None, *, weights: bool, pickles: bool
) -> tuple[str, Fetched]:
    """A hub's model, or one at a URL, into a folder of its own: (its place, counts). The hub's own cache is filled on
    the way, and shares the bytes where it can."""
    if not is_hub_id(path):
        return _from_url(downloads, find_model(path, revision, pickles=pickles), weights=weights, pickles=pickles)
    commit = pinned_revision(path, revision)
    assert commit is not None, "a hub id has one"
    place, counts = model_place(path, commit), Fetched()
    there = downloads.model(place, weights=weights)
    if there is not None:
        for size in there:
            counts.add(size, fetched=False)
        return place, counts
    cached = Path(find_model(path, commit, weights=weights, pickles=pickles).url)
    names = sorted(file.relative_to(cached).as_posix() for file in cached.rglob("*") if file.is_file())
    for name in names:
        _link((cached / name).resolve(), downloads.unfinished(f"{place}/{name}"))
        size = (cached / name).stat().st_size
        downloads.add(f"{place}/{name}", f"hub:{path}@{commit}/{name}", commit, size)
        counts.add(size, fetched=True)
    downloads.add_model(place, names, weights=weights)
    return place, counts


def _link(source: Path, target: Path) -> None:
    """The same bytes under another name where the file system can, else a copy."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _from_url(downloads: Downloads, folder: ModelFolder, *, weights: bool, pickles: bool) -> tuple[str, Fetched]:
    names = [name for name in folder.names if _belongs(name, weights=weights, pickles=pickles)]
    place = model_place(folder.url.partition("://")[2].strip("/"), "url")
    found = [storage.info(storage.join(folder.url, name)) for name in names]
    files = [
        WantedFile(file.url, file.size, file.etag, f"{place}/{name}") for name, file in zip(names, found, strict=True)
    ]
    return place, fetch_files(downloads, files, lambda _line: None)


def _belongs(name: str, *, weights: bool, pickles: bool) -> bool:
    if name.endswith(".safetensors") or name.endswith(".safetensors.index.json"):
        return weights
    if name.startswith("pytorch_model"):
        return weights and pickles
    return SMALL_FILES.match(name) is not None and NOT_COPIED.match(name) is None


def total(counts: Sequence[Fetched]) -> Fetched:
    """All together."""
    return Fetched(
        files=sum(each.files for each in counts),
        bytes=sum(each.bytes for each in counts),
        kept_files=sum(each.kept_files for each in counts),
        kept_bytes=sum(each.kept_bytes for each in counts),
    )
