"""Checkpoints of real DeepSpeed engines and FSDP2 models, imported: every tensor is the live model's, bit for bit."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import shutil
from functools import partial
from pathlib import Path

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  imported before the ranks are forked
import pytest
import torch
import transformers.models.llama.modeling_llama  # noqa: F401  as above
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from families import make_family
from foreign import MOMENTS, STEPS, DeepspeedCase, save_dcp, save_deepspeed
from harness import run_distributed
from one_rank import alone
from safetensors.torch import load_file
from tiny import make_model, recipe_for
from training import STRATEGIES, train, train_all
from transformers import AutoModelForCausalLM

from ftlaunch.distributed.model import build_model
from ftlaunch.distributed.model_files import find_model
from ftlaunch.distributed.start_weights import load_with_optimizer
from ftlaunch.distributed.strategies.table import prepare
from ftlaunch.distributed.world import World
from ftlaunch.launcher import export_target
from ftlaunch.launcher.cli import main
from ftlaunch.launcher.import_checkpoint import Wanted, import_checkpoint
from ftlaunch.recipes.errors import UserError
from ftlaunch.recipes.schema import Recipe

FP32_SUMS = (("data_types", {"grad_accum_dtype": "fp32"}),)
CASES = {
    1: [DeepspeedCase("zero2", "tied", 2), DeepspeedCase("zero3-fp32", "untied", 3, torch.float32)],
    2: [
        DeepspeedCase("zero0-fp32", "untied", 0, torch.float32),
        DeepspeedCase("zero1", "untied", 1),
        DeepspeedCase("zero1-fp32-sums", "tied", 1, config=FP32_SUMS),
        DeepspeedCase("zero3-groups", "tied", 3, zero=(("sub_group_size", 9_000),)),
    ],
    3: [
        DeepspeedCase("zero1-fp32-frozen", "untied", 1, torch.float32, frozen=True),
        DeepspeedCase("zero2-in-turn", "tied", 2, zero=(("round_robin_gradients", True),), getters=False),
        DeepspeedCase("zero2-elastic", "untied", 2, zero=(("elastic_checkpoint", True),)),
        DeepspeedCase("zero3", "untied", 3),
        DeepspeedCase("zero3-fp32-frozen", "tied", 3, torch.float32, frozen=True),
    ],
}
"""By world size. The sizes of the tiny model divide by neither."""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    make_model(folder / "untied")
    make_model(folder / "tied", tie_word_embeddings=True)
    return folder


@pytest.fixture(scope="module")
def saved(models, tmp_path_factory):
    """By DeepSpeed: FOLDER/SIZE/NAME."""
    folder = tmp_path_factory.mktemp("deepspeed")
    for size, cases in CASES.items():
        run_distributed(save_deepspeed, size, models, folder / str(size), cases)
    return folder


@pytest.fixture(scope="module")
def dcp(models, tmp_path_factory):
    """By torch.distributed.checkpoint on two ranks."""
    folder = tmp_path_factory.mktemp("dcp")
    run_distributed(save_dcp, 2, models / "untied", folder)
    return folder


def imported(source, to, base=None, *, dtype=None, training=False):
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert import_checkpoint(str(source), str(to), Wanted(base and str(base), dtype, training, False)) == 0
    return said.getvalue()


def check_equal(file: Path, expected: dict[str, torch.Tensor]) -> None:
    found = load_file(file)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


@pytest.mark.parametrize(("size", "case"), [(size, case) for size in CASES for case in CASES[size]], ids=str)
def test_deepspeed(size, case, saved, models, tmp_path):
    source, to = saved / str(size) / case.name, tmp_path / "to"
    has_state = case.stage > 0
    said = imported(source, to, models / case.model, training=has_state)
    live = torch.load(source / "live.pt")
    check_equal(to / "model.safetensors", live["model"])
    if case.stage and "fp32-sums" not in case.name:  # which zero_to_fp32 does not read
        theirs = get_fp32_state_dict_from_zero_checkpoint(str(source))
        kept = load_file(
            to / "training" / "master.safetensors" if case.dtype == torch.bfloat16 else to / "model.safetensors"
        )
        common = kept.keys() & theirs.keys()  # of ZeRO-1 it leaves out what was frozen
        assert len(common) > len(kept) - 2
        assert all(torch.equal(kept[name], theirs[name].contiguous()) for name in common)
    if has_state and case.getters:
        if case.dtype == torch.bfloat16:
            check_equal(to / "training" / "master.safetensors", live["master"])
        for moment in MOMENTS:
            check_equal(to / "training" / f"{moment}.safetensors", live[moment])
    assert "what the program added (epoch)" in said
    assert ("by number" in said) != has_state


def test_an_import_verifies_opens_and_trains(saved, models, tmp_path, capsys):
    """With the optimizer's state too, under strategies and sizes that are not those of the save: what is held before
    the first step is what was imported, and a step later all agree."""
    source = saved / "3" / "zero3"
    imported(source, tmp_path / "to", models / "untied", training=True)
    assert main(["verify", str(tmp_path / "to")]) == 0
    said = capsys.readouterr().out
    assert "the very same by from_pretrained" in said or "within" in said
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "to").dtype == torch.bfloat16
    settings = {"path": str(tmp_path / "to"), "dtype": "bfloat16", "keep_optimizer_state": True}
    changes = {"train": {"max_steps": 1, "learning_rate": 1e-30, "weight_decay": 0.0, "betas": (0.0, 0.0)}}
    recipes = [
        recipe_for(tmp_path, name=name, model=settings, strategy=STRATEGIES[name], **changes)
        for name in ("fsdp", "zero3", "zero1")
    ]
    for run in train_all(recipes, 2):
        # A rate of nothing leaves the weights: fp32 of the engine that wrote them, not of the rounded ones.
        check_equal(
            run.checkpoint / "training" / "master.safetensors", load_file(tmp_path / "to/training/master.safetensors")
        )
        state = (run.checkpoint / "training" / "state.json").read_text()
        assert f'"optimizer": {{"step": {float(STEPS + 1)}}}' in state


@pytest.mark.parametrize("strategy", ["fsdp", "zero1", "zero3"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_an_engine_goes_on_from_imported_state(strategy, dtype, saved, models, tmp_path):
    """In either dtype of the recipe: its fp32 weights are those of the optimizer that wrote them."""
    to = tmp_path / "to"
    imported(saved / "1" / "zero2", to, models / "tied", training=True)
    model = {"path": str(to), "dtype": dtype, "keep_optimizer_state": True}
    recipe = Recipe.model_validate(recipe_for(tmp_path, model=model, strategy=STRATEGIES[strategy]))
    with alone():
        built = build_model(recipe, find_model(str(to)))
        engine = prepare(built, recipe, World())
        load_with_optimizer(engine, built, str(to))
        held = {
            part: {f.spec.name: f.values.clone().view(f.spec.shape) for f in engine.fragments(part)}
            for part in engine.parts
        }
        assert engine.optimizer_state() == {"step": STEPS}
    weights = held.pop("master" if dtype == "bfloat16" else "model")
    check_equal(to / "training" / "master.safetensors", weights)
    for moment in MOMENTS:
        check_equal(to / "training" / f"{moment}.safetensors", held[moment])


def test_what_the_trainer_puts_beside_is_found(saved, models, tmp_path):
    """config.json and tokenizer lie in checkpoint-N; a copy in an older DeepSpeed's layout is refused, no bug."""
    source = copied(saved / "1" / "zero2", tmp_path)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(models / "tied" / name, source)
    imported(source, tmp_path / "to")
    assert (tmp_path / "to" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    path = source / f"global_step{STEPS}" / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"
    states = torch.load(path, weights_only=False)
    del states["optimizer_state_dict"]["single_partition_of_fp32_groups"]
    torch.save(states, path)
    assert "not as DeepSpeed 0.19 writes them" in refusal(source, tmp_path)


# --- torch.distributed.checkpoint -----------------------------------------------------------------------------------

LAYOUTS = {
    "plain": "no optimizer state",
    "nested": None,
    "compiled": "no optimizer state",
    "numbered": "by number",
    "columns": "no optimizer state",
    "accelerate": None,
}
"""Folder -> why its optimizer's state is left behind, if it is."""


@pytest.mark.parametrize("name", LAYOUTS)
def test_dcp(name, dcp, models, tmp_path):
    why, to = LAYOUTS[name], tmp_path / "to"
    said = imported(dcp / name, to, models / "untied", training=why is None)
    live = torch.load(dcp / "live.pt")
    check_equal(to / "model.safetensors", live["model"])
    assert (why or "") in said
    if why is None:
        for moment in MOMENTS:
            check_equal(to / "training" / f"{moment}.safetensors", live[moment])
        assert json.loads((to / "training" / "state.json").read_text())["optimizer"] == {"step": STEPS}
        assert not (to / "training" / "master.safetensors").exists()  # the weights themselves are fp32
    if name == "nested":
        assert "left behind: lr_scheduler" in said and "'model.' before them" in said


def test_in_another_dtype_fp32_is_kept_beside(dcp, models, tmp_path):
    imported(dcp / "accelerate", tmp_path / "to", models / "untied", dtype="bfloat16", training=True)
    live = torch.load(dcp / "live.pt")["model"]
    check_equal(tmp_path / "to" / "training" / "master.safetensors", live)
    check_equal(tmp_path / "to" / "model.safetensors", {name: value.bfloat16() for name, value in live.items()})
    assert json.loads((tmp_path / "to" / "config.json").read_text())["dtype"] == "bfloat16"


# --- what is refused ------------------------------------------------------------------------------------------------


class Trap:
    """Writes a file when it is unpickled as usual."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self):
        return Path.write_text, (self.place, "executed")


def refusal(source, tmp_path, base=None, **wanted) -> str:
    to = tmp_path / "refused"
    with pytest.raises(UserError) as raised:
        imported(source, to, base, **wanted)
    assert not to.exists()
    return str(raised.value)


def copied(source: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    return Path(shutil.copytree(source, copy))


def test_damaged_deepspeed_checkpoints(saved, models, tmp_path):
    base = models / "untied"
    source, step = saved / "3" / "zero3", f"global_step{STEPS}"
    tell = partial(refusal, tmp_path=tmp_path, base=base)

    copy = copied(source, tmp_path)
    lost = copy / step / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    lost.unlink()
    assert f"1 are missing: {lost.name}" in tell(copy)
    shutil.copy(copy / step / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", lost)
    lost.write_bytes(lost.read_bytes()[:5000])
    assert f"{lost} cannot be read: it is truncated" in tell(copy)

    copy = copied(source, tmp_path)
    shutil.copy(lost.with_name(lost.name), copy / step / "bf16_zero_pp_rank_3_mp_rank_00_optim_states.pt")
    assert "saved by 3 ranks, and there are files of more: bf16_zero_pp_rank_3" in tell(copy)
    shutil.copytree(copy / step, copy / "global_step9")
    (copy / "latest").unlink()
    assert "several checkpoints" in tell(copy) and f"{step}, global_step9" in tell(copy)
    (copy / "latest").write_text("global_step77")
    assert "names 'global_step77', which is no folder" in tell(copy)

    copy = copied(saved / "3" / "zero2-elastic", tmp_path)
    other = saved / "2" / "zero1" / step / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    shutil.copy(other, copy / step)
    assert "of different checkpoints" in tell(copy)
    for name in (
        "layer_00-model_00-model_states.pt",
        "expp_rank_0_mp_rank_00_optim_states.pt",
        "mp_rank_01_model_states.pt",
    ):
        copy = copied(source, tmp_path)
        (copy / step / name).touch()
        assert "was saved under" in tell(copy) and name in tell(copy)


def test_damaged_dcp_checkpoints(dcp, models, tmp_path):
    tell = partial(refusal, tmp_path=tmp_path, base=models / "untied")
    copy = copied(dcp / "nested", tmp_path)
    shard = copy / "__1_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-1000])
    assert "truncated: __1_0.distcp" in tell(copy)
    shard.unlink()
    assert "1 of its 2 files are missing: __1_0.distcp" in tell(copy)
    (copy / ".metadata").write_bytes((copy / ".metadata").read_bytes()[:300])
    assert "cannot be read" in tell(copy)
    (copy / ".metadata").write_bytes(pickle.dumps(Trap(tmp_path / "executed")))
    assert "nothing of it was run: it names" in tell(copy)
    assert not (tmp_path / "executed").exists()
    (copy / ".metadata").unlink()
    assert "has no .metadata, which rank 0 writes last" in tell(copy)


def test_other_models_are_refused(saved, dcp, models, tmp_path):
    """Names and shapes that are missing, too many, and different: each with its number and the first few."""
    make_model(tmp_path / "wide", hidden_size=48, num_hidden_layers=2)
    said = refusal(dcp / "plain", tmp_path, tmp_path / "wide")
    assert "not of this model (9)" in said and "model.layers.2" in said
    assert "other shapes (21)" in said and "(307, 40) in the checkpoint and (307, 48) by config.json" in said
    assert "… and 16 more" in said
    make_model(tmp_path / "deep", num_hidden_layers=4)
    assert "missing (9)" in refusal(saved / "3" / "zero3", tmp_path, tmp_path / "deep")
    assert "are one tensor by config.json" in refusal(dcp / "plain", tmp_path, models / "tied")
    assert "no config.json beside it" in refusal(dcp / "plain", tmp_path)
    assert "without ZeRO the optimizer calls its tensors by number" in refusal(
        saved / "2" / "zero0-fp32", tmp_path, models / "untied", training=True
    )


def test_what_is_no_checkpoint(models, tmp_path):
    (tmp_path / "runs" / "checkpoint-100").mkdir(parents=True)
    said = refusal(tmp_path / "runs", tmp_path)
    assert "is no checkpoint that can be imported" in said and "mp_rank_00_model_states.pt" in said
    assert ".metadata" in said and "pytorch_model.bin" in said and "Name one of checkpoint-100/" in said
    assert "holds safetensors already" in refusal(models / "tied", tmp_path)
    assert "is not there" in refusal(tmp_path / "nowhere", tmp_path)
    assert "read from a local disk only" in refusal("s3://bucket/checkpoint", tmp_path)


def test_an_import_that_was_broken_off_goes_on(dcp, models, tmp_path, monkeypatch):
    """And one that is finished is only replaced when that is asked for."""
    to = tmp_path / "to"
    wanted = Wanted(str(models / "untied"), None, True, False)
    real = export_target.write_weights
    monkeypatch.setattr(export_target, "write_weights", fails_at("exp_avg.safetensors", real))
    with pytest.raises(RuntimeError, match="broken off"):
        import_checkpoint(str(dcp / "nested"), str(to), wanted)
    written: list[str] = []
    monkeypatch.setattr(
        export_target,
        "write_weights",
        lambda folder, file, *rest: written.append(file.name) or real(folder, file, *rest),
    )
    imported(dcp / "nested", to, models / "untied", training=True)
    assert written == ["exp_avg.safetensors", "exp_avg_sq.safetensors"]
    with pytest.raises(UserError, match="a finished import is there already"):
        import_checkpoint(str(dcp / "nested"), str(to), wanted)


def fails_at(name, write):
    def failing(folder, file, *rest):
        if file.name == name:
            raise RuntimeError("broken off")
        return write(folder, file, *rest)

    return failing


# --- pickled weights ------------------------------------------------------------------------------------------------


@pytest.fixture
def pickled(models, tmp_path):
    """The untied model as pickle, in two files."""
    folder = copied(models / "untied", tmp_path)
    (folder / "model.safetensors").unlink()
    tensors = load_file(models / "untied" / "model.safetensors")
    names = [f"pytorch_model-0000{number}-of-00002.bin" for number in (1, 2)]
    for number, name in enumerate(names):
        torch.save(dict(list(tensors.items())[number::2]), folder / name)
    weight_map = {key: names[place % 2] for place, key in enumerate(tensors)}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_pickled_weights_are_imported(pickled, models, tmp_path):
    imported(pickled, tmp_path / "to")
    check_equal(tmp_path / "to" / "model.safetensors", load_file(models / "untied" / "model.safetensors"))
    (pickled / "pytorch_model-00002-of-00002.bin").unlink()
    assert "does not hold pytorch_model-00002-of-00002.bin" in refusal(pickled, tmp_path)


def test_buffers_are_imported_with_the_weights(tmp_path):
    """A learned scale of every layer, and one that is lost."""
    folder = make_family(tmp_path / "gemma4_text", "gemma4_text")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    scale = "model.layers.1.layer_scalar"
    assert tensors[scale] != 1
    torch.save(tensors, folder / "pytorch_model.bin")
    imported(folder, tmp_path / "to")
    check_equal(tmp_path / "to" / "model.safetensors", tensors)
    torch.save({name: value for name, value in tensors.items() if name != scale}, folder / "pytorch_model.bin")
    assert f"missing (1):\n    {scale}\n" in refusal(folder, tmp_path)


def test_pickled_weights_are_trained_only_where_that_is_said(pickled, tmp_path):
    """And then they are what safetensors are."""
    recipe = recipe_for(tmp_path, name="pickled", model={"path": str(pickled)}, train={"max_steps": 2})
    with pytest.raises(AssertionError, match=r"import-checkpoint .* --to NEW_FOLDER; or set model.allow_pickle: true"):
        train(recipe)
    recipe["model"]["allow_pickle"] = True
    plain = recipe_for(tmp_path, name="plain", model={"path": str(pickled.parent / "model")}, train={"max_steps": 2})
    shutil.rmtree(pickled.parent / "model")
    imported(pickled, pickled.parent / "model")
    runs = train_all([recipe, plain], 2)
    assert runs[0].losses == runs[1].losses


@pytest.mark.parametrize("kind", ["bin", "deepspeed"])
def test_a_hostile_pickle_is_not_run(kind, pickled, saved, models, tmp_path):
    trap = {"model.norm.weight": torch.ones(3), "module": Trap(tmp_path / "executed")}
    if kind == "bin":
        for path in pickled.glob("*.bin*"):
            path.unlink()
        source, path = pickled, pickled / "pytorch_model.bin"
    else:
        source = copied(saved / "1" / "zero2", tmp_path)
        path = source / f"global_step{STEPS}" / "mp_rank_00_model_states.pt"
    torch.save(trap, path)
    said = refusal(source, tmp_path, models / "untied")
    assert f"{path} is refused, and nothing of it was run: it names " in said
    assert "If you trust where it comes from" in said
    assert not (tmp_path / "executed").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "executed").read_text() == "executed"  # opened as usual, it would have been
