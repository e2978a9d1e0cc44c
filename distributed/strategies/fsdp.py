"""FSDP2: parameters, gradients and optimizer state sharded per block; `ddp` is the same on an (N, 1) mesh, hybrid
sharding on a mesh of (nodes, ranks of a node).

Gradients are summed over ranks (never averaged), because the loop divides by one global weight. The optimizer works on
plain local shards (`optimizers/base.py`): DTensor's dispatch would cost more than the update of a small model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from ...recipes.errors import UserError
from ...recipes.schema import Recipe
from ...recipes.schema_strategy import Fsdp
from ..buffers import Buffers
from ..checkpoint.fragments import Fragment, FragmentReader, TensorSpec
from ..initialise import fill_adapter, fill_buffers, fill_random_model
from ..model import DTYPES, SAFETENSORS_DTYPES, BuiltModel
from ..optimizers.base import Piece, Shard, ShardGroup
from ..optimizers.table import build_optimizer
from ..world import World


class FsdpEngine:
    """The `Engine` of FSDP2 (see `base.py` for the contract)."""

    def __init__(self, built: BuiltModel, recipe: Recipe, world: World) -> None:
        self._built, self._recipe, self._world = built, recipe, world
        self._device = torch.device(world.device)
        # Where shards lie and are updated.
        self._home = torch.device("cpu") if _is_offloaded(recipe) else self._device
        self._dtype = DTYPES[recipe.model.dtype]
        self._mesh = _mesh(recipe, world)
        self._replicas = world.size // self._mesh.shape[-1]
        self._sums_at_last = self._replicas > 1 and not _is_offloaded(recipe)
        self._sums_now = True
        self.module: nn.Module = _shard(built, recipe, self._mesh)
        self._materialise()
        self._buffers = Buffers(built, world.size)
        self._parameters: dict[str, nn.Parameter] = dict(self.module.named_parameters())
        self._shadows = {n: _shadow(p) for n, p in self._parameters.items() if p.requires_grad}
        self._optimizer = build_optimizer([self._shard_of(n) for n in self._shadows], recipe.train, self._shard_group())
        master = [] if self._dtype == torch.float32 else ["master"]
        self.parts = ("model", *master, *self._optimizer.parts)

    def _shard_of(self, name: str) -> Shard:
        start, stop = _local_range(self._parameters[name])
        return Shard(
            name, self._shadows[name], self._built.shapes[name], start, stop, is_table=name in self._built.tables
        )

    def _shard_group(self) -> ShardGroup:
        axis = self._mesh.ndim - 1
        return ShardGroup(self._mesh.shape[axis], self._mesh.get_local_rank(axis), self._mesh.get_group(axis))

    def _materialise(self) -> None:
        """Memory for this rank's shards, then the values that no file holds."""
        self.module.to_empty(device=self._home)
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

    def set_learning_rate(self, learning_rate: float) -> None:
        self._optimizer.set_learning_rate(learning_rate)

    def backward(self, loss_sum: Tensor, weight_total: float, *, last_micro_batch: bool) -> None:
        self._reduce_over_replicas(last_micro_batch)
        (loss_sum / weight_total).backward()  # type: ignore[no-untyped-call]

    def _reduce_over_replicas(self, now: bool) -> None:
        """With a step's last micro-batch only: until then each replica adds up its own. Within a replica FSDP2 reduces
        every micro-batch, because gradients that are not reduced are whole on every rank; and where shards are in the
        host's memory, over replicas too: what waits to be summed would stay on the device."""
        if self._sums_at_last and now != self._sums_now:
            for module in self._sharded_modules():
                module.set_requires_all_reduce(now, recurse=False)
            self._sums_now = now

    def _sharded_modules(self) -> Iterator[FSDPModule]:
        return (module for module in self.module.modules() if isinstance(module, FSDPModule))

    def _refuse_partial_sums(self) -> None:
        """What replicas have not summed with the last micro-batch would be missing now, and be added a step later."""
        if self._sums_at_last and any(map(_waits_to_be_summed, self._sharded_modules())):
            raise UserError(
                "strategy: a part of this model took part in some micro-batches of a step and not in its last one, so "
                "replicas do not sum its gradients. Take strategy: {type: fsdp}, which has no replicas."
            )

    def step(self) -> float:
        self._buffers.refuse_changes()
        self._refuse_partial_sums()
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
        for name, shadow in self._shadows.items():
            parameter = self._parameters[name]
            if parameter.grad is not None and shadow.numel():
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
        pieces = self._pieces(part)
        for name, published in self._built.published.items():
            if name not in pieces:
                continue
            shape, start, stop = pieces[name]
            values = self._values(part, name, empty=start == stop)
            dtype = self._dtype if part == "model" else values.dtype
            spec = TensorSpec(published, tuple(shape), SAFETENSORS_DTYPES[dtype])
            ranges = ((start, stop),) if stop > start else ()
            yield Fragment(spec, ranges, values.flatten(), replicas=self._replicas)
        if part == "model":
            yield from self._buffers.fragments()

    def _pieces(self, part: str) -> Mapping[str, Piece]:
        """What this rank holds of a part, by name in the module."""
        if part in self._optimizer.parts:
            return self._optimizer.pieces(part)
        names = self._built.published if part == "model" else self._shadows
        return {name: Piece(self._built.shapes[name], *_local_range(self._parameters[name])) for name in names}

    def _values(self, part: str, name: str, *, empty: bool) -> Tensor:
        """This rank's values of one tensor of a part, as they are: whoever stores them casts chunk by chunk."""
        if part in self._optimizer.parts:
            return torch.empty(0) if empty else self._optimizer.read(part, name)
        return _local(self._parameters[name]).detach()

    def load(self, part: str, reader: FragmentReader) -> None:
        for name, (_, start, stop) in self._pieces(part).items():
            stored = self._built.published[name]
            if part not in self._optimizer.parts:
                self._load_tensor(name, stored, reader)
            elif stop > start:
                self._optimizer.write(part, name, reader.read(stored, ((start, stop),)))
        if part == "model":
            self._buffers.load(reader)

    def load_base(self, reader: FragmentReader) -> None:
        for name, stored in self._built.starts():
            self._load_tensor(name, stored, reader)
        self._buffers.load_base(reader)

    def _load_tensor(self, name: str, stored: str, reader: FragmentReader) -> None:
        start, stop = _local_range(self._parameters[name])
        if stop == start:
            return
        target = _local(self._parameters[name])
        values = reader.read(stored, ((start, stop),))
        with torch.no_grad():
            target.copy_(values.view(target.shape))

    def optimizer_state(self) -> Mapping[str, Any]:
        return {"step": float(self._optimizer.steps)}

    def load_optimizer_state(self, state: Mapping[str, Any]) -> None:
        self._optimizer.steps = int(state["step"])


