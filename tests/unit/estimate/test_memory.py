"""The estimate's arithmetic: what each strategy keeps, what a micro-batch leaves, and when a rank is fullest.

`benchmarks/plan_memory.py` holds it against what runs really take.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from ftlaunch.distributed.estimate.activations import activations
from ftlaunch.distributed.estimate.layouts import LAYOUTS, layout_of
from ftlaunch.distributed.estimate.memory import estimate
from ftlaunch.distributed.estimate.outline import Held, Unit, make_outline
from ftlaunch.distributed.estimate.remedies import advice, remedies
from ftlaunch.distributed.estimate.setting import Room, Setting
from ftlaunch.distributed.loss_model import LOGITS_BYTES
from ftlaunch.distributed.strategies.deepspeed import BUCKET_ELEMENTS
from ftlaunch.distributed.strategies.table import STRATEGIES
from ftlaunch.recipes.schema import Recipe

HIDDEN, INNER, LAYERS, VOCABULARY = 96, 256, 3, 1000
CONFIG = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2,
          "intermediate_size": INNER, "vocab_size": VOCABULARY}  # fmt: skip
BLOCK = 3 * HIDDEN * HIDDEN + 3 * HIDDEN * INNER
REST = 2 * VOCABULARY * HIDDEN
P = LAYERS * BLOCK + REST


def make(trained: bool = True):
    tables = [Held(name, (VOCABULARY, HIDDEN), trained, True) for name in ("embed.weight", "lm_head.weight")]
    shapes = {"q": (HIDDEN, HIDDEN), "k": (HIDDEN // 2, HIDDEN), "v": (HIDDEN // 2, HIDDEN), "o": (HIDDEN, HIDDEN),
              "gate": (INNER, HIDDEN), "up": (INNER, HIDDEN), "down": (HIDDEN, INNER)}  # fmt: skip
    blocks = [Held(f"layers.{n}.{name}.weight", s, trained) for n in range(LAYERS) for name, s in shapes.items()]
    return make_outline([*tables, *blocks], CONFIG)


def recipe(**sections) -> Recipe:
    data = {"train": [{"path": "a"}], "sequence_length": 128, **sections.pop("data", {})}
    train = {"global_batch_size": 64, **sections.pop("train", {})}
    return Recipe.model_validate({"name": "a", "model": {"path": "a"}, "data": data, "train": train, **sections})


def zero(stage: int, **more):
    return {"type": "deepspeed", "stage": stage, **more}


OUTLINE = make()


def test_every_strategy_has_a_layout():
    assert LAYOUTS.keys() == STRATEGIES.keys()


def test_the_constants_are_those_of_the_ranks():
    from ftlaunch.distributed.estimate import activations as ours
    from ftlaunch.distributed.estimate import layouts

    assert ours.LOGITS_BYTES == LOGITS_BYTES
    assert layouts.BUCKET_ELEMENTS == BUCKET_ELEMENTS


@pytest.mark.parametrize(
    ("strategy", "ranks", "nodes", "weights", "gradients", "optimizer", "offloaded"),
    [
        ({"type": "ddp"}, 4, 1, 4 * P, 4 * P, 8 * P, 0),
        ({"type": "fsdp"}, 4, 1, P, P, 2 * P, 0),
        ({"type": "fsdp", "shard": "node"}, 8, 4, 2 * P, 2 * P, 4 * P, 0),
        ({"type": "fsdp", "offload": "cpu"}, 4, 1, 0, 0, 0, 4 * P),
        (zero(1), 4, 1, 3 * P, 4 * P, 2 * P, 0),  # 2 bytes whole, 4 of a quarter
        (zero(2), 4, 1, 3 * P, P, 2 * P, 0),
        (zero(3), 4, 1, 1.5 * P, P, 2 * P, 0),
        (zero(2, offload_optimizer="cpu"), 4, 1, 2 * P, 0, 0, 5.5 * P + 2 * VOCABULARY * HIDDEN),
        (zero(3, offload_optimizer="cpu", offload_param="cpu"), 4, 1, 0, 0, 0, 5.5 * P),
    ],
    ids=str,
)
def test_what_stays_on_a_rank(strategy, ranks, nodes, weights, gradients, optimizer, offloaded):
    one, setting = recipe(strategy=strategy), Setting(ranks, nodes)
    layout, memory = layout_of(one, OUTLINE, setting), estimate(one, OUTLINE, setting)
    assert (layout.weights, layout.gradients) == (weights, gradients)
    assert memory.optimizer == optimizer
    assert memory.offloaded == offloaded


def test_gathered_blocks_are_those_at_work_or_all_of_them():
    half = recipe(model={"path": "a", "dtype": "bfloat16"})
    fsdp, ddp = layout_of(half, OUTLINE, Setting(4)), layout_of(recipe(strategy={"type": "ddp"}), OUTLINE, Setting(4))
    kept = layout_of(recipe(strategy={"type": "fsdp", "reshard_after_forward": False}), OUTLINE, Setting(4))
    assert fsdp.always == ddp.always == 2 * REST
    assert (fsdp.copies, ddp.copies, kept.copies) == (0, 2 * LAYERS * BLOCK, 2 * LAYERS * BLOCK)
    # Gathered, the next one fetched, and what a third of its gradients takes.
    assert fsdp.block == pytest.approx(2 * (2 + 1 / 3) * BLOCK)


def test_one_rank_in_float32_gathers_nothing():
    one = recipe(model={"path": "a", "dtype": "float32"})
    for strategy in ("ddp", "fsdp"):
        layout = layout_of(
            one.model_copy(update={"strategy": recipe(strategy={"type": strategy}).strategy}), OUTLINE, Setting(1)
        )
        assert (layout.weights, layout.always, layout.copies, layout.block, layout.last) == (4 * P, 0, 0, 0, 0)


def test_activations_grow_with_tokens_and_fall_when_they_are_recomputed():
    def saved(**train) -> float:
        return activations(recipe(train=train), OUTLINE, Setting(1)).saved

    assert saved(micro_batch_size=2) == 2 * saved()
    assert saved(activation_checkpointing=True) < saved() / 3
    again = activations(recipe(train={"activation_checkpointing": True}), OUTLINE, Setting(1))
    assert again.work > activations(recipe(), OUTLINE, Setting(1)).work


def test_masks_of_packed_samples_grow_with_the_square_of_the_length():
    def masks(device: str, length: int, **data) -> float:
        one = recipe(data={"sequence_length": length, **data})
        return activations(one, OUTLINE, Setting(1, 1, device)).saved

    assert masks("cpu", 512, packing=False) == masks("cuda", 512, packing=False) == masks("cuda", 512)
    extra = masks("cpu", 512) - masks("cuda", 512)
    assert masks("cpu", 1024) - masks("cuda", 1024) > 2 * extra


def test_eager_attention_saves_the_scores_of_all_heads():
    def saved(attention: str) -> float:
        one = recipe(model={"path": "a", "attention": attention}, data={"packing": False})
        return activations(one, OUTLINE, Setting(1)).saved

    assert saved("eager") - saved("sdpa") == 6 * 4 * 128 * 128 * LAYERS


def test_a_model_that_changes_its_logits_holds_them_all():
    capped = replace(OUTLINE, widths=replace(OUTLINE.widths, changes_logits=True))
    assert activations(recipe(), capped, Setting(1)).loss == 128 * VOCABULARY * 14


def test_dropout_of_an_adapter_keeps_its_inputs():
    adapted = replace(make(trained=False), adapted=7 * HIDDEN * LAYERS, adapter_ranks=7 * LAYERS * 4)

    def saved(dropout: float) -> float:
        return activations(recipe(adapter={"rank": 4, "dropout": dropout}), adapted, Setting(1)).saved

    assert saved(0.1) - saved(0.0) == pytest.approx(3 * 128 * 7 * HIDDEN * LAYERS, abs=1)


def test_the_fullest_moment_depends_on_what_there_is_most_of():
    long, short = recipe(data={"sequence_length": 8192}), recipe(data={"sequence_length": 8})
    assert estimate(short, OUTLINE, Setting(4)).moment == "the reduction of gradients"
    small = replace(OUTLINE, blocks=(Unit(trained=10),) * LAYERS)
    assert estimate(short, small, Setting(4)).moment == "the end of the backward pass"
    assert estimate(long, OUTLINE, Setting(4)).moment in ("the loss", "the backward pass of a block")
    memory = estimate(long, OUTLINE, Setting(4))
    assert memory.activations == max(memory.parts.values()) > 0.5 * memory.total
    assert memory.total == sum(memory.parts.values())


def test_gradients_wait_for_the_next_micro_batch_only_where_there_is_one():
    def gradients(global_batch_size: int) -> int:
        one = recipe(data={"sequence_length": 8192}, train={"global_batch_size": global_batch_size})
        return estimate(one, OUTLINE, Setting(4)).gradients

    assert (gradients(4), gradients(8)) == (0, P)


def test_copies_of_what_is_saved_are_shared_out():
    whole = estimate(recipe(), OUTLINE, Setting(1)).staging
    assert whole == (2 + 4 + 8) * P
    assert estimate(recipe(), OUTLINE, Setting(4)).staging == whole / 4
    assert estimate(recipe(checkpoint={"mode": "sync"}), OUTLINE, Setting(1)).staging == 0


def test_weights_in_4_bits():
    packed = Unit().with_tensor(Held("a", (64, 64), False, packed_bytes=64 * 36)).with_tensor(Held("b", (64,), False))
    assert (packed.frozen, packed.packed, packed.unpacked) == (64, 64 * 36, 4096)


def test_no_outline_without_widths():
    assert make_outline([], {"model_type": "odd"}) is None


# --- what helps -----------------------------------------------------------------------------------------------------


def changes(one: Recipe, setting: Setting = Setting(4)) -> dict[str, int]:  # noqa: B008 - frozen
    return {remedy.change: remedy.memory.total for remedy in remedies(one, OUTLINE, setting, Room(None))}


def test_remedies_by_what_takes_most():
    busy = recipe(train={"micro_batch_size": 8}, data={"sequence_length": 4096})
    found, now = changes(busy), estimate(busy, OUTLINE, Setting(4)).total
    assert list(found)[:3] == [
        "train.micro_batch_size: 4",
        "train.micro_batch_size: 1",
        "train.activation_checkpointing: true",
    ]
    assert all(total < now for total in found.values())
    heavy = changes(recipe(strategy={"type": "ddp"}, data={"sequence_length": 8}))
    assert "train.activation_checkpointing: true" not in heavy
    assert {"strategy: {type: fsdp}", "adapter: {type: lora}", "train.optimizer: adamw_8bit"} <= set(heavy)
    assert "strategy: {type: fsdp, offload: cpu}" in heavy


def test_remedies_of_a_cpu_offload_nothing():
    assert not [change for change in changes(recipe(strategy={"type": "ddp"}), Setting(4, 1, "cpu")) if "cpu" in change]


def test_a_remedy_is_what_the_changed_recipe_takes():
    busy = recipe(train={"micro_batch_size": 8}, data={"sequence_length": 4096})
    half = recipe(train={"micro_batch_size": 4}, data={"sequence_length": 4096})
    assert changes(busy)["train.micro_batch_size: 4"] == estimate(half, OUTLINE, Setting(4)).total


def test_advice_names_the_largest_part_and_the_changes():
    busy = recipe(train={"micro_batch_size": 8}, data={"sequence_length": 4096})
    text = advice(busy, OUTLINE, Setting(4), Room(2**30))
    assert "of 1.0 GiB in" in text
    assert "most of it activations (" in text
    assert "  train.micro_batch_size: 4: " in text
    assert "  train.micro_batch_size: 1 and train.activation_checkpointing: true: " in text
