"""Options of training: each does what it says, and none changes what is learned unless it says so."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.models.llama.modeling_llama  # noqa: F401  imported before the ranks are forked
from harness import run_distributed
from one_rank import Rank
from safetensors.torch import load_file
from tiny import make_model, recipe_for
from torch._dynamo.utils import counters
from training import Trained, train, train_all

from ftlaunch.distributed.data import feed, stream
from ftlaunch.distributed.data.build import build_index
from ftlaunch.distributed.model import base_name
from ftlaunch.distributed.world import World
from ftlaunch.recipes.schema import TrainSource

FP32_TOLERANCE = 1e-5
"""Relative, of a loss after some steps: sums in another order."""

BF16_TOLERANCE = 5e-3
"""Relative. bf16 has 8 bits (2^-8 = 4e-3) for each activation, and shards change which sums round where; the loss
averages over some hundred tokens, and masters and reductions are fp32, so that nothing adds up over steps."""


def recipe(folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    """Few steps, no evaluation, one checkpoint."""
    shared: dict[str, Any] = {
        "name": name,
        "data": {"sequence_length": 96},
        "evaluate": {"at_start": False, "at_end": False},
        "checkpoint": {"every_steps": None},
        "train": {"max_steps": 4},
    }
    for section, values in changes.items():
        shared[section] = {**shared.get(section, {}), **values} if isinstance(values, dict) else values
    return recipe_for(folder, **shared)


def weights(run: Trained) -> dict[str, torch.Tensor]:
    """The published tensors of a run's newest checkpoint."""
    return {name: value for file in run.checkpoint.glob("*.safetensors") for name, value in load_file(file).items()}


def evaluations(run: Trained) -> list[dict[str, float]]:
    """Held-out losses, in the order in which they were measured."""
    return [line["losses"] for line in run.lines if line["kind"] == "evaluation"]


def test_a_run_of_so_many_tokens_with_wsd_and_two_held_out_sets(tmp_path):
    most, peak = 4000, 3e-3
    train_for = {"max_steps": None, "max_tokens": most, "lr_scheduler": "wsd", "decay_ratio": 0.5, "warmup_ratio": 0.25}
    settings = recipe(tmp_path, "tokens", train=train_for, evaluate={"at_start": True, "at_end": True})
    settings["data"]["eval"].append({"name": "texts", "path": str(tmp_path / "text.parquet"), "format": "text"})
    run = train(settings, 2)
    tokens = [0] + [step["tokens"] for step in run.steps]
    assert len(run.steps) > 4 and tokens[-2] < most <= tokens[-1]
    middles = [(before + min(after, most)) / 2 / most for before, after in itertools.pairwise(tokens)]
    expected = [peak * min(1.0, middle / 0.25, (1.0 - middle) / 0.5) for middle in middles]
    assert [step["learning_rate"] for step in run.steps] == pytest.approx(expected)
    before, after = evaluations(run)
    assert before.keys() == after.keys() == {"chats/loss", "texts/loss"}
    assert all(after[name] < before[name] for name in before)
    assert after["chats/loss"] != after["texts/loss"]


def test_a_disk_cache_lets_every_block_be_fetched_once_for_all_epochs_and_ranks(tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "CACHE_BYTES", 1)  # no rank keeps a block in its memory
    monkeypatch.setattr(feed, "AHEAD_STEPS", 1)  # readers are held back
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    settings = recipe(tmp_path, "kept", train={"max_steps": None, "num_epochs": 2})
    paths = [tmp_path / "chat.jsonl", tmp_path / "text.parquet"]
    sources = [{"path": str(path), "overlong": "truncate_right"} for path in paths]
    settings["data"] |= {"train": sources, "eval": [], "disk_cache_gb": 0.01}
    without = {**settings, "name": "again", "data": {**settings["data"], "disk_cache_gb": None}}
    kept, again = train_all([settings, without], 2)
    index = build_index([TrainSource.model_validate(one) for one in sources], ["chat", "text"])
    stored = int(index.block_bytes.sum())
    assert sum(step["data_read_bytes"] for step in kept.steps) == stored
    assert sum(step["data_read_bytes"] for step in again.steps) > 1.5 * stored
    assert kept.losses == again.losses
    assert sum(step["reader_idle_s"] for step in kept.steps) > 0


