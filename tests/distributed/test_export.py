"""What `ftlaunch export` writes: plain folders that the libraries open, adapters merged as peft merges them."""

from __future__ import annotations

import ctypes
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_distributed
from logits import logits
from peft import LoraConfig, PeftModel, get_peft_model
from ruamel.yaml import YAML
from safetensors.torch import load_file, save_file
from servers import moto_process
from tiny import make_model, make_tokenizer, recipe_for
from training import Trained, train_all
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from ftlaunch.distributed import merging, model_writer, storage
from ftlaunch.launcher import cli, export, export_target

LOGIT_TOLERANCE = 1e-5
"""Absolute, of logits around 1, in fp32: one matrix product instead of three."""

ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"dropout": 0.1},
    "rslora": {"use_rslora": True, "modules_to_save": ["lm_head", "embed_tokens"]},
    "dora": {"use_dora": True, "modules_to_save": ["lm_head"], "target_modules": ["q_proj", "down_proj"]},
    "pissa": {"init": "pissa_niter_4", "target_modules": ["k_proj", "up_proj"]},
    "qlora": {"type": "qlora"},
    "embedded": {"target_modules": ["embed_tokens", "o_proj"]},
}
TIED = "embedded-tied"


def settings(folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    shared: dict[str, Any] = {
        "name": name,
        "checkpoint": {"every_steps": None},
        "train": {"max_steps": 3, "learning_rate": 1e-2, "lr_scheduler": "constant"},
    }
    for section, values in changes.items():
        shared[section] = {**shared.get(section, {}), **values}
    return recipe_for(folder, **shared)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Trained]]:
    """A full run in bfloat16, and one with each adapter."""
    folder = tmp_path_factory.mktemp("export")
    recipe_for(folder)
    (folder / "model" / "README.md").write_text("---\nlicense: apache-2.0\n---\n\n# A base\n")
    GenerationConfig(do_sample=True, temperature=0.6).save_pretrained(folder / "model")
    make_model(folder / "tied", tie_word_embeddings=True)
    full = {"model": {"dtype": "bfloat16"}, "track": {"tensorboard": False}}
    recipes = [settings(folder, "full", **full)]
    recipes += [
        settings(folder, name, adapter={"rank": 3, "alpha": 6, **adapter}) for name, adapter in ADAPTERS.items()
    ]
    recipes[-1]["data"]["train"][0]["path"] = f"file://{recipes[-1]['data']['train'][0]['path']}"
    recipes[1]["checkpoint"] |= {"every_steps": 2, "keep_last": 2}
    tied = {"rank": 2, **ADAPTERS["embedded"]}
    recipes.append(settings(folder, TIED, adapter=tied, model={"path": str(folder / "tied")}))
    runs = train_all(recipes)
    return folder, dict(zip(["full", *ADAPTERS, TIED], runs, strict=True))


def exported(run: Trained, to: Path, *options: str) -> Path:
    assert cli.main(["export", str(run.directory), "--to", str(to), *options]) == 0
    return to


def opened(folder: Path, run: Trained, base: str = "model") -> Any:
    """The adapter on its base, as anybody opens it."""
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / base), run.checkpoint)


def test_a_full_checkpoint_is_a_plain_model(trained, tmp_path):
    _, runs = trained
    to = exported(runs["full"], tmp_path / "to")
    ours, theirs = (load_file(place / "model.safetensors") for place in (to, runs["full"].checkpoint))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    model, report = AutoModelForCausalLM.from_pretrained(to, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.bfloat16
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(runs["full"].checkpoint)))
    assert model.generation_config.temperature == 0.6
    assert AutoTokenizer.from_pretrained(to).chat_template
    assert not (to / "training").exists()
    assert cli.main(["verify", str(to)]) == 0


