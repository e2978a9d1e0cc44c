"""FSDP2: parameters, gradients and optimizer state sharded per block; `ddp` is the same on an (N, 1) mesh.

Gradients are summed over ranks (never averaged), because the loop divides by one global weight. The optimizer works on
plain local shards: AdamW is elementwise, and DTensor's dispatch would cost more than the update of a small model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from ...recipes.schema import Fsdp, Recipe
from ..checkpoint.fragments import Fragment, FragmentReader, TensorSpec
from ..initialise import fill_adapter, fill_buffers, fill_random_model
from ..model import DTYPES, BuiltModel
from ..world import World
from .optimizer import adamw_groups

SAFETENSORS_DTYPES = {torch.bfloat16: "BF16", torch.float32: "F32"}

MOMENTS = ("exp_avg", "exp_avg_sq")


class FsdpEngine:
    """The `Engine` of FSDP2 (see `base.py` for the contract)."""

    def __init__(self, built: BuiltModel, recipe: Recipe, world: World) -> None:
        self._built, self._recipe, self._world = built, recipe, world
        self._device = torch.device(world.device)
        self._dtype = DTYPES[recipe.model.dtype]
        self._mesh = _mesh(recipe, world)
        self._replicas = world.size // self._mesh.shape[-1]
        self.module: nn.Module = _shard(built, recipe, self._mesh)
        self._materialise()
        self._parameters: dict[str, nn.Parameter] = dict(self.module.named_parameters())
        self._shadows = {n: _shadow(p) for n, p in self._parameters.items() if p.requires_grad}
        self._trainable = {n: p for n, p in self._shadows.items() if p.numel()}
        self._optimizer = torch.optim.AdamW(
            adamw_groups(self._trainable, {n: p.ndim for n, p in self._parameters.items()}, recipe.train),
            lr=recipe.train.learning_rate,
            betas=recipe.train.betas,
            eps=recipe.train.eps,
            fused=True,
        )
        self._create_moments()
        master = [] if self._dtype == torch.float32 else ["master"]
        self.parts = ("model", *master, *MOMENTS)

    def _materialise(self) -> None:
        """Memory for this rank's shards, then the values that no file holds."""
        self.module.to_empty(device=self._device)
        built, seed = self._built, self._recipe.train.seed
        if not isinstance(self.module, FSDPModule):
            built.loss_model.causal_lm.tie_weights()  # plain parameters have been replaced one by one
        fill_buffers(built.loss_model, self._device)
        if self._recipe.model.init == "random":
            fill_random_model(built.loss_model, seed, self._fill)
        fill_adapter(built.loss_model, built.new_tensors(), seed, self._fill)

    def _fill(self, parameter: nn.Parameter, whole: Tensor) -> None:
        start, stop = _local_range(parameter)
        local = _local(parameter)
        with torch.no_grad():
            local.copy_(whole.flatten()[start:stop].view(local.shape))

    def _create_moments(self) -> None:
        # Eagerly, so that a checkpoint before the first step looks like every other one.
        for shadow in self._trainable.values():
            self._optimizer.state[shadow] = {
                "step": torch.zeros((), dtype=torch.float32, device=self._device),
                "exp_avg": torch.zeros_like(shadow),
                "exp_avg_sq": torch.zeros_like(shadow),
            }

    def set_learning_rate(self, learning_rate: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate

    def backward(self, loss_sum: Tensor, weight_total: float, *, last_micro_batch: bool) -> None:
        # FSDP2 reduces every micro-batch: accumulating unreduced gradients would keep a full copy on every rank.
        (loss_sum / weight_total).backward()  # type: ignore[no-untyped-call]

    def step(self) -> float:
        shadows = list(self._bind_gradients())
        norm = self._gradient_norm([shadow.grad for shadow in shadows if shadow.grad is not None])
        if torch.isfinite(norm):
            self._clip(shadows, norm)
            self._optimizer.step()
        for shadow in shadows:
            shadow.grad = None
        for parameter in self._parameters.values():
            parameter.grad = None
        return float(norm)

    def _bind_gradients(self) -> Iterator[nn.Parameter]:
        """Point the optimizer's parameters at the shards as they lie now: FSDP2 may re-pad a shard's storage."""
        for name, shadow in self._trainable.items():
            parameter = self._parameters[name]
            if parameter.grad is not None:
                shadow.data = _local(parameter)
                shadow.grad = _local(parameter.grad)
                yield shadow

    def _gradient_norm(self, gradients: list[Tensor]) -> Tensor:
        norm = nn.utils.get_total_norm(gradients) if gradients else torch.zeros(())
        squared = norm.to(self._device, torch.float32).square()
        if self._mesh.shape[-1] > 1:
            dist.all_reduce(squared, group=self._mesh.get_group(self._mesh.ndim - 1))
        return squared.sqrt()

    def _clip(self, shadows: list[nn.Parameter], norm: Tensor) -> None:
        limit = self._recipe.train.max_grad_norm
        if limit is not None:
            nn.utils.clip_grads_with_norm_(shadows, limit, norm)

    def fragments(self, part: str) -> Iterator[Fragment]:
        for name, published in self._stored(part):
            parameter = self._parameters[name]
            values = self._values(part, name)
            start, stop = _local_range(parameter)
            dtype = self._dtype if part == "model" else values.dtype
            spec = TensorSpec(published, tuple(parameter.shape), SAFETENSORS_DTYPES[dtype])
            ranges = ((start, stop),) if stop > start else ()
            yield Fragment(spec, ranges, values.flatten(), replicas=self._replicas)

    def _stored(self, part: str) -> Iterator[tuple[str, str]]:
        """(name in the module, name in files) of the tensors of a part."""
        for name, published in self._built.published.items():
            if part == "model" or name in self._shadows:
                yield name, published

    def _values(self, part: str, name: str) -> Tensor:
        """This rank's values of one tensor of a part, as they are: whoever stores them casts chunk by chunk."""
        if part in MOMENTS:
            shadow = self._shadows[name]
            return self._optimizer.state[shadow][part] if shadow.numel() else shadow.detach()
        return _local(self._parameters[name]).detach()

    def load(self, part: str, reader: FragmentReader) -> None:
        for name, published in self._stored(part):
            self._load_tensor(part, name, published, reader)

    def load_base(self, reader: FragmentReader) -> None:
        """Fill the base model's tensors from a model folder; copies that are trained whole start from it too."""
        for name, stored in self._built.base.items():
            self._load_tensor("model", name, stored, reader)
        for name in self._built.new_tensors():
            if (source := self._built.copied_from(name)) is not None:
                self._load_tensor("model", name, source, reader)

    def _load_tensor(self, part: str, name: str, stored: str, reader: FragmentReader) -> None:
        start, stop = _local_range(self._parameters[name])
        if stop == start:
            return
        target = self._optimizer.state[self._shadows[name]][part] if part in MOMENTS else _local(self._parameters[name])
        values = reader.read(stored, ((start, stop),))
        with torch.no_grad():
            target.copy_(values.view(target.shape))

    def optimizer_state(self) -> Mapping[str, Any]:
        steps = [float(state["step"]) for state in self._optimizer.state.values()]
        return {"step": max(steps, default=0.0)}

    def load_optimizer_state(self, state: Mapping[str, Any]) -> None:
        for values in self._optimizer.state.values():
            values["step"].fill_(state["step"])


def prepare(built: BuiltModel, recipe: Recipe, world: World) -> FsdpEngine:
    """Lay a model out over all ranks; the process group must exist."""
    return FsdpEngine(built, recipe, world)


def _mesh(recipe: Recipe, world: World) -> DeviceMesh:
    kind = torch.device(world.device).type
    if recipe.strategy.type == "ddp":
        return init_device_mesh(kind, (world.size, 1), mesh_dim_names=("replicate", "shard"))
    return init_device_mesh(kind, (world.size,), mesh_dim_names=("shard",))


def _shard(built: BuiltModel, recipe: Recipe, mesh: DeviceMesh) -> nn.Module:
    """compile → shard blocks → shard the rest; activation checkpointing is already in the blocks.

    A single rank in fp32 has nothing to shard and nothing to cast: there FSDP2 would only copy every weight in both
    directions of each step.
    """
    dtype = DTYPES[recipe.model.dtype]
    if mesh.size() == 1 and dtype == torch.float32:
        for block in _blocks(built) if recipe.train.compile else ():
            block.compile()
        return built.loss_model
    policy = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    reshard = recipe.strategy.reshard_after_forward if isinstance(recipe.strategy, Fsdp) else False
    for block in _blocks(built):
        if recipe.train.compile:
            block.compile()
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    root: nn.Module = built.loss_model
    fully_shard(root, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # Without this gloo would be asked for a pre-multiplied sum, which it does not have.
            module.set_force_sum_reduction_for_comms(True)
    return root


def _blocks(built: BuiltModel) -> list[nn.Module]:
    names = built.loss_model.causal_lm._no_split_modules or ()
    return [module for module in built.loss_model.modules() if type(module).__name__ in names]


def _local(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def _local_range(parameter: Tensor) -> tuple[int, int]:
    """Where this rank's shard lies in the flattened tensor; dimension 0 is the sharded one, so it is contiguous."""
    if not isinstance(parameter, DTensor):
        return 0, parameter.numel()
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    row = parameter.shape[1:].numel()
    return offset[0] * row, (offset[0] + shape[0]) * row


def _shadow(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(_local(parameter).detach())
