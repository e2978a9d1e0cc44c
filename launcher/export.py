"""`ftlaunch export CHECKPOINT --to PLACE`: a plain model folder with a card, streamed from where the checkpoint lies to
where it shall be. Nothing but a few blocks of tensors is ever held."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..distributed import storage
from ..distributed.checkpoint.fragments import TensorSpec
from ..distributed.checkpoint.layout import DTYPE_OF_TORCH, DTYPES, FileSet, plan_files
from ..distributed.checkpoint.manifest import (
    MANIFEST_NAME,
    STATE_PATH,
    FileRecord,
    Manifest,
    read_checked,
    read_manifest,
    record_bytes,
)
from ..distributed.checkpoint.reader import CheckpointReader
from ..distributed.merging import MergedTensors, StoredTensors, TensorStream, in_dtype, structure_of
from ..distributed.model_files import ModelFolder, is_hub_id
from ..distributed.reopen import ADAPTER_CONFIG, base_folder, precise_buffers
from ..distributed.run_directory import RunDirectory
from ..recipes.errors import UserError
from ..recipes.load import parse_recipe_text
from . import units
from .export_gguf import Converter, GgufFile, local_folder
from .export_target import EXPORT, IMPORT, Part, Target, read_back, write_all
from .history import read_record
from .locate import Located, locate
from .model_card import CardFacts, license_of, model_card
from .record import Record

SHARD_BYTES = 2 * 2**30
"""Of a whole model's file: what a broken-off export has to write again at most."""

CARD = "README.md"


@dataclass(frozen=True)
class Wanted:
    """What the user asked for. `dtype`: torch's name; None: as stored. `gguf`: what makes a GGUF file besides; None: no
    such file."""

    merge_adapter: bool
    dtype: str | None
    overwrite: bool
    gguf: Converter | None = None


@dataclass(frozen=True)
class Source:
    """A checkpoint to export. `config`: peft's, with an adapter; `small`: its other files, as they were written."""

    located: Located
    manifest: Manifest
    small: Mapping[str, bytes]
    config: dict[str, Any] | None
    base: ModelFolder | None

    def reader(self, stem: str) -> CheckpointReader:
        """Its weights; all that is read is held against the manifest."""
        spans = {file.path: file.spans for file in self.manifest.files}
        return CheckpointReader(self.located.directory, stem, spans)


def export(reference: str, to: str, wanted: Wanted) -> int:
    """Write it, read it back in samples, and say where it lies. Raises UserError for a target that is in use, and for a
    GGUF file that could not be made, when the rest is there."""
    source = open_source(reference, merge=wanted.merge_adapter)
    tensors, stem, untied = _weights(source, merge=wanted.merge_adapter)
    files = plan_files(_specs(source, tensors, stem, wanted.dtype), stem=stem, max_file_bytes=SHARD_BYTES)
    small = _small_files(source, files, wanted, untied=untied)
    gguf = _gguf(source, files, wanted, to) if wanted.gguf else None
    planned = sorted((*small, *(file.name for file in files.files), *([gguf.name] if gguf else [])))
    target = Target.begin(to, _identity(source, wanted), planned, overwrite=wanted.overwrite)
    records = write_all(target, [Part(stem, tensors, files)], small)
    failure = _convert(gguf, records) if gguf else None
    manifest = Manifest(source.manifest.step, source.manifest.attempt, tuple(records))
    target.finish(manifest)
    read_back(to, manifest)
    if failure is not None:
        raise failure
    total = sum(record.size for record in records)
    kind = "the adapter" if stem == "adapter_model" else "the model"
    print(
        f"{kind} of step {manifest.step}: {units.size(total)} in {len(records) + 1} files in {to}, read back in samples"
    )
    print(f"  from_pretrained({to!r}) opens it; ftlaunch verify {to} reads all of it")
    return 0


def open_source(reference: str, *, merge: bool) -> Source:
    """The checkpoint that is meant, without its weights. Raises UserError."""
    located = locate(reference)
    manifest = read_manifest(located.directory).weights_only()
    small = {file.path: _read(located.directory, file) for file in manifest.files if _is_small(file)}
    config = json.loads(small[ADAPTER_CONFIG]) if ADAPTER_CONFIG in small else None
    if merge and config is None:
        raise UserError(f"--merge-adapter: {located.directory} holds a whole model, no adapter; leave it out")
    return Source(located, manifest, small, config, base_folder(config) if merge and config else None)


def _is_small(file: FileRecord) -> bool:
    return not file.path.endswith((".safetensors", ".safetensors.index.json")) and file.path not in NOT_TAKEN_OVER


NOT_TAKEN_OVER = frozenset({CARD, EXPORT.note, IMPORT.note})
"""Of a folder that is an export or an import itself."""


def _read(directory: str, file: FileRecord) -> bytes:
    return bytes(read_checked(directory, file.path, file.spans, 0, file.size))


def _weights(source: Source, *, merge: bool) -> tuple[TensorStream, str, bool]:
    """The tensors, the stem of their files, and whether the head is no longer tied."""
    if source.config is None:
        return StoredTensors(source.reader("model")), "model", False
    adapter = source.reader("adapter_model")
    if not merge or source.base is None:
        return StoredTensors(adapter), "adapter_model", False
    base = CheckpointReader(source.base.url)
    merged = MergedTensors(base, adapter, source.config, structure_of(source.base))
    return merged, "model", bool(merged.untied)