@pytest.mark.parametrize("variant", ADAPTERS)
def test_an_adapter_is_merged_as_peft_merges_it(trained, tmp_path, variant, monkeypatch):
    """In blocks of a few rows. The same products in fp32, which may be added up in another order for other numbers of
    rows: a few units in the last place of the largest term."""
    monkeypatch.setattr(merging, "row_ranges", few_rows)
    folder, runs = trained
    to = exported(runs[variant], tmp_path / "to", "--merge-adapter")
    model = opened(folder, runs[variant])
    answer = logits(model)
    merged = model.merge_and_unload()
    theirs = merged.state_dict()
    ours = load_file(to / "model.safetensors")
    assert ours.keys() == theirs.keys()
    base = load_file(folder / "model" / "model.safetensors")
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], rtol=1e-6, atol=1e-6 * float(theirs[name].abs().max()))
    changed = {name for name in ours if not torch.equal(ours[name], base[name])}
    assert changed == {name for name in ours if not torch.equal(theirs[name], base[name])} != set()
    plain, report = AutoModelForCausalLM.from_pretrained(to, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(logits(plain), answer, rtol=0, atol=LOGIT_TOLERANCE)
    assert not (to / "adapter_config.json").exists()
    assert cli.main(["verify", str(to)]) == 0


def few_rows(spec: Any) -> Any:
    rows = spec.shape[0]
    return ((start, min(start + 7, rows)) for start in range(0, rows, 7))


def test_embeddings_that_were_tied_to_the_head(trained, tmp_path):
    """The adapter changes the embeddings alone, as peft runs it: the merged model has a head of its own."""
    folder, runs = trained
    answer = logits(opened(folder, runs[TIED], "tied"))
    to = exported(runs[TIED], tmp_path / "to", "--merge-adapter")
    model = AutoModelForCausalLM.from_pretrained(to)
    torch.testing.assert_close(logits(model), answer, rtol=0, atol=LOGIT_TOLERANCE)
    assert cli.main(["verify", str(to)]) == 0


def random_adapter(base: Path, to: Path, **config: Any) -> PeftModel:
    """peft's own adapter with random A and B, saved as a checkpoint of ours; the model that it belongs to."""
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = get_peft_model(model, LoraConfig(r=3, init_lora_weights=False, task_type="CAUSAL_LM", **config))
    model.save_pretrained(to.with_name(f"{to.name}-peft"))
    copy_with(to.with_name(f"{to.name}-peft"), to, base)
    return model


@pytest.mark.parametrize("use_dora", [False, True])
def test_weights_that_are_stored_transposed(tmp_path, use_dora):
    """GPT-2's, beside others that are not, under a head that is tied; one of them is square."""
    base = make_tokenizer(tmp_path / "base")
    GPT2LMHeadModel(GPT2Config(vocab_size=307, n_embd=24, n_layer=2, n_head=2, n_positions=64)).save_pretrained(base)
    model = random_adapter(base, tmp_path / "checkpoint", target_modules="all-linear", use_dora=use_dora)
    answer, theirs = logits(model), model.merge_and_unload().state_dict()
    words = ["export", str(tmp_path / "checkpoint"), "--merge-adapter", "--to", str(tmp_path / "to")]
    assert cli.main(words) == 0
    for name, weight in load_file(tmp_path / "to" / "model.safetensors").items():
        torch.testing.assert_close(weight, theirs[name], rtol=1e-6, atol=1e-6 * float(theirs[name].abs().max()))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "to")
    torch.testing.assert_close(logits(merged), answer, rtol=0, atol=LOGIT_TOLERANCE * float(answer.abs().max()))


def test_onto_a_base_in_bfloat16(tmp_path):
    """peft adds fp32 to bfloat16 in place, which rounds once, as we do: the very same numbers."""
    base = make_model(tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    random_adapter(base, tmp_path / "checkpoint", target_modules=["q_proj", "up_proj"])
    opened_there = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    theirs = PeftModel.from_pretrained(opened_there, tmp_path / "checkpoint").merge_and_unload().state_dict()
    assert cli.main(["export", str(tmp_path / "checkpoint"), "--merge-adapter", "--to", str(tmp_path / "to")]) == 0
    ours = load_file(tmp_path / "to" / "model.safetensors")
    assert all(weight.dtype == torch.bfloat16 and torch.equal(weight, theirs[name]) for name, weight in ours.items())


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"target_modules": ["q_proj"], "rank_pattern": {"layers.0": 2}}, "rank_pattern"),
        ({"target_modules": ["q_proj"], "lora_bias": True}, "lora_bias"),
    ],
)
def test_other_adapters_are_refused(tmp_path, capsys, config, said):
    base = make_model(tmp_path / "base")
    if "lora_bias" in config:
        LlamaForCausalLM(LlamaConfig.from_pretrained(base, attention_bias=True)).save_pretrained(base)
    random_adapter(base, tmp_path / "checkpoint", **config)
    assert cli.main(["export", str(tmp_path / "checkpoint"), "--merge-adapter", "--to", str(tmp_path / "to")]) == 1
    assert f"an adapter with {said} cannot be merged here" in capsys.readouterr().err


