"""Building the model: its structure without memory, what is trained, what each tensor is called when published.

Everything here works on the meta device. Strategies lay the result out over ranks; only then do values arrive, from
stored files or drawn by `initialise.py`, each rank filling just its part.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..recipes.errors import UserError
from ..recipes.schema import Recipe
from .adapter import adapt
from .loss_model import LossModel
from .persistent import persistent_buffers, set_dtypes
from .quantized import Packing, packings, quantize_base
from .stored_layout import AS_IT_IS, StoredLayout, layout_of

if TYPE_CHECKING:
    from .model_files import ModelFolder

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
SAFETENSORS_DTYPES = {torch.bfloat16: "BF16", torch.float32: "F32"}


@dataclass(frozen=True)
class BuiltModel:
    """A model on the meta device.

    `published` maps a parameter's name inside `loss_model` to its name in checkpoint files, in checkpoint order; with
    an adapter it holds the adapter's tensors only. `base` maps to names in the folder that the run starts from.
    `shapes` are those of whole parameters, which a strategy may hold flat; `tables` the names of embeddings and heads,
    which some optimizers treat otherwise; `packed` weights of the base that are held in 4 bits, by their stored names.
    Tied parameters appear once. `buffers` maps what the folder holds beside parameters to its names there
    (`buffers.py`). What files call a tensor of the base, or what pieces of it they hold, `layout` says.
    """

    loss_model: LossModel
    published: dict[str, str]
    base: dict[str, str]
    buffers: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    tables: frozenset[str]
    packed: dict[str, Packing]
    has_adapter: bool
    layout: StoredLayout = AS_IT_IS

    @property
    def config(self) -> Any:
        """transformers' configuration of the model."""
        return self.loss_model.causal_lm.config

    def new_tensors(self) -> Iterator[str]:
        """Names of parameters that no folder holds: an adapter's."""
        return (name for name in self.shapes if name not in self.base)

    def frozen(self) -> frozenset[str]:
        """Names, as `published`, of what is stored and not trained."""
        trained = {name for name, parameter in self.loss_model.named_parameters() if parameter.requires_grad}
        frozen = frozenset(published for name, published in self.published.items() if name not in trained)
        return frozen.union(self.published_buffers().values())

    def published_buffers(self) -> dict[str, str]:
        """As `published`: with an adapter those of modules that are trained whole, which peft wants beside their
        parameters; all others are its base's."""
        if not self.has_adapter:
            return self.buffers
        return {name: adapter_name(name) for name in self.buffers if is_copy(name)}

    def blocks(self) -> list[nn.Module]:
        """The layers that are compiled, sharded and recomputed each as one."""
        names = self.loss_model.causal_lm._no_split_modules or ()
        return [module for module in self.loss_model.modules() if type(module).__name__ in names]

    def starts(self) -> Iterator[tuple[str, str]]:
        """What the model's own folder fills: name in `loss_model`, stored name. Copies that are trained whole beside an
        adapter start from it too."""
        yield from self.base.items()
        for name in self.new_tensors():
            if (source := self.copied_from(name)) is not None:
                yield name, source

    def copied_from(self, name: str) -> str | None:
        """For a copy that is trained whole beside an adapter: the stored name of what it starts as."""
        return _original_name(name) if is_copy(name) else None


def build_model(recipe: Recipe, folder: ModelFolder) -> BuiltModel:
    """The recipe's model, frozen and adapted, without values. Raises UserError for what cannot be trained."""
    causal_lm = _structure(recipe, folder)
    layout = layout_of(causal_lm)
    model = causal_lm if recipe.adapter is None else adapt(causal_lm, recipe.adapter)
    if recipe.adapter is not None and recipe.adapter.type == "qlora":
        quantize_base(model, causal_lm, DTYPES[recipe.model.dtype])
    loss_model = LossModel(model, causal_lm)
    if recipe.model.train_layers:
        _train_only(loss_model, recipe.model.train_layers)
    _set_dtypes(loss_model, DTYPES[recipe.model.dtype])
    if recipe.train.activation_checkpointing:
        causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
    has_adapter = recipe.adapter is not None
    shapes = {name: tuple(parameter.shape) for name, parameter in loss_model.named_parameters()}
    base = {name: base_name(name) for name in shapes if not is_adapter_tensor(name)}
    published = {name: adapter_name(name) for name in shapes if is_adapter_tensor(name)} if has_adapter else base
    buffers = {name: _original_name(name) for name, _ in persistent_buffers(loss_model)}
    packed = {base[name]: packing for name, packing in packings(loss_model).items()}
    return BuiltModel(loss_model, published, base, buffers, shapes, _tables(loss_model), packed, has_adapter, layout)


