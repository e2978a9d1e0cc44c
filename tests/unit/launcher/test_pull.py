"""Checkpoints that are fetched, verified, and asked."""

from __future__ import annotations

import json
import threading
import zlib
from pathlib import Path

import pytest

from ftlaunch.distributed import storage
from ftlaunch.distributed.checkpoint.commit import CommitRecord, commit
from ftlaunch.distributed.checkpoint.manifest import MANIFEST_NAME, FileRecord, Manifest, Span, record_bytes
from ftlaunch.distributed.run_directory import RunDirectory
from ftlaunch.launcher import cli
from ftlaunch.launcher.generate import checkpoint_folder, load_writer


def add_checkpoint(run: Path, step: int, files: dict[str, bytes], loss: float) -> None:
    """Commit a checkpoint with these files."""
    directory = run / f"step-{step:06d}.a1"
    for name, content in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)
    manifest = Manifest(step, 1, tuple(record_bytes(name, content) for name, content in files.items()))
    (directory / MANIFEST_NAME).write_bytes(manifest.to_bytes())
    commit(str(run), CommitRecord(step, 1, directory.name, "2026-01-01T00:00:00+00:00", {"held-out/loss": loss}))


RECIPE = """
name: bot
model: {path: base}
data: {train: [{path: rows.jsonl}], eval: [{path: held-out.jsonl, name: held-out}]}
"""


@pytest.fixture
def run(place: Path) -> Path:
    """A run of two checkpoints; the older one is the better."""
    folder = place / "runs" / "bot"
    RunDirectory(str(folder)).store_recipe(RECIPE)
    model = {path.name: path.read_bytes() for path in (place / "base").iterdir()}
    add_checkpoint(folder, 5, {**model, "training/state.json": b"{}"}, loss=1.0)
    add_checkpoint(folder, 10, {**model, "training/state.json": b"{}", "NOTE": b"ten"}, loss=2.0)
    return folder