@pytest.mark.parametrize(("dtype", "bits"), [("bfloat16", 8), ("float16", 11)])
def test_merged_in_fp32_and_rounded_once(trained, tmp_path, dtype, bits):
    folder, runs = trained
    to = exported(runs["dora"], tmp_path / "to", "--merge-adapter", "--dtype", dtype)
    theirs = opened(folder, runs["dora"]).merge_and_unload().state_dict()
    for name, weight in load_file(to / "model.safetensors").items():
        assert weight.dtype == getattr(torch, dtype)
        # Half a unit in the last place, or the smallest step near zero.
        torch.testing.assert_close(weight.float(), theirs[name], rtol=2.0**-bits, atol=2.0**-24)
    assert json.loads((to / "config.json").read_text())["dtype"] == dtype
    assert AutoModelForCausalLM.from_pretrained(to, dtype="auto").dtype == getattr(torch, dtype)


def test_an_adapter_stays_one_without_merging(trained, tmp_path):
    folder, runs = trained
    to = exported(runs["rslora"], tmp_path / "to")
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert torch.equal(logits(PeftModel.from_pretrained(base, to)), logits(opened(folder, runs["rslora"])))
    assert cli.main(["verify", str(to)]) == 0


def test_several_shards_and_a_url(trained, tmp_path, monkeypatch):
    _, runs = trained
    monkeypatch.setattr(export, "SHARD_BYTES", 40_000)
    assert cli.main(["export", str(runs["full"].directory), "--to", "memory://shards/model"]) == 0
    for name in storage.list_names("memory://shards/model"):
        (tmp_path / name).write_bytes(storage.read_bytes(f"memory://shards/model/{name}"))
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    theirs = AutoModelForCausalLM.from_pretrained(runs["full"].checkpoint)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(theirs))
    assert cli.main(["verify", "memory://shards/model"]) == 0
    assert cli.main(["verify", str(tmp_path), "--no-logits"]) == 0


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket of an S3 server of its own."""
    with moto_process(tmp_path) as port:
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "a",
            "AWS_SECRET_ACCESS_KEY": "b",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(name, value)
        storage.filesystem("s3://models/x")[0].mkdir("models")
        yield "s3://models"


def test_everything_in_a_bucket(trained, tmp_path, bucket):
    """Checkpoint, base and result; merged from there and to there, and verified there."""
    folder, runs = trained
    local = exported(runs["dora"], tmp_path / "local", "--merge-adapter")
    copy_with(runs["dora"].checkpoint, tmp_path / "copy", base=f"{bucket}/base")
    for source, name in ((folder / "model", "base"), (tmp_path / "copy", "run")):
        for path in source.iterdir():
            storage.write_bytes(f"{bucket}/{name}/{path.name}", path.read_bytes())
    assert cli.main(["verify", f"{bucket}/run"]) == 0
    assert cli.main(["export", f"{bucket}/run", "--merge-adapter", "--to", f"{bucket}/to"]) == 0
    weights = storage.read_bytes(f"{bucket}/to/model.safetensors")
    assert weights == (local / "model.safetensors").read_bytes()
    assert {"config.json", "tokenizer.json", "README.md"} <= set(storage.list_names(f"{bucket}/to"))
    assert cli.main(["verify", f"{bucket}/to"]) == 0
    assert cli.main(["export", f"{bucket}/run", "--to", f"{bucket}/to"]) == 1


def test_the_card(trained, tmp_path):
    folder, runs = trained
    text = (exported(runs["embedded"], tmp_path / "to", "--merge-adapter") / "README.md").read_text()
    front = YAML(typ="safe").load(text.split("---\n")[1])
    assert "base_model" not in front, "a folder is no name that a hub knows"
    assert f"from `{folder / 'model'}`" in text
    assert front["license"] == "apache-2.0"
    assert front["tags"] == ["ftlaunch", "sft", "lora"]
    lines = {
        line["step"]: line["losses"]["chats/loss"] for line in runs["embedded"].lines if line["kind"] == "evaluation"
    }
    assert f"| chats/loss | {lines[0]:.4f} | {lines[3]:.4f} |" in text
    sources = next(line["sources"] for line in reversed(runs["embedded"].lines) if line["kind"] == "data")
    for name, counts in sources.items():
        row = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
        assert f"| {counts['rows']:,} | {counts['tokens']:,} |" in row
    assert "after 3 optimizer steps" in text
    assert "learning_rate: 0.01" in text
    state = json.loads((runs["embedded"].checkpoint / "training/state.json").read_text())
    assert f"Files and their order: `{state['data']}`." in text
    assert f"torch {torch.__version__.partition('+')[0]}" in text


def test_the_card_of_an_earlier_step_says_what_was_then(trained, tmp_path):
    _, runs = trained
    assert cli.main(["export", f"{runs['lora'].directory}@2", "--to", str(tmp_path / "to")]) == 0
    text = (tmp_path / "to" / "README.md").read_text()
    earlier = runs["lora"].directory / "step-000002.a1"
    assert not (earlier / "training").exists(), "its training state is gone, and what was read is still known"
    state = json.loads((runs["lora"].checkpoint / "training/state.json").read_text())
    assert f"Files and their order: `{state['data']}`." in text
    assert f"after 2 optimizer steps on {runs['lora'].steps[1]['tokens']:,} tokens" in text
    first = next(line["losses"]["chats/loss"] for line in runs["lora"].lines if line["kind"] == "evaluation")
    assert "| held-out loss | at step 0 |\n" in text and f"| chats/loss | {first:.4f} |\n" in text


def test_a_card_of_what_came_from_hubs_and_behind_passwords(trained, tmp_path):
    """The run's recipe says so; a password in a URL is not handed on."""
    _, runs = trained
    run = tmp_path / "run"
    shutil.copytree(runs["full"].directory, run)
    recipe = YAML(typ="safe").load(run / "recipe.yaml")
    recipe["model"]["path"] = "acme/base-7b"
    recipe["data"]["train"][0]["path"] = "hub:acme/chats@v2"
    recipe["data"]["eval"][0]["path"] = "https://ann:hunter2@example.com/held|out.jsonl"
    YAML(typ="safe").dump(recipe, run / "recipe.yaml")
    assert cli.main(["export", str(run), "--to", str(tmp_path / "to")]) == 0
    text = (tmp_path / "to" / "README.md").read_text()
    front = YAML(typ="safe").load(text.split("---\n")[1])
    assert front["base_model"] == "acme/base-7b"
    assert front["datasets"] == ["acme/chats"]
    assert "hunter2" not in text and "REDACTED@example.com" in text