def test_a_held_out_fraction_is_measured_and_left_out_of_every_pass(tmp_path):
    """Of 60 rows about 45 are served in each of two passes, the same number in both, and the run ends with them."""
    train_for = {"max_steps": None, "num_epochs": 2}
    settings = recipe(tmp_path, "split", train=train_for, evaluate={"at_start": True, "at_end": True})
    settings["data"] |= {"train": [{**settings["data"]["train"][0], "weight": None}], "eval": {"fraction": 0.25}}
    run = train(settings, 2)
    [counts] = [line["sources"] for line in run.lines if line["kind"] == "data"]
    served, odd = divmod(counts["chat"]["rows"], 2)
    assert 30 < served < 60 and not odd
    before, after = evaluations(run)
    assert before.keys() == {"chat/loss"}
    assert after["chat/loss"] < before["chat/loss"]
    assert run.steps[-1]["progress"] == 1.0


def test_dropout_does_not_depend_on_the_layout(tmp_path):
    """With one micro-batch size, and a whole micro-batch for every rank, the same bins share a micro-batch."""
    changes: dict[str, Any] = {
        "adapter": {"type": "lora", "rank": 4, "dropout": 0.4},
        "data": {"sequence_length": 96},
    }
    runs = [train(recipe(tmp_path, f"world-{size}", **changes), size) for size in (1, 2, 3)]
    [without] = train_all([recipe(tmp_path, "without", **{**changes, "adapter": {"type": "lora", "rank": 4}})])
    for run in runs:
        assert run.losses == pytest.approx(runs[0].losses, rel=FP32_TOLERANCE)
        assert run.losses != pytest.approx(without.losses, rel=10 * FP32_TOLERANCE)


def test_dropout_repeats(tmp_path):
    """Bit for bit: nothing of it comes from anywhere but seed, step and bin."""
    changes = {"adapter": {"type": "lora", "rank": 4, "dropout": 0.1}}
    one, two = train_all([recipe(tmp_path, name, **changes) for name in ("one", "two")])
    assert one.losses == two.losses


def test_bfloat16_on_two_ranks(tmp_path):
    settings = {"model": {"dtype": "bfloat16"}}
    one = train(recipe(tmp_path, "one", **settings), 1)
    two = train(recipe(tmp_path, "two", **settings), 2)
    assert two.losses == pytest.approx(one.losses, rel=BF16_TOLERANCE)
    assert one.losses[-1] < one.losses[0]
    assert {value.dtype for value in weights(two).values()} == {torch.bfloat16}


def dtypes_after_a_step(rank: int, size: int, settings: dict[str, Any]) -> dict[str, tuple[bool, torch.dtype]]:
    """Whether each parameter is trained, and the dtype that this rank stores it in."""
    made = Rank.build(settings, World(rank=rank, size=size, local_rank=rank, local_size=size))
    batch = {name: torch.arange(16)[None] for name in ("input_ids", "position_ids", "targets")}
    made.engine.module.train()
    loss = made.engine.module(batch).sum()
    made.engine.backward(loss, 16.0, last_micro_batch=True)
    assert made.engine.step() > 0
    return {base_name(name): (p.requires_grad, p.dtype) for name, p in made.engine.module.named_parameters()}


@pytest.mark.parametrize("adapter", [None, {"type": "lora", "rank": 4}])
def test_masters_stay_fp32(tmp_path, adapter):
    """What is trained is stored in fp32 whatever it computes in; what is frozen takes only the memory it needs."""
    settings = recipe(tmp_path, "masters", model={"dtype": "bfloat16"}, adapter=adapter)
    for kinds in run_distributed(dtypes_after_a_step, 2, settings):
        assert {dtype for trained, dtype in kinds.values() if trained} == {torch.float32}
        frozen = {dtype for trained, dtype in kinds.values() if not trained}
        assert frozen == (set() if adapter is None else {torch.bfloat16})