def _tables(loss_model: LossModel) -> frozenset[str]:
    head = loss_model.causal_lm.get_output_embeddings()
    found = (module for module in loss_model.modules() if isinstance(module, nn.Embedding) or module is head)
    held = {id(parameter) for module in found for parameter in module.parameters()}
    named = loss_model.named_parameters()
    return frozenset(name for name, p in named if id(p) in held or ".lora_embedding_" in name)


def _structure(recipe: Recipe, folder: ModelFolder) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type = folder.config.get("model_type")
    _refuse_quantized(folder.config)
    # `probes.choose_attention` may find better than sdpa.
    attention = "sdpa" if recipe.model.attention == "auto" else recipe.model.attention
    try:
        config = AutoConfig.from_pretrained(folder.local_small_files)

        def make(dtype: torch.dtype) -> Any:
            with torch.device("meta"):
                own = copy.deepcopy(config)  # it is told the dtype
                return AutoModelForCausalLM.from_config(own, attn_implementation=attention, dtype=dtype)

        causal_lm = make(torch.float32)
        set_dtypes(causal_lm, DTYPES[recipe.model.dtype], make)
    except (ValueError, ImportError, KeyError) as error:
        if isinstance(error, ImportError) and attention == "flash_attention_2":
            raise UserError(f"model.attention: {error} It is in pip install flash-attn; auto needs none.") from error
        raise UserError(f"model.path: transformers cannot build model type {model_type!r}: {error}") from error
    causal_lm.tie_weights()
    causal_lm.config.use_cache = False
    return causal_lm


def _refuse_quantized(config: Mapping[str, Any]) -> None:
    """Stored numbers of a quantised model mean nothing without their scales, and some (FP8) have the right shapes."""
    quantization = config.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method", "of some kind") if isinstance(quantization, dict) else quantization
        raise UserError(
            f"model.path: the weights are quantised (quantization_config: {method}), and cannot be trained. Take the "
            "model in bfloat16."
        )


def _train_only(loss_model: LossModel, patterns: tuple[str, ...]) -> None:
    unused = set(patterns)
    for name, parameter in loss_model.named_parameters():
        hits = [pattern for pattern in patterns if fnmatchcase(base_name(name), pattern)]
        unused.difference_update(hits)
        parameter.requires_grad_(bool(hits))
    if unused:
        names = [base_name(name) for name, _ in loss_model.named_parameters()]
        raise UserError(
            f"model.train_layers: no parameter matches {', '.join(sorted(unused))}. Names look like "
            f"{', '.join(names[:: max(1, len(names) // 6)][:6])}."
        )


def _set_dtypes(loss_model: LossModel, dtype: torch.dtype) -> None:
    """Trainable masters in fp32; frozen weights in the published dtype, since nothing will be added to them."""
    for module in loss_model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and not parameter.requires_grad and parameter.dtype != dtype:
                module._parameters[name] = nn.Parameter(parameter.detach().to(dtype), requires_grad=False)
    loss_model.causal_lm.tie_weights()


def is_adapter_tensor(name: str) -> bool:
    """Whether a parameter of peft's wrapper belongs to the adapter."""
    return ".lora_" in name or is_copy(name)


def is_copy(name: str) -> bool:
    """Whether a parameter belongs to a module that is trained whole beside the adapter."""
    return ".modules_to_save." in name


def base_name(name: str) -> str:
    """A parameter's name in the model's own files: without our and peft's wrappers."""
    for wrapper in ("model.base_model.model.", "model."):
        if name.startswith(wrapper):
            name = name.removeprefix(wrapper)
            break
    while ".base_layer." in name:  # one within the other, where several tensors of a module have adapters
        name = name.replace(".base_layer.", ".")
    return name.replace(".original_module.", ".")


def _original_name(name: str) -> str:
    """The same, of a copy that is trained whole beside an adapter that of what it starts as."""
    return base_name(name.replace(".modules_to_save.default.", ".original_module."))


def adapter_name(name: str) -> str:
    """A parameter's name in peft's files: without our wrapper and without the adapter's own name."""
    name = name.replace(".lora_magnitude_vector.default.weight", ".lora_magnitude_vector")
    name = name.removesuffix(".default")  # of an embedding, whose matrices are parameters and no modules
    return name.removeprefix("model.").replace(".modules_to_save.default.", ".").replace(".default.", ".")
