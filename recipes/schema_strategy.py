"""The recipe's `strategy`: how the model is laid out over ranks."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from .section import Section


class Ddp(Section):
    """Every rank holds the whole model (FSDP2 on an (N, 1) mesh)."""

    type: Literal["ddp"] = "ddp"


class Fsdp(Section):
    """Parameters, gradients and optimizer state sharded over ranks (FSDP2)."""

    type: Literal["fsdp"] = "fsdp"
    shard: Literal["world", "node"] = "world"
    """Over which ranks: all of them, or those of a node, so that weights travel within nodes only and each node holds
    all of them (hybrid sharding)."""
    offload: Literal["none", "cpu"] = "none"
    """`cpu`: parameters, gradients and optimizer state stay in the host's memory, where the update is made too. A GPU
    then holds the block at work and the activations only, and steps are slow."""
    reshard_after_forward: bool = True
    """Free a block's gathered weights after its forward pass; off: more memory, one gather less a block."""


class Deepspeed(Section):
    """DeepSpeed ZeRO; needs the extra `ftlaunch[deepspeed]`. Weights, losses and checkpoints are those of `fsdp`."""

    type: Literal["deepspeed"] = "deepspeed"
    stage: Annotated[int, Field(ge=1, le=3)] = 3
    """What is sharded over all ranks: the optimizer's state (1), gradients too (2), parameters too (3)."""
    offload_optimizer: Literal["none", "cpu"] = "none"
    """`cpu`: the optimizer's state and fp32 weights stay in the host's memory, and are updated there."""
    offload_param: Literal["none", "cpu"] = "none"
    """`cpu`: a rank's parameters wait in the host's memory until their layer needs them. Stage 3 only."""
    deepspeed_config: dict[str, Any] = {}
    """Keys of DeepSpeed's own configuration, such as {zero_optimization: {reduce_bucket_size: 50000000}}. They tune
    ZeRO; one that contradicts the recipe is an error."""


class Auto(Section):
    """Chosen when ranks start, from what one of them is estimated to take and what its device has: `ddp` where the
    whole model fits, else `fsdp`; what waits in the host's memory (`deepspeed` with offload_optimizer, `fsdp` with
    offload) only where nothing else fits. `plan` says which and why, and the run writes it down."""

    type: Literal["auto"] = "auto"
    memory_gb: Annotated[float, Field(gt=0)] | None = None
    """Memory in GB of the device of a rank, to choose by, where it is less than there is or where `plan` cannot see it.
    None: what is free there when the run starts; on a CPU a rank's share of the host's."""


ChosenStrategy = Ddp | Fsdp | Deepspeed
"""What a model is laid out by."""

StrategyConfig = Annotated[Ddp | Fsdp | Deepspeed | Auto, Field(discriminator="type")]
