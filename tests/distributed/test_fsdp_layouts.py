"""Hybrid sharding by node, and shards in the host's memory: the same losses, one checkpoint, whatever lays it out."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from harness import RanksFailed, run_distributed
from one_rank import Rank, read_steps, relative
from one_rank import alone as alone_in_the_world
from safetensors.torch import load_file
from tiny import recipe_for
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from training import Trained, train, train_all, world_of

from ftlaunch.distributed.batch import on_device
from ftlaunch.distributed.data.stream import StepBatches
from ftlaunch.distributed.entry import PolicyModel
from ftlaunch.recipes.errors import UserError
from ftlaunch.recipes.methods.table import build_method

LOSS_TOLERANCE = 1e-5
"""Relative; sums in another order. See `test_training_layout.py`, whose bounds these are."""

NORM_TOLERANCE = 5e-5

HYBRID = {"type": "fsdp", "shard": "node"}
OFFLOAD = {"type": "fsdp", "offload": "cpu"}
BOTH = {**HYBRID, **OFFLOAD, "reshard_after_forward": False}

LAYOUTS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    # strategy; ranks of each node
    "hybrid-2x1": (HYBRID, (1, 1)),
    "hybrid-1x3": (HYBRID, (3,)),
    "hybrid-2x2": (HYBRID, (2, 2)),
    "offload-1": (OFFLOAD, (1,)),
    "offload-3": (OFFLOAD, (3,)),
    "both-2x2": (BOTH, (2, 2)),
}


def recipe(folder: Path, name: str, strategy: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """Clipping, decay, a batch that 4 ranks do not divide, and shapes that 3 do not."""
    train_for = {
        "max_steps": 4,
        "global_batch_size": 6,
        "micro_batch_size": 1,
        "max_grad_norm": 0.5,
        "weight_decay": 0.1,
        "lr_scheduler": "constant",
        **changes.pop("train", {}),
    }
    return recipe_for(
        folder,
        name=name,
        strategy=strategy or {"type": "fsdp"},
        evaluate={"at_start": False, "at_end": False},
        checkpoint={"every_steps": None},
        train=train_for,
        **changes,
    )


ADAPTERS: dict[str, dict[str, Any]] = {"full": {}, "lora": {"adapter": {"type": "lora", "rank": 4, "alpha": 8}}}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Trained]]:
    """One rank, which shards nothing."""
    folder = tmp_path_factory.mktemp("layouts")
    settings = [recipe(folder, name, **changes) for name, changes in ADAPTERS.items()]
    return folder, dict(zip(ADAPTERS, train_all(settings), strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_loss_does_not_depend_on_it(alone, layout):
    folder, references = alone
    strategy, nodes = LAYOUTS[layout]
    settings = [recipe(folder, f"{layout}-{name}", strategy, **changes) for name, changes in ADAPTERS.items()]
    runs = dict(zip(ADAPTERS, train_all(settings, sum(nodes), ranks_per_node=nodes), strict=True))
    for name, run in runs.items():
        reference = references[name]
        assert run.losses == pytest.approx(reference.losses, rel=LOSS_TOLERANCE), name
        assert run.grad_norms == pytest.approx(reference.grad_norms, rel=NORM_TOLERANCE), name
    assert max(references["full"].grad_norms) > 0.5, "there is something to clip"


def placed(rank: int, _size: int, settings: dict[str, Any], nodes: tuple[int, ...]) -> tuple[list[int], int, str]:
    """The mesh's shape, the share of the weights that a rank holds in thousandths, and where."""
    engine = Rank.build(settings, world_of(rank, nodes)).engine
    parameters = [p for p in engine.module.parameters() if isinstance(p, DTensor)]
    held, whole = sum(p.to_local().numel() for p in parameters), sum(p.numel() for p in parameters)
    return list(parameters[0].device_mesh.shape), 1000 * held // whole, parameters[0].to_local().device.type


def test_ranks_of_a_node_share_and_nodes_repeat(tmp_path):
    for nodes, shape, share in (((2, 2), [2, 2], 500), ((1, 1, 1), [3, 1], 1000), ((3,), [1, 3], 333)):
        for mesh, held, _ in run_distributed(placed, sum(nodes), recipe(tmp_path, "placed", HYBRID), nodes):
            assert mesh == shape
            assert held == pytest.approx(share, abs=30)


def summed(
    rank: int, size: int, settings: dict[str, Any], nodes: tuple[int, ...], step: StepBatches, alone: dict[str, Tensor]
) -> tuple[int, int, float]:
    """Of one step that every rank takes alike: sums over replicas; groups of parameters that are summed together; how
    far the gradients are from what so many ranks alone would have."""
    made = Rank.build(settings, world_of(rank, nodes))
    with patch.object(torch.distributed, "all_reduce", wraps=torch.distributed.all_reduce) as sums:
        made.accumulate(step)
    groups = sum(isinstance(module, FSDPModule) for module in made.engine.module.modules())
    gradients = made.gradients()
    return sums.call_count, groups, max(relative(gradients[name], size * value) for name, value in alone.items())


