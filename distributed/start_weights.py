"""What an engine is filled with before the first step: the newest checkpoint, or else what the run starts from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..recipes.errors import UserError
from ..recipes.schema import Recipe
from . import storage
from .adapter_start import start_adapter
from .attempt import Attempt
from .checkpoint.exchange import Range
from .checkpoint.fetch import Share
from .checkpoint.fragments import FragmentReader, TensorSpec
from .checkpoint.manifest import DamagedError, read_manifest
from .checkpoint.reader import CheckpointReader
from .group import Group
from .importing.pickled import open_pickled, pickled_names
from .metrics import Recorder
from .model import BuiltModel
from .model_files import ModelFolder
from .node_share import shared_on_node
from .quantized import QuantizingReader
from .resume import load_newest
from .saver import checked_reader, read_state, refuse_missing
from .strategies.base import Engine
from .weights import check_base


def load_weights(
    recipe: Recipe,
    built: BuiltModel,
    engine: Engine,
    folder: ModelFolder,
    attempt: Attempt,
    group: Group,
    recorder: Recorder | None,
) -> dict[str, Any] | None:
    """Weights from the newest checkpoint or else from where the run starts; the state to continue from, if any."""

    state = None
    with shared_on_node(folder.url, group.world, attempt.key) as share:

        def load_base() -> None:
            if recipe.model.init == "pretrained" and (attempt.resume is None or built.has_adapter):
                base = built.layout.joined(open_weights(folder, share, pickles=recipe.model.allow_pickle))
                reader = QuantizingReader(base, built.packed, group.world.device)
                left_out = check_base(built, reader)
                if recorder and left_out:
                    recorder.message(_buffers_note(left_out), level="warning")
                if recipe.model.keep_optimizer_state:
                    load_with_optimizer(engine, built, folder.url, share)
                else:
                    engine.load_base(reader)

        group.alike(load_base, "loading weights")
        state = load_newest(engine, built, attempt, group, recorder)
        if attempt.resume is None and built.has_adapter:
            base = built.layout.joined(open_weights(folder, share, pickles=recipe.model.allow_pickle))
            start_adapter(engine, built, recipe, base, group)
    return state


def _buffers_note(left_out: Sequence[str]) -> str:
    names = ", ".join(left_out[:3]) + (", …" if len(left_out) > 3 else "")
    return (
        f"model.path: {len(left_out)} buffers of the model are not in the files ({names}); they have the values that "
        "models of this type begin with"
    )


def open_weights(folder: ModelFolder, share: Share | None = None, *, pickles: bool = False) -> FragmentReader:
    """The weights in a model's folder; pickled ones, where there are no others, if `pickles` allows it.

    Raises UserError."""
    if not pickles or any(name.endswith(".safetensors") for name in folder.names):
        return CheckpointReader(folder.url, share=share)
    if not storage.is_local(folder.url):
        raise UserError(
            f"model.allow_pickle: pickled weights are read from a local disk only. Run ftlaunch import-checkpoint on a "
            f"copy of {folder.url}, --to where they shall be."
        )
    place = storage.local_path(folder.url)
    return open_pickled(place, pickled_names(set(folder.names), place))


def load_with_optimizer(engine: Engine, built: BuiltModel, directory: str, share: Share | None = None) -> None:
    """Fill an engine with the weights of a checkpoint, in fp32 where it has them so, and with its optimizer's state.

    Raises UserError for a folder without training state, for that of another optimizer, and for one that leaves out
    what is trained now; DamagedError for bytes that are not what was written."""
    manifest = read_manifest(directory)
    files = manifest.files
    if not manifest.is_resumable:
        raise UserError(
            f"model.keep_optimizer_state: {directory} holds its weights only, no training/state.json. Leave the key "
            "out, or name a checkpoint with its training state (of another program: import-checkpoint --training)."
        )
    moments = [part for part in engine.parts if part not in ("model", "master")]
    refuse_missing(directory, moments, files)
    weights = checked_reader(directory, "model", files, share)
    has_master = any(file.path.startswith(("training/master.", "training/master-")) for file in files)
    masters = [checked_reader(directory, "master", files, share)] if has_master else []
    readers: dict[str, CheckpointReader] = {part: checked_reader(directory, part, files, share) for part in moments}
    joined = {part: built.layout.joined(reader) for part, reader in readers.items()}
    _refuse_other_layers(built, directory, joined)
    precise = built.layout.joined(Layered((*masters, weights)))
    for part in engine.parts:
        engine.load(part, joined.get(part, precise))
    if damaged := [problem for reader in (*masters, weights, *readers.values()) for problem in reader.damaged]:
        raise DamagedError(damaged[0])
    engine.load_optimizer_state(read_state(directory)["optimizer"])


def _refuse_other_layers(built: BuiltModel, directory: str, readers: dict[str, FragmentReader]) -> None:
    """A tensor that was frozen then has no moments."""
    trained = set(built.published.values()) - built.frozen()
    held = {name for reader in readers.values() for name in reader.names()}
    if lost := sorted(trained - held):
        raise UserError(
            f"model.keep_optimizer_state: {directory} has no optimizer state of {len(lost)} tensors that are trained "
            f"here ({', '.join(lost[:3])}), which were frozen there. Leave the key out, or set model.train_layers."
        )


@dataclass(frozen=True)
class Layered:
    """A `FragmentReader` that takes each tensor from the first reader that has it."""

    readers: Sequence[FragmentReader]

    def names(self) -> Sequence[str]:
        """Of all of them."""
        return list(dict.fromkeys(name for reader in self.readers for name in reader.names()))

    def spec(self, name: str) -> TensorSpec:
        """Shape and dtype. Raises KeyError."""
        return self._of(name).spec(name)

    def read(self, name: str, ranges: Sequence[Range]) -> Tensor:
        """The elements of these ranges, one after the other."""
        return self._of(name).read(name, ranges)

    def _of(self, name: str) -> FragmentReader:
        for reader in self.readers:
            if name in reader.names():
                return reader
        raise KeyError(name)
