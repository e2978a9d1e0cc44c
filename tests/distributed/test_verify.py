"""What `ftlaunch verify` says of checkpoints that are whole, and of those that are not."""

from __future__ import annotations

import io
import json
import shutil
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_model, recipe_for
from training import Trained, train_all

from ftlaunch.distributed import reopen, storage
from ftlaunch.distributed.checkpoint import examine, manifest
from ftlaunch.distributed.checkpoint.manifest import MANIFEST_NAME, FileRecord, Manifest, Span, record_bytes
from ftlaunch.launcher import cli, units
from ftlaunch.launcher import verify as verifying
from ftlaunch.launcher.check_progress import Counted, Progress

NAMES = ("full", "half", "lora", "pissa", "qlora")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Trained]]:
    """Runs of two checkpoints each, of which the newer has training state."""
    folder = tmp_path_factory.mktemp("verify")
    recipe_for(folder)
    make_model(folder / "tied", tie_word_embeddings=True)
    short: dict[str, Any] = {
        "train": {"max_steps": 4, "learning_rate": 1e-2},
        "checkpoint": {"every_steps": 2, "keep_last": 2},
        "evaluate": {"at_start": False},
    }
    lora = {"type": "lora", "rank": 3}
    recipes = [
        recipe_for(folder, name="full", **short),
        recipe_for(folder, name="half", model={"path": str(folder / "tied"), "dtype": "bfloat16"}, **short),
        recipe_for(folder, name="lora", adapter={**lora, "use_dora": True, "modules_to_save": ["lm_head"]}, **short),
        recipe_for(folder, name="pissa", adapter={**lora, "init": "pissa", "use_rslora": True}, **short),
        recipe_for(folder, name="qlora", adapter={**lora, "type": "qlora"}, **short),
    ]
    return folder, dict(zip(NAMES, train_all(recipes), strict=True))


