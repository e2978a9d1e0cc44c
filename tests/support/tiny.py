"""Small real things to train on: models with random weights, tokenizers trained here, rows drawn from a seed."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WORDS = tuple("alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma tau".split())  # noqa: SIM905


def make_tokenizer(folder: Path, vocab_size: int = 300) -> Path:
    """A byte-level BPE with a ChatML template, as transformers saves it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 4096,
        "chat_template": CHATML,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def make_model(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A small Llama with random weights and odd sizes, and a tokenizer beside it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    make_tokenizer(folder)
    settings = {
        "vocab_size": 307,
        "hidden_size": 40,
        "intermediate_size": 52,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        LlamaForCausalLM(LlamaConfig(**(settings | changes))).save_pretrained(folder)
    return folder


def sentence(rng: random.Random, words: tuple[int, int] = (1, 20)) -> str:
    """Some words."""
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(*words)))


def chat_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Conversations of one or two turns."""
    rng = random.Random(seed)
    return [
        {
            "messages": [
                {"role": role, "content": f"{number} {sentence(rng)}"}
                for _ in range(rng.randint(1, 2))
                for role in ("user", "assistant")
            ]
        }
        for number in range(count)
    ]


def text_rows(count: int, seed: int = 0, words: tuple[int, int] = (1, 60)) -> list[dict[str, Any]]:
    """Documents, some longer than a sequence."""
    rng = random.Random(seed)
    return [{"text": f"{number} {sentence(rng, words)}"} for number in range(count)]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]], row_group_size: int = 16) -> Path:
    """Rows as parquet with several row groups."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=row_group_size)
    return path


def write_recipe(path: Path, recipe: dict[str, Any]) -> Path:
    """A recipe file (JSON is YAML)."""
    path.write_text(json.dumps(recipe))
    return path


def recipe_for(folder: Path, **changes: Any) -> dict[str, Any]:
    """A recipe over a small model and two weighted sources in `folder`, made if they are not there."""
    model = folder / "model"
    if not model.exists():
        make_model(model)
        write_jsonl(folder / "chat.jsonl", chat_rows(60))
        write_parquet(folder / "text.parquet", text_rows(40))
        write_jsonl(folder / "held-out.jsonl", chat_rows(10, seed=1))
    cut = {"overlong": "truncate_right"}  # text is split
    recipe: dict[str, Any] = {
        "name": "tiny",
        "model": {"path": str(model), "dtype": "float32"},
        "data": {
            "sequence_length": 64,
            "pack_buffer": 8,
            "train": [
                {"path": str(folder / "chat.jsonl"), "format": "chat", "weight": 0.7, **cut},
                {"path": str(folder / "text.parquet"), "format": "text", "weight": 0.3},
            ],
            "eval": [{"name": "chats", "path": str(folder / "held-out.jsonl"), "format": "chat", **cut}],
        },
        "train": {"max_steps": 8, "global_batch_size": 8, "micro_batch_size": 2, "learning_rate": 3e-3},
        "checkpoint": {"path": str(folder / "runs"), "every_steps": 3},
        "track": {"tensorboard": False},
    }
    for section, values in changes.items():
        recipe[section] = {**recipe[section], **values} if isinstance(recipe.get(section), dict) else values
    return recipe
