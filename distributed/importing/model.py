"""The model that a checkpoint is of, and which of its tensors is which: by fixed rules for the names that wrappers add,
held against what config.json says. What does not fit is refused, never left out."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ...recipes.errors import UserError
from ...recipes.schema import Recipe
from ..buffers import stored_shapes
from ..checkpoint.fragments import FragmentReader
from ..merging import row_ranges
from ..model import BuiltModel, build_model
from ..model_files import ModelFolder, find_model
from .base import Foreign, Renamed, torch_dtype

WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_fsdp_wrapped_module|_orig_mod|_checkpoint_wrapped_module)\.")
"""Parts of names that FSDP, torch.compile and activation checkpointing put anywhere."""

PREFIXES = ("", "model.", "module.", "model.module.", "state_dict.", "app.model.")
"""What may stand before the model's own names: of modules that hold a model, and of state dicts that hold one."""

SHOWN = 5


@dataclass(frozen=True)
class Model:
    """A model by its folder of small files. `shapes`: published name -> shape, in checkpoint order, buffers last;
    `besides`: names of its state dict that are no tensors of their own: tied ones."""

    folder: ModelFolder
    built: BuiltModel = field(repr=False)
    shapes: Mapping[str, tuple[int, ...]]
    besides: Set[str]

    @classmethod
    def of(cls, folder: ModelFolder) -> Model:
        """Raises UserError for a folder without config.json, and for a model that cannot be trained."""
        section = {"path": folder.url, "dtype": "float32"}
        recipe = Recipe.model_validate(
            {"name": "import", "model": section, "data": {"train": [{"path": "none.jsonl"}]}}
        )
        built = build_model(recipe, folder)
        if built.layout.pieces:
            raise UserError(
                f"{folder.url}: checkpoints of model type {built.config.model_type!r} cannot be imported yet: its "
                "files hold tensors under other names than the model does. Start from its weights, as model.path."
            )
        shapes = {published: built.shapes[name] for name, published in built.published.items()} | stored_shapes(built)
        return cls(folder, built, shapes, built.loss_model.causal_lm.state_dict().keys() - shapes.keys())


def find_base(source: str, base: str | None) -> ModelFolder:
    """Where config.json and the tokenizer are: what the user named, or else beside the checkpoint, as the Trainer puts
    them. Raises UserError where there are none."""
    if base is not None:
        return find_model(base, weights=False)
    place = Path(source.removeprefix("file://"))
    for folder in (place, place.absolute().parent):
        if (folder / "config.json").is_file():
            return ModelFolder(str(folder))
    raise UserError(
        f"{source} has no config.json beside it, which says what model its tensors are: name the model that it began "
        "with, --base MODEL (a hub id, a folder, or a checkpoint)."
    )


@dataclass(frozen=True)
class Aligned:
    """A checkpoint under the model's own names. `prefix`: what stood before them; `beside`: tensors outside of it."""

    weights: Renamed
    moments: Mapping[str, Renamed]
    prefix: str
    beside: tuple[str, ...]


def align(foreign: Foreign, model: Model) -> Aligned:
    """Raises UserError that lists what is missing, what is too much and what has another shape."""
    cleaned = _cleaned(foreign.weights.names())
    _refuse_adapters(cleaned)
    prefix = max(PREFIXES, key=lambda prefix: (_fitting(cleaned, prefix, model), -PREFIXES.index(prefix)))
    inside = {name.removeprefix(prefix): there for name, there in cleaned.items() if name.startswith(prefix)}
    beside = tuple(name for name in cleaned if not name.startswith(prefix))
    _refuse_mismatch(foreign, inside, model)
    _refuse_untied(foreign.weights, inside, model)
    weights = Renamed(foreign.weights, {name: inside[name] for name in model.shapes})
    return Aligned(weights, _aligned_moments(foreign, prefix, model), prefix, beside)