def test_a_card_of_an_unknown_licence_says_so(trained, tmp_path):
    _, runs = trained
    text = (exported(runs[TIED], tmp_path / "to") / "README.md").read_text()
    assert "license" not in YAML(typ="safe").load(text.split("---\n")[1])
    assert "licence of the base model was not found" in text


# --- targets --------------------------------------------------------------------------------------------------------


def test_a_place_in_use_is_refused(trained, tmp_path, capsys):
    _, runs = trained
    (tmp_path / "notes.txt").write_text("mine")
    for options in ([], ["--overwrite"]):
        assert cli.main(["export", str(runs["full"].directory), "--to", str(tmp_path), *options]) == 1
        assert "something else is there already (notes.txt)" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    checkpoint = runs["full"].checkpoint
    before = sorted(path.name for path in checkpoint.iterdir())
    assert cli.main(["export", str(runs["full"].directory), "--to", str(checkpoint), "--overwrite"]) == 1
    assert sorted(path.name for path in checkpoint.iterdir()) == before


def test_a_finished_export_is_replaced_only_when_told(trained, tmp_path, capsys):
    _, runs = trained
    to = exported(runs["lora"], tmp_path / "to")
    (to / "notes.txt").write_text("mine")
    assert cli.main(["export", str(runs["lora"].directory), "--to", str(to), "--merge-adapter"]) == 1
    assert "a finished export is there already" in capsys.readouterr().err
    exported(runs["lora"], to, "--merge-adapter", "--overwrite")
    assert not (to / "adapter_config.json").exists() and not (to / "adapter_model.safetensors").exists()
    assert (to / "notes.txt").read_text() == "mine"
    AutoModelForCausalLM.from_pretrained(to)


def test_a_broken_off_export_goes_on(trained, tmp_path, monkeypatch, capsys):
    """What was written whole is not written again; another export is not mixed into it."""
    _, runs = trained
    to = tmp_path / "to"
    monkeypatch.setattr(export, "SHARD_BYTES", 40_000)
    write, written = model_writer.write_weights, []

    def failing(folder, file, *rest):
        if len(written) == 2:
            raise export_target.InfrastructureError("the network is gone")
        written.append(file.name)
        return write(folder, file, *rest)

    monkeypatch.setattr(export_target, "write_weights", failing)
    words = ["export", str(runs["full"].directory), "--to", str(to)]
    assert cli.main(words) == 2
    assert not (to / "MANIFEST.json").exists() and not (to / "config.json").exists()
    assert cli.main([*words, "--dtype", "float32"]) == 1
    assert "another export that was broken off" in capsys.readouterr().err
    monkeypatch.setattr(
        export_target,
        "write_weights",
        lambda folder, file, *rest: written.append(file.name) or write(folder, file, *rest),
    )
    assert cli.main(words) == 0
    assert len(written) == len(set(written)) == len(list(to.glob("model-*.safetensors")))
    assert cli.main(["verify", str(to)]) == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["full", "--merge-adapter"], "holds a whole model, no adapter"),
        (["full@77"], "Committed steps: 3"),
        (["nothing"], "there is no run"),
        (["full", "--dtype", "int8"], "int8"),
        (["full", "--to", "model/config.json"], "model/config.json is a file"),
    ],
)
def test_what_cannot_be_exported_is_exit_1(trained, tmp_path, monkeypatch, capsys, words, said):
    folder, _ = trained
    monkeypatch.chdir(folder)
    to = [] if "--to" in words else ["--to", str(tmp_path / "to")]
    assert cli.main(["export", *words, *to]) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "to").exists()