@pytest.fixture
def place(trained: tuple[Path, dict[str, Trained]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copies of the runs, to be damaged, in the current directory."""
    folder, _ = trained
    shutil.copytree(folder / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def verify(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    code = cli.main(["verify", *words])
    shown = capsys.readouterr()
    return code, shown.out + shown.err


@pytest.mark.parametrize("name", NAMES)
def test_a_whole_run(capsys, place, name):
    code, said = verify(capsys, name)
    assert code == 0, said
    directories = [line for line in said.splitlines() if not line.startswith(" ")]
    assert [Path(line).name for line in directories] == ["step-000004.a1", "step-000002.a1"]
    assert said.count("\n  whole\n") == 2
    assert said.count("headers and index agree") == said.count("all finite") == 2
    library = "transformers" if name in ("full", "half") else "peft"
    assert said.count(f"by from_pretrained ({library}) and by the engine") == 2
    assert said.count("with training state") == said.count("weights only") == 1


def test_what_is_counted(capsys, place):
    directory = place / "runs" / "full" / "step-000004.a1"
    _, said = verify(capsys, str(directory))
    files = json.loads((directory / MANIFEST_NAME).read_text())["files"]
    assert f"{len(files)} files".split()[0] in said.split("files     ")[1].split(",")[0]
    assert f"{sum(len(file['spans']) for file in files.values())} spans" in said
    assert f"{len(load_file(directory / 'model.safetensors'))} tensors in 1 file;" in said


@pytest.mark.parametrize(
    ("reference", "steps"),
    [("full", [4, 2]), ("full@latest", [4]), ("full@2", [2]), ("runs/full@4", [4]), ("full@best", [4])],
)
def test_which_checkpoints_are_meant(capsys, place, reference, steps):
    losses = {}
    for step in (2, 4):
        record = place / "runs" / "full" / "commits" / f"step-{step:06d}.json"
        losses[step] = json.loads(record.read_text())["metrics"]
    assert losses[4] and not losses[2]
    code, said = verify(capsys, reference, "--no-logits")
    assert code == 0
    assert [int(line.split("step-")[1][:6]) for line in said.splitlines() if not line.startswith(" ")] == steps
    assert "logits" not in said


def test_progress_counts_every_byte(capsys, place):
    directory = str(place / "runs" / "lora" / "step-000004.a1")
    read: list[int] = []
    found = examine.examine(directory, manifest.read_manifest(directory), read.append)
    assert sum(read) == found.num_bytes
    out, now = io.StringIO(), [0.0]
    counted = Counted(Progress(out, drawn_over=False, clock=lambda: now[0], amount=units.size), "reading", 4096)
    now[0] = 10.0
    counted.advance(1024)
    assert out.getvalue() == "reading: 1 KiB, 25%, about 30 s left\n"


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)


def truncate(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize("name", ["full", "lora"])
def test_a_flipped_bit_of_any_file_is_named(capsys, place, name):
    """In every file of a checkpoint but the manifest, in the middle of it."""
    directory = place / "runs" / name / "step-000004.a1"
    files = json.loads((directory / MANIFEST_NAME).read_text())["files"]
    assert len(files) >= 6
    for path, file in files.items():
        flip(directory / path, file["size"] // 2)
    code, said = verify(capsys, f"{name}@4")
    assert code == 1
    for path, file in list(files.items())[: verifying.SHOWN]:
        start, length, _ = next(s for s in file["spans"] if s[0] <= file["size"] // 2 < s[0] + s[1])
        assert f"PROBLEM   {path}: bytes {start} to {start + length} are not what was written" in said
    assert "not compared: the files have to be whole" in said
    assert "What to do" in said


def test_only_the_bytes_that_are_damaged_are_named(capsys, place):
    """Spans of 4 MiB; the file is read in runs of several."""
    directory = place / "large"
    directory.mkdir()
    data = torch.arange(5 * 2**20, dtype=torch.float32)
    save_file({"model.a": data}, directory / "model.safetensors")
    content = (directory / "model.safetensors").read_bytes()
    size = 4 * 2**20
    spans = [
        Span(at, len(content[at : at + size]), zlib.crc32(content[at : at + size]))
        for at in range(0, len(content), size)
    ]
    (directory / MANIFEST_NAME).write_bytes(
        Manifest(1, 1, (FileRecord("model.safetensors", len(content), tuple(spans)),)).to_bytes()
    )
    assert verify(capsys, "large", "--no-logits")[0] == 0
    for at in (size + 5, 2 * size + 5, 4 * size + 5):
        flip(directory / "model.safetensors", at)
    code, said = verify(capsys, "large", "--no-logits")
    assert code == 1
    assert f"bytes {size} to {3 * size} are not" in said and f"bytes {4 * size} to {5 * size} are not" in said
    assert said.count("PROBLEM") == 2


def test_a_read_that_goes_wrong_once_is_no_damage(capsys, place, monkeypatch):
    read_range, wrong = storage.read_range, []

    def read_wrong_once(url, start, stop):
        data = read_range(url, start, stop)
        if url.endswith("config.json") and not wrong:
            wrong.append(url)
            return data[:-1] + b"?"
        return data

    monkeypatch.setattr(storage, "read_range", read_wrong_once)
    assert verify(capsys, "full@4", "--no-logits")[0] == 0
    assert wrong


def test_a_missing_file_is_named(capsys, place):
    (place / "runs" / "full" / "step-000004.a1" / "tokenizer.json").unlink()
    (place / "runs" / "full" / "step-000004.a1" / "training" / "state.json").unlink()
    code, said = verify(capsys, "full")
    assert code == 1
    assert "PROBLEM   tokenizer.json is missing" in said and "PROBLEM   training/state.json is missing" in said
    assert said.count("\n  whole\n") == 1
    assert "take another checkpoint that is whole: " in said and "step-000002.a1" in said.split("take another")[1]


@pytest.mark.parametrize("kept", [0, 5, 1000, 20_001])
def test_a_truncated_file_is_named(capsys, place, kept):
    weights = place / "runs" / "full" / "step-000004.a1" / "model.safetensors"
    size = weights.stat().st_size
    truncate(weights, kept)
    code, said = verify(capsys, "full@4")
    assert code == 1
    assert f"model.safetensors: bytes {kept} to {size} are cut off ({size} bytes were written)" in said


def test_a_file_that_grew_is_named(capsys, place):
    config = place / "runs" / "full" / "step-000004.a1" / "config.json"
    size = config.stat().st_size
    config.write_bytes(config.read_bytes() + b"{}")
    code, said = verify(capsys, "full@4", "--no-logits")
    assert code == 1
    assert f"config.json: bytes {size} to {size + 2} were added" in said


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_text("{")])
def test_a_manifest_that_is_gone_or_broken(capsys, place, damage):
    damage(place / "runs" / "full" / "step-000004.a1" / MANIFEST_NAME)
    code, said = verify(capsys, "full", "--no-logits")
    assert code == 1
    assert said.count("PROBLEM") == said.count("\n  whole\n") == 1
    assert MANIFEST_NAME in said


def test_a_commit_record_that_is_broken(capsys, place):
    flip(place / "runs" / "full" / "commits" / "step-000004.json", 0)
    code, said = verify(capsys, "full", "--no-logits")
    assert code == 1
    assert "step-000004.json is no commit record" in said


def rewritten(directory: Path) -> None:
    """Give a changed folder a manifest that fits."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != MANIFEST_NAME)
    records = tuple(record_bytes(str(path.relative_to(directory)), path.read_bytes()) for path in paths)
    (directory / MANIFEST_NAME).write_bytes(Manifest(4, 1, records).to_bytes())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_numbers_that_are_none(capsys, place, dtype, monkeypatch):
    """Wherever reads begin and end: within a value too."""
    directory = place / "runs" / "full" / "step-000004.a1"
    tensors = {name: values.to(dtype) for name, values in load_file(directory / "model.safetensors").items()}
    tensors["model.norm.weight"][3] = float("nan")
    tensors["lm_head.weight"].view(-1)[-1] = float("inf")
    tensors["lm_head.weight"].view(-1)[:7] = float("-inf")
    tensors["model.layers.1.mlp.up_proj.weight"][:] = float("nan")
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    rewritten(directory)
    content = (directory / "model.safetensors").read_bytes()
    odd = [
        Span(at, len(content[at : at + 997]), zlib.crc32(content[at : at + 997])) for at in range(0, len(content), 997)
    ]
    kept = manifest.read_manifest(str(directory))
    records = [FileRecord(f.path, f.size, tuple(odd) if f.path == "model.safetensors" else f.spans) for f in kept.files]
    (directory / MANIFEST_NAME).write_bytes(Manifest(4, 1, tuple(records)).to_bytes())
    neighbours = manifest.neighbours
    monkeypatch.setattr(examine, "neighbours", lambda spans: neighbours(spans, 5 * 997))
    code, said = verify(capsys, "full@4", "--no-logits")
    assert code == 1
    assert "PROBLEM   model.norm.weight has 1 values that are NaN or infinite" in said
    assert "PROBLEM   lm_head.weight has 8 values that are NaN or infinite" in said
    assert f"PROBLEM   model.layers.1.mlp.up_proj.weight has {52 * 40} values that are NaN or infinite" in said
    assert said.count("PROBLEM") == 3
    assert "lower train.learning_rate" in said


def test_an_index_that_contradicts_the_headers(capsys, place):
    """The bytes are as they were written, and wrong."""
    directory = place / "runs" / "full" / "step-000004.a1"
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, held in halves.items():
        save_file({name: tensors[name] for name in held}, directory / file, metadata={"format": "pt"})
    index = {name: file for file, held in halves.items() for name in held}
    total = sum(values.nbytes for values in tensors.values())
    place_of_index = directory / "model.safetensors.index.json"

    def said_of(weight_map: dict[str, str], size: int) -> tuple[int, str]:
        place_of_index.write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}))
        rewritten(directory)
        return verify(capsys, "full@4")

    code, said = said_of(index, total)
    assert code == 0 and f"{len(names)} tensors in 2 files; headers and index agree" in said, said
    code, said = said_of({**index, names[0]: index[names[1]]}, total)
    assert code == 1 and f"model.safetensors.index.json and the headers of its files disagree about {names[0]}" in said
    code, said = said_of(index, total - 1)
    assert code == 1 and f"says {total - 1} bytes, the headers {total}" in said
    place_of_index.unlink()
    rewritten(directory)
    code, said = verify(capsys, "full@4")
    assert code == 1 and "model.safetensors.index.json is missing for 2 files" in said