def test_train_layers_freezes_the_others(tmp_path):
    patterns = ["model.layers.2.*", "lm_head.weight"]
    run = train(recipe(tmp_path, "some", model={"train_layers": patterns}), 2)
    before = load_file(tmp_path / "model" / "model.safetensors")
    after = weights(run)
    assert after.keys() == before.keys()
    for name, values in after.items():
        trained = name.startswith(("model.layers.2.", "lm_head."))
        assert torch.equal(values, before[name]) != trained, name


def test_activation_checkpointing_changes_nothing(tmp_path):
    """Bit for bit: the same kernels compute the same numbers twice."""
    plain, again = train_all(
        [
            recipe(tmp_path, "plain"),
            recipe(tmp_path, "again", train={"max_steps": 4, "activation_checkpointing": True}),
        ],
        2,
    )
    assert again.losses == plain.losses and again.grad_norms == plain.grad_norms
    assert all(torch.equal(value, weights(plain)[name]) for name, value in weights(again).items())


def test_activation_checkpointing_with_an_adapter(tmp_path):
    """Frozen embeddings give blocks inputs without gradients, on which re-entrant checkpointing would learn nothing;
    and dropout must fall the same way the second time."""
    changes = {"adapter": {"type": "lora", "rank": 4, "dropout": 0.1}}
    plain, again = train_all(
        [
            recipe(tmp_path, "plain", **changes),
            recipe(tmp_path, "again", train={"max_steps": 4, "activation_checkpointing": True}, **changes),
        ]
    )
    assert again.losses == plain.losses and again.grad_norms == plain.grad_norms
    assert len(set(again.losses)) == 4


def loss_norm_and_graphs(rank: int, size: int, settings: dict[str, Any]) -> tuple[float, float, int]:
    """Of one global batch of one packed sequence; and how many graphs were compiled for it."""
    made = Rank.build(settings, World(rank=rank, size=size, local_rank=rank, local_size=size))
    input_ids = torch.randint(307, (1, 32), generator=torch.Generator().manual_seed(6))
    positions = torch.cat([torch.arange(20), torch.arange(12)])[None]
    made.engine.module.train()
    loss = made.engine.module({"input_ids": input_ids, "position_ids": positions, "targets": input_ids}).sum()
    made.engine.backward(loss, 32.0, last_micro_batch=True)
    return float(loss.detach()), made.engine.step(), counters["stats"]["unique_graphs"]


def test_compiled_blocks(tmp_path):
    """Fused kernels round elsewhere, and learn the same. One block and one shape, because compiling takes long."""
    make_model(tmp_path / "one-block", num_hidden_layers=1)
    settings = recipe(tmp_path, "compiled", model={"path": str(tmp_path / "one-block")})
    [(*plain, none)] = run_distributed(loss_norm_and_graphs, 1, settings)
    settings["train"]["compile"] = True
    [(*compiled, graphs)] = run_distributed(loss_norm_and_graphs, 1, settings, timeout_s=600.0)
    assert compiled == pytest.approx(plain, rel=FP32_TOLERANCE)
    assert none == 0 and graphs > 0


def test_resharding_changes_nothing(tmp_path):
    """Keeping gathered weights costs memory, not numbers."""
    freed, kept = train_all(
        [
            recipe(tmp_path, "freed", strategy={"type": "fsdp"}),
            recipe(tmp_path, "kept", strategy={"type": "fsdp", "reshard_after_forward": False}),
        ],
        2,
    )
    assert kept.losses == freed.losses


def test_weight_decay_spares_vectors(tmp_path):
    """With gradients too small to matter beside it, decay is all that happens: to matrices by exactly its factor, to
    norms not at all."""
    settings = {"learning_rate": 1e-3, "lr_scheduler": "constant", "max_steps": 1, "eps": 1e30, "weight_decay": 0.5}
    run = train(recipe(tmp_path, "decay", train=settings), 2)
    before = load_file(tmp_path / "model" / "model.safetensors")
    for name, values in weights(run).items():
        expected = before[name] * (1 - 1e-3 * 0.5) if values.ndim > 1 else before[name]
        torch.testing.assert_close(values, expected, rtol=1e-6, atol=1e-9, msg=name)
