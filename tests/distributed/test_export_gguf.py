"""`ftlaunch export --gguf`: llama.cpp's own converter on a folder that was exported, and what is said when it fails."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from safetensors.numpy import load_file
from tiny import WORDS, recipe_for, sentence
from training import Trained, train_all

from ftlaunch.launcher import cli, export_gguf


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Trained]]:
    """A full run and one with an adapter, of a model with a vocabulary that the converter knows."""
    folder = tmp_path_factory.mktemp("gguf")
    shared = {"checkpoint": {"every_steps": None}, "evaluate": {"at_start": False, "at_end": False}}
    full = recipe_for(folder, name="full", train={"max_steps": 2, "learning_rate": 1e-2}, **shared)
    write_sentencepiece(folder / "model")
    lora = {**full, "name": "lora", "adapter": {"type": "lora", "rank": 3}}
    return folder, dict(zip(("full", "lora"), train_all([full, lora]), strict=True))


def write_sentencepiece(folder: Path) -> None:
    """tokenizer.model beside tokenizer.json, as Llama 2 has it."""
    import random

    rng = random.Random(0)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([sentence(rng) for _ in range(200)]),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=290,
        model_type="bpe",
        byte_fallback=True,
        user_defined_symbols=list(WORDS[:3]),
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    code = cli.main(["export", *map(str, words)])
    shown = capsys.readouterr()
    return code, " ".join((shown.out + shown.err).split())


def of_gguf(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a file, in fp32, by the names that llama.cpp gives them."""
    from gguf import GGUFReader, dequantize

    return {one.name: dequantize(one.data, one.tensor_type) for one in GGUFReader(path).tensors}


def unpermuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of Q and K as transformers has them: llama.cpp interleaves the two halves that rotate together."""
    return weight.reshape(heads, weight.shape[0] // heads // 2, 2, -1).swapaxes(1, 2).reshape(weight.shape)


def check_same_weights(gguf: Path, folder: Path) -> None:
    made, stored = of_gguf(gguf), load_file(folder / "model.safetensors")
    names = {"attn_q": ("self_attn.q_proj", 4), "attn_k": ("self_attn.k_proj", 2), "ffn_down": ("mlp.down_proj", None)}
    for layer in range(3):
        for there, (here, heads) in names.items():
            weight = made[f"blk.{layer}.{there}.weight"]
            weight = weight if heads is None else unpermuted(weight, heads)
            expected = stored[f"model.layers.{layer}.{here}.weight"]
            assert np.array_equal(weight, expected.astype(np.float32)), (layer, there)
    assert np.array_equal(made["output_norm.weight"], stored["model.norm.weight"].astype(np.float32))
    assert np.array_equal(made["output.weight"], stored["lm_head.weight"].astype(np.float32))


def test_the_real_converter_on_a_merged_adapter(trained, tmp_path, capsys):
    """The numbers of the file are those of the folder, and it is verified like the rest."""
    _, runs = trained
    to = tmp_path / "out"
    words = ["--merge-adapter", "--dtype", "float16"]
    code, said = run(capsys, runs["lora"].directory, "--to", to, *words, "--gguf")
    assert code == 0, said
    check_same_weights(to / "lora-f16.gguf", to)
    assert "lora-f16.gguf" in json.loads((to / "MANIFEST.json").read_text())["files"]
    assert cli.main(["verify", str(to)]) == 0
    assert "not of this checkpoint" not in capsys.readouterr().out
    code, said = run(capsys, runs["lora"].directory, "--to", to, *words, "--overwrite")
    assert code == 0 and not list(to.glob("*.gguf")), "it goes with the export that it belonged to"


def test_what_the_real_converter_says_of_a_tokenizer_it_does_not_know(trained, tmp_path, capsys):
    """The model beside it is whole, and nothing half-made is left."""
    _, runs = trained
    broken = tmp_path / "checkpoint"
    shutil.copytree(runs["full"].checkpoint, broken)
    manifest = json.loads((broken / "MANIFEST.json").read_text())
    del manifest["files"]["tokenizer.model"]
    (broken / "MANIFEST.json").write_text(json.dumps(manifest))
    to = tmp_path / "out"
    code, said = run(capsys, broken, "--to", to, "--gguf")
    assert code == 1
    assert "it ended with code 1" in said and "BPE pre-tokenizer was not recognized" in said
    assert f"the model in {to} is whole" in said and "does not know the family" in said
    assert not list(to.glob("*.gguf*")) and not list(to.glob(".*"))
    assert cli.main(["verify", str(to)]) == 0


def stand_in(folder: Path, body: str) -> Path:
    """A program in the converter's place, for what the real one cannot be brought to do."""
    script = folder / "convert_hf_to_gguf.py"
    script.write_text(f"import sys\nfrom pathlib import Path\n{body}\n")
    return folder


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("print('no room'); sys.exit(7)", "it ended with code 7: no room"),
        ("print('done')", "it ended with code 0 and wrote no GGUF file: done"),
        ("Path(sys.argv[3]).write_bytes(b'GG')", "and wrote no GGUF file"),
        ("import os; os.kill(os.getpid(), 9)", "it ended with code -9"),
    ],
)
def test_a_converter_that_fails(trained, tmp_path, capsys, body, said):
    _, runs = trained
    to = tmp_path / "out"
    code, text = run(capsys, runs["full"].directory, "--to", to, "--gguf-converter", stand_in(tmp_path, body))
    assert code == 1
    assert said in text, text
    assert not list(to.glob("*.gguf*")) and not list(to.glob(".*"))
    assert (to / "MANIFEST.json").exists()


def test_arguments_are_a_list(trained, tmp_path, capsys):
    """Names with spaces and quotes reach the converter as they are."""
    _, runs = trained
    to = tmp_path / "it's a; folder $(x)"
    write = "Path(sys.argv[3]).write_bytes(b'GGUF'); Path('arguments').write_text(repr(sys.argv[1:]))"
    code, text = run(
        capsys,
        runs["full"].directory,
        "--to",
        to,
        "--gguf-converter",
        stand_in(tmp_path, f"import os; os.chdir({str(tmp_path)!r}); {write}"),
    )
    assert code == 0, text
    made = f"{to}/.full-f32.gguf.tmp"
    assert (tmp_path / "arguments").read_text() == repr([str(to), "--outfile", made, "--outtype", "f32"])


def test_before_anything_is_written(trained, tmp_path, capsys, monkeypatch):
    _, runs = trained
    to = tmp_path / "out"
    code, said = run(capsys, runs["lora"].directory, "--to", to, "--gguf")
    assert code == 1 and "add --merge-adapter" in said
    code, said = run(capsys, runs["full"].directory, "--to", "memory://out", "--gguf")
    assert code == 1 and "reads local files" in said
    code, said = run(capsys, runs["full"].directory, "--to", to, "--gguf", "--gguf-converter", tmp_path / "none")
    assert code == 1 and "there is no convert_hf_to_gguf.py" in said and "clone llama.cpp" in said
    monkeypatch.setattr(export_gguf.shutil, "which", lambda *_, **__: None)
    code, said = run(capsys, runs["full"].directory, "--to", to, "--gguf")
    assert code == 1 and "is not on the PATH" in said and "clone llama.cpp" in said
    assert not to.exists()
