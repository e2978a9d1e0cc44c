"""Optimizers on shards against the libraries' own on whole tensors: the same gradients, random, of odd shapes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from bitsandbytes.optim import AdamW8bit
from harness import run_distributed
from safetensors.torch import load_file
from tiny import recipe_for, write_recipe
from torch import Tensor, nn
from training import Trained, train, train_all
from transformers.optimization import Adafactor

from ftlaunch.distributed import entry
from ftlaunch.distributed.optimizers.base import Shard, ShardGroup, ShardOptimizer
from ftlaunch.distributed.optimizers.state import STATE
from ftlaunch.distributed.optimizers.table import OPTIMIZERS, build_optimizer, layout_note
from ftlaunch.recipes.errors import UserError
from ftlaunch.recipes.schema import Train

SHAPES = {"wide": (7, 13), "tall": (65, 90), "vector": (11,), "row": (1, 6), "experts": (3, 4, 5), "table": (9, 6)}
"""`row`, and parts of others, leave some ranks with nothing."""

RATE, DECAY, STEPS = 1e-2, 0.1, 5


def values(step: int) -> dict[str, Tensor]:
    """Weights (step 0) or gradients of very different sizes."""
    generator = torch.Generator().manual_seed(step)
    return {
        name: torch.randn(shape, generator=generator) * 10.0 ** (i - 3)
        for i, (name, shape) in enumerate(SHAPES.items())
    }


def groups_of(parameters: Mapping[str, nn.Parameter], names: list[str]) -> list[dict[str, Any]]:
    """Matrices decay, vectors do not."""
    return [{"params": [parameters[n]], "weight_decay": DECAY if parameters[n].ndim > 1 else 0.0} for n in names]


def adamw(parameters: Mapping[str, nn.Parameter]) -> list[torch.optim.Optimizer]:
    return [torch.optim.AdamW(groups_of(parameters, list(SHAPES)), lr=RATE, fused=True)]


def adafactor(parameters: Mapping[str, nn.Parameter]) -> list[torch.optim.Optimizer]:
    """As Hugging Face's Trainer sets it up for `optim: adafactor`."""
    return [Adafactor(groups_of(parameters, list(SHAPES)), lr=RATE, scale_parameter=False, relative_step=False)]


def muon(parameters: Mapping[str, nn.Parameter]) -> list[torch.optim.Optimizer]:
    matrices = ["wide", "tall", "row"]
    others = [name for name in SHAPES if name not in matrices]
    return [
        torch.optim.Muon(groups_of(parameters, matrices), lr=RATE, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups_of(parameters, others), lr=RATE, fused=True),
    ]


def adamw_8bit(parameters: Mapping[str, nn.Parameter]) -> list[torch.optim.Optimizer]:
    return [AdamW8bit(groups_of(parameters, list(SHAPES)), lr=RATE)]


ORACLES: dict[str, Callable[[Mapping[str, nn.Parameter]], list[torch.optim.Optimizer]]] = {
    "adamw": adamw,
    "adafactor": adafactor,
    "muon": muon,
    "adamw_8bit": adamw_8bit,
}


def oracle(name: str, steps: int) -> dict[str, Tensor]:
    """Whole weights after so many steps."""
    parameters = {n: nn.Parameter(v) for n, v in values(0).items()}
    optimizers = ORACLES[name](parameters)
    for step in range(1, steps + 1):
        for n, gradient in values(step).items():
            parameters[n].grad = gradient
        for optimizer in optimizers:
            optimizer.step()
    return {n: parameter.detach() for n, parameter in parameters.items()}


def shards_of(rank: int, size: int) -> list[Shard]:
    """As FSDP2 cuts: chunks of rows, the last ones shorter or empty."""
    shards = []
    for name, whole in values(0).items():
        parts = list(torch.chunk(whole, size))
        parts += [whole[:0]] * (size - len(parts))
        start = sum(part.numel() for part in parts[:rank])
        held = nn.Parameter(parts[rank].clone())
        shards.append(Shard(name, held, SHAPES[name], start, start + held.numel(), is_table=name == "table"))
    return shards