def test_weights_that_do_not_fit_their_configuration(capsys, place):
    """The bytes are as they were written; it is the model that cannot be opened."""
    directory = place / "runs" / "full" / "step-000004.a1"
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    rewritten(directory)
    assert verify(capsys, "full@4", "--no-logits")[0] == 0
    code, said = verify(capsys, "full@4")
    assert code == 1
    assert "missing_keys: model.norm.weight" in said


def test_logits_that_differ_are_told(capsys, place, monkeypatch):
    """Ours are made wrong by a hundredth of a weight."""
    own = reopen.read_whole
    scaled = lambda reader, name: own(reader, name) * (1.01 if name == "lm_head.weight" else 1)  # noqa: E731
    monkeypatch.setattr(reopen, "read_whole", scaled)
    code, said = verify(capsys, "full@4")
    assert code == 1
    assert "logits of transformers and ours differ by" in said


def test_a_base_that_is_gone(capsys, place):
    directory = place / "runs" / "lora" / "step-000004.a1"
    config = json.loads((directory / "adapter_config.json").read_text())
    (directory / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "gone/away/base"}))
    rewritten(directory)
    code, said = verify(capsys, "lora@4")
    assert code == 1
    assert "there is no folder 'gone/away/base'" in said


def test_a_model_that_does_not_fit_is_not_opened(capsys, place, monkeypatch):
    monkeypatch.setattr(reopen, "MEMORY_FACTOR", 1e12)
    monkeypatch.setattr(reopen, "plain_logits", None)
    code, said = verify(capsys, "full@4")
    assert code == 0
    assert "logits    not compared: that takes" in said


