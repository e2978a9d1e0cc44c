"""Checkpoints of torch.distributed.checkpoint: a `.metadata` file that says where each chunk of each tensor lies in
`__0_0.distcp` and its like; also a pair of them, as accelerate and the Trainer save under FSDP.

`.metadata` is a pickle, which torch opens as it is. Here its classes are never loaded (`_Stand` takes their place), and
every other name is refused. A chunk is what `torch.save` wrote, and comes whole into memory, one tensor's at a time.
"""

from __future__ import annotations

import io
import os
import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple, cast

import torch

from ...recipes.errors import UserError
from ..checkpoint.exchange import Range
from ..checkpoint.fragments import TensorSpec
from ..checkpoint.layout import num_elements
from ..pickles import REMEDY, Inert
from .base import MOMENTS, Foreign, Moments, Renamed, stored_dtype, torch_dtype

METADATA = ".metadata"

STATE = re.compile(r"(?:(?:optimizer|optim)\.)?state\.(?P<name>.+)\.(?P<kind>exp_avg|exp_avg_sq|step)")
"""A tensor's state in an optimizer's state dict: by name, as `get_optimizer_state_dict` gives it."""

OPTIMIZER = re.compile(r"(?:optimizer|optim)\..*|state\..+\.[^.]+|param_groups\..*")

BESIDE = re.compile(
    r"(?:lr_scheduler|scheduler|train_state|dataloader|rng|rng_state|random_states|step|epoch|extra)(?:\..*)?"
)
"""Keys of what programs keep beside a model."""

NO_MOMENTS = "it holds no optimizer state"

INERT = frozenset(
    {
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "Metadata",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
            "MetadataIndex",
            "StorageMeta",
            "_MEM_FORMAT_ENCODING",
        )
    }
    | {("torch.distributed.checkpoint.filesystem", "_StorageInfo"), ("torch.serialization", "_get_layout")}
)
PLAIN: Mapping[tuple[str, str], Any] = {
    ("torch", "Size"): tuple,
    ("collections", "OrderedDict"): dict,
    ("pathlib", "PosixPath"): PurePosixPath,
    ("pathlib._local", "PosixPath"): PurePosixPath,
    ("builtins", "set"): set,
}


class _Chunk(NamedTuple):
    """A part of a tensor: its place in it, and where its bytes lie."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    path: Path
    begin: int
    length: int


class _Unpickler(pickle.Unpickler):
    """Makes nothing but tuples, plain values and `Inert`."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in INERT:
            return Inert
        if (module, name) in PLAIN:
            return PLAIN[module, name]
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        raise UserError(f"it names {module}.{name}, which nothing of its kind needs. {REMEDY}")


def find(folder: Path) -> Foreign | None:
    """See `base.py`."""
    places = [folder] if (folder / METADATA).is_file() else _pair(folder)
    if not places:
        _refuse_unfinished(folder)
        return None
    stores = [_Store.open(place) for place in places]
    keys = {key: store for store in stores for key in store.specs}
    others = [key for store in stores for key in store.others]
    weights = {key: store for key, store in keys.items() if not OPTIMIZER.fullmatch(key) and not BESIDE.fullmatch(key)}
    moments, why = _moments(keys, others)
    names = sorted({key.partition(".")[0] for key in (*keys, *others) if BESIDE.fullmatch(key)})
    what = f"checkpoint of torch.distributed.checkpoint in {', '.join(map(str, places))}"
    return Foreign(what, _Both(weights), None, 0, moments, why, tuple(names))


def _pair(folder: Path) -> list[Path]:
    """accelerate's folders, of the model and perhaps of the optimizer."""
    model, optimizer = folder / "pytorch_model_fsdp_0", folder / "optimizer_0"
    if not (model / METADATA).is_file():
        return []
    return [model, *([optimizer] if (optimizer / METADATA).is_file() else [])]


def _refuse_unfinished(folder: Path) -> None:
    for place in (folder, folder / "pytorch_model_fsdp_0"):
        if place.is_dir() and any(place.glob("*.distcp")):
            raise UserError(
                f"{place} has no {METADATA}, which rank 0 writes last: the save was broken off, or the folder was not "
                "copied whole (its name begins with a dot)."
            )


