"""Checkpoints as other programs write them: by real DeepSpeed engines and FSDP2 models that took a few steps; and what
they held then."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from transformers import AutoModelForCausalLM

from ftlaunch.distributed.strategies import deepspeed_compat
from ftlaunch.distributed.world import World

STEPS = 2
MOMENTS = ("exp_avg", "exp_avg_sq")


class DeepspeedCase(NamedTuple):
    """How an engine is set up. `frozen`: whether the embeddings are not trained; `zero`: more keys of
    `zero_optimization`; `getters`: whether DeepSpeed's own getters of fp32 tensors know where these lie (they do not
    under `round_robin_gradients`)."""

    name: str
    model: str
    stage: int
    dtype: torch.dtype = torch.bfloat16
    frozen: bool = False
    zero: tuple[tuple[str, Any], ...] = ()
    config: tuple[tuple[str, Any], ...] = ()
    getters: bool = True


def save_deepspeed(rank: int, size: int, models: Path, folder: Path, cases: list[DeepspeedCase]) -> None:
    """FOLDER/NAME of each case, as `save_checkpoint` writes it, and FOLDER/NAME/live.pt."""
    world = World(rank=rank, size=size, local_rank=rank, local_size=size)
    for case in cases:
        torch.manual_seed(rank)
        engine = _engine(world, models / case.model, case)
        for _ in range(STEPS):
            ids = torch.randint(3, 300, (2, 16))
            engine.backward(engine(input_ids=ids, labels=ids).loss)
            engine.step()
        engine.save_checkpoint(str(folder / case.name), client_state={"epoch": 1})
        live = _live(engine, case)
        if rank == 0:
            torch.save(live, folder / case.name / "live.pt")
        dist.barrier()


def _engine(world: World, model: Path, case: DeepspeedCase) -> Any:
    deepspeed = deepspeed_compat.attach(world)
    causal_lm = AutoModelForCausalLM.from_pretrained(model, dtype=case.dtype)
    if case.frozen:
        causal_lm.get_input_embeddings().weight.requires_grad_(False)
    trained = [parameter for parameter in causal_lm.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "bf16": {"enabled": case.dtype == torch.bfloat16},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": case.stage, "reduce_bucket_size": 50_000, **dict(case.zero)},
        **dict(case.config),
    }
    with deepspeed_compat.quiet():
        return deepspeed.initialize(
            model=causal_lm, optimizer=torch.optim.AdamW(groups, lr=1e-2), config=config, dist_init_required=False
        )[0]


def _live(engine: Any, case: DeepspeedCase) -> dict[str, dict[str, torch.Tensor]]:
    """By part and name, whole: what the model computes with, fp32 weights, moments; collective."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if case.stage in (1, 2):
        # Linked for the getters in the first step, when later groups had no state yet.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    live: dict[str, dict[str, torch.Tensor]] = {part: {} for part in ("model", "master", *MOMENTS)}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=case.stage == 3):
            live["model"][name] = parameter.detach().clone()
        if parameter.requires_grad and case.stage and case.getters:
            live["master"][name] = safe_get_full_fp32_param(parameter).clone().view(live["model"][name].shape)
            for moment in MOMENTS:
                state = safe_get_full_optimizer_state(parameter, moment)
                live[moment][name] = state.clone().view(live["model"][name].shape)
    return live


def save_dcp(rank: int, size: int, model: Path, folder: Path) -> None:
    """FOLDER/NAME for several programs' layouts of one FSDP2 model after some steps, and FOLDER/live.pt."""
    causal_lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for block in causal_lm.model.layers:
        fully_shard(block)
    fully_shard(causal_lm)
    optimizer = torch.optim.AdamW(causal_lm.parameters(), lr=1e-2)
    for step in range(STEPS):
        torch.manual_seed(10 * step + rank)
        ids = torch.randint(3, 300, (2, 16))
        causal_lm(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    weights, state = get_model_state_dict(causal_lm), get_optimizer_state_dict(causal_lm, optimizer)
    wrapped = {name.replace(".self_attn.", "._fsdp_wrapped_module.self_attn."): v for name, v in weights.items()}
    columns = {name: v.redistribute(placements=[Shard(v.ndim - 1)]) for name, v in weights.items()}
    layouts: dict[str, dict[str, Any]] = {
        "plain": dict(weights),
        "nested": {"model": weights, "optim": state, "step": STEPS, "lr_scheduler": {"last_epoch": STEPS}},
        "compiled": {f"module._orig_mod.{name}": value for name, value in wrapped.items()},
        "numbered": {"model": weights, "optimizer": optimizer.state_dict()},
        "columns": {"model": columns},
        # As accelerate's save_fsdp_model and save_fsdp_optimizer call it.
        "accelerate/pytorch_model_fsdp_0": {"model": weights},
        "accelerate/optimizer_0": {"optimizer": state},
    }
    for name, layout in layouts.items():
        dcp.save(layout, storage_writer=FileSystemWriter(str(folder / name)))
    live = {
        "model": {name: value.full_tensor() for name, value in weights.items()},
        **{m: {name: held[m].full_tensor() for name, held in state["state"].items()} for m in MOMENTS},
    }
    if rank == 0:
        torch.save(live, folder / "live.pt")
