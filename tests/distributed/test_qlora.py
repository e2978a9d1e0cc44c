"""QLoRA: a base in 4 bits learns what transformers' and peft's own learns, at every layout, and needs its memory."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from harness import run_distributed
from logits import engine_logits, logits
from one_rank import Rank
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import make_model, recipe_for
from torch import Tensor, nn
from torch.nn import functional as F
from training import Trained, train, train_all, world_of
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from ftlaunch.distributed.checkpoint.reader import CheckpointReader, read_whole
from ftlaunch.distributed.model import build_model
from ftlaunch.distributed.model_files import find_model
from ftlaunch.distributed.quantized import BLOCK, Linear4bit, Packing, QuantizingReader, pack, unpack
from ftlaunch.recipes.errors import UserError
from ftlaunch.recipes.schema import Recipe

TOLERANCE = 1e-5
"""Relative, of losses, as for every layout; absolute, of logits around 1, in fp32: the same kernels, the same codes."""

WHOLE_BLOCKS = {"hidden_size": 64, "intermediate_size": 128}
"""Rows that 64 divides, so that our blocks are bitsandbytes' own. Elsewhere rows are of 40 and 52."""


def recipe(folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    shared: dict[str, Any] = {
        "name": name,
        "adapter": {"type": "qlora", "rank": 3, "alpha": 6},
        "evaluate": {"at_start": False, "at_end": False},
        "checkpoint": {"every_steps": None},
        "train": {"max_steps": 4, "learning_rate": 1e-2, "lr_scheduler": "constant"},
    }
    return recipe_for(folder, **shared | changes)


def in_4_bits(path: Path | str, dtype: torch.dtype = torch.float32) -> Any:
    """As transformers opens it, with its products computed in `dtype`: bitsandbytes' own take bf16 on a CPU."""
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=config, dtype=dtype, device_map="cpu")
    layers = [(name, module) for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"]
    assert len(layers) == 3 * 7
    for name, layer in layers:
        linear = nn.Linear(layer.in_features, layer.out_features, bias=False)
        weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(dtype)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, linear)
    del model.hf_quantizer, model.config.quantization_config
    model.is_quantized = model.is_loaded_in_4bit = False
    return model


