"""Where every byte of a checkpoint lies: names, shapes and dtypes fix it before anything is written.

The format is safetensors (https://github.com/huggingface/safetensors, README, "Format"): 8 bytes little-endian header
length, a JSON header padded with spaces to a multiple of 8, then the tensors one after the other without holes. File
names and the index follow transformers, so that `from_pretrained` opens a folder as it is.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from ...recipes.errors import UserError
from .. import storage
from .fragments import TensorSpec

MAX_FILE_BYTES = 512 * 2**20
"""Bytes of tensors in a file: small enough that a model has many files, and so many ranks that write at once."""

FILES_AT_ONCE = 8
"""Files that are filled side by side, tensor by tensor, so that their owners work at the same time."""

MAX_HEADER_BYTES = 100_000_000
"""The limit that the safetensors library sets itself; more means that the file is something else."""

SINGLE_FILE_STEMS = frozenset({"adapter_model"})
"""Parts that peft reads from one file, whatever their size."""


class Dtype(NamedTuple):
    """One element: its size in bytes, and torch's name of it."""

    itemsize: int
    torch_name: str


DTYPES: Mapping[str, Dtype] = {
    "BOOL": Dtype(1, "bool"),
    "U8": Dtype(1, "uint8"),
    "I8": Dtype(1, "int8"),
    "F8_E4M3": Dtype(1, "float8_e4m3fn"),
    "F8_E5M2": Dtype(1, "float8_e5m2"),
    "F8_E8M0": Dtype(1, "float8_e8m0fnu"),
    "U16": Dtype(2, "uint16"),
    "I16": Dtype(2, "int16"),
    "F16": Dtype(2, "float16"),
    "BF16": Dtype(2, "bfloat16"),
    "U32": Dtype(4, "uint32"),
    "I32": Dtype(4, "int32"),
    "F32": Dtype(4, "float32"),
    "U64": Dtype(8, "uint64"),
    "I64": Dtype(8, "int64"),
    "F64": Dtype(8, "float64"),
    "C64": Dtype(8, "complex64"),
}
"""safetensors' name of a dtype -> its size and torch's name."""

DTYPE_OF_TORCH: Mapping[str, str] = {dtype.torch_name: name for name, dtype in DTYPES.items()}
"""torch's name of a dtype, without "torch." -> safetensors' name."""


def num_elements(spec: TensorSpec) -> int:
    """Elements of a tensor; 1 for a scalar, 0 if a dimension is empty."""
    return math.prod(spec.shape)


def num_bytes(spec: TensorSpec) -> int:
    """Bytes of a tensor."""
    return num_elements(spec) * DTYPES[spec.dtype].itemsize


class StoredTensor(NamedTuple):
    """A tensor's place: bytes [start, stop) counted from the beginning of the file."""

    spec: TensorSpec
    start: int
    stop: int


@dataclass(frozen=True)
class StoredFile:
    """One safetensors file: its name in the folder, the bytes before the tensors, and the tensors in file order."""

    name: str
    header: bytes
    tensors: tuple[StoredTensor, ...]

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return self.tensors[-1].stop if self.tensors else len(self.header)


@dataclass(frozen=True)
class FileSet:
    """The files of one part ("model", "exp_avg", ...) of a checkpoint, or of a model folder."""

    stem: str
    files: tuple[StoredFile, ...]

    @cached_property
    def places(self) -> Mapping[str, tuple[StoredFile, StoredTensor]]:
        """Tensor name -> the file that holds it and its place there."""
        return {tensor.spec.name: (file, tensor) for file in self.files for tensor in file.tensors}

    @property
    def index_name(self) -> str:
        """File name of the index."""
        return f"{self.stem}.safetensors.index.json"

    def index(self) -> bytes | None:
        """The index that transformers reads when a model has several files; None for one file, which has none."""
        if len(self.files) == 1:
            return None
        total = sum(num_bytes(tensor.spec) for file in self.files for tensor in file.tensors)
        weight_map = {name: file.name for name, (file, _) in sorted(self.places.items())}
        content = {"metadata": {"total_size": total}, "weight_map": weight_map}
        return json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n"


# --- planning -------------------------------------------------------------------------------------------------------


