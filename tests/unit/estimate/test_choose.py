"""`strategy: {type: auto}`: the decision as a table, over models of real sizes."""

from __future__ import annotations

import pytest

from ftlaunch.distributed.estimate.choose import USABLE, choose, possible
from ftlaunch.distributed.estimate.memory import estimate
from ftlaunch.distributed.estimate.outline import Held, make_outline
from ftlaunch.distributed.estimate.remedies import advice, remedies
from ftlaunch.distributed.estimate.setting import Room, Setting
from ftlaunch.recipes.schema import Recipe

GIB = 2**30


def llama(hidden: int, inner: int, layers: int, vocabulary: int = 128_256, heads: int = 32, keys: int = 8):
    """The outline of a Llama."""
    size = hidden // heads
    block = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (keys * size, hidden),
        "self_attn.v_proj": (keys * size, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    tensors = [
        Held(f"model.layers.{n}.{name}.weight", shape, True) for n in range(layers) for name, shape in block.items()
    ]
    tensors += [Held(f"{name}.weight", (vocabulary, hidden), True, True) for name in ("model.embed_tokens", "lm_head")]
    tensors.append(Held("model.norm.weight", (hidden,), True))
    config = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
              "num_key_value_heads": keys, "intermediate_size": inner, "vocab_size": vocabulary}  # fmt: skip
    return make_outline(tensors, config)


ONE_B = llama(2048, 8192, 16)
EIGHT_B = llama(4096, 14_336, 32)
SEVENTY_B = llama(8192, 28_672, 80, heads=64)


def recipe(**sections) -> Recipe:
    sections = {"strategy": {"type": "auto"}, **sections}
    train = {"activation_checkpointing": True, **sections.pop("train", {})}
    return Recipe.model_validate(
        {"name": "a", "model": {"path": "a"}, "data": {"train": [{"path": "a"}]}, "train": train, **sections}
    )


def room(device: float, host: float = 1000, **more) -> Room:
    return Room(int(device * GIB), int(host * GIB), **more)


FSDP, BY_NODE = {"type": "fsdp"}, {"type": "fsdp", "shard": "node"}
AWAY = {"type": "fsdp", "offload": "cpu"}
ZERO_2 = {"type": "deepspeed", "stage": 2, "offload_optimizer": "cpu"}
ZERO_3 = {"type": "deepspeed", "stage": 3, "offload_optimizer": "cpu"}


@pytest.mark.parametrize(
    ("outline", "ranks", "nodes", "where", "strategy"),
    [
        (ONE_B, 1, 1, room(80), {"type": "ddp"}),
        (ONE_B, 8, 1, room(80), {"type": "ddp"}),
        (ONE_B, 8, 1, room(24), FSDP),
        (EIGHT_B, 8, 1, room(80), FSDP),
        (EIGHT_B, 16, 2, room(80), BY_NODE),
        (EIGHT_B, 16, 2, room(24), FSDP),
        (EIGHT_B, 16, 16, room(80), FSDP),  # a rank a node: nothing to share within one
        (EIGHT_B, 1, 1, room(80), ZERO_2),
        (EIGHT_B, 1, 1, room(80, has_deepspeed=False), AWAY),
        (EIGHT_B, 4, 1, room(26), ZERO_2),
        (EIGHT_B, 4, 1, room(20), ZERO_3),
        (EIGHT_B, 4, 1, room(24, has_deepspeed=False), AWAY),
        (SEVENTY_B, 8, 1, room(80), ZERO_3),
        (SEVENTY_B, 8, 1, room(80, host=150), AWAY),
        (SEVENTY_B, 64, 8, room(80), FSDP),
    ],
)
def test_the_first_that_fits(outline, ranks, nodes, where, strategy):
    choice = choose(recipe(), outline, Setting(ranks, nodes), where)
    assert choice.fits
    assert choice.strategy == recipe(strategy=strategy).strategy
    assert choice.memory.total <= USABLE * where.device_bytes
    assert not any(
        tried.memory.total <= USABLE * where.device_bytes and tried.memory.offloaded <= where.host_bytes
        for tried in choice.tried[:-1]
    )
    assert choice.memory == estimate(recipe(strategy=strategy), outline, Setting(ranks, nodes))


def test_why_names_what_was_not_taken():
    choice = choose(recipe(), EIGHT_B, Setting(8), room(80))
    assert str(choice).startswith("strategy auto: fsdp: it fits when all ranks share it (about ")
    assert "of 68.0 GiB that may be used" in str(choice)
    assert "ddp would take 1" in str(choice)


def test_nothing_is_offloaded_where_there_is_no_room_on_the_host_for_it():
    full = choose(recipe(), EIGHT_B, Setting(1), room(80, host=60))
    assert not full.fits
    assert "nothing fits by the estimate" in str(full)
    assert full.memory.offloaded == 0


def test_the_leanest_is_tried_where_nothing_fits():
    choice = choose(recipe(), SEVENTY_B, Setting(8), room(10))
    assert not choice.fits
    assert choice.memory.total == min(tried.memory.total for tried in choice.tried)


def test_a_cpu_has_nothing_to_offload_to():
    kinds = [candidate.strategy.type for candidate in possible(recipe(), Setting(2, 1, "cpu"), room(80))]
    assert kinds == ["ddp", "fsdp"]


@pytest.mark.parametrize(
    "sections",
    [
        {"train": {"optimizer": "muon"}},
        {"adapter": {"type": "qlora"}},
    ],
)
def test_deepspeed_is_left_out_where_the_recipe_is_not_for_it(sections):
    kinds = {candidate.strategy.type for candidate in possible(recipe(**sections), Setting(2), room(80))}
    assert kinds == {"ddp", "fsdp"}


def test_a_recipe_that_is_compiled_keeps_stage_2():
    strategies = [c.strategy for c in possible(recipe(train={"compile": True}), Setting(2), room(80))]
    assert [s.stage for s in strategies if s.type == "deepspeed"] == [2]


def test_the_key_counts_where_it_is_less_than_there_is():
    def chosen(memory_gb: float | None, device: float) -> str:
        one = recipe(strategy={"type": "auto", "memory_gb": memory_gb})
        return choose(one, ONE_B, Setting(8), room(device)).strategy.type

    assert [chosen(None, 80), chosen(25, 80), chosen(80, 24), chosen(200, 80)] == ["ddp", "fsdp", "fsdp", "ddp"]


def test_nothing_is_recomputed_in_silence():
    """A choice changes the strategy and nothing else of the recipe."""
    without = recipe(train={"activation_checkpointing": False, "micro_batch_size": 8})
    choice = choose(without, EIGHT_B, Setting(8), room(80))
    assert choice.memory.activations > 40 * GIB
    assert not choice.fits or choice.memory.total <= USABLE * 80 * GIB


def test_under_auto_a_remedy_is_what_lets_something_fit():
    """Under another strategy perhaps than the leanest, which is tried where nothing fits."""
    train = {"activation_checkpointing": False, "micro_batch_size": 4}
    busy = recipe(train=train, data={"train": [{"path": "a"}], "sequence_length": 4096})
    assert not choose(busy, EIGHT_B, Setting(8), room(80)).fits
    found = {remedy.change: remedy for remedy in remedies(busy, EIGHT_B, Setting(8), room(80))}
    assert found["train.activation_checkpointing: true"].strategy == "fsdp"
    assert all(remedy.memory.total <= USABLE * 80 * GIB for remedy in found.values())
    assert not [change for change in found if change.startswith("strategy")]
    assert "  train.activation_checkpointing: true: fsdp, " in advice(busy, EIGHT_B, Setting(8), room(80))