def pull(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    code = cli.main(["pull", *words])
    shown = capsys.readouterr()
    return code, shown.out + shown.err


@pytest.mark.parametrize(
    ("reference", "step"), [("bot", 10), ("bot@latest", 10), ("bot@best", 5), ("bot@5", 5), ("runs/bot@10", 10)]
)
def test_a_checkpoint_is_copied_without_the_optimizer_state(capsys, place, run, reference, step):
    code, said = pull(capsys, reference, "here")
    assert code == 0
    assert f"step {step}:" in said
    assert (place / "here" / "NOTE").exists() == (step == 10)
    assert (place / "here" / "model.safetensors").read_bytes() == (place / "base" / "model.safetensors").read_bytes()
    assert not (place / "here" / "training").exists()
    assert not (place / "here" / MANIFEST_NAME).exists()


def test_with_training_it_is_a_whole_checkpoint(capsys, place, run):
    assert pull(capsys, "bot", "here", "--training")[0] == 0
    assert {path.name for path in (place / "here").iterdir()} == {p.name for p in (run / "step-000010.a1").iterdir()}


def test_a_folder_in_use_is_refused(capsys, place, run):
    code, said = pull(capsys, "bot", "base")
    assert code == 1
    assert "not an empty folder" in said
    assert pull(capsys, "bot", "bot.yaml")[0] == 1


def test_a_flipped_bit_is_found(capsys, place, run):
    weights = run / "step-000010.a1" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    code, said = pull(capsys, "bot", "here")
    assert code == 2
    assert "model.safetensors: bytes" in said
    assert not (place / "here" / "model.safetensors").exists()


def test_bytes_that_no_checksum_covers_are_found(capsys, place, run):
    directory = run / "step-000010.a1"
    files = [FileRecord("NOTE", 3, (Span(0, 2, zlib.crc32(b"te")),))]
    (directory / MANIFEST_NAME).write_bytes(Manifest(10, 1, tuple(files)).to_bytes())
    assert pull(capsys, "bot", "here")[0] == 2


def test_spans_are_copied_at_once_and_progress_is_said(capsys, place, run, monkeypatch):
    """Both files wait for each other, and the spans of one are written in any order."""
    directory = run / "step-000010.a1"
    content = {"one.bin": b"0123456789", "two.bin": b"abcdefghij"}
    records = []
    for name, data in content.items():
        (directory / name).write_bytes(data)
        spans = (Span(0, 4, zlib.crc32(data[:4])), Span(4, 6, zlib.crc32(data[4:])))
        records.append(FileRecord(name, len(data), spans))
    (directory / MANIFEST_NAME).write_bytes(Manifest(10, 1, (*records, FileRecord("empty", 0, ()))).to_bytes())
    (directory / "empty").touch()
    together, read_range = threading.Barrier(4), storage.read_range

    def wait_and_read(url, start, stop):
        together.wait(60)
        return read_range(url, start, stop)

    monkeypatch.setattr(storage, "read_range", wait_and_read)
    code, said = pull(capsys, "bot", "here")
    assert code == 0
    assert " 50%  one.bin" in said
    assert "100%  two.bin" in said
    assert {path.name: path.read_bytes() for path in (place / "here").iterdir()} == {**content, "empty": b""}


def test_a_step_that_is_not_there_lists_those_that_are(capsys, run):
    code, said = pull(capsys, "bot@7", "here")
    assert code == 1
    assert "5, 10" in said


def test_a_run_that_is_not_there(capsys, run):
    code, said = pull(capsys, "bott", "here")
    assert code == 1
    assert "did you mean bot" in said


# --- status ---------------------------------------------------------------------------------------------------------


def test_status_says_state_step_losses_and_checkpoints(capsys, run):
    lines = [
        {"kind": "step", "step": 10, "attempt": 1, "progress": 0.5, "loss": 1.25, "learning_rate": 1e-4}
        | {"tokens_per_s": 100.0, "memory_bytes": 1 << 20, "tokens": 10, "step_s": 1.0},
        {"kind": "evaluation", "step": 10, "attempt": 1, "losses": {"held-out/loss": 2.0}},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert cli.main(["status", "bot"]) == 0
    out = capsys.readouterr().out
    wanted = ["unfinished", "loss 1.2500", "evaluated at step 10: held-out/loss 2.0000", "checkpoints: 5, 10"]
    assert [part for part in wanted if part not in out] == []


def test_status_of_a_running_run_names_host_and_process(capsys, run):
    RunDirectory(str(run)).claim_attempt(world_size=1, command=())
    assert cli.main(["status", "bot"]) == 0
    assert "running, attempt 1 on " in capsys.readouterr().out


# --- generate -------------------------------------------------------------------------------------------------------


def test_a_run_answers(capsys, run):
    assert cli.main(["generate", "bot", "what is one plus two ?", "--max-new-tokens", "3"]) == 0
    # All weights are zero, so every logit is equal and the first token wins; it is special and not shown.
    assert capsys.readouterr().out.strip() == ""


def test_a_checkpoint_folder_answers(capsys, place):
    assert cli.main(["generate", "base", "what", "--max-new-tokens", "1", "--temperature", "0.5"]) == 0


def test_the_prompt_goes_through_the_chat_template_unless_raw(place):
    with checkpoint_folder("base") as folder:
        writer = load_writer(folder)
    writer.tokenizer.chat_template = "what is {% for m in messages %}{{ m['content'] }}{% endfor %} ?"
    ids = writer._inputs("two", raw=False)["input_ids"][0].tolist()
    assert writer.tokenizer.convert_ids_to_tokens(ids) == ["what", "is", "two", "?"]
    ids = writer._inputs("two", raw=True)["input_ids"][0].tolist()
    assert writer.tokenizer.convert_ids_to_tokens(ids) == ["two"]


def test_an_adapter_answers_on_its_base(capsys, place):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = get_peft_model(AutoModelForCausalLM.from_pretrained("base"), LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained("adapter")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (place / "adapter" / name).write_bytes((place / "base" / name).read_bytes())
    writer = load_writer(place / "adapter")
    assert any("lora_A" in name for name, _ in writer.model.named_parameters())
    assert cli.main(["generate", "adapter", "what", "--max-new-tokens", "1"]) == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nothing", "what"], "there is no run"),
        (["base", "what", "--temperature", "-1"], "must be 0 or more"),
    ],
)
def test_what_cannot_answer_is_exit_1(capsys, place, words, said):
    assert cli.main(["generate", *words]) == 1
    assert said in capsys.readouterr().err


def test_a_broken_model_is_exit_1(capsys, place):
    (place / "base" / "model.safetensors").unlink()
    assert cli.main(["generate", "base", "what"]) == 1
    assert "cannot be opened as a model" in capsys.readouterr().err
