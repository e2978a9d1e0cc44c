"""File layout, held against the real safetensors library."""

from __future__ import annotations

import json
import struct

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from ftlaunch.distributed.checkpoint.fragments import TensorSpec
from ftlaunch.distributed.checkpoint.layout import (
    DTYPES,
    FILES_AT_ONCE,
    num_bytes,
    open_folder,
    plan_file,
    plan_files,
    read_header,
)
from ftlaunch.recipes.errors import UserError

SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
BY_SIZE = ["I64", "F32", "BF16", "BOOL"]
SPECS = st.lists(
    st.builds(
        TensorSpec, st.text('abc.é"\\', min_size=1, max_size=8), SHAPES, st.sampled_from(["F32", "BF16", "BOOL", "I64"])
    ),
    unique_by=lambda spec: spec.name,
    max_size=12,
)


def zeros(spec):
    return torch.zeros(spec.shape, dtype=getattr(torch, DTYPES[spec.dtype].torch_name))


@pytest.mark.parametrize("name", DTYPES)
def test_dtypes_are_those_of_torch_and_safetensors(name):
    tensor = torch.zeros(3, dtype=getattr(torch, DTYPES[name].torch_name))
    assert tensor.itemsize == DTYPES[name].itemsize
    stored = safetensors.torch.save({"t": tensor})
    assert json.loads(stored[8 : 8 + struct.unpack("<Q", stored[:8])[0]])["t"]["dtype"] == name


@given(SPECS)
def test_a_header_is_byte_for_byte_that_of_the_library(specs):
    # The library orders by dtype, then by name; ours keeps the caller's order among elements of one size.
    rank = list(DTYPES)
    specs = sorted(specs, key=lambda s: (DTYPES[s.dtype].itemsize, rank.index(s.dtype)), reverse=True)
    specs = [
        s
        for size in ("I64", "F32", "BF16", "BOOL")
        for s in sorted(specs, key=lambda s: s.name.encode())
        if s.dtype == size
    ]
    file = plan_file("model.safetensors", specs)
    stored = safetensors.torch.save({spec.name: zeros(spec) for spec in specs}, {"format": "pt"})
    assert file.size == len(stored)
    assert file.header == stored[: len(file.header)]


@given(SPECS, st.integers(1, 200))
def test_a_plan_holds_every_tensor_once_and_keeps_the_limit(specs, max_file_bytes):
    plan = plan_files(specs, stem="model", max_file_bytes=max_file_bytes)
    assert sorted(plan.places) == sorted(spec.name for spec in specs)
    for file in plan.files:
        used = sum(num_bytes(tensor.spec) for tensor in file.tensors)
        assert used <= max_file_bytes or sum(num_bytes(tensor.spec) > 0 for tensor in file.tensors) == 1
        assert file.size == len(file.header) + used
        for tensor in file.tensors:
            assert tensor.start % DTYPES[tensor.spec.dtype].itemsize == 0
    assert plan == plan_files(specs, stem="model", max_file_bytes=max_file_bytes)


def test_names_and_index_are_those_of_transformers():
    specs = [TensorSpec(f"w{i}", (4,), "F32") for i in range(4)]
    one = plan_files(specs, stem="model")
    assert [file.name for file in one.files] == ["model.safetensors"]
    assert one.index() is None
    two = plan_files(specs, stem="model", max_file_bytes=32)
    assert [file.name for file in two.files] == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = json.loads(two.index())
    assert index["metadata"] == {"total_size": 64}
    assert set(index["weight_map"]) == {"w0", "w1", "w2", "w3"}


def test_consecutive_tensors_go_to_different_files_within_a_window():
    specs = [TensorSpec(f"w{i:02}", (4,), "F32") for i in range(4 * FILES_AT_ONCE)]
    plan = plan_files(specs, stem="model", max_file_bytes=32)
    names = [plan.places[spec.name][0].name for spec in specs[:FILES_AT_ONCE]]
    assert len(set(names)) == FILES_AT_ONCE
    first_window = {plan.places[spec.name][0].name for spec in specs[: 2 * FILES_AT_ONCE]}
    assert first_window == set(names)


def test_frozen_tensors_have_files_of_their_own_and_an_adapter_has_one_file():
    specs = [TensorSpec(name, (4,), "F32") for name in "abcd"]
    plan = plan_files(specs, stem="model", frozen={"b", "d"})
    assert [[tensor.spec.name for tensor in file.tensors] for file in plan.files] == [["a", "c"], ["b", "d"]]
    adapter = plan_files(specs, stem="adapter_model", max_file_bytes=16, frozen={"b"})
    assert [file.name for file in adapter.files] == ["adapter_model.safetensors"]


def test_a_name_twice_or_a_foreign_dtype_is_refused():
    with pytest.raises(ValueError, match="twice: a"):
        plan_files([TensorSpec("a", (), "F32"), TensorSpec("a", (), "F32")], stem="model")
    with pytest.raises(ValueError, match="F4"):
        plan_files([TensorSpec("a", (), "F4")], stem="model")


def save(folder, name="model.safetensors", **tensors):
    tensors = tensors or {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(1, dtype=torch.bfloat16)}
    safetensors.torch.save_file(tensors, folder / name)
    return folder / name


def test_headers_of_the_library_are_read(tmp_path):
    file = read_header(str(save(tmp_path)), "model.safetensors")
    assert {t.spec for t in file.tensors} == {TensorSpec("a", (2, 3), "F32"), TensorSpec("b", (), "BF16")}
    assert file.size == (tmp_path / "model.safetensors").stat().st_size


@pytest.mark.parametrize("keep", [0, 5, 8, 40, -1])
def test_a_truncated_file_is_named(tmp_path, keep):
    path = save(tmp_path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"model\.safetensors is broken"):
        open_folder(str(tmp_path))


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"[1]",
        b'{"a":{"dtype":"F32","shape":[1]}}',
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
        b'{"a":{"dtype":"F9","shape":[1],"data_offsets":[0,4]}}',
    ],
)
def test_a_broken_header_is_named(tmp_path, header):
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    with pytest.raises(UserError, match=r"model\.safetensors is broken"):
        open_folder(str(tmp_path))


def test_an_index_that_names_a_missing_file(tmp_path):
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    save(tmp_path, "model-00001-of-00002.safetensors")
    with pytest.raises(UserError, match=r"not there: model-00002-of-00002\.safetensors"):
        open_folder(str(tmp_path))
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match="no index with a weight_map"):
        open_folder(str(tmp_path))


def test_files_without_index_must_be_all_there(tmp_path):
    save(tmp_path, "exp_avg-00002-of-00002.safetensors", b=torch.zeros(2))
    with pytest.raises(UserError, match="all files of exp_avg"):
        open_folder(str(tmp_path), "exp_avg")
    save(tmp_path, "exp_avg-00001-of-00002.safetensors", a=torch.zeros(1))
    assert list(open_folder(str(tmp_path), "exp_avg").places) == ["a", "b"]


def test_a_folder_without_safetensors_says_what_is_there(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"no model\.safetensors.*There is: config\.json"):
        open_folder(str(tmp_path))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"pickle \(pytorch_model\.bin\).*import-checkpoint .*model.allow_pickle: true"):
        open_folder(str(tmp_path))
    with pytest.raises(UserError, match="There is: nothing"):
        open_folder(str(tmp_path / "nowhere"))
