"""What the tutorials of torch, DeepSpeed and peft do in a step, for benchmarks that hold ours against them.

Shapes: B sequences of a rank's batch, S tokens in a sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from step_sides import LEARNING_RATE
from torch import Tensor, nn

MAX_NORM = 1.0
LORA_RANK = 16
LORA = {"type": "lora", "rank": LORA_RANK, "alpha": 2 * LORA_RANK, "target_modules": "all-linear"}
"""`with_lora`, as a recipe has it."""

Step = Callable[[Tensor], Tensor]
"""One update on a rank's tokens [B, S]; its loss."""


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """As everybody sets it up."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=LEARNING_RATE, fused=True, weight_decay=0.0)


def torch_step(model: Any, *, autocast: bool = False) -> Step:
    """A plain torch loop's; `autocast`: to bfloat16 on CUDA."""
    optimizer = adamw(model)

    def step(input_ids: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            loss: Tensor = model(input_ids=input_ids, labels=input_ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def deepspeed_step(model: nn.Module, batch: int, **config: Any) -> Step:
    """DeepSpeed's, with torch's AdamW: its own would have to be compiled. `batch`: B; `config`: more of its keys."""
    import deepspeed

    whole = {"train_micro_batch_size_per_gpu": batch, "gradient_clipping": MAX_NORM, **config}
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    optimizer = adamw(model)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=whole, dist_init_required=False)[0]

    def step(input_ids: Tensor) -> Tensor:
        loss: Tensor = engine(input_ids=input_ids, labels=input_ids).loss
        engine.backward(loss)
        engine.step()
        return loss

    return step


def sharded(model: nn.Module, layers: Iterable[nn.Module], **settings: Any) -> nn.Module:
    """torch's `fully_shard`, a layer at a time."""
    from torch.distributed.fsdp import fully_shard

    for layer in layers:
        fully_shard(layer, **settings)
    fully_shard(model, **settings)
    return model


def with_lora(model: Any) -> Any:
    """A model with peft's adapter on every linear layer but the head."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config)
