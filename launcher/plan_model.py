"""What a model is, from config.json and the headers of its weights: parameters, what is trained, and what a checkpoint
will hold. No weights are read."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from ..distributed import storage
from ..distributed.checkpoint.fragments import TensorSpec
from ..distributed.checkpoint.layout import FileSet, num_elements, open_folder, plan_files
from ..distributed.estimate.outline import Held, Outline, make_outline
from ..distributed.model_files import HUB_ID, find_model
from ..distributed.optimizers.state import STATE
from ..distributed.save_mode import ROOM
from ..recipes.errors import UserError
from ..recipes.schema import Lora, Model, Recipe
from ..recipes.schema_cluster import LocalCluster
from .hardware import Machine
from .unknown import Unknown, ask

DTYPE_NAMES = {"bfloat16": "BF16", "float32": "F32"}
EMBEDDINGS = re.compile(r"(embed|\bwte\b|\bwpe\b|position)", re.IGNORECASE)
HEADS = re.compile(r"(^|\.)(lm_head|embed_out|output|score)\.weight$")


@dataclass(frozen=True)
class ModelPlan:
    """Parameters counted from the headers. `stored` are the tensors that a checkpoint publishes, `trained` those with
    optimizer state; `outline` is what memory is estimated from, None where config.json names sizes otherwise."""

    model_type: str
    parameters: int
    trainable: int
    stored: tuple[TensorSpec, ...]
    trained: tuple[TensorSpec, ...]
    outline: Outline | None


@dataclass(frozen=True)
class PlannedFile:
    """A file of a checkpoint, relative to the checkpoint's folder."""

    name: str
    bytes: int


@dataclass(frozen=True)
class SavePlan:
    """Whether training waits for its checkpoints ("sync") or goes on beside them ("async"; "auto": the nodes' memory
    decides, which is not known here), and what the copies take on each node."""

    mode: str
    copy_bytes: int


def is_on_hub(path: str) -> bool:
    """Whether a model path can only be the name of a model on a hub."""
    return storage.is_local(path) and not storage.local_path(path).is_dir() and HUB_ID.match(path) is not None


def plan_model(recipe: Recipe) -> ModelPlan | Unknown:
    """The model a recipe trains. Raises UserError for a folder in reach that is no model."""
    path = recipe.model.path
    if is_on_hub(path):
        return Unknown(f"{path} is on a model hub, which plan does not ask")
    return ask(path, lambda: _look(recipe, path))


def _look(recipe: Recipe, path: str) -> ModelPlan | Unknown:
    folder = find_model(path, weights=False)
    config = folder.config
    if recipe.model.init == "random":
        return Unknown(f"the {config.get('model_type', '')} model is yet to be initialised from config.json")
    return from_headers(recipe, config, open_folder(folder.url))


def from_headers(recipe: Recipe, config: Mapping[str, Any], files: FileSet) -> ModelPlan:
    """Count a stored model. Raises UserError for patterns that match nothing."""
    base = [tensor.spec for _, tensor in files.places.values()]
    dtype = DTYPE_NAMES[recipe.model.dtype]
    whole = [TensorSpec(spec.name, spec.shape, dtype) for spec in base]
    if recipe.adapter is not None:
        stored = adapter_tensors(recipe.adapter, whole)
        trained: Sequence[TensorSpec] = stored
        parameters = sum(map(num_elements, [*whole, *stored]))
    else:
        stored, trained = whole, _chosen(whole, recipe.model)
        parameters = sum(map(num_elements, whole))
    return ModelPlan(
        model_type=str(config.get("model_type", "")),
        parameters=parameters,
        trainable=sum(map(num_elements, trained)),
        stored=tuple(stored),
        trained=tuple(trained),
        outline=make_outline(_held(recipe, whole, trained), config),
    )


def _held(recipe: Recipe, base: Sequence[TensorSpec], trained: Sequence[TensorSpec]) -> Iterator[Held]:
    """All tensors of the model at work: the base's, and an adapter's beside them."""
    names = {spec.name for spec in trained}
    for spec in [*base, *trained] if recipe.adapter is not None else base:
        is_table = bool(EMBEDDINGS.search(spec.name) or HEADS.search(spec.name))
        packed = _bytes_in_4_bits(spec) if _is_in_4_bits(recipe, spec) else 0
        yield Held(spec.name, spec.shape, spec.name in names, is_table, packed)


def _chosen(tensors: Sequence[TensorSpec], model: Model) -> list[TensorSpec]:
    if not model.train_layers:
        return list(tensors)
    for pattern in model.train_layers:
        if not any(fnmatchcase(spec.name, pattern) for spec in tensors):
            raise UserError(
                f"model.train_layers: {pattern!r} matches no parameter; the names look like "
                f"{', '.join(spec.name for spec in tensors[:3])}"
            )
    return [spec for spec in tensors if any(fnmatchcase(spec.name, pattern) for pattern in model.train_layers)]