def follow(optimizer: ShardOptimizer, shards: list[Shard], steps: range) -> None:
    for step in steps:
        for shard in shards:
            gradient = values(step)[shard.name].flatten()[shard.start : shard.stop]
            shard.parameter.grad = gradient.view(shard.parameter.shape) if shard.parameter.numel() else None
        optimizer.step()


def built(name: str, rank: int, size: int) -> tuple[ShardOptimizer, list[Shard]]:
    shards = shards_of(rank, size)
    group = ShardGroup(size, rank, dist.group.WORLD if size > 1 else None)
    train = Train(optimizer=name, learning_rate=RATE, weight_decay=DECAY)  # type: ignore[arg-type]
    return build_optimizer(shards, train, group), shards


def whole_state(optimizer: ShardOptimizer) -> dict[tuple[str, str], tuple[tuple[int, ...], int, Any]]:
    """Every piece of this rank: shape, start, and values."""
    return {
        (part, name): (piece.shape, piece.start, optimizer.read(part, name).flatten().numpy().copy())
        for part in optimizer.parts
        for name, piece in optimizer.pieces(part).items()
        if piece.stop > piece.start
    }


def trained_on_shards(rank: int, size: int, name: str) -> Any:
    """Weights by name and start; state."""
    optimizer, shards = built(name, rank, size)
    follow(optimizer, shards, range(1, STEPS + 1))
    weights = {shard.name: (shard.start, shard.parameter.detach().numpy().copy()) for shard in shards}
    return weights, whole_state(optimizer)


def assembled(parts: list[tuple[int, Any]], shape: tuple[int, ...]) -> Tensor:
    flat = torch.cat(
        [torch.from_numpy(part).flatten() for _, part in sorted(parts, key=lambda part: part[0]) if part.size]
    )
    return flat.view(shape)


def tolerance_of(name: str, size: int) -> float:
    """In units of the largest change of a weight. Muon does the very same arithmetic, and the others do on one rank;
    elsewhere vector instructions end at other elements, and Adafactor's means are sums in another order. 8-bit codes
    are some percent apart, and blocks of 256 of another shard have other scales."""
    exact = name == "muon" or (size == 1 and name != "adafactor")
    return 0.0 if exact else 5e-2 if name == "adamw_8bit" else 1e-5


def check_weights(results: list[dict[str, Any]], expected: dict[str, Tensor], tolerance: float) -> None:
    """Against whole weights, in units of their change: a rate that is a little off is seen in large weights too. A
    weight itself is rounded to 2^-24."""
    start = values(0)
    for tensor, there in expected.items():
        ours = assembled([weights[tensor] for weights in results], SHAPES[tensor])
        change, rounding = (there - start[tensor]).abs().max(), there.abs().max() * 1e-6
        assert change > RATE, tensor
        assert (ours - there).abs().max() <= tolerance * change + (rounding if tolerance else 0.0), tensor


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_shards_follow_as_whole_tensors_do(name, size):
    results = run_distributed(trained_on_shards, size, name)
    check_weights([weights for weights, _ in results], oracle(name, STEPS), tolerance_of(name, size))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_is_what_plan_says_and_every_world_holds_the_same(name):
    alone, three = (run_distributed(trained_on_shards, size, name) for size in (1, 3))
    expected = {
        (part, t): shape for t, whole in SHAPES.items() for part, shape in STATE[name](whole, t == "table").items()
    }
    assert {key: shape for key, (shape, _, _) in alone[0][1].items()} == expected
    for key, (shape, start, held) in alone[0][1].items():
        assert start == 0
        pieces = {state[key][1]: state[key][2] for _, state in three if key in state}  # means over rows are on all
        there = assembled(list(pieces.items()), shape)
        tolerance = 5e-2 if name == "adamw_8bit" else 1e-5
        assert (there - torch.from_numpy(held).view(shape)).abs().max() <= tolerance * abs(held).max(), key


