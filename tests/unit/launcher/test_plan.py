"""The plan: arithmetic of worlds, batches, durations and models, and the command that shows it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from ftlaunch.distributed.checkpoint.layout import num_elements, open_folder
from ftlaunch.launcher import cli, plan_view, units
from ftlaunch.launcher.hardware import Machine, parse_mebibytes
from ftlaunch.launcher.plan_data import SourcePlan
from ftlaunch.launcher.plan_duration import SampleStats, plan_duration
from ftlaunch.launcher.plan_model import PlannedFile, SavePlan, from_headers, plan_checkpoint, plan_saving
from ftlaunch.launcher.plan_strategy import plan_strategy
from ftlaunch.launcher.plan_world import WorldPlan, plan_batch, plan_world, world_problems, world_warnings
from ftlaunch.launcher.unknown import Unknown
from ftlaunch.recipes.errors import UserError
from ftlaunch.recipes.schema import Recipe
from ftlaunch.recipes.schema_cluster import LocalCluster, RayCluster
from ftlaunch.recipes.schema_nodes import NodeRange

from .conftest import CONFIG, HIDDEN, INNER, LAYERS, VOCABULARY

BLOCK = 4 * HIDDEN * HIDDEN + 3 * HIDDEN * INNER + 2 * HIDDEN
PARAMETERS = 2 * VOCABULARY * HIDDEN + HIDDEN + LAYERS * BLOCK


def recipe(**sections: object) -> Recipe:
    base = {"name": "bot", "model": {"path": "base"}, "data": {"train": [{"path": "rows.jsonl"}]}}
    return Recipe.model_validate({**base, **sections})


# --- world ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cluster", "gpus", "world"),
    [
        (LocalCluster(), 0, WorldPlan(1, 1, "cpu")),
        (LocalCluster(nodes=2), 0, WorldPlan(2, 1, "cpu")),
        (LocalCluster(processes_per_node=3), 0, WorldPlan(1, 3, "cpu")),
        (LocalCluster(), 8, WorldPlan(1, 8, "cuda")),
        (LocalCluster(nodes=2), 8, WorldPlan(2, 4, "cuda")),
        (LocalCluster(gpus_per_node=2), 8, WorldPlan(1, 2, "cuda")),
        (LocalCluster(gpus_per_node=0, processes_per_node=2), 8, WorldPlan(1, 2, "cpu")),
        (RayCluster(nodes=4, gpus_per_node=8), 0, WorldPlan(4, 8, "cuda")),
        (RayCluster(nodes=4, gpus_per_node=0), 0, WorldPlan(4, 1, "cpu")),
        (RayCluster(nodes=NodeRange(min=2, max=3), gpus_per_node=2), 0, WorldPlan(3, 2, "cuda")),
    ],
)
def test_the_world(cluster, gpus, world):
    assert plan_world(cluster, Machine(gpus=gpus)) == world


@pytest.mark.parametrize(
    ("cluster", "gpus"),
    [(LocalCluster(gpus_per_node=2), 1), (LocalCluster(gpus_per_node=1), 0), (LocalCluster(nodes=4), 2)],
)
def test_more_gpus_than_exist_are_a_problem(cluster, gpus):
    machine = Machine(gpus=gpus)
    [problem] = world_problems(cluster, plan_world(cluster, machine), machine)
    assert f"this machine has {gpus}" in problem


@pytest.mark.parametrize("cluster", [LocalCluster(gpus_per_node=2), LocalCluster(nodes=2), RayCluster(gpus_per_node=8)])
def test_gpus_that_are_there_or_elsewhere_are_none(cluster):
    machine = Machine(gpus=2)
    assert world_problems(cluster, plan_world(cluster, machine), machine) == []


def test_what_a_running_cluster_offers_is_unknown():
    assert isinstance(plan_world(RayCluster(), Machine()), Unknown)


def test_logical_nodes_and_crowded_cores_are_said():
    cluster, machine = LocalCluster(nodes=3), Machine(cores=2)
    warnings = world_warnings(cluster, WorldPlan(3, 1, "cpu"), machine)
    assert "logical nodes" in warnings[0]
    assert "3 ranks share 2 cores" in warnings[1]
    assert world_warnings(LocalCluster(), WorldPlan(1, 1, "cpu"), machine) == []
    assert world_warnings(RayCluster(nodes=3), WorldPlan(3, 1, "cpu"), machine) == []


def test_memory_that_a_gpu_does_not_tell_is_0():
    assert [parse_mebibytes("81559"), parse_mebibytes(" [N/A] ")] == [81559 << 20, 0]


# --- batch ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "micro", "ranks", "accumulation", "empty"),
    [
        (128, 2, 64, 1, 0),
        (32, 1, 1, 32, 0),
        (32, 1, 3, 12, 4),  # 16 streams of 2: ranks serve 6, 5, 5 of them
        (4, 3, 1, 2, 2),
        (4, 1, 8, 1, 4),
    ],
)
def test_the_batch_is_dealt_and_what_is_empty_is_counted(batch, micro, ranks, accumulation, empty):
    plan = plan_batch(recipe(train={"global_batch_size": batch, "micro_batch_size": micro}), ranks)
    assert (plan.accumulation, plan.empty_sequences) == (accumulation, empty)
    assert plan.waste == pytest.approx(empty / (batch + empty))


# --- duration -------------------------------------------------------------------------------------------------------


def source(name: str, rows: int | Unknown, num_bytes: int = 1000) -> SourcePlan:
    return SourcePlan(name, "train", name, "text", 1, num_bytes, rows, 1)


def test_max_steps_are_exact_whatever_is_unknown():
    plan = plan_duration(recipe(train={"max_steps": 7}), [source("rows", Unknown("x"))], {})
    assert (plan.steps, plan.exact) == (7, True)
    assert isinstance(plan.epochs, Unknown)
    assert isinstance(plan.tokens, Unknown)


def test_without_packing_rows_make_the_steps():
    data = {"train": [{"path": "rows"}], "packing": False}
    plan = plan_duration(recipe(data=data, train={"global_batch_size": 8, "num_epochs": 3}), [source("rows", 100)], {})
    assert plan.steps_per_epoch == 12.5
    assert plan.steps == 38
    assert isinstance(plan.tokens, Unknown)


def test_with_packing_a_sample_tells_the_tokens():
    data = {"train": [{"path": "rows"}], "sequence_length": 100}
    stats = {"rows": SampleStats(rows=10, samples_per_row=0.5, tokens_per_row=25.0, bytes_per_row=10.0)}
    one = recipe(data=data, train={"global_batch_size": 2, "num_epochs": 2})
    plan = plan_duration(one, [source("rows", 80)], stats)
    assert (plan.steps_per_epoch, plan.steps, plan.tokens, plan.exact) == (10.0, 20, 4000.0, False)
    estimated = plan_duration(one, [source("rows", Unknown("x"), num_bytes=800)], stats)
    assert estimated.steps == 20


def test_without_a_sample_packed_steps_are_unknown_and_say_how_to_know():
    steps = plan_duration(recipe(), [source("rows", 80)], {}).steps
    assert isinstance(steps, Unknown)
    assert "--sample" in steps.reason


def test_with_weights_the_primary_source_ends_the_epoch():
    data = {"packing": False, "train": [{"path": "a", "weight": 3}, {"path": "b", "weight": 1}]}
    plan = plan_duration(recipe(data=data, train={"global_batch_size": 1}), [source("a", 30), source("b", 2)], {})
    assert plan.steps_per_epoch == 40
    data["train"][1]["repeat"] = False
    plan = plan_duration(recipe(data=data, train={"global_batch_size": 1}), [source("a", 30), source("b", 2)], {})
    assert plan.steps_per_epoch == 32
    data["train"][1]["primary"] = True
    plan = plan_duration(recipe(data=data, train={"global_batch_size": 1}), [source("a", 30), source("b", 2)], {})
    assert plan.steps_per_epoch == 8


@pytest.mark.parametrize(
    ("keys", "epochs", "steps"),
    [
        ([{"num_epochs": 3}, {}], 1, 3 * 10 + 40),
        ([{"num_epochs": 0.5}, {}], 2, 5 + 2 * 40),
        ([{"weight": 1, "num_epochs": 2}, {"weight": 1, "primary": True}], 1, 20 + 40),
        ([{"weight": 1, "num_epochs": 5}, {"weight": 1, "primary": True}], 1, 40 + 40),
    ],
)
def test_passes_of_a_source_are_counted(keys, epochs, steps):
    data = {"packing": False, "train": [{"path": path, **more} for path, more in zip("ab", keys, strict=True)]}
    one = recipe(data=data, train={"global_batch_size": 1, "num_epochs": epochs})
    assert plan_duration(one, [source("a", 10), source("b", 40)], {}).steps == steps


def test_a_held_out_fraction_is_not_trained_on():
    data = {"packing": False, "train": [{"path": "a"}], "eval": {"fraction": 0.5}}
    plan = plan_duration(recipe(data=data, train={"global_batch_size": 1}), [source("a", 30)], {})
    assert plan.steps == 15


def test_the_first_end_counts():
    data = {"packing": False, "train": [{"path": "a"}]}
    both = recipe(data=data, train={"global_batch_size": 1, "num_epochs": 2, "max_steps": 50})
    assert plan_duration(both, [source("a", 10)], {}).steps == 20
    stats = {"a": SampleStats(rows=1, samples_per_row=1.0, tokens_per_row=10.0, bytes_per_row=1.0)}
    tokens = recipe(data=data, train={"global_batch_size": 1, "max_tokens": 35})
    assert plan_duration(tokens, [source("a", 10)], stats).steps == 4


# --- model ----------------------------------------------------------------------------------------------------------


def model_plan(place, **sections: object):
    return from_headers(recipe(**sections), CONFIG, open_folder(str(place / "base")))


def test_full_fine_tuning_trains_every_parameter(place):
    plan = model_plan(place)
    assert plan.parameters == plan.trainable == PARAMETERS


def test_lora_counts_every_linear_layer_but_the_head(place):
    plan = model_plan(place, adapter={"rank": 4})
    linear = 4 * (HIDDEN + HIDDEN) + 3 * (HIDDEN + INNER)
    assert plan.trainable == 4 * LAYERS * linear
    assert plan.parameters == PARAMETERS + plan.trainable


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"rank": 4}, {"r": 4, "target_modules": "all-linear"}),
        ({"rank": 4, "use_dora": True}, {"r": 4, "use_dora": True, "target_modules": "all-linear"}),
        ({"rank": 4, "init": "pissa"}, {"r": 8, "target_modules": "all-linear"}),
        (
            {"rank": 4, "target_modules": r".*\.1\..*(q|v)_proj"},
            {"r": 4, "target_modules": r".*\.1\..*(q|v)_proj"},
        ),
    ],
)
def test_lora_counts_what_peft_makes(place, ours, theirs):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(place / "base"))
    adapted = get_peft_model(base, LoraConfig(modules_to_save=["lm_head"], task_type="CAUSAL_LM", **theirs))
    plan = model_plan(place, adapter={**ours, "modules_to_save": ["lm_head"]})
    assert plan.trainable == sum(p.numel() for p in adapted.parameters() if p.requires_grad)


def test_named_targets(place):
    plan = model_plan(place, adapter={"rank": 1, "target_modules": ["q_proj"]})
    assert plan.trainable == LAYERS * 2 * HIDDEN
    with pytest.raises(UserError, match="matches no layer"):
        model_plan(place, adapter={"target_modules": ["query"]})


def test_chosen_layers(place):
    layers = {"path": "base", "train_layers": ["model.layers.1.*"]}
    assert model_plan(place, model=layers).trainable == BLOCK
    with pytest.raises(UserError, match="matches no parameter"):
        model_plan(place, model={"path": "base", "train_layers": ["layers.1.*"]})


def test_checkpoint_files_hold_weights_masters_and_both_moments(place):
    one = recipe(model={"path": "base", "dtype": "bfloat16"})
    files = {file.name: file.bytes for file in plan_checkpoint(one, model_plan(place))}
    assert set(files) == {
        "model.safetensors",
        "training/master.safetensors",
        "training/exp_avg.safetensors",
        "training/exp_avg_sq.safetensors",
    }
    header = files["training/master.safetensors"] - 4 * PARAMETERS
    assert 0 < header < 10_000
    assert files["model.safetensors"] < files["training/master.safetensors"]


def test_fp32_weights_are_their_own_masters(place):
    one = recipe(model={"path": "base", "dtype": "float32"})
    names = [file.name for file in plan_checkpoint(one, model_plan(place, model={"path": "base", "dtype": "float32"}))]
    assert "training/master.safetensors" not in names


def test_frozen_tensors_have_no_optimizer_state(place):
    one = recipe(adapter={"rank": 4})
    files = {file.name: file.bytes for file in plan_checkpoint(one, model_plan(place, adapter={"rank": 4}))}
    assert set(files) >= {"adapter_model.safetensors", "training/exp_avg.safetensors"}
    assert sum(files.values()) < 14 * (PARAMETERS + 2000)


@pytest.mark.parametrize(
    ("optimizer", "parts", "bytes_per_weight"),
    [
        ("adamw", {"exp_avg", "exp_avg_sq"}, (8, 8)),
        ("adamw_8bit", {"exp_avg", "exp_avg_sq"}, (2, 2.1)),
        ("adafactor", {"exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col"}, (0.001, 1)),
        ("muon", {"momentum_buffer", "exp_avg", "exp_avg_sq"}, (4, 8)),
    ],
)
def test_an_optimizers_state_in_files_and_memory(place, optimizer, parts, bytes_per_weight):
    one, plan = recipe(train={"optimizer": optimizer}), model_plan(place)
    files = {file.name: file.bytes for file in plan_checkpoint(one, plan)}
    state = {name for name in files if name.startswith("training/") and "master" not in name}
    assert state == {f"training/{part}.safetensors" for part in parts}
    low, high = bytes_per_weight
    assert low * PARAMETERS <= a_plan_of(one, plan).memory.optimizer <= high * PARAMETERS
    if optimizer == "muon":  # hidden matrices and nothing else
        hidden = LAYERS * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * INNER)
        assert files["training/momentum_buffer.safetensors"] == pytest.approx(4 * hidden, abs=8000)


def a_plan_of(one, plan, ranks=1, nodes=1, machine=Machine(), device="cuda"):  # noqa: B008 - frozen
    return plan_strategy(one, plan, WorldPlan(nodes, ranks // nodes, device), machine)


def test_memory_of_an_unusual_configuration_is_unknown(place):
    odd = from_headers(recipe(), {"model_type": "odd"}, open_folder(str(place / "base")))
    assert isinstance(a_plan_of(recipe(), odd), Unknown)


def test_a_strategy_that_the_recipe_names_is_taken_and_what_does_not_fit_is_said(place):
    model = model_plan(place)
    fits = a_plan_of(recipe(strategy={"type": "ddp"}), model, machine=Machine(gpus=1, gpu_memory_bytes=10**9))
    assert fits == a_plan_of(recipe(strategy={"type": "ddp"}), model)
    assert (fits.chosen, fits.why, fits.warning) == ({"type": "ddp"}, "", "")
    assert fits.memory.weights == 4 * PARAMETERS
    assert fits.memory.optimizer == 8 * PARAMETERS
    tight = Machine(gpus=1, gpu_memory_bytes=fits.memory.total - 1, memory_bytes=10**9)
    warning = a_plan_of(recipe(strategy={"type": "ddp"}), model, machine=tight).warning
    assert "By the estimate a rank takes" in warning and "train.activation_checkpointing: true" in warning
    # Of a cluster elsewhere nothing is known here.
    away = recipe(strategy={"type": "ddp"}, cluster={"type": "ray", "gpus_per_node": 1})
    assert a_plan_of(away, model, machine=tight).warning == ""


def test_auto_is_decided_by_the_machine_or_by_the_key(place):
    short = {"train": [{"path": "rows.jsonl"}], "sequence_length": 8}  # so that weights are most of it
    model, auto = model_plan(place), recipe(strategy={"type": "auto"}, data=short)
    ddp = a_plan_of(recipe(strategy={"type": "ddp"}, data=short), model, ranks=4).memory
    roomy = Machine(gpus=4, gpu_memory_bytes=2 * ddp.total, memory_bytes=10**12)
    found = a_plan_of(auto, model, ranks=4, machine=roomy)
    assert (found.chosen, found.memory, found.warning) == ({"type": "ddp"}, ddp, "")
    assert "strategy auto: ddp: the whole model fits on every rank" in found.why
    tight = recipe(strategy={"type": "auto", "memory_gb": ddp.total / 1e9}, data=short)
    found = a_plan_of(tight, model, ranks=4, machine=roomy)
    assert found.chosen["type"] == "fsdp"
    assert "ddp would take" in found.why
    none = recipe(strategy={"type": "auto", "memory_gb": 1e-6}, data=short)
    found = a_plan_of(none, model, ranks=4, machine=roomy)
    assert "nothing fits by the estimate" in found.why
    assert "No single change of the recipe helps" in found.warning


def test_auto_without_a_device_to_look_at_says_what_each_strategy_takes(place):
    auto = recipe(strategy={"type": "auto"}, cluster={"type": "ray", "gpus_per_node": 8, "nodes": 2})
    found = a_plan_of(auto, model_plan(place), ranks=16, nodes=2)
    assert isinstance(found, Unknown)
    for part in ("strategy.memory_gb", "ddp takes about", "fsdp {shard: node} takes about", "offload_optimizer: cpu}"):
        assert part in str(found)


def test_planned_tensors_add_up(place):
    plan = model_plan(place, adapter={"rank": 4})
    assert sum(map(num_elements, plan.trained)) == plan.trainable


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """A machine of known size, whatever the test runs on."""
    monkeypatch.setattr(plan_view, "this_machine", lambda: Machine(gpus=0, cores=2))


def plan_json(capsys, *words: str) -> dict:
    assert cli.main(["plan", "bot.yaml", "--json", *words]) == 0
    return json.loads(capsys.readouterr().out)


def test_json_has_everything(capsys, place):
    plan = plan_json(capsys)
    assert plan["world"] == {"nodes": 1, "ranks_per_node": 1, "device": "cpu"}
    assert plan["batch"]["accumulation"] == 4
    assert plan["duration"]["steps"] == 3
    assert plan["model"] == {
        "model_type": "llama",
        "parameters": PARAMETERS,
        "trainable": PARAMETERS,
        "dtype": "float32",
    }
    rows, held_out = plan["sources"]
    assert (rows["found"]["format"], rows["found"]["rows"][:8]) == ("prompt_completion", "unknown:")
    assert (held_out["split"], held_out["found"]["rows"]) == ("eval", 5)
    assert {"train.learning_rate", "checkpoint", "data.packing"} <= set(plan["defaults"])
    assert {"train.max_steps", "data.sequence_length", "model.dtype"} & set(plan["defaults"]) == set()
    assert plan["recipe"]["train"]["learning_rate"] == 2e-5
    assert plan["strategy"]["chosen"]["type"] == "fsdp"
    memory = plan["strategy"]["memory"]
    assert (memory["weights"], memory["optimizer"]) == (4 * PARAMETERS, 8 * PARAMETERS)
    assert plan["strategy"]["rank_bytes"] == sum(size for size in memory.values() if isinstance(size, int)) - (
        memory["offloaded"] + memory["staging"]
    )


@pytest.mark.parametrize(
    ("changes", "nodes", "saving"),
    [
        ({}, 1, ("async", 101)),
        ({"cluster": {"type": "local", "nodes": 3}}, 3, ("async", 34)),  # logical nodes share this machine's memory
        ({"checkpoint": {"mode": "sync"}}, 1, ("sync", 0)),
        ({"checkpoint": {"mode": "async"}}, 1, ("async", 101)),
        ({"cluster": {"type": "ray", "nodes": 2}}, 2, ("auto", 51)),
    ],
)
def test_how_checkpoints_are_written_depends_on_the_memory_for_copies(changes, nodes, saving):
    files = [PlannedFile("a", 50), PlannedFile("b", 51)]
    assert plan_saving(recipe(**changes), files, nodes, Machine(memory_bytes=202)) == SavePlan(*saving)
    if saving == ("async", 101) and not changes:
        assert plan_saving(recipe(), files, nodes, Machine(memory_bytes=201)) == SavePlan("sync", 0)


def test_overrides_and_nodes_are_planned(capsys, place):
    plan = plan_json(capsys, "train.global_batch_size=6", "--nodes", "4")
    assert plan["batch"]["ranks"] == 4
    assert plan["batch"]["empty_sequences"] == 2
    assert len(plan["warnings"]) >= 2


def test_the_terminal_shows_every_default_and_figure(capsys, place):
    assert cli.main(["plan", "bot.yaml"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    wanted = ["learning_rate: 2e-05", "keep_last: 2", "1 rank on 1 node", "x 4 (accumulation)", "model.safetensors"]
    wanted += ["saved while training waits", "strategy fsdp", "a rank (an estimate, at its most in"]
    wanted += ["eval, text (found from its columns), 5 rows, 1 file of", "train, prompt_completion (found from"]
    assert [part for part in wanted if part not in out] == []


def test_the_terminal_shows_memory_by_part(capsys, place, monkeypatch):
    """Weights, gradients, optimizer, what is gathered, activations and the loss; on the host the copies for saves."""
    monkeypatch.setattr(plan_view, "this_machine", lambda: Machine(gpus=0, cores=2, memory_bytes=10**12))
    words = ("cluster.processes_per_node=2", "model.dtype=bfloat16", "train.global_batch_size=8")
    memory = plan_json(capsys, *words)["strategy"]["memory"]
    parts = ("weights", "gradients", "optimizer", "gathered", "activations", "loss")
    assert cli.main(["plan", "bot.yaml", *words]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert memory["weights"] and memory["staging"], memory
    shown = ", ".join(f"{part} {units.size(memory[part])}" for part in parts if memory[part])
    assert f"(an estimate, at its most in {memory['moment']}: {shown})" in out
    staging = f"{units.size(memory['staging'])} of copies where checkpoints are written beside the training"
    assert f"on the host {staging}" in out
    assert memory["staging"] == pytest.approx((2 + 4 + 8) * PARAMETERS / 2, abs=1)
    assert cli.main(["plan", "bot.yaml", *words, "checkpoint.mode=sync"]) == 0
    assert "of copies where" not in " ".join(capsys.readouterr().out.split())


def test_the_terminal_says_what_auto_chooses_and_why(capsys, place):
    assert cli.main(["plan", "bot.yaml", "strategy={type: auto, memory_gb: 4}"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "strategy auto: ddp: the whole model fits on every rank, so nothing is gathered (about " in out
    assert "of 3.2 GiB that may be used)" in out
    assert cli.main(["plan", "bot.yaml", "strategy={type: auto}"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "strategy unknown: auto chooses by the memory of the run's devices, which strategy.memory_gb can say" in out
    assert "ddp takes about" in out and "fsdp takes about" in out


def test_what_is_held_out_is_shown(capsys, place):
    assert cli.main(["plan", "bot.yaml", "data.eval={fraction: 0.02}"]) == 0
    assert "2.0% of the rows of each source" in " ".join(capsys.readouterr().out.split())


def test_what_cannot_be_known_is_no_error_unless_strict(capsys, place):
    words = ["plan", "bot.yaml", "model.path=someone/some-model"]
    assert cli.main(words) == 0
    assert "unknown: someone/some-model is on a model hub" in capsys.readouterr().out
    assert cli.main([*words, "--strict"]) == 1
    assert "model is unknown" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.train.0.path=gone/*.jsonl", "no data files found"),
        ("data.train.0.path=gone.jsonl", "data.train.0.path: gone.jsonl"),
        ("method={type: cpt}", "its rows are in format prompt_completion, and method cpt reads text"),
        ("model.path=./nowhere", "there is no folder"),
        ("--gpus-per-node=4", "this machine has 0"),
    ],
)
def test_what_the_user_must_mend_is_exit_1(capsys, place, override, said):
    assert cli.main(["plan", "bot.yaml", override]) == 1
    assert said in capsys.readouterr().err


def test_a_run_that_would_be_refused_is_planned_whole_and_exit_1(capsys, place):
    assert cli.main(["plan", "bot.yaml", "--json", "--gpus-per-node=4"]) == 1
    plan = json.loads(capsys.readouterr().out)
    assert plan["batch"]["ranks"] == 4
    assert "this machine has 0" in plan["problems"][0]


def test_a_model_folder_without_weights_is_exit_1(capsys, place):
    (place / "base" / "model.safetensors").unlink()
    assert cli.main(["plan", "bot.yaml"]) == 1
    assert "model.safetensors" in capsys.readouterr().err
    assert cli.main(["plan", "bot.yaml", "model.init=random"]) == 0
    assert "yet to be initialised" in capsys.readouterr().out


def test_an_unreachable_store_is_unknown(capsys, place):
    assert cli.main(["plan", "bot.yaml", "data.train.0.path=http://127.0.0.1:9/rows.jsonl"]) == 0
    assert "unknown: " in capsys.readouterr().out


def test_planning_imports_nothing_heavy(place):
    code = (
        "import sys; from ftlaunch.launcher.cli import main; code = main(['plan', 'bot.yaml', '--sample'])\n"
        "assert code == 0\n"
        "print(sorted({'torch', 'ray', 'transformers', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=place, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