def plan_files(
    specs: Sequence[TensorSpec],
    *,
    stem: str,
    max_file_bytes: int = MAX_FILE_BYTES,
    frozen: Collection[str] = (),
) -> FileSet:
    """Lay tensors out over files. It depends on nothing but its arguments, least of all on the world size.

    Within a file tensors with larger elements come first, as the safetensors library has it, which keeps every tensor
    aligned; apart from that they keep their order. Tensors named in `frozen` get files of their own, so that a later
    save may link them. A file exceeds `max_file_bytes` only for a single tensor that does, or where the reader
    knows one file only (adapters).
    """
    _check_specs(specs)
    if stem in SINGLE_FILE_STEMS:
        dealt = [list(specs)]
    else:
        groups = ([s for s in specs if s.name not in frozen], [s for s in specs if s.name in frozen])
        dealt = [file for group in groups for file in _deal(group, max_file_bytes)] or [[]]
    return FileSet(stem, tuple(map(plan_file, _names(stem, len(dealt)), dealt)))


def plan_file(name: str, specs: Sequence[TensorSpec]) -> StoredFile:
    """One file that holds these tensors, larger elements first."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    ordered = sorted(specs, key=lambda spec: -DTYPES[spec.dtype].itemsize)
    offsets = [0]
    for spec in ordered:
        offsets.append(offsets[-1] + num_bytes(spec))
        entries[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": offsets[-2:]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    starts = [len(header) + offset for offset in offsets]
    return StoredFile(name, header, tuple(map(StoredTensor, ordered, starts[:-1], starts[1:])))


def _check_specs(specs: Sequence[TensorSpec]) -> None:
    if len({spec.name for spec in specs}) != len(specs):
        twice = sorted({spec.name for spec in specs if sum(other.name == spec.name for other in specs) > 1})
        raise ValueError(f"tensors are named twice: {', '.join(twice)}")
    unknown = sorted({spec.dtype for spec in specs} - set(DTYPES))
    if unknown:
        raise ValueError(f"not a dtype of safetensors: {', '.join(unknown)}")


def _names(stem: str, count: int) -> Iterator[str]:
    if count == 1:
        return iter([f"{stem}.safetensors"])
    return (f"{stem}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1))


def _deal(specs: Sequence[TensorSpec], max_file_bytes: int) -> Iterator[list[TensorSpec]]:
    """Consecutive tensors go to different files of a window, so that the files' owners receive and write in turn."""
    for window in _windows(specs, FILES_AT_ONCE * max_file_bytes):
        yield from _balance(window, max_file_bytes)


def _windows(specs: Sequence[TensorSpec], capacity: int) -> Iterator[list[TensorSpec]]:
    window: list[TensorSpec] = []
    filled = 0
    for spec in specs:
        if window and filled + num_bytes(spec) > capacity:
            yield window
            window, filled = [], 0
        window.append(spec)
        filled += num_bytes(spec)
    if window:
        yield window


