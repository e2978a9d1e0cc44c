"""What a checkpoint answers: as the engine resumes it, and as the libraries open it that everybody uses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from harness import run_distributed
from one_rank import Rank
from training import Trained

from ftlaunch.distributed.saver import load_parts
from ftlaunch.distributed.world import World


def probe_batch() -> dict[str, torch.Tensor]:
    """Two sequences of tokens."""
    input_ids = torch.randint(307, (2, 21), generator=torch.Generator().manual_seed(2))
    return {"input_ids": input_ids, "position_ids": torch.arange(21).expand(2, -1), "targets": input_ids}


def logits_of_the_engine(rank: int, size: int, settings: dict[str, Any], checkpoint: Path) -> Any:
    """The logits of a checkpoint, resumed by the engine itself."""
    made = Rank.build(settings, World(rank=rank, size=size, local_rank=rank, local_size=size))
    load_parts(made.engine, str(checkpoint), made.built.has_adapter, layout=made.built.layout)
    made.engine.module.eval()
    with torch.no_grad():
        return made.engine.module(probe_batch(), "own_logits").float().numpy().copy()


def engine_logits(settings: dict[str, Any], run: Trained, size: int = 2) -> torch.Tensor:
    """Those of a run's newest checkpoint, on so many ranks."""
    return torch.from_numpy(run_distributed(logits_of_the_engine, size, settings, run.checkpoint)[0])


def logits(model: Any) -> torch.Tensor:
    """Those of a transformers or peft model."""
    model.eval()
    with torch.no_grad():
        answer: torch.Tensor = model(input_ids=probe_batch()["input_ids"]).logits.float()
    return answer
