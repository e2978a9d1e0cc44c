"""Tensors cut into what files hold, and joined again: for any shards, and as transformers itself does it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from families import tiny_config
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from ftlaunch.distributed.checkpoint.fragments import Fragment, TensorSpec
from ftlaunch.distributed.stored_layout import Piece, StoredLayout, layout_of
from ftlaunch.recipes.errors import UserError


class Held:
    """A `FragmentReader` of tensors in memory."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors

    def names(self) -> Sequence[str]:
        return list(self.tensors)

    def spec(self, name: str) -> TensorSpec:
        return TensorSpec(name, tuple(self.tensors[name].shape), "F32")

    def read(self, name: str, ranges: Sequence[tuple[int, int]]) -> torch.Tensor:
        flat = self.tensors[name].flatten()
        return torch.cat([flat[start:stop] for start, stop in ranges]) if ranges else flat[:0]


@st.composite
def ranges(draw, count: int):
    cuts = sorted(draw(st.lists(st.integers(0, count), max_size=8, unique=True)))
    return tuple(zip(cuts[::2], cuts[1::2], strict=False))


@given(st.data())
def test_any_ranges_are_cut_and_joined(data):
    sizes = data.draw(st.lists(st.integers(0, 7), min_size=1, max_size=6))
    count = sum(sizes)
    whole = torch.arange(float(count))
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    pieces = [Piece(f"p{n}", (size,), start) for n, (size, start) in enumerate(zip(sizes, starts, strict=True))]
    layout = StoredLayout({"w": pieces}, {"w": (count,)})
    held = data.draw(ranges(count))
    values = torch.cat([whole[start:stop] for start, stop in held]) if held else whole[:0]
    cut = list(layout.cut([Fragment(TensorSpec("w", (count,), "F32"), held, values, replicas=3)]))
    assert [one.spec.name for one in cut] == [piece.name for piece in pieces], "the same on every rank"
    stored = {piece.name: torch.full((piece.shape[0],), -1.0) for piece in pieces}
    for one in cut:
        assert one.replicas == 3
        at = 0
        for start, stop in one.ranges:
            stored[one.spec.name][start:stop] = one.values[at : at + stop - start]
            at += stop - start
        assert at == len(one.values)
    expected = torch.full((count,), -1.0)
    for start, stop in held:
        expected[start:stop] = whole[start:stop]
    assert torch.equal(torch.cat([stored[piece.name] for piece in pieces]), expected)
    full = {piece.name: whole[piece.start : piece.stop] for piece in pieces}
    reader = layout.joined(Held(full))
    assert reader.names() == ["w"]
    assert reader.spec("w").shape == (count,)
    asked = data.draw(ranges(count))
    assert reader.read("w", asked).tolist() == [number for start, stop in asked for number in range(start, stop)]


FAMILIES = ["mixtral", "qwen3_moe", "olmoe", "gpt_neox", "minimax_m2", "llama", "glm4_moe", "deepseek_v3"]


@pytest.mark.parametrize("family", FAMILIES)
def test_files_hold_what_transformers_would_write(family):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(family))
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in model.state_dict()}
    tensors = {name: tensor.detach() for name, tensor in (*model.named_parameters(), *buffers.items())}
    assert bool(buffers) == (family in ("minimax_m2", "glm4_moe", "deepseek_v3"))
    layout = layout_of(model)
    assert bool(layout.pieces) == (family != "llama")
    specs = {name: TensorSpec(name, tuple(tensor.shape), "F32") for name, tensor in tensors.items()}
    fragments = [Fragment(specs[name], ((0, tensor.numel()),), tensor.flatten()) for name, tensor in tensors.items()]
    ours = {one.spec.name: one.values.view(one.spec.shape) for one in layout.cut(fragments)}
    theirs = revert_weight_conversion(model, dict(tensors))
    assert ours.keys() == theirs.keys() == set(layout.names(tensors))
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    joined = layout.joined(Held(ours))
    assert set(joined.names()) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(joined.read(name, ((0, tensor.numel()),)).view(tensor.shape), tensor)


def test_what_is_no_range_of_a_tensor_is_refused():
    config = AutoConfig.for_model(
        "hrm_text", vocab_size=64, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=4
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UserError, match=r"'hrm_text' are merged or permuted by transformers when loaded \(model\."):
        layout_of(model)