def _moments(keys: Mapping[str, _Store], others: Sequence[str]) -> tuple[Moments | None, str]:
    """AdamW's, by the weights' names, and why there are none."""
    found = {key: match for key in (*keys, *others) if (match := STATE.fullmatch(key))}
    if not found:
        return None, NO_MOMENTS
    if any(match["name"].isdigit() for match in found.values()):
        return None, "its optimizer calls its tensors by number, and nothing says which is which"
    readers = {
        moment: Renamed(_Both(keys), {m["name"]: key for key, m in found.items() if m["kind"] == moment})
        for moment in MOMENTS
    }
    if {frozenset(reader.names()) for reader in readers.values()} != {frozenset(readers[MOMENTS[0]].names())}:
        return None, "its optimizer keeps one moment of some tensors and two of others, which is not AdamW's state"
    kept = set(readers[MOMENTS[0]].names())
    steps = {key: match["name"] for key, match in found.items() if match["kind"] == "step" and match["name"] in kept}
    counts = {float(keys[key].read(key, ((0, 1),))) for key in steps if key in keys}
    if len(counts) != 1:
        said = "not said how often" if not counts else f"different numbers of times ({sorted(counts)})"
        return None, f"it is {said} its tensors were updated" if not counts else f"its tensors were updated {said}"
    return Moments(readers, counts.pop()), ""


@dataclass(frozen=True)
class _Both:
    """A `FragmentReader` of tensors of one or two checkpoints."""

    stores: Mapping[str, _Store]

    def names(self) -> Sequence[str]:
        """Of all of them."""
        return list(self.stores)

    def spec(self, name: str) -> TensorSpec:
        """Raises KeyError."""
        return self.stores[name].specs[name]

    def read(self, name: str, ranges: Sequence[Range]) -> torch.Tensor:
        """The elements of these ranges, one after the other."""
        return self.stores[name].read(name, ranges)


