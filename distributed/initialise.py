"""Values for tensors that no file holds: random models, adapters, buffers.

A tensor is drawn whole, on the CPU, one at a time, from a generator keyed by (seed, tensor name); each rank keeps
its part. So the same recipe starts from the same model at every world size and under every strategy; drawing on
the sharded tensors would give another model for each.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..recipes.errors import UserError
from .loss_model import LossModel
from .model import base_name
from .persistent import persistent_buffers

Fill = Callable[[nn.Parameter, Tensor], None]
"""Copies this rank's part of a whole tensor (on the CPU) into a parameter."""

Tensors = Mapping[str, Tensor | None]


def keyed_seed(*key: object) -> int:
    """A 63-bit seed from any printable key; stable across machines and versions."""
    digest = hashlib.blake2b("\0".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@contextmanager
def drawn_from(seed: int) -> Iterator[None]:
    """Draw from a CPU generator with this seed; the generator outside is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # see `seed_dropout` for what `torch.manual_seed` costs
        yield


def fill_buffers(loss_model: LossModel, device: torch.device) -> None:
    """Compute the buffers that no checkpoint stores (rotary frequencies), which meta tensors have lost. Those that are
    stored get what the model's own initialisation makes of them, until they are loaded (`buffers.py`).

    Raises UserError for one that no file has and that the model's own initialisation does not set: guessing would train
    another model.
    """
    for module in loss_model.causal_lm.modules():
        if not module._buffers:
            continue
        whole, again = _drawn_twice(loss_model, module)
        _refuse(module, _unset(whole._buffers, again._buffers) & module._non_persistent_buffers_set)
        for name, buffer in whole._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)


def unset_buffers(loss_model: LossModel) -> list[str]:
    """Names of persistent buffers that the model's own initialisation leaves out."""
    return [name for name, place in persistent_buffers(loss_model) if _is_unset(loss_model, *place)]


def _is_unset(loss_model: LossModel, owner: nn.Module, key: str) -> bool:
    whole, again = _drawn_twice(loss_model, owner)
    return key in _unset(whole._buffers, again._buffers)


def fill_random_model(loss_model: LossModel, seed: int, fill: Fill) -> None:
    """Draw every parameter as the model's own initialisation has it. Raises UserError for one that it leaves out, and
    for such a buffer that checkpoints store."""
    for _, place in persistent_buffers(loss_model):
        _refuse(place.owner, {place.key} if _is_unset(loss_model, *place) else ())
    tied: set[int] = set()
    for prefix, module in loss_model.named_modules():
        own = {name: p for name, p in module._parameters.items() if p is not None and id(p) not in tied}
        if not own:
            continue
        key = keyed_seed(seed, base_name(f"{prefix}."))
        whole, again = _drawn_twice(loss_model, module, key)
        _refuse(module, _unset(whole._parameters, again._parameters))
        for name, parameter in own.items():
            tied.add(id(parameter))
            fill(parameter, whole._parameters[name])  # type: ignore[arg-type]


def _drawn_twice(loss_model: LossModel, module: nn.Module, seed: int = 0) -> tuple[nn.Module, nn.Module]:
    """Over two different memories. A marker like NaN would not do for whole numbers and booleans."""
    return _drawn_module(loss_model, module, seed), _drawn_module(loss_model, module, seed, unset=1)


def _unset(tensors: Tensors, again: Tensors) -> set[str]:
    """What did not come out the same over two different memories."""
    pairs = ((name, tensor, again[name]) for name, tensor in tensors.items())
    return {name for name, one, other in pairs if one is not None and other is not None and not torch.equal(one, other)}


def _refuse(module: nn.Module, unset: Collection[str]) -> None:
    for name in unset:
        raise UserError(
            f"model.path: {type(module).__name__}.{name} cannot be rebuilt; this model type is not supported."
        )


def fill_adapter(loss_model: LossModel, names: Iterator[str], seed: int, fill: Fill) -> None:
    """Draw an adapter. Modules that are trained whole start as copies and are filled with the base model's values
    elsewhere, as is what starts from weights (`adapter_start.py`)."""
    parameters = dict(loss_model.named_parameters())
    for name in names:
        if ".lora_" in name:
            fill(parameters[name], drawn_adapter(name, tuple(parameters[name].shape), seed))


def drawn_adapter(name: str, shape: tuple[int, ...], seed: int, init: str = "kaiming") -> Tensor:
    """LoRA's start (Hu et al. 2021, section 4.1; peft's defaults): A uniform as `nn.Linear` draws it, or normal with a
    spread of 1 / rank (`gaussian`), B zero."""
    whole = torch.zeros(shape)
    with drawn_from(keyed_seed(seed, name)):
        # An embedding's A starts at zero and its B is normal: the product has to start at zero either way.
        if "lora_A" in name and init == "gaussian":
            nn.init.normal_(whole, std=1 / shape[0])
        elif "lora_A" in name:
            nn.init.kaiming_uniform_(whole, a=math.sqrt(5))
        elif "lora_embedding_B" in name:
            nn.init.normal_(whole)
    return whole


def _drawn_module(loss_model: LossModel, module: nn.Module, seed: int, unset: int = 0) -> nn.Module:
    """A CPU twin of one module (without its children's parameters), initialised by the model's own rules; its
    tensors hold `unset` before that."""
    twin = object.__new__(type(module))  # `copy.copy` would call the constructor of what FSDP2 has wrapped
    twin.__dict__.update(module.__dict__)
    twin._parameters = {
        name: None if p is None else nn.Parameter(torch.full(p.shape, float(unset)))
        for name, p in module._parameters.items()
    }
    twin._buffers = {
        name: None if b is None else torch.full(b.shape, unset, dtype=b.dtype) for name, b in module._buffers.items()
    }
    with drawn_from(seed), torch.no_grad():
        loss_model.causal_lm._init_weights(twin)
    return twin