def adapter_tensors(lora: Lora, base: Sequence[TensorSpec]) -> list[TensorSpec]:
    """The tensors that peft adds. Linear layers are told from the headers by their two dimensions and by not being
    an embedding or the head, which is right for dense models; a router may be counted besides."""
    targets = [spec for spec in base if _is_target(lora, spec)]
    if not targets:
        raise UserError(
            f"adapter.target_modules: {lora.target_modules} matches no layer; the names look like "
            f"{', '.join(spec.name for spec in base[:3])}"
        )
    tensors = []
    for spec in targets:
        name = f"base_model.model.{spec.name.removesuffix('.weight')}"
        rows, columns = spec.shape
        tensors.append(TensorSpec(f"{name}.lora_A.weight", (lora.stored_rank, columns), spec.dtype))
        tensors.append(TensorSpec(f"{name}.lora_B.weight", (rows, lora.stored_rank), spec.dtype))
        if lora.use_dora:
            tensors.append(TensorSpec(f"{name}.lora_magnitude_vector", (rows,), spec.dtype))
    saved = [spec for spec in base if set(spec.name.split(".")) & set(lora.modules_to_save)]
    return tensors + [TensorSpec(f"base_model.model.{spec.name}", spec.shape, spec.dtype) for spec in saved]


def _is_target(lora: Lora, spec: TensorSpec) -> bool:
    if len(spec.shape) != 2 or not spec.name.endswith(".weight"):
        return False
    module = spec.name.removesuffix(".weight")
    if lora.target_modules == "all-linear":
        return _is_linear(spec)
    if isinstance(lora.target_modules, tuple):
        return any(module == target or module.endswith(f".{target}") for target in lora.target_modules)
    return re.fullmatch(lora.target_modules, module) is not None


def _is_linear(spec: TensorSpec) -> bool:
    """A linear layer's weight that is not the head's."""
    is_weight = len(spec.shape) == 2 and spec.name.endswith(".weight")
    return is_weight and not EMBEDDINGS.search(spec.name) and not HEADS.search(spec.name)


def _is_in_4_bits(recipe: Recipe, spec: TensorSpec) -> bool:
    is_base = ".lora_" not in spec.name and not spec.name.startswith("base_model.")
    return recipe.adapter is not None and recipe.adapter.type == "qlora" and is_base and _is_linear(spec)


def _bytes_in_4_bits(spec: TensorSpec) -> int:
    """NF4: rows of blocks of 64 weights, each with a scale in fp32."""
    return int(spec.shape[0]) * -(-spec.shape[1] // 64) * 36


def plan_checkpoint(recipe: Recipe, model: ModelPlan) -> tuple[PlannedFile, ...]:
    """The weight files of one checkpoint; configuration and tokenizer come besides."""
    stem = "model" if recipe.adapter is None else "adapter_model"
    trained = {spec.name for spec in model.trained}
    frozen = [spec.name for spec in model.stored if spec.name not in trained]
    files = [PlannedFile(file.name, file.size) for file in plan_files(model.stored, stem=stem, frozen=frozen).files]
    master = [] if recipe.model.dtype == "float32" else ["master"]  # fp32 weights are their own master copy
    parts = {part: [TensorSpec(spec.name, spec.shape, "F32") for spec in model.trained] for part in master}
    for part, tensors in {**parts, **_optimizer_state(recipe, model)}.items():
        files += [PlannedFile(f"training/{file.name}", file.size) for file in plan_files(tensors, stem=part).files]
    return tuple(files)


def plan_saving(recipe: Recipe, files: Sequence[PlannedFile], nodes: int, machine: Machine) -> SavePlan:
    """How checkpoints are written: as a run decides it, by the memory of this machine where it is the node."""
    mode, total = recipe.checkpoint.mode, sum(file.bytes for file in files)
    if mode == "auto" and isinstance(recipe.cluster, LocalCluster):
        mode = "async" if total <= ROOM * machine.memory_bytes else "sync"
    return SavePlan(mode, 0 if mode == "sync" else -(-total // nodes))


def _optimizer_state(recipe: Recipe, model: ModelPlan) -> dict[str, list[TensorSpec]]:
    """The tensors of each part of the optimizer's state."""
    parts: dict[str, list[TensorSpec]] = {}
    for spec in model.trained:
        is_table = bool(EMBEDDINGS.search(spec.name) or HEADS.search(spec.name))
        for part, shape in STATE[recipe.train.optimizer](spec.shape, is_table).items():
            parts.setdefault(part, []).append(TensorSpec(spec.name, shape, "F32"))
    return parts