def _cleaned(names: Sequence[str]) -> dict[str, str]:
    """Without what wrappers put in -> as it is."""
    cleaned: dict[str, str] = {}
    for name in names:
        plain = WRAPPERS.sub("", name)
        if plain in cleaned:
            raise UserError(f"{cleaned[plain]} and {name} are one tensor's name; the checkpoint holds two of it.")
        cleaned[plain] = name
    return cleaned


def _refuse_adapters(names: Mapping[str, str]) -> None:
    found = [name for name in names if ".lora_" in name or ".base_layer." in name]
    if found:
        raise UserError(
            f"the checkpoint is of a model with an adapter ({found[0]}), which cannot be imported. Save the adapter "
            "with peft's save_pretrained, or merge it into its base (merge_and_unload) and save the whole model."
        )


def _fitting(names: Mapping[str, str], prefix: str, model: Model) -> int:
    return sum(prefix + name in names for name in model.shapes)


def _refuse_mismatch(foreign: Foreign, inside: Mapping[str, str], model: Model) -> None:
    missing = [name for name in model.shapes if name not in inside]
    extra = [name for name in inside if name not in model.shapes and name not in model.besides]
    shapes = [
        f"{name} is {foreign.weights.spec(inside[name]).shape} in the checkpoint and {shape} by config.json"
        for name, shape in model.shapes.items()
        if name in inside and foreign.weights.spec(inside[name]).shape != shape
    ]
    if missing or extra or shapes:
        said = _listed("missing", missing) + _listed("not of this model", extra) + _listed("other shapes", shapes)
        raise UserError(
            f"the tensors of the {foreign.what} do not fit {model.folder.url}/config.json:\n{said}"
            f"Name the model that it began with: --base MODEL."
        )


def _listed(title: str, items: Sequence[str]) -> str:
    if not items:
        return ""
    more = f"\n    … and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return f"  {title} ({len(items)}):\n    " + "\n    ".join(items[:SHOWN]) + more + "\n"


def _refuse_untied(reader: FragmentReader, inside: Mapping[str, str], model: Model) -> None:
    """A head that config.json ties to the embeddings, and that is another tensor here, would be lost."""
    parameters = dict(model.built.loss_model.causal_lm.named_parameters(remove_duplicate=False))
    names = {id(parameter): name for name, parameter in parameters.items() if name in model.shapes}
    for name in sorted(model.besides & inside.keys() & parameters.keys()):
        same = names[id(parameters[name])]
        if same in inside and not _equal(reader, inside[name], inside[same]):
            raise UserError(
                f"{name} and {same} are one tensor by config.json (tie_word_embeddings), and two in the checkpoint: "
                "--base names another model than the one that it is of."
            )


def _equal(reader: FragmentReader, one: str, other: str) -> bool:
    spec = reader.spec(one)
    if one == other or spec.shape != reader.spec(other).shape:
        return one == other
    width = math.prod(spec.shape[1:])
    ranges = [((start * width, stop * width),) for start, stop in row_ranges(spec)]
    # The other may be kept in fp32, of which this one is the rounded copy that the model computed with.
    dtype = torch_dtype(spec)
    return all(torch.equal(reader.read(one, part), reader.read(other, part).to(dtype)) for part in ranges)


def _aligned_moments(foreign: Foreign, prefix: str, model: Model) -> dict[str, Renamed]:
    """By the model's names. An optimizer's own dict may leave out what stands before the model's names in another."""
    if foreign.moments is None:
        return {}
    return {
        moment: Renamed(reader, dict(_moment_names(reader, prefix, model)))
        for moment, reader in foreign.moments.readers.items()
    }


def _moment_names(reader: FragmentReader, prefix: str, model: Model) -> Iterator[tuple[str, str]]:
    cleaned = _cleaned(reader.names())
    before = max(("", prefix), key=lambda prefix: _fitting(cleaned, prefix, model))
    for name in model.shapes:
        there = cleaned.get(before + name)
        if there is not None:
            if (found := reader.spec(there).shape) != model.shapes[name]:
                raise UserError(f"the optimizer's state of {name} is {found}, and the tensor {model.shapes[name]}.")
            yield name, there