def test_from_an_object_store(capsys, place):
    """Through URLs, and with one file too many, which does no harm."""
    for name in ("full", "lora"):
        for path in (place / "runs" / name).rglob("*"):
            if path.is_file():
                url = storage.join("memory://verify", name, str(path.relative_to(place / "runs" / name)))
                storage.write_bytes(url, path.read_bytes())
    storage.write_bytes("memory://verify/full/step-000004.a1/left.tmp", b"x")
    code, said = verify(capsys, "memory://verify/full")
    assert code == 0, said
    assert said.count("from_pretrained (transformers)") == 2
    assert "besides   left.tmp" in said
    assert verify(capsys, "memory://verify/lora@4")[0] == 0
    storage.delete_tree("memory://verify/full/step-000004.a1/config.json")
    code, said = verify(capsys, "memory://verify/full@4")
    assert code == 1
    assert "config.json is missing" in said


@pytest.mark.parametrize(
    ("reference", "said"),
    [("nothing", "there is no run"), ("full@7", "Committed steps: 2, 4"), ("full@x", "after the @")],
)
def test_what_is_not_there(capsys, place, reference, said):
    code, shown = verify(capsys, reference)
    assert code == 1
    assert said in shown


def test_what_was_pulled_can_be_verified(capsys, place):
    assert cli.main(["pull", "full", "whole", "--training"]) == 0
    assert verify(capsys, "whole")[0] == 0
    assert cli.main(["pull", "full", "plain"]) == 0
    code, said = verify(capsys, "plain")
    assert code == 1
    assert "pull it with --training" in said