@dataclass
class _Store:
    """One checkpoint. `others`: keys that hold no tensor."""

    specs: Mapping[str, TensorSpec]
    chunks: Mapping[str, Sequence[_Chunk]]
    others: Sequence[str]
    _name: str = ""
    _held: dict[_Chunk, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path) -> _Store:
        """Raises UserError for files that are missing or truncated, and for tensors that are not there whole."""
        specs: dict[str, TensorSpec] = {}
        chunks: dict[str, Sequence[_Chunk]] = {}
        others: list[str] = []
        try:
            metadata = _read_metadata(folder / METADATA)
            places = {_place(key): info for key, info in metadata.storage_data.items()}
            for name, entry in metadata.state_dict_metadata.items():
                if not isinstance(entry.state, dict) or "chunks" not in entry.state:
                    others.append(name)
                    continue
                specs[name] = TensorSpec(name, tuple(entry.size), stored_dtype(entry.properties.state[0]))
                chunks[name] = [_chunk(folder, name, chunk, places) for chunk in entry.chunks]
        except (AttributeError, KeyError, TypeError, IndexError) as error:
            raise UserError(f"{folder / METADATA} is not as torch writes it ({error!r}).") from error
        _check(folder, specs, chunks)
        return cls(specs, chunks, others)

    def read(self, name: str, ranges: Sequence[Range]) -> torch.Tensor:
        """The elements of these ranges, one after the other."""
        spec = self.specs[name]
        width = num_elements(spec) // max(1, spec.shape[0]) if spec.shape else 1
        parts = []
        for start, stop in ranges:
            first, last = start // max(1, width), -(-stop // max(1, width))
            parts.append(self._rows(name, first, last)[start - first * width : stop - first * width])
        return torch.cat(parts)

    def _rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows of a tensor, flat. Chunks stay until no later row of the same tensor can want them."""
        spec = self.specs[name]
        if not spec.shape:
            return self._load(self.chunks[name][0]).reshape(1)
        if name != self._name:
            self._name, self._held = name, {}
        self._held = {chunk: values for chunk, values in self._held.items() if _end(chunk) > start}
        rows = torch.empty(stop - start, *spec.shape[1:], dtype=torch_dtype(spec))
        for chunk in self.chunks[name]:
            low, high = max(start, chunk.offsets[0]), min(stop, _end(chunk))
            if low < high:
                if chunk not in self._held:
                    self._held[chunk] = self._load(chunk)
                across = [slice(at, at + size) for at, size in zip(chunk.offsets[1:], chunk.sizes[1:], strict=True)]
                part = self._held[chunk][low - chunk.offsets[0] : high - chunk.offsets[0]]
                rows[(slice(low - start, high - start), *across)] = part
        return rows.flatten()

    def _load(self, chunk: _Chunk) -> torch.Tensor:
        try:
            with chunk.path.open("rb", buffering=0) as file:
                part = cast("IO[bytes]", _Slice(file, chunk.begin, chunk.length))
                values = torch.load(part, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
            end = chunk.begin + chunk.length
            raise UserError(
                f"{chunk.path}: bytes {chunk.begin} to {end} are no tensor. Copy it again, whole."
            ) from error
        if not isinstance(values, torch.Tensor) or tuple(values.shape) != chunk.sizes:
            raise UserError(f"{chunk.path}: byte {chunk.begin} begins another tensor than {METADATA} says.")
        return values.detach()


class _Slice(io.RawIOBase):
    """A part of a file as a file, of which no copy is made."""

    def __init__(self, file: io.FileIO, begin: int, length: int) -> None:
        self._file, self._begin, self._length = file, begin, length
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        room = memoryview(buffer).cast("B")[: max(0, self._length - self._at)]
        count = os.preadv(self._file.fileno(), [room], self._begin + self._at) if room else 0
        self._at += count
        return count


def _end(chunk: _Chunk) -> int:
    return chunk.offsets[0] + chunk.sizes[0]


def _read_metadata(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            return _Unpickler(file).load()
    except UserError as error:
        raise UserError(f"{path} is refused, and nothing of it was run: {error}.") from error
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
        raise UserError(
            f"{path} cannot be read ({error!r}): truncated, or no file of torch's. Copy it again."
        ) from error


def _place(index: Any) -> tuple[str, tuple[int, ...]]:
    """Which chunk of which tensor; what is no tensor has no offset."""
    return index.fqn, tuple(getattr(index, "offset", None) or ())


def _chunk(folder: Path, name: str, chunk: Any, places: Mapping[tuple[str, tuple[int, ...]], Any]) -> _Chunk:
    offsets = tuple(chunk.offsets)
    info = places[name, offsets] if (name, offsets) in places else places[name, ()]
    if (info.state.get("transform_descriptors")) is not None:
        raise UserError(f"{folder}: its tensors are stored compressed, which cannot be imported.")
    relative = PurePosixPath(info.relative_path)
    if relative.is_absolute() or ".." in relative.parts:
        raise UserError(f"{folder / METADATA} names a file outside its folder: {info.relative_path}.")
    return _Chunk(offsets, tuple(chunk.sizes), folder / relative, info.offset, info.length)


def _check(folder: Path, specs: Mapping[str, TensorSpec], chunks: Mapping[str, Sequence[_Chunk]]) -> None:
    wanted: dict[Path, int] = {}
    for chunk in (chunk for parts in chunks.values() for chunk in parts):
        wanted[chunk.path] = max(wanted.get(chunk.path, 0), chunk.begin + chunk.length)
    missing = sorted(path.name for path in wanted if not path.is_file())
    if missing:
        raise UserError(
            f"{folder}: {len(missing)} of its {len(wanted)} files are missing: {', '.join(missing[:5])}. Each rank "
            "writes its own, perhaps on its own machine: copy all of them here."
        )
    short = [f"{p.name} ({p.stat().st_size} of {size} bytes)" for p, size in wanted.items() if p.stat().st_size < size]
    if short:
        raise UserError(f"{folder}: truncated: {', '.join(sorted(short)[:5])}. Copy it again, whole.")
    holes = list(_holes(specs, chunks))
    if holes:
        raise UserError(f"{folder}: {METADATA} lists not all of {', '.join(holes[:3])}; it is damaged.")


def _holes(specs: Mapping[str, TensorSpec], chunks: Mapping[str, Sequence[_Chunk]]) -> Iterator[str]:
    for name, spec in specs.items():
        if sum(num_elements(TensorSpec(name, chunk.sizes, spec.dtype)) for chunk in chunks[name]) != num_elements(spec):
            yield name