def resumed(rank: int, size: int, name: str, state: dict[Any, Any], weights: dict[str, Any]) -> Any:
    """Go on for two steps from whole weights and state."""
    optimizer, shards = built(name, rank, size)
    for shard in shards:
        whole = torch.from_numpy(weights[shard.name]).flatten()
        shard.parameter.data = whole[shard.start : shard.stop].view(shard.parameter.shape).clone()
    for part in optimizer.parts:
        for tensor, piece in optimizer.pieces(part).items():
            if piece.stop > piece.start:
                optimizer.write(part, tensor, torch.from_numpy(state[part, tensor][2])[piece.start : piece.stop])
    optimizer.steps = STEPS
    assert optimizer.steps == STEPS
    follow(optimizer, shards, range(STEPS + 1, STEPS + 3))
    return {shard.name: (shard.start, shard.parameter.detach().numpy().copy()) for shard in shards}


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_is_restored_at_any_world_size(name, size):
    [(weights, state)] = run_distributed(trained_on_shards, 1, name)
    results = run_distributed(resumed, size, name, state, {n: held for n, (_, held) in weights.items()})
    check_weights(results, oracle(name, STEPS + 2), tolerance_of(name, size))


def recipe(folder: Path, name: str, optimizer: str, **train: Any) -> dict[str, Any]:
    rate = 3e-4 if optimizer == "adafactor" else 1e-3
    return recipe_for(
        folder,
        name=name,
        evaluate={"at_start": False, "at_end": False},
        checkpoint={"every_steps": None},
        train={"max_steps": 6, "optimizer": optimizer, "learning_rate": rate, "lr_scheduler": "constant", **train},
    )


def weights_of(run: Trained) -> dict[str, Tensor]:
    return {
        path.name + name: v for path in run.checkpoint.rglob("*.safetensors") for name, v in load_file(path).items()
    }


LAYOUT_TOLERANCES = {"adafactor": 1e-5, "muon": 1e-4, "adamw_8bit": 1e-3}
"""Relative, of losses over six steps. Adafactor: sums in another order. Muon rounds to 8 bits of mantissa (2^-9), where
the last bit of a sum decides now and then. 8-bit moments are rounded in other blocks."""


@pytest.mark.parametrize("optimizer", ["adafactor", "muon", "adamw_8bit"])
def test_runs(tmp_path, optimizer):
    """Losses at worlds of 1 and 3; a resume at the same size repeats bit for bit, at another goes on as before."""
    [alone] = train_all([recipe(tmp_path, "alone", optimizer, max_steps=8)])
    three = train(recipe(tmp_path, "three", optimizer), 3)
    tolerance = LAYOUT_TOLERANCES[optimizer]
    assert three.losses == pytest.approx(alone.losses[:6], rel=tolerance)
    assert three.grad_norms[0] == pytest.approx(alone.grad_norms[0], rel=1e-5)
    assert alone.losses[-1] < alone.losses[0] - 0.01
    train(recipe(tmp_path, "again", optimizer, max_steps=3), 3)
    again = train(recipe(tmp_path, "again", optimizer), 3)
    assert again.losses == three.losses
    there, here = weights_of(three), weights_of(again)
    assert there.keys() == here.keys() and all(torch.equal(value, here[name]) for name, value in there.items())
    moved = train(recipe(tmp_path, "again", optimizer, max_steps=8), 2)
    assert moved.losses == pytest.approx(alone.losses, rel=2 * tolerance)


def test_a_run_is_told_what_is_bound_to_the_layout():
    """And nothing where only rounding differs."""
    notes = {name: layout_note(Train(optimizer=name)) for name in OPTIMIZERS}  # type: ignore[arg-type]
    assert {name for name, note in notes.items() if note} == {"adamw_8bit", "muon"}
    assert "adamw_8bit is bound to the layout: its moments are rounded to 8 bits" in (notes["adamw_8bit"] or "")


def test_8_bits_without_their_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(UserError, match="adamw_8bit needs bitsandbytes"):
        built("adamw_8bit", 0, 1)


def test_another_optimizers_checkpoint(tmp_path, capsys):
    """8 bits go on from AdamW's moments, which are the same; Muon cannot, and says what to do."""
    path = str(write_recipe(tmp_path / "r.yaml", recipe(tmp_path, "changed", "adamw", max_steps=2)))
    assert entry.main([path]) == 0
    changed = ["train.max_steps=3", "--accept-changes"]
    assert entry.main([path, "train.optimizer=muon", *changed]) == 1
    assert "has no momentum_buffer, from which train.optimizer goes on" in capsys.readouterr().err
    assert entry.main([path, "train.optimizer=adamw_8bit", *changed]) == 0
