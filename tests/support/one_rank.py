"""The parts of one rank's program, put together by hand in the test's own process: a world of one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ftlaunch.distributed import group as groups
from ftlaunch.distributed.adapter_start import start_adapter
from ftlaunch.distributed.attempt import begin_attempt
from ftlaunch.distributed.batch import on_device
from ftlaunch.distributed.checkpoint.peers import Peers
from ftlaunch.distributed.checkpoint.reader import CheckpointReader
from ftlaunch.distributed.data.stream import StepBatches
from ftlaunch.distributed.entry import PolicyModel
from ftlaunch.distributed.group import Group
from ftlaunch.distributed.model import BuiltModel, base_name, build_model
from ftlaunch.distributed.model_files import find_model
from ftlaunch.distributed.quantized import QuantizingReader
from ftlaunch.distributed.run_data import open_data
from ftlaunch.distributed.strategies.base import Engine
from ftlaunch.distributed.strategies.table import prepare
from ftlaunch.distributed.world import World
from ftlaunch.recipes.load import LoadedRecipe
from ftlaunch.recipes.methods.table import build_method
from ftlaunch.recipes.schema import Recipe


@contextmanager
def alone() -> Iterator[Group]:
    """The process group of a world of one. Variables that say it is a rank (DeepSpeed is told by one) go with it: in
    other tests they would make libraries look for a launcher's group."""
    with patch.dict(os.environ):
        group = groups.start(World(), "")
        try:
            yield group
        finally:
            groups.stop()


@dataclass(frozen=True)
class Rank:
    """A model laid out, and the method it learns by. Make it inside `alone()` (or any other process group)."""

    recipe: Recipe
    built: BuiltModel
    engine: Engine

    @classmethod
    def build(cls, recipe: dict[str, Any], world: World | None = None) -> Rank:
        """The recipe's model with the values that a run starts from."""
        typed = Recipe.model_validate(recipe)
        folder = find_model(typed.model.path)
        built = build_model(typed, folder)
        engine = prepare(built, typed, world or World())
        if typed.model.init == "pretrained":
            base = CheckpointReader(folder.url)
            world = world or World()
            engine.load_base(QuantizingReader(built.layout.joined(base), built.packed, world.device))
            start_adapter(engine, built, typed, base, Group(world, Peers(world.rank, world.size, None)))
        return cls(typed, built, engine)

    def accumulate(self, step: StepBatches) -> float:
        """Forward and backward of a whole global batch; its loss. The gradients stay for `gradients`."""
        method = build_method(self.recipe.method)
        weight = sum(method.weight(micro.batch) for micro in step.micro_batches)
        total = 0.0
        self.engine.module.train()
        for number, micro in enumerate(step.micro_batches):
            terms = method.loss(PolicyModel(self.engine.module), on_device(micro.batch, "cpu"))
            self.engine.backward(terms.loss_sum, weight, last_micro_batch=number == len(step.micro_batches) - 1)
            total += float(terms.loss_sum.detach())
        return total / weight

    def gradients(self) -> dict[str, Tensor]:
        """Whole gradients by the model's own names; collective."""
        return {
            base_name(name): _whole(parameter.grad)
            for name, parameter in self.engine.module.named_parameters()
            if parameter.grad is not None
        }

    def weights(self) -> dict[str, Tensor]:
        """Whole parameters by the model's own names; collective."""
        return {
            base_name(name): _whole(parameter.detach()) for name, parameter in self.engine.module.named_parameters()
        }


def _whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def read_steps(recipe: dict[str, Any], group: Group, count: int) -> list[StepBatches]:
    """The first global batches of a recipe's data."""
    typed = Recipe.model_validate(recipe)
    attempt = begin_attempt(LoadedRecipe(typed, "test.yaml", (), ()), 1, ("test",))
    data = open_data(typed, find_model(typed.model.path), build_method(typed.method), attempt, group)
    with closing(data.training_stream(None)) as stream:
        return [stream.next_step() for _ in range(count)]


def relative(a: Tensor, b: Tensor) -> float:
    """Largest difference in units of the largest value."""
    difference, scale = (a.detach().double() - b.detach().double()).abs().max(), b.detach().double().abs().max()
    return float(difference / scale.clamp_min(torch.finfo(b.dtype).tiny))
