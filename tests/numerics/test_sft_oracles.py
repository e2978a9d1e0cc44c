"""SFT against what everybody uses: Hugging Face's Trainer, TRL's SFTTrainer, and a loop that anybody can check.

The very same batches go through both. fp32 sums of some hundred terms in another order differ by about 1e-7 relative;
the tolerance of 1e-5 is two digits above that and two below the smallest mistake in a divisor (one token in a batch of
some hundreds).
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from one_rank import Rank, read_steps, relative
from tiny import recipe_for
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from ftlaunch.distributed.data.stream import MicroBatch, StepBatches
from ftlaunch.recipes.methods.base import IGNORED

TOLERANCE = 1e-5
UPDATE_TOLERANCE = 1e-3
"""Of the largest change of a weight after three steps. AdamW divides by the root of the second moment, which for
gradients near zero turns rounding into changes of a fair part of the learning rate; the median is far below."""

STEPS = 3
LEARNING_RATE = 1e-3

SHARED_ARGUMENTS: dict[str, Any] = {
    "per_device_train_batch_size": 1,
    "learning_rate": LEARNING_RATE,
    "lr_scheduler_type": "constant",
    "weight_decay": 0.1,
    "max_grad_norm": 0.0,
    "optim": "adamw_torch",
    "report_to": [],
    "save_strategy": "no",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
}


def recipe(folder: Path, packing: bool, micro_batch_size: int) -> dict[str, Any]:
    return recipe_for(
        folder,
        data={"packing": packing, "sequence_length": 160},
        train={
            "max_steps": STEPS,
            "global_batch_size": 4,
            "micro_batch_size": micro_batch_size,
            "learning_rate": LEARNING_RATE,
            "lr_scheduler": "constant",
            "weight_decay": 0.1,
            "max_grad_norm": None,
        },
    )


def labels_of(batch: Any) -> Tensor:
    """transformers' labels, which it shifts itself: position i holds what position i - 1 predicts."""
    labels = torch.full(batch.targets.shape, IGNORED, dtype=torch.int64)
    labels[:, 1:] = torch.from_numpy(batch.targets[:, :-1])
    return labels


def hf_inputs(micro: MicroBatch) -> dict[str, Tensor]:
    """One of our micro-batches as transformers wants it."""
    return {
        "input_ids": torch.from_numpy(micro.batch.input_ids),
        "position_ids": torch.from_numpy(micro.batch.position_ids),
        "labels": labels_of(micro.batch),
    }