@pytest.mark.parametrize("shape", [(7, 40), (1, 64), (33, 200)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_quantised_by_themselves(shape, dtype):
    """Whatever else is quantised with them; and a second time nothing changes."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 3, shape[0])[:, None]
    weight = weight.to(dtype).float()
    packed = pack(weight, dtype)
    assert packed.shape == Packing(*shape, dtype).shape and packed.dtype == dtype
    again = unpack(packed, shape[1], torch.float32)
    # NF4's codes are at most 0.30 apart, of a block's largest element.
    scales = torch.stack([part.abs().amax(1) for part in weight.split(BLOCK, 1)], 1).repeat_interleave(BLOCK, 1)
    assert ((again - weight).abs() <= 0.16 * scales[:, : shape[1]]).all()
    for row in range(0, shape[0], 5):
        assert torch.equal(unpack(pack(weight[row : row + 1], dtype), shape[1], torch.float32)[0], again[row])
    assert torch.equal(unpack(pack(again, dtype), shape[1], torch.float32), again)


def test_a_reader_gives_any_range(tmp_path):
    """Also ranges that end within a row, as flat partitions do; other tensors come as they are."""
    folder = make_model(tmp_path / "model")
    reader, name = CheckpointReader(str(folder)), "model.layers.1.mlp.up_proj.weight"
    packing = Packing(52, 40, torch.bfloat16)
    quantizing = QuantizingReader(reader, {name: packing}, "cpu")
    whole = pack(read_whole(reader, name), torch.bfloat16).flatten().view(torch.int16)
    width = packing.shape[1]
    for ranges in ([(0, 52 * width)], [(3 * width, 5 * width)], [(7, 2 * width + 1), (40 * width - 3, 40 * width + 3)]):
        expected = torch.cat([whole[start:stop] for start, stop in ranges])
        assert torch.equal(quantizing.read(name, ranges).view(torch.int16), expected)
    assert quantizing.spec(name).shape == packing.shape
    other = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(quantizing.read(other, [(5, 9)]), reader.read(other, [(5, 9)]))
    assert quantizing.spec(other) == reader.spec(other)


def plain_losses(path: str, start: dict[str, Tensor], steps: int) -> list[float]:
    """transformers' base in 4 bits with peft's adapter, from our draw, by a plain loop."""
    config = LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(in_4_bits(path), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.copy_(start[name])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    losses = []
    for step in range(steps):
        ids = probe(step)
        answer = model(input_ids=ids).logits[:, :-1]
        loss = F.cross_entropy(answer.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum") / ids[:, 1:].numel()
        loss.backward()
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def probe(step: int) -> Tensor:
    return torch.randint(307, (2, 24), generator=torch.Generator().manual_seed(step))


def our_losses(rank: int, size: int, settings: dict[str, Any], steps: int) -> tuple[dict[str, Any], list[float]]:
    """Adapter at the start, and losses of the same batches; every rank takes all of them."""
    made = Rank.build(settings, world_of(rank, (size,)))
    named = made.engine.module.named_parameters()
    start = {name.removeprefix("model."): p.detach().numpy().copy() for name, p in named if "lora_A" in name}
    made.engine.set_learning_rate(1e-2)
    losses = []
    for step in range(steps):
        ids = probe(step)
        targets = torch.full_like(ids, -100)
        targets[:, :-1] = ids[:, 1:]
        batch = {"input_ids": ids, "position_ids": torch.arange(24).expand(2, -1), "targets": targets}
        made.engine.module.train()
        loss = made.engine.module(batch).sum()
        made.engine.backward(loss, float(ids[:, 1:].numel()), last_micro_batch=True)
        losses.append(float(loss.detach()) / ids[:, 1:].numel())
        made.engine.step()
    return start, losses


def test_it_learns_what_transformers_and_peft_learn(tmp_path):
    folder = make_model(tmp_path / "whole", **WHOLE_BLOCKS)
    settings = recipe(tmp_path, "steps", model={"path": str(folder)})
    [(start, ours)] = run_distributed(our_losses, 1, settings, 4)
    theirs = plain_losses(str(folder), {name: torch.from_numpy(value) for name, value in start.items()}, 4)
    assert ours[0] == pytest.approx(theirs[0], rel=TOLERANCE)
    # AdamW turns rounding of gradients near zero into changes of weights.
    assert ours == pytest.approx(theirs, rel=2e-4)
    assert len(set(ours)) == 4


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trained]:
    folder = tmp_path_factory.mktemp("qlora")
    return folder, train(recipe(folder, "alone"))


LAYOUTS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "ddp": ({"type": "ddp"}, (2,)),
    "fsdp": ({"type": "fsdp"}, (3,)),
    "hybrid-offload": ({"type": "fsdp", "shard": "node", "offload": "cpu"}, (2, 2)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_loss_does_not_depend_on_the_layout(alone, layout):
    folder, one = alone
    strategy, nodes = LAYOUTS[layout]
    run = train(recipe(folder, layout, strategy=strategy), sum(nodes), ranks_per_node=nodes)
    assert run.losses == pytest.approx(one.losses, rel=TOLERANCE)
    assert run.grad_norms == pytest.approx(one.grad_norms, rel=5 * TOLERANCE)
    assert one.losses[-1] < one.losses[0]


def test_it_is_another_base_than_the_whole_one(alone):
    folder, one = alone
    [whole] = train_all([recipe(folder, "whole", adapter={"type": "lora", "rank": 3, "alpha": 6})])
    assert whole.losses != pytest.approx(one.losses, rel=10 * TOLERANCE)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_adapter_opens_on_the_base_in_4_bits(tmp_path, dtype):
    """With transformers' own quantisation it says what the engine says. In bf16 both round every activation to 2^-9 of
    it, in other kernels; that adds up over three layers as the root of some ten roundings."""
    folder = make_model(tmp_path / "whole", **WHOLE_BLOCKS)
    settings = recipe(tmp_path, "opened", model={"path": str(folder), "dtype": dtype})
    run = train(settings, 2)
    typed = getattr(torch, dtype)
    model = PeftModel.from_pretrained(in_4_bits(folder, typed), run.checkpoint, autocast_adapter_dtype=False)
    ours, theirs, base = engine_logits(settings, run), logits(model), logits(in_4_bits(folder, typed))
    tolerance = TOLERANCE if dtype == "float32" else 2**-9 * 10**0.5
    assert (ours - theirs).norm() <= tolerance * theirs.norm()
    assert (base - theirs).norm() > 10 * tolerance * theirs.norm()


def test_a_run_goes_on_at_another_world_size(alone):
    folder, one = alone
    settings = recipe(folder, "moved")
    train({**settings, "train": {**settings["train"], "max_steps": 2}}, 3)
    assert train(settings, 2).losses == pytest.approx(one.losses, rel=TOLERANCE)


def bytes_of_weights(rank: int, size: int, settings: dict[str, Any]) -> tuple[int, int]:
    """Of the quantised layers on this rank, and how many parameters those stand for."""
    module = Rank.build(settings, world_of(rank, (size,))).engine.module
    layers = [layer for layer in module.modules() if isinstance(layer, Linear4bit)]
    local = [getattr(layer.weight, "_local_tensor", layer.weight) for layer in layers]
    return sum(t.numel() * t.element_size() for t in local), sum(x.in_features * x.out_features for x in layers)


def test_memory(tmp_path):
    """4.5 bits a weight, shared out over ranks."""
    folder = make_model(tmp_path / "whole", **WHOLE_BLOCKS)
    settings = recipe(tmp_path, "memory", model={"path": str(folder), "dtype": "bfloat16"})
    held = run_distributed(bytes_of_weights, 2, settings)
    [number] = {parameters for _, parameters in held}
    assert number == 3 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128)
    assert sum(size for size, _ in held) == number * 4.5 / 8


def typed_recipe(folder: Path) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "refused",
            "model": {"path": str(folder)},
            "data": {"train": [{"path": "nowhere.jsonl"}]},
            "adapter": {"type": "qlora"},
        }
    )


def test_a_missing_library_is_said(tmp_path, monkeypatch):
    folder = make_model(tmp_path / "model")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match="qlora needs bitsandbytes"):
        build_model(typed_recipe(folder), find_model(str(folder)))


def test_weights_of_another_shape_are_named(tmp_path):
    """As without quantisation (`check_base`)."""
    from ftlaunch.distributed.weights import check_base

    folder, other = make_model(tmp_path / "model"), make_model(tmp_path / "other", intermediate_size=56)
    built = build_model(typed_recipe(folder), find_model(str(folder)))
    with pytest.raises(UserError, match=r"layers\.0\.mlp\.gate_proj\.weight is \(56, 40\) in the files"):
        check_base(built, QuantizingReader(CheckpointReader(str(other)), built.packed, "cpu"))
