"""Adapting a model through peft: which layers, which variant, what is trained of them.

An adapter that starts within the weights (PiSSA, OLoRA) is usually trained on a base from which its start was taken
away. Here the base stays as it is, and the start is subtracted beside it: A holds [A, A0] and B holds [B, -B0], where
only the first halves are trained. That is the same function of A and B with the same gradients, no rank changes a
weight, and the model at work is what everybody opens later: the base as it was with a plain adapter of twice the rank
(peft's own conversion of such adapters, `subtract_mutated_init`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..recipes.errors import UserError
from ..recipes.schema import Lora

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

NAME = "default"
"""What peft calls the adapter."""


class HalfTrained(nn.Linear):
    """A linear layer without bias of which one half is trained: of `weight` [out, in] the first of two halves along
    `dim`. Frozen in the graph rather than by masking gradients, so that every strategy leaves the other half alone."""

    def __init__(self, weight: nn.Parameter, dim: int) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.weight = weight
        self._dim = dim

    def forward(self, input: Tensor) -> Tensor:
        trained, start = self.weight.chunk(2, self._dim)
        return F.linear(input, torch.cat([trained, start.detach()], self._dim))


def adapt(causal_lm: Any, adapter: Lora) -> Any:
    """peft's model around `causal_lm`, on the meta device too. Raises UserError for what cannot be adapted."""
    from peft import get_peft_model

    head = causal_lm.get_output_embeddings()
    try:
        adapted = get_peft_model(causal_lm, _config(adapter), autocast_adapter_dtype=False)
    except ValueError as error:
        raise UserError(f"adapter: {error}{_of_experts(causal_lm, _named(adapter))}") from error
    if causal_lm.config.get_text_config().tie_word_embeddings and causal_lm.get_output_embeddings() is not head:
        raise UserError(
            "adapter: this model's head is its embeddings (tie_word_embeddings), so it cannot be adapted or trained by "
            "itself. Leave the head out of adapter.modules_to_save and adapter.target_modules."
        )
    _refuse_unused(adapted, adapter)
    if adapter.starts_within or adapter.use_dora:
        _refuse_layers(adapted, adapter)
    if adapter.starts_within:
        _train_half(adapted)
    return adapted


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """Name and layer of everything that is adapted, in the model's order."""
    from peft.tuners.lora import LoraLayer

    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer))


def is_inside_adapter(name: str) -> bool:
    """Whether a module of peft's model belongs to the adapter, copies that are trained whole included."""
    return ".lora_" in name or ".modules_to_save." in name or ".original_module" in name


def _config(adapter: Lora) -> Any:
    from peft import LoraConfig

    targets = adapter.target_modules
    alpha = _alpha(adapter)
    return LoraConfig(
        r=adapter.stored_rank,
        # peft types alpha as int; the ratio is what counts and floats work.
        lora_alpha=int(alpha) if float(alpha).is_integer() else alpha,
        lora_dropout=adapter.dropout,
        use_rslora=adapter.use_rslora,
        use_dora=adapter.use_dora,
        target_modules=targets if isinstance(targets, str) else list(targets),
        modules_to_save=list(adapter.modules_to_save) or None,
        task_type="CAUSAL_LM",
    )


def _alpha(adapter: Lora) -> float:
    """What gives the recipe's scale at the rank that is stored."""
    ratio = adapter.stored_rank / adapter.rank
    return adapter.alpha * (math.sqrt(ratio) if adapter.use_rslora else ratio)


def _refuse_unused(adapted: Any, adapter: Lora) -> None:
    """peft is content when one of several names fits. Raises UserError for a name that fits no module."""
    modules = [name.removeprefix("base_model.model.") for name, _ in lora_layers(adapted)]
    saved = [name.partition(".modules_to_save.")[0] for name, _ in adapted.named_parameters() if _is_saved(name)]
    for key, names, found in (
        ("target_modules", _named(adapter), modules),
        ("modules_to_save", adapter.modules_to_save, saved),
    ):
        unused = [name for name in names if not any(f".{module}".endswith(f".{name}") for module in found)]
        if unused:
            raise UserError(
                f"adapter.{key}: no module is called {', '.join(unused)}. Names look like {', '.join(_some(adapted))}."
                f"{_of_experts(adapted, unused)}"
            )


def _named(adapter: Lora) -> Sequence[str]:
    """The modules to adapt, where they are named one by one and not by a pattern."""
    return adapter.target_modules if isinstance(adapter.target_modules, tuple) else ()


def _of_experts(model: nn.Module, names: Sequence[str]) -> str:
    """What to say of names of tensors, not of modules: one holds the weights of all experts of a layer."""
    tensors = [name for name, tensor in model.named_parameters() if tensor.ndim == 3 and not name.endswith(".weight")]
    stacked = [name for name in names if any(tensor.endswith(f".{name}") for tensor in tensors)]
    if not stacked:
        return ""
    return (
        f" In this model {', '.join(stacked)} holds the weights of all experts of a layer, which adapters do not reach "
        "here: leave it out, or train the model in full."
    )


def _is_saved(name: str) -> bool:
    return ".modules_to_save." in name


def _some(adapted: Any) -> list[str]:
    """Last parts of the names of modules that have weights of their own."""
    names = {
        name.replace(".base_layer", "") for name, module in adapted.named_modules() if "weight" in module._parameters
    }
    ours = ("lora_", "modules_to_save", "original_module")
    return sorted({name.rpartition(".")[2] for name in names if not any(part in name for part in ours)})


def _refuse_layers(adapted: Any, adapter: Lora) -> None:
    """DoRA, and starts within the weights, are made for matrices. Raises UserError."""
    how = "use_dora: true" if adapter.use_dora else f"init: {adapter.init}"
    for name, layer in lora_layers(adapted):
        module = name.removeprefix("base_model.model.")
        if NAME not in layer.lora_A:
            raise UserError(
                f"adapter.target_modules: {module} is an embedding, which {how} cannot adapt. Leave it out."
            )
        most = min(layer.in_features, layer.out_features)
        if adapter.starts_within and adapter.rank > most:
            raise UserError(
                f"adapter.rank: {module} has {most} singular vectors, so init: {adapter.init} cannot start from "
                f"{adapter.rank}. Lower the rank, leave that module out of target_modules, or take init: kaiming."
            )


def _train_half(adapted: nn.Module) -> None:
    for _, layer in lora_layers(adapted):
        layer.lora_A[NAME] = HalfTrained(layer.lora_A[NAME].weight, dim=0)
        layer.lora_B[NAME] = HalfTrained(layer.lora_B[NAME].weight, dim=1)