class Recording:
    """A trainer that keeps each micro-batch's share of the loss, and the gradients of each whole global batch."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.micro_losses: list[float] = []
        self.gradients: list[dict[str, Tensor]] = []

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.micro_losses.append(float(loss))
        if len(self.micro_losses) % self.args.gradient_accumulation_steps == 0:
            self.gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
        return loss


class RecordingTrainer(Recording, Trainer):
    pass


class RecordingSFTTrainer(Recording, SFTTrainer):
    pass


def train_with_hf(model_folder: str, steps: list[StepBatches], output: Path, **more: Any) -> RecordingTrainer:
    """HF Trainer on our micro-batches, in our order."""
    micro_batches = [hf_inputs(micro) for step in steps for micro in step.micro_batches]
    arguments = TrainingArguments(
        output_dir=str(output),
        gradient_accumulation_steps=len(steps[0].micro_batches),
        max_steps=len(steps),
        remove_unused_columns=False,
        **SHARED_ARGUMENTS | more,
    )
    trainer = RecordingTrainer(
        model=AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32),
        args=arguments,
        train_dataset=micro_batches,
        data_collator=lambda items: items[0],
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("packing", [True, False])
def test_hugging_face_trainer(tmp_path, group, packing, accumulation):
    """Losses, gradients of whole global batches, and weights after three optimizer steps."""
    settings = recipe(tmp_path, packing, 4 // accumulation)
    steps = read_steps(settings, group, STEPS)
    assert packing == any(len(rows) > 1 for step in steps for micro in step.micro_batches for rows in micro.batch.rows)
    hf = train_with_hf(settings["model"]["path"], steps, tmp_path / "hf")
    before = AutoModelForCausalLM.from_pretrained(settings["model"]["path"], dtype=torch.float32).state_dict()
    rank = Rank.build(settings)
    rank.engine.set_learning_rate(LEARNING_RATE)
    for number, step in enumerate(steps):
        loss = rank.accumulate(step)
        part = hf.micro_losses[number * accumulation : (number + 1) * accumulation]
        assert len(part) == accumulation == len(step.micro_batches)
        assert loss == pytest.approx(sum(part), rel=TOLERANCE)
        ours = rank.gradients()
        assert ours.keys() == hf.gradients[number].keys()
        # From the second step on the weights differ a little, and so do the gradients.
        worst = max(relative(ours[name], there) for name, there in hf.gradients[number].items())
        assert worst <= TOLERANCE * 10**number, f"step {number + 1}"
        rank.engine.step()
    after = hf.model.state_dict()
    for name, ours in rank.weights().items():
        change = (after[name] - before[name]).abs().max()
        assert (ours - after[name]).abs().max() <= UPDATE_TOLERANCE * change, name


def test_clipping_is_the_trainers(tmp_path, group):
    """The norm before it, and what the optimizer got: its first moment, a tenth of the clipped gradient."""
    settings = recipe(tmp_path, packing=True, micro_batch_size=2)
    settings["train"]["max_grad_norm"] = 0.05
    steps = read_steps(settings, group, 1)
    hf = train_with_hf(settings["model"]["path"], steps, tmp_path / "hf", max_grad_norm=0.05, logging_steps=1)
    rank = Rank.build(settings)
    rank.accumulate(steps[0])
    norm = rank.engine.step()
    assert norm == pytest.approx(hf.state.log_history[0]["grad_norm"], rel=TOLERANCE)
    assert norm > 0.1, "there is something to clip"
    moments = {name: hf.optimizer.state[p]["exp_avg"] for name, p in hf.model.named_parameters()}
    ours = {one.spec.name: one.values.view(one.spec.shape) for one in rank.engine.fragments("exp_avg")}
    assert ours.keys() == moments.keys()
    assert sum(float(moment.square().sum()) for moment in moments.values()) ** 0.5 == pytest.approx(0.005, rel=1e-3)
    for name, moment in moments.items():
        assert relative(ours[name], moment) <= TOLERANCE, name


@pytest.mark.parametrize("packing", [True, False])
def test_a_loop_over_single_samples(tmp_path, group, packing):
    """Every sample by itself, unpadded, through the model's own logits: one sum, divided by one count."""
    settings = recipe(tmp_path, packing, 2)
    [step] = read_steps(settings, group, 1)
    model = AutoModelForCausalLM.from_pretrained(settings["model"]["path"], dtype=torch.float32)
    samples = [sample for micro in step.micro_batches for sample in samples_of(micro)]
    assert len(samples) > 4 if packing else len(samples) == 4
    total, count = torch.zeros(()), 0
    for input_ids, targets in samples:
        logits = model(input_ids=input_ids[None]).logits[0]
        total = total + F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
        count += int((targets != IGNORED).sum())
    (total / count).backward()
    rank = Rank.build(settings)
    assert rank.accumulate(step) == pytest.approx(float(total.detach()) / count, rel=TOLERANCE)
    gradients = rank.gradients()
    for name, parameter in model.named_parameters():
        assert relative(gradients[name], parameter.grad) <= TOLERANCE, name


@pytest.mark.parametrize("packing", [True, False])
def test_trl(tmp_path, group, packing):
    """TRL gets the samples of a global batch one by one, as a tokenised data set; ours may lie packed."""
    settings = recipe(tmp_path, packing, 2)
    [step] = read_steps(settings, group, 1)
    rows = [
        {"input_ids": input_ids.tolist(), "labels": [IGNORED, *targets[:-1].tolist()]}
        for micro in step.micro_batches
        for input_ids, targets in samples_of(micro)
    ]
    arguments = SFTConfig(
        output_dir=str(tmp_path / "trl"),
        gradient_accumulation_steps=len(rows),
        max_steps=1,
        max_length=None,
        gradient_checkpointing=False,
        **SHARED_ARGUMENTS,
    )
    trl = RecordingSFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(settings["model"]["path"], dtype=torch.float32),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(settings["model"]["path"]),
    )
    trl.train()
    rank = Rank.build(settings)
    assert len(trl.micro_losses) == len(rows)
    assert rank.accumulate(step) == pytest.approx(sum(trl.micro_losses), rel=TOLERANCE)
    ours, [theirs] = rank.gradients(), trl.gradients
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert relative(ours[name], gradient) <= TOLERANCE, name


def samples_of(micro: MicroBatch) -> list[tuple[Tensor, Tensor]]:
    """(input_ids, targets) of each sample, cut where positions restart. The last piece of a sequence may be padding,
    or end in it: causal attention makes that harmless."""
    pieces = []
    for ids, positions, targets in zip(
        micro.batch.input_ids, micro.batch.position_ids, micro.batch.targets, strict=True
    ):
        starts = [*(positions == 0).nonzero()[0], len(ids)]
        pieces += [
            (torch.from_numpy(ids[start:stop]), torch.from_numpy(targets[start:stop]))
            for start, stop in itertools.pairwise(starts)
            if (targets[start:stop] != IGNORED).any()
        ]
    return pieces