def test_an_adapter_of_another_base_is_refused(trained, tmp_path, capsys):
    _, runs = trained
    make_model(tmp_path / "other", hidden_size=48)
    copy_with(runs["lora"].checkpoint, tmp_path / "copy", base=tmp_path / "other")
    words = ["export", str(tmp_path / "copy"), "--merge-adapter", "--to", str(tmp_path / "to")]
    assert cli.main(words) == 1
    assert "adapter of another model" in capsys.readouterr().err


def copy_with(checkpoint: Path, to: Path, base: Path | str) -> None:
    """A checkpoint whose adapter names another base, with a manifest that fits."""
    from ftlaunch.distributed.checkpoint.manifest import MANIFEST_NAME, Manifest, record_bytes

    to.mkdir()
    for path in checkpoint.iterdir():
        if path.is_file() and path.name not in (MANIFEST_NAME, "README.md"):
            (to / path.name).write_bytes(path.read_bytes())
    config = json.loads((to / "adapter_config.json").read_text())
    (to / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(base)}))
    records = tuple(record_bytes(path.name, path.read_bytes()) for path in sorted(to.iterdir()))
    (to / MANIFEST_NAME).write_bytes(Manifest(3, 1, records).to_bytes())


def test_damaged_weights_are_not_exported(trained, tmp_path, capsys):
    _, runs = trained
    copy_with(runs["lora"].checkpoint, tmp_path / "copy", base=trained[0] / "model")
    weights = tmp_path / "copy" / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert cli.main(["export", str(tmp_path / "copy"), "--merge-adapter", "--to", str(tmp_path / "to")]) == 1
    assert "are not what was written" in capsys.readouterr().err
    assert not (tmp_path / "to" / "model.safetensors").exists()


def test_numbers_that_float16_does_not_hold_are_refused(trained, tmp_path, capsys):
    _, runs = trained
    base = make_model(tmp_path / "large")
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][0] = 1e6
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    copy_with(runs["lora"].checkpoint, tmp_path / "copy", base=base)
    words = ["export", str(tmp_path / "copy"), "--merge-adapter", "--dtype", "float16", "--to", str(tmp_path / "to")]
    assert cli.main(words) == 1
    assert "model.norm.weight has values up to 1e+06, more than float16 holds" in capsys.readouterr().err


# --- memory ---------------------------------------------------------------------------------------------------------


def resident_bytes(key: str) -> int:
    """A line of proc(5)'s status file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def growth_of_an_export(rank: int, size: int, small: list[str], large: list[str]) -> int:
    """Peak of resident memory above what it was before, in a process that has done the same with a small model."""
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 2**20)  # glibc's M_MMAP_THRESHOLD: freed blocks go back to the system
    assert cli.main(small) == 0
    libc.malloc_trim(0)
    before = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM, the peak, back to now (proc(5))
    assert cli.main(large) == 0
    return resident_bytes("VmHWM") - before


def test_a_merge_holds_some_blocks_and_never_the_model(trained, tmp_path, monkeypatch):
    """A base of 130 MB in fp32, of three matrices with 41 MB each, in blocks of 4 MB. Measured: 21 MB, of which reading
    back takes 16. A matrix whole, with its update and their sum, has 123 MB."""
    monkeypatch.setattr(merging.row_ranges, "__defaults__", (4 * 2**20,))
    folder, runs = trained
    base = make_model(tmp_path / "base", hidden_size=512, intermediate_size=20_000, num_hidden_layers=1)
    random_adapter(base, tmp_path / "large", target_modules="all-linear")
    copy_with(runs["lora"].checkpoint, tmp_path / "small", base=folder / "model")
    words = [
        ["export", str(tmp_path / name), "--merge-adapter", "--to", str(tmp_path / f"{name}-to")]
        for name in ("small", "large")
    ]
    [growth] = run_distributed(growth_of_an_export, 1, *words)
    assert (tmp_path / "large-to" / "model.safetensors").stat().st_size > 120e6
    assert growth < 40e6