def prepare(built: BuiltModel, recipe: Recipe, world: World) -> FsdpEngine:
    """Lay a model out over all ranks; the process group must exist."""
    return FsdpEngine(built, recipe, world)


def _mesh(recipe: Recipe, world: World) -> DeviceMesh:
    """The last axis shards, one before it replicates."""
    kind = torch.device(world.device).type
    if recipe.strategy.type == "ddp":
        return init_device_mesh(kind, (world.size, 1), mesh_dim_names=("replicate", "shard"))
    if isinstance(recipe.strategy, Fsdp) and recipe.strategy.shard == "node":
        return DeviceMesh(kind, _ranks_by_node(world), mesh_dim_names=("replicate", "shard"))
    return init_device_mesh(kind, (world.size,), mesh_dim_names=("shard",))


def _ranks_by_node(world: World) -> list[list[int]]:
    """The ranks of each node. Raises UserError, on all ranks, where nodes run different numbers of them."""
    places: list[Any] = [world.node_rank] * world.size
    if world.size > 1:
        dist.all_gather_object(places, world.node_rank)
    nodes = [[rank for rank, place in enumerate(places) if place == node] for node in sorted(set(places))]
    counts = sorted({len(ranks) for ranks in nodes})
    if len(counts) > 1:
        raise UserError(
            f"strategy.shard: node needs the same number of ranks on every node; here it is {counts[0]} on some and "
            f"{counts[-1]} on others. Take shard: world, or nodes that are alike."
        )
    return nodes


def _is_offloaded(recipe: Recipe) -> bool:
    return isinstance(recipe.strategy, Fsdp) and recipe.strategy.offload == "cpu"


def _shard(built: BuiltModel, recipe: Recipe, mesh: DeviceMesh) -> nn.Module:
    """compile → shard blocks → shard the rest; activation checkpointing is already in the blocks.

    A single rank in fp32 has nothing to shard and nothing to cast: there FSDP2 would only copy every weight in both
    directions of each step.
    """
    dtype, is_offloaded = DTYPES[recipe.model.dtype], _is_offloaded(recipe)
    if mesh.size() == 1 and dtype == torch.float32 and not is_offloaded:
        for block in built.blocks() if recipe.train.compile else ():
            block.compile()
        return built.loss_model
    policy = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    offload = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if is_offloaded else OffloadPolicy()
    reshard = recipe.strategy.reshard_after_forward if isinstance(recipe.strategy, Fsdp) else False
    for block in built.blocks():
        if recipe.train.compile:
            block.compile()
        fully_shard(block, mesh=mesh, mp_policy=policy, offload_policy=offload, reshard_after_forward=reshard)
    root: nn.Module = built.loss_model
    fully_shard(root, mesh=mesh, mp_policy=policy, offload_policy=offload, reshard_after_forward=False)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # Without this gloo would be asked for a pre-multiplied sum, which it does not have.
            module.set_force_sum_reduction_for_comms(True)
    return root


def _waits_to_be_summed(module: FSDPModule) -> bool:
    """Whether gradients of a module's parameters are with its replica alone (FSDP2's inside, torch 2.11 to 2.13)."""
    state = module._get_fsdp_state()
    groups = state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
    return any(group is not None and group._partial_reduce_output is not None for group in groups)


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