def _balance(window: Sequence[TensorSpec], max_file_bytes: int) -> list[list[TensorSpec]]:
    """Deal each tensor to the emptiest file; as few files as the limit allows."""
    least = max(1, -(-sum(map(num_bytes, window)) // max_file_bytes))
    for count in range(min(least, len(window)), len(window) + 1):
        files: list[list[TensorSpec]] = [[] for _ in range(count)]
        filled = [0] * count
        for spec in window:
            emptiest = filled.index(min(filled))
            files[emptiest].append(spec)
            filled[emptiest] += num_bytes(spec)
        if all(size <= max_file_bytes or len(file) == 1 for file, size in zip(files, filled, strict=True)):
            break
    return [file for file in files if file]


# --- reading --------------------------------------------------------------------------------------------------------


def read_header(url: str, name: str) -> StoredFile:
    """The header of safetensors file `url`, by two ranged reads, checked against the file's size.

    Raises UserError that names the file when it is truncated or something else.
    """
    size = storage.info(url).size
    if size < 8:
        raise _broken(url, f"it has {size} bytes, too few for a safetensors file")
    (length,) = struct.unpack("<Q", storage.read_range(url, 0, 8))
    if length > min(MAX_HEADER_BYTES, size - 8):
        raise _broken(url, f"its header would have {length} bytes, the file has {size}: truncated, or no safetensors")
    text = storage.read_range(url, 8, 8 + length)
    tensors = _parse_header(url, text)
    file = StoredFile(name, struct.pack("<Q", length) + text, tensors)
    if file.size != size:
        raise _broken(url, f"its header describes {file.size} bytes, the file has {size}")
    return file


def _parse_header(url: str, text: bytes) -> tuple[StoredTensor, ...]:
    try:
        entries = json.loads(text)
        entries.pop("__metadata__", None)
        begin = 8 + len(text)
        tensors = [_stored(name, entry, begin) for name, entry in entries.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _broken(url, f"its header cannot be read ({error})") from error
    tensors.sort(key=lambda tensor: (tensor.start, tensor.stop))
    end = begin
    for tensor in tensors:
        if tensor.start != end or tensor.stop - tensor.start != num_bytes(tensor.spec):
            raise _broken(url, f"the place of tensor {tensor.spec.name} does not fit its shape or its neighbours")
        end = tensor.stop
    return tuple(tensors)


def _stored(name: str, entry: Mapping[str, Any], begin: int) -> StoredTensor:
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"tensor {name} has dtype {entry['dtype']}; readable are {', '.join(DTYPES)}")
    start, stop = entry["data_offsets"]
    return StoredTensor(TensorSpec(name, tuple(map(int, entry["shape"])), entry["dtype"]), begin + start, begin + stop)


def _broken(url: str, what: str) -> UserError:
    return UserError(f"{url} is broken: {what}. Copy or download it again.")


def open_folder(url: str, stem: str = "model") -> FileSet:
    """The files of part `stem` in a folder: one file, or several with or without an index.

    Raises UserError when there are none, when the index names a file that is missing, and when a file is broken.
    """
    present = set(storage.list_names(url))
    single, index = f"{stem}.safetensors", f"{stem}.safetensors.index.json"
    if single in present:
        names = [single]
    elif index in present:
        names = _indexed(storage.join(url, index), present)
    else:
        names = _numbered(url, stem, present)
    return FileSet(stem, tuple(read_header(storage.join(url, name), name) for name in names))


def _indexed(index_url: str, present: Collection[str]) -> list[str]:
    try:
        names = sorted(set(json.loads(storage.read_bytes(index_url))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _broken(index_url, f"it is no index with a weight_map ({error!r})") from error
    missing = [name for name in names if name not in present]
    if missing:
        raise UserError(
            f"{index_url} names files that are not there: {', '.join(missing)}. Copy the folder again, whole."
        )
    return names


def _numbered(url: str, stem: str, present: Collection[str]) -> list[str]:
    pattern = re.compile(re.escape(stem) + r"-(\d{5})-of-(\d{5})\.safetensors")
    found = {match[0]: int(match[2]) for match in map(pattern.fullmatch, present) if match}
    if not found:
        raise UserError(_no_weights(url, stem, present))
    if {len(found)} != set(found.values()):
        counts = ", ".join(sorted(found))
        raise UserError(f"{url} does not hold all files of {stem}: there are {counts}. Copy the folder again, whole.")
    return sorted(found)


def _no_weights(url: str, stem: str, present: Iterable[str]) -> str:
    names = sorted(present)
    pickled = [name for name in names if name.endswith((".bin", ".pt", ".pth")) and "model" in name]
    if pickled:
        return (
            f"{url} holds its weights as pickle ({', '.join(pickled[:3])}), which is not read unless you say so: "
            "opened as usual it can run any code. Take its tensors out, without running anything, by "
            f"ftlaunch import-checkpoint {url} --to NEW_FOLDER; or set model.allow_pickle: true."
        )
    listed = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "") if names else "nothing"
    there = f"{url} has no {stem}.safetensors and no {stem}-00001-of-....safetensors. There is: {listed}."
    # Of a model on a hub pickled weights are not even fetched.
    pickled_on_hub = " If a hub has them as pytorch_model.bin only, model.allow_pickle: true fetches and reads those."
    return there + (pickled_on_hub if stem == "model" and "config.json" in names else "")
