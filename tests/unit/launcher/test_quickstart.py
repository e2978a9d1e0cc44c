"""The quickstart without its training: folder, tokenizer, recipes, probe and table."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ftlaunch.distributed.data.template import load_tokenizer
from ftlaunch.launcher import quickstart, quickstart_data, quickstart_probe, quickstart_table
from ftlaunch.launcher.quickstart_model import CONFIG, PADDING, SPECIAL_TOKENS, VOCABULARY, build_model_folder
from ftlaunch.recipes.errors import UserError
from ftlaunch.recipes.load import load_recipe


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("a place: with 'odd' #name")
    quickstart.prepare(folder, Console(file=io.StringIO()))
    return folder


@pytest.fixture(scope="module")
def tokenizer(place: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(place / "model")


@pytest.fixture(scope="module")
def checkpoint(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of the quickstart's shape, as a checkpoint that plain transformers reads."""
    from shutil import copytree

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    copytree(place / "model", folder)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(folder)
    return folder


def held_out(place: Path) -> list[quickstart_data.Row]:
    return quickstart_data.read_jsonl_gz(place / "data/task/heldout.jsonl.gz")


@pytest.mark.parametrize("text", ["def f(self, key=None):\n\treturn  key\n", "naïve 日本語 🙂", " a  b ", "\x00\x7f"])
def test_tokenizer_gives_back_every_text(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_tokenizer_knows_the_turns(tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert rendered == "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nSo.<|im_end|>\n"
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [0, 1, 2]
    assert tokenizer.eos_token_id == CONFIG["eos_token_id"]
    assert tokenizer.pad_token == PADDING
    assert len(tokenizer) == VOCABULARY


def test_model_folder_is_left_alone(place: Path) -> None:
    before = (place / "model/tokenizer.json").read_bytes()
    build_model_folder(place / "model", iter(()))
    assert (place / "model/tokenizer.json").read_bytes() == before


def test_model_is_small(checkpoint: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert 0.5e6 < sum(parameter.numel() for parameter in model.parameters()) < 1e6
    assert model.generation_config.eos_token_id == CONFIG["eos_token_id"]


def test_recipes_load_from_any_folder(place: Path) -> None:
    base, tuned = (load_recipe(place / f"{name}.yaml", environ={}).recipe for name in ("base", "tuned"))
    assert (base.name, base.model.init, base.method.type) == ("base", "random", "cpt")
    assert (tuned.name, tuned.model.init, tuned.method.type) == ("tuned", "pretrained", "sft")
    assert tuned.model.path == f"{base.checkpoint.path}/base" == f"{place}/runs/base"
    assert tuned.strategy.type == "fsdp"
    assert [source.name for source in tuned.data.eval] == ["task", "general"]  # type: ignore[union-attr]
    assert base.data.eval[0] == tuned.data.eval[1]  # type: ignore[index]
    assert tuned.data.train[1].path == base.data.train[0].path


def test_every_sample_fits_a_sequence(place: Path, tokenizer: Any) -> None:
    longest = max(
        len(quickstart_probe.prompt_ids(tokenizer, row)) + len(quickstart_probe.answer_ids(tokenizer, row)) + 1
        for row in held_out(place)
    )
    assert longest <= quickstart.SEQUENCE_LENGTH


def test_recipes_of_the_user_are_kept_and_the_schema_lies_beside_them(place: Path) -> None:
    edited = (place / "tuned.yaml").read_text() + "# mine\n"
    (place / "tuned.yaml").write_text(edited)
    quickstart.write_recipes(place)
    assert (place / "tuned.yaml").read_text() == edited
    assert json.loads((place / "recipe.schema.json").read_text())["title"] == "Recipe"


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="ftlaunch quickstart DIR"):
        quickstart.prepare(tmp_path / "file/folder", Console(file=io.StringIO()))


def test_exchanged_prompts(place: Path) -> None:
    rows = held_out(place)
    exchanged = quickstart_probe.exchange_prompts(rows)
    assert [row["messages"][1] for row in exchanged] == [row["messages"][1] for row in rows]
    assert all(new["messages"][0] != old["messages"][0] for new, old in zip(exchanged, rows, strict=True))
    assert sorted(row["messages"][0]["content"] for row in exchanged) == sorted(
        row["messages"][0]["content"] for row in rows
    )


def test_probe_reads_rows_as_training_does(place: Path, tokenizer: Any) -> None:
    encoder = load_tokenizer(str(place / "model"))
    for row in held_out(place)[:20]:
        input_ids, _, targets = quickstart_probe.answer_batch(tokenizer, [row])
        trained_ids, mask = encoder.chat(row["messages"], None, "assistant")
        length = input_ids.shape[1]
        assert trained_ids[:length].tolist() == input_ids[0].tolist()
        assert not mask[length:].any()  # the template's line break after the turn
        assert mask[:length].tolist() == (targets[0] != quickstart_probe.IGNORED).tolist()


def test_answer_loss_is_that_of_transformers_row_by_row(place: Path, checkpoint: Path, tokenizer: Any) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    rows = held_out(place)[:20]  # more than a batch
    loss_sum, num_targets = 0.0, 0
    for row in rows:
        prompt, answer = quickstart_probe.prompt_ids(tokenizer, row), quickstart_probe.answer_ids(tokenizer, row)
        labels = torch.tensor([[-100] * len(prompt) + answer])
        with torch.inference_mode():
            loss_sum += model(input_ids=torch.tensor([prompt + answer]), labels=labels).loss.item() * len(answer)
        num_targets += len(answer)
    assert quickstart_probe.answer_loss(model, tokenizer, rows) == pytest.approx(loss_sum / num_targets, rel=1e-5)


def test_probe_answers_rows_as_if_each_were_alone(place: Path, checkpoint: Path, tokenizer: Any) -> None:
    from transformers import AutoModelForCausalLM

    rows = held_out(place)[:3]
    probe = quickstart_probe.probe(str(checkpoint), rows, 2)
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    batch = tokenizer(quickstart_probe.prompt_text(tokenizer, rows[0]), return_tensors="pt", add_special_tokens=False)
    tokens = model.generate(**batch, max_new_tokens=quickstart_probe.MAX_NEW_TOKENS, do_sample=False)
    alone = tokenizer.decode(tokens[0, batch["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert len(probe.written) == 2
    assert probe.written[0] == alone


def test_table() -> None:
    row = {"messages": [{"role": "user", "content": "Signature of the function f with [a]?"}, {"role": "assistant"}]}
    base = quickstart_table.Side(4.0, 4.0, 3.0, 4.1, 0.0, ("",))
    tuned = quickstart_table.Side(2.0, 2.000002, 3.3, 2.9, 1.0, ("def f(a):",))
    output = io.StringIO()
    outcome = quickstart_table.Outcome(base, tuned, (row,))
    quickstart_table.show_outcome(outcome, "qs", Console(file=output, width=120))
    shown = output.getvalue()
    for expected in (
        "-50%",
        "+10%",
        "+0.900",
        "2e-06",
        "100%",
        "with [a]?",
        "def f(a):",
        "ftlaunch qs/tuned.yaml --fresh",
    ):
        assert expected in shown