@pytest.mark.parametrize(
    ("strategy", "nodes", "times"), [({"type": "ddp"}, (3,), 1), (HYBRID, (2, 2), 1), (BOTH, (2, 2), 6)]
)
def test_replicas_are_summed_once_a_step(tmp_path, strategy, nodes, times):
    """However many micro-batches it has; with each where gradients are not to stay on the device."""
    one = recipe(tmp_path, "one")
    with alone_in_the_world() as group:
        [step] = read_steps(one, group, 1)
        rank = Rank.build(one)
        rank.accumulate(step)
        whole = rank.gradients()
    assert len(step.micro_batches) == 6
    settings = recipe(tmp_path, "summed", strategy)
    for sums, groups, apart in run_distributed(summed, sum(nodes), settings, nodes, step, whole):
        assert sums == times * groups > 1
        assert apart < LOSS_TOLERANCE


def stepped_too_soon(rank: int, _size: int, settings: dict[str, Any], step: StepBatches) -> str:
    made = Rank.build(settings, world_of(rank, (2,)))
    method = build_method(made.recipe.method)
    loss = method.loss(PolicyModel(made.engine.module), on_device(step.micro_batches[0].batch, "cpu")).loss_sum
    made.engine.backward(loss, 1.0, last_micro_batch=False)
    with pytest.raises(UserError) as refused:
        made.engine.step()
    return str(refused.value)


def test_gradients_that_replicas_have_not_summed_are_not_left_out(tmp_path):
    settings = recipe(tmp_path, "soon", {"type": "ddp"})
    with alone_in_the_world() as group:
        [step] = read_steps(recipe(tmp_path, "one"), group, 1)
    for said in run_distributed(stepped_too_soon, 2, settings, step):
        assert "replicas do not sum its gradients" in said


def test_nodes_that_differ_are_refused_on_every_rank(tmp_path):
    with pytest.raises(RanksFailed) as failed:
        train(recipe(tmp_path, "uneven", HYBRID), 3, ranks_per_node=(2, 1))
    assert str(failed.value).count("UserError: strategy.shard: node needs the same number of ranks on every node") == 3


def stored(run: Trained) -> dict[str, Tensor]:
    files = sorted(run.checkpoint.rglob("*.safetensors"))
    return {f"{file.stem} {name}": value for file in files for name, value in load_file(file).items()}


def test_a_run_moves_between_layouts(alone):
    """hybrid, all ranks, ddp, host memory: weights and moments are those of one rank, and so is the loss."""
    folder, _ = alone
    tour = [(HYBRID, (2, 2)), ({"type": "fsdp"}, (3,)), ({"type": "ddp"}, (2,)), (OFFLOAD, (2,)), (HYBRID, (2, 2))]
    for number, (strategy, nodes) in enumerate(tour, start=1):
        settings = recipe(folder, "tour", strategy, train={"max_steps": number})
        run = train(settings, sum(nodes), ranks_per_node=nodes)
    whole = train(recipe(folder, "whole", train={"max_steps": len(tour)}))
    assert run.losses == pytest.approx(whole.losses, rel=LOSS_TOLERANCE)
    ours, theirs = stored(run), stored(whole)
    assert ours.keys() == theirs.keys()
    assert {name.split()[0] for name in ours} == {"model", "exp_avg", "exp_avg_sq"}
    for name, value in theirs.items():
        # Of the largest value. AdamW turns rounding of gradients near zero into changes of weights.
        assert (ours[name] - value).abs().max() <= 2e-4 * value.abs().max(), name


@pytest.mark.parametrize("optimizer", ["muon", "adafactor"])
def test_optimizers_that_look_at_whole_matrices(alone, optimizer):
    """They talk to the ranks of their own node only."""
    folder, _ = alone
    changes = {"optimizer": optimizer, "learning_rate": 1e-3}
    one = train(recipe(folder, f"{optimizer}-1", train=changes))
    settings = recipe(folder, f"{optimizer}-both", BOTH, train=changes)
    both = train(settings, 4, ranks_per_node=(2, 2))
    # Muon computes in bf16 inside (`test_optimizers.py`).
    assert both.losses == pytest.approx(one.losses, rel=1e-4 if optimizer == "muon" else LOSS_TOLERANCE)


def test_bfloat16_in_the_hosts_memory(alone):
    """Masters stay fp32 there; the very same numbers as without offload."""
    folder, _ = alone
    model = {"dtype": "bfloat16"}
    here = train(recipe(folder, "bf16-here", model=model), 2)
    away = train(recipe(folder, "bf16-away", OFFLOAD, model=model), 2)
    assert away.losses == here.losses
    assert torch.equal(*(stored(run)["master lm_head.weight"] for run in (here, away)))
