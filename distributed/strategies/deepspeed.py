"""DeepSpeed ZeRO-1, 2 and 3: optimizer state, gradients and parameters sharded, optionally kept in the host's memory.

Gradients are summed over ranks, as under FSDP2, and never averaged: in bfloat16 a loss that is multiplied by three, to
undo a division by three, rounds otherwise in every layer. The optimizer is torch's AdamW on DeepSpeed's flat fp32
partitions, and the model enters without values: each rank fills just what it holds.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...recipes.deepspeed_config import passed_on
from ...recipes.schema import Recipe, Train
from ...recipes.schema_strategy import Deepspeed
from ..buffers import Buffers
from ..checkpoint.fragments import Fragment, FragmentReader, TensorSpec
from ..initialise import fill_adapter, fill_buffers, fill_random_model
from ..model import DTYPES, SAFETENSORS_DTYPES, BuiltModel
from ..optimizers.adamw import MOMENTS, adamw_groups
from ..world import World
from . import deepspeed_compat as compat

BUCKET_ELEMENTS = 500_000_000
"""DeepSpeed's own default for gradients that are sent together: a buffer of 2 GB. An adapter's are far fewer."""


class DeepspeedEngine:
    """The `Engine` of DeepSpeed ZeRO (see `base.py` for the contract)."""

    def __init__(self, built: BuiltModel, recipe: Recipe, world: World) -> None:
        self._built, self._recipe, self._world = built, recipe, world
        self._strategy = _strategy(recipe)
        self._dtype = DTYPES[recipe.model.dtype]
        self._deepspeed = compat.attach(world)
        config = engine_config(recipe, sum(p.numel() for p in built.loss_model.parameters() if p.requires_grad))
        template = copy.deepcopy(built.loss_model)  # on the meta device: names and whole shapes
        self._materialise(config)
        self._parameters = dict(built.loss_model.named_parameters())
        self._adamw = self._optimizer(template)
        for block in built.blocks() if recipe.train.compile else ():
            block.compile()
        with compat.quiet():
            self._engine: Any = self._deepspeed.initialize(
                model=built.loss_model, optimizer=self._adamw, config=config, dist_init_required=False
            )[0]
        compat.follow_mode(self._engine)
        self._buffers = Buffers(built, world.size)
        layout = compat.Shards if self._strategy.stage == 3 else compat.Partitions
        self.module: nn.Module = self._engine
        self._layout = layout(self._engine.optimizer, self._adamw)
        if self._strategy.stage == 3:
            self._gather_head()
        self._is_stale = True
        self.module.register_forward_pre_hook(self._publish)
        self._draw(template)
        master = [] if self._dtype == torch.float32 else ["master"]
        self.parts = ("model", *master, *MOMENTS)

    def _materialise(self, config: dict[str, Any]) -> None:
        """Memory for what this rank holds, one parameter at a time: under ZeRO-3 no rank has more than one whole."""
        loss_model, device = self._built.loss_model, torch.device(self._world.device)
        fill_buffers(loss_model, device)
        shard = compat.shard_as_made(self._deepspeed, config, self._dtype) if self._strategy.stage == 3 else None
        made: dict[nn.Parameter, nn.Parameter] = {}  # tied parameters stay one
        for module in loss_model.modules():
            for name, parameter in module._parameters.items():
                if parameter is None:
                    continue
                if parameter not in made:
                    memory = torch.empty(parameter.shape, dtype=self._dtype, device=device)
                    made[parameter] = nn.Parameter(memory, requires_grad=parameter.requires_grad)
                    if shard:
                        shard(made[parameter])
                module._parameters[name] = made[parameter]

    def _optimizer(self, template: nn.Module) -> torch.optim.Optimizer:
        train = self._recipe.train
        trained = {name: parameter for name, parameter in self._parameters.items() if parameter.requires_grad}
        dimensions = {name: parameter.ndim for name, parameter in template.named_parameters()}
        return torch.optim.AdamW(
            adamw_groups(trained, dimensions, train),
            lr=train.learning_rate,
            betas=train.betas,
            eps=train.eps,
            fused=True,
        )

    def _gather_head(self) -> None:
        loss_model = self._built.loss_model
        head = loss_model.causal_lm.get_output_embeddings()
        loss_model.gathers_head(compat.gather_head(self._deepspeed, loss_model, head))

    def _draw(self, template: Any) -> None:
        """The values that no file holds."""
        names = {parameter: name for name, parameter in template.named_parameters()}
        seed = self._recipe.train.seed

        def fill(parameter: nn.Parameter, whole: Tensor) -> None:
            mine = self._parameters[names[parameter]]
            start, stop = self._layout.range_of(mine)
            self._write(mine, whole.flatten()[start:stop])

        if self._recipe.model.init == "random":
            fill_random_model(template, seed, fill)
        fill_adapter(template, self._built.new_tensors(), seed, fill)

    def _write(self, parameter: nn.Parameter, values: Tensor, moment: str | None = None) -> None:
        """Put this rank's elements of a tensor where they are kept."""
        if not parameter.requires_grad:
            self._layout.frozen(parameter).copy_(values)
        elif len(values):
            self._layout.master(parameter, moment).copy_(values)
            self._is_stale = True

    def _publish(self, module: nn.Module, inputs: object) -> None:
        """Before the first forward pass after a load, and not in the load: it takes all ranks, and one that cannot read
        its part must not leave the others waiting."""
        if self._is_stale:
            self._layout.publish()
            self._is_stale = False

    def set_learning_rate(self, learning_rate: float) -> None:
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate

    def backward(self, loss_sum: Tensor, weight_total: float, *, last_micro_batch: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last_micro_batch)
        self._engine.backward(loss_sum / weight_total, scale_wrt_gas=False)

    def step(self) -> float:
        # A norm that is not finite is DeepSpeed's "overflow": the update is left out, and the norm says infinity.
        self._buffers.refuse_changes()
        self._engine.step()
        norm = float(self._engine.get_global_grad_norm())
        if not math.isfinite(norm):
            compat.forget_gradients(self._engine.optimizer)
        return norm

    def fragments(self, part: str) -> Iterator[Fragment]:
        for name, published in self._stored(part):
            parameter = self._parameters[name]
            values = self._values(part, parameter)
            start, stop = self._layout.range_of(parameter)
            dtype = self._dtype if part == "model" else values.dtype
            spec = TensorSpec(published, self._built.shapes[name], SAFETENSORS_DTYPES[dtype])
            ranges = ((start, stop),) if stop > start else ()
            is_whole = self._layout.frozen_is_whole and not parameter.requires_grad
            yield Fragment(spec, ranges, values, replicas=self._world.size if is_whole else 1)
        if part == "model":
            yield from self._buffers.fragments()

    def _stored(self, part: str) -> Iterator[tuple[str, str]]:
        """(name in the module, name in files) of the tensors of a part."""
        for name, published in self._built.published.items():
            if part == "model" or self._parameters[name].requires_grad:
                yield name, published

    def _values(self, part: str, parameter: nn.Parameter) -> Tensor:
        """This rank's values of one tensor of a part, as they are: whoever stores them casts chunk by chunk."""
        if not parameter.requires_grad:
            return self._layout.frozen(parameter)
        return self._layout.master(parameter, part if part in MOMENTS else None)

    def load(self, part: str, reader: FragmentReader) -> None:
        for name, published in self._stored(part):
            self._load_tensor(part, name, published, reader)
        if part == "model":
            self._buffers.load(reader)

    def load_base(self, reader: FragmentReader) -> None:
        for name, stored in self._built.starts():
            self._load_tensor("model", name, stored, reader)
        self._buffers.load_base(reader)

    def _load_tensor(self, part: str, name: str, stored: str, reader: FragmentReader) -> None:
        parameter = self._parameters[name]
        start, stop = self._layout.range_of(parameter)
        if stop > start:
            self._write(parameter, reader.read(stored, ((start, stop),)), part if part in MOMENTS else None)

    def optimizer_state(self) -> Mapping[str, Any]:
        steps = [float(state["step"]) for state in self._adamw.state.values()]
        return {"step": max(steps, default=0.0)}

    def load_optimizer_state(self, state: Mapping[str, Any]) -> None:
        for values in self._adamw.state.values():
            values["step"].fill_(state["step"])