def _specs(source: Source, tensors: TensorStream, stem: str, dtype: str | None) -> list[TensorSpec]:
    """What is written, in the dtype that was asked for."""
    if dtype is None:
        return list(tensors.specs())
    folder = source.base or ModelFolder(source.located.directory)
    return in_dtype(tensors.specs(), DTYPE_OF_TORCH[dtype], precise_buffers(folder) if stem == "model" else frozenset())


def _gguf(source: Source, files: FileSet, wanted: Wanted, to: str) -> GgufFile:
    """What is to be made besides. Raises UserError for a place or a kind of model that no GGUF file is made of."""
    assert wanted.gguf is not None
    if source.config is not None and not wanted.merge_adapter:
        raise UserError("--gguf: it is made of a whole model, and this checkpoint is an adapter; add --merge-adapter")
    title = source.located.run.rstrip("/").rpartition("/")[2] if source.located.run else "model"
    return GgufFile(wanted.gguf, local_folder(to), title, _dtype_of(files))


def _convert(gguf: GgufFile, records: list[FileRecord]) -> UserError | None:
    """Make it, and add it to what was written; why it could not be made. The model beside it is whole all the same."""
    print(f"{gguf.name}: {gguf.converter.command[-1]} is at work on what was written")
    try:
        records.append(gguf.make())
    except UserError as error:
        return error
    return None


# --- small files ----------------------------------------------------------------------------------------------------


def _small_files(source: Source, files: FileSet, wanted: Wanted, *, untied: bool) -> dict[str, bytes]:
    """All but the weights, by name."""
    small = dict(source.small)
    if source.base is not None:
        small.pop(ADAPTER_CONFIG)
        small = source.base.small_files() | small
        small["config.json"] = as_json(source.base.config)
    if "config.json" in small:
        changes = {"dtype": _dtype_of(files)} | ({"tie_word_embeddings": False} if untied else {})
        small["config.json"] = as_json(with_changes(json.loads(small["config.json"]), changes))
    if (index := files.index()) is not None:
        small[files.index_name] = index
    small[CARD] = model_card(card_facts(source, files, merged=wanted.merge_adapter)).encode()
    return small


def _dtype_of(files: FileSet) -> str:
    """torch's name of the dtype that most values have."""
    sizes: dict[str, int] = {}
    for _, tensor in files.places.values():
        sizes[tensor.spec.dtype] = sizes.get(tensor.spec.dtype, 0) + tensor.stop - tensor.start
    return DTYPES[max(sizes, key=lambda dtype: sizes[dtype])].torch_name if sizes else "float32"


def with_changes(config: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A model's configuration with these keys; in the parts of a composed one where they are there already. The old
    name of `dtype` goes, since it would contradict."""
    changed = {
        key: with_changes(value, {k: v for k, v in changes.items() if k in value}) if isinstance(value, dict) else value
        for key, value in config.items()
        if key != "torch_dtype"
    }
    return changed | dict(changes)


def as_json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False).encode() + b"\n"


# --- the card -------------------------------------------------------------------------------------------------------


def card_facts(source: Source, files: FileSet, *, merged: bool) -> CardFacts:
    """What is known about a checkpoint: from the run around it, or, of one that was pulled, from its own files."""
    run = source.located.run
    text = RunDirectory(run).read_recipe() if run else None
    recipe = parse_recipe_text(text, f"{run}/recipe.yaml") if text else None
    step = source.manifest.step
    base = recipe.model.path if recipe else (source.config or {}).get("base_model_name_or_path")
    found = source.base or _base_beside(base)
    record = read_record(RunDirectory(run), step) if run else Record({})
    kind = "merged" if merged else "adapter" if source.config else "full"
    return CardFacts(
        title=recipe.name if recipe else "A fine-tuned model",
        step=step,
        base=base,
        license=_license(found),
        kind=kind,
        dtype=_dtype_of(files),
        recipe=recipe,
        recipe_text=text or "",
        record=record,
        data_digest=record.data_digest or _data_digest(source.located.directory),
    )


def _base_beside(base: str | None) -> ModelFolder | None:
    """The base's folder, where it can be looked into without downloading it."""
    if base is None or is_hub_id(base) or ("://" not in base and not storage.is_folder(base)):
        return None
    return ModelFolder(base)


def _license(folder: ModelFolder | None) -> str | None:
    if folder is None:
        return None
    card = storage.read_bytes(storage.join(folder.url, CARD)).decode(errors="replace") if CARD in folder.names else ""
    return license_of(card, folder.config if "config.json" in folder.names else {})


def _data_digest(directory: str) -> str:
    """What tells which files were read, of a checkpoint without its run; only one with its training state knows."""
    files = [file for file in read_manifest(directory).files if file.path == STATE_PATH]
    return str(json.loads(_read(directory, files[0])).get("data", "")) if files else ""


# --- writing --------------------------------------------------------------------------------------------------------


def _identity(source: Source, wanted: Wanted) -> dict[str, Any]:
    """What makes two exports the same: the checkpoint's own checksums, the base, and what was asked for."""
    return {
        "checkpoint": record_bytes(MANIFEST_NAME, source.manifest.to_bytes()).spans[0].crc32,
        "base": source.base.url if source.base else None,
        "dtype": wanted.dtype,
        "step": source.manifest.step,
    }