def prepare(built: BuiltModel, recipe: Recipe, world: World) -> DeepspeedEngine:
    """Lay a model out over all ranks; the process group must exist."""
    return DeepspeedEngine(built, recipe, world)


def _strategy(recipe: Recipe) -> Deepspeed:
    assert isinstance(recipe.strategy, Deepspeed)
    return recipe.strategy


def engine_config(recipe: Recipe, trained: int) -> dict[str, Any]:
    """DeepSpeed's configuration: what the recipe says, and what it passes on. `trained`: elements that are trained."""
    strategy = _strategy(recipe)
    buckets = {"zero_optimization": {"reduce_bucket_size": min(BUCKET_ELEMENTS, trained)}}
    return _merged(_merged(buckets, passed_on(strategy)), _as_said(strategy, recipe.train, recipe.model.dtype))


def _merged(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    both = {
        key: _merged(lower[key], value) if isinstance(lower.get(key), dict) and isinstance(value, dict) else value
        for key, value in upper.items()
    }
    return {**lower, **both}


def _as_said(strategy: Deepspeed, train: Train, dtype: str) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        # Where a step ends is said with each micro-batch.
        "gradient_accumulation_steps": 1,
        "gradient_clipping": train.max_grad_norm or 0.0,
        "bf16": {"enabled": dtype == "bfloat16", "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        # Stage 3 refuses it, and is told in deepspeed_compat.py.
        "gradient_allreduce_op": "mean" if strategy.stage == 3 else "sum",
        # torch's fused AdamW on the CPU, which needs no compiler.
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": strategy.stage,
            "offload_optimizer": {"device": strategy.offload_optimizer},
            **({"offload_param": {"device": strategy.offload_param}} if strategy.stage == 3 else {}),
        },
    }
