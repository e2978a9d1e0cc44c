"""What benchmarks train on: a Llama of a given size with random weights, a tokenizer, text of fixed length.

Shapes: B sequences in a batch, S tokens in a sequence.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

END = "<|endoftext|>"


@dataclass(frozen=True)
class Size:
    """How big the model and a step are."""

    hidden: int
    layers: int
    vocab: int
    sequence: int
    batch: int


def write_model(folder: Path, size: Size, seed: int, dtype: str = "float32", **changes: Any) -> Path:
    """A model folder: weights, configuration, and a tokenizer that makes one token of every word. `changes`: of
    LlamaConfig."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = {
        "vocab_size": size.vocab,
        "hidden_size": size.hidden,
        "intermediate_size": size.hidden * 3,
        "num_hidden_layers": size.layers,
        "num_attention_heads": max(1, size.hidden // 64),
        "num_key_value_heads": max(1, size.hidden // 64),
        "max_position_embeddings": size.sequence,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**config | changes)).to(getattr(torch, dtype)).save_pretrained(folder)
    write_tokenizer(folder, size.vocab)
    return folder


def write_tokenizer(folder: Path, vocab: int) -> None:
    """A tokenizer that makes one token of every word."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {END: 0, **{word(number): number for number in range(1, vocab)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=END))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([END])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def word(number: int) -> str:
    """The word of one token."""
    return f"w{number}"


def write_text(path: Path, size: Size, rows: int, seed: int) -> Path:
    """JSON lines of documents of S - 1 words: with the token that ends a document, S tokens each."""
    rng = random.Random(seed)
    with path.open("w") as lines:
        for _ in range(rows):
            text = " ".join(word(rng.randrange(1, size.vocab)) for _ in range(size.sequence - 1))
            lines.write(json.dumps({"text": text}) + "\n")
    return path


def write_documents(path: Path, size: Size, rows: int, words: int, seed: int) -> Path:
    """JSON lines of documents of log-normal length, about `words` words in the median, at most a sequence."""
    rng = random.Random(seed)
    with path.open("w") as lines:
        for _ in range(rows):
            length = min(size.sequence - 1, max(2, int(rng.lognormvariate(0, 1) * words)))
            text = " ".join(word(rng.randrange(1, size.vocab)) for _ in range(length))
            lines.write(json.dumps({"text": text}) + "\n")
    return path


def recipe(folder: Path, model: Path, text: Path, size: Size, **changes: Any) -> dict[str, Any]:
    """A recipe that trains on whole sequences of S tokens, B a step."""
    sections: dict[str, Any] = {
        "name": "benchmark",
        "model": {"path": str(model), "dtype": "float32"},
        "method": {"type": "cpt"},
        "data": {
            "sequence_length": size.sequence,
            "packing": False,
            "train": [{"path": str(text), "format": "text"}],
        },
        "train": {
            "global_batch_size": size.batch,
            "micro_batch_size": size.batch,
            "learning_rate": 1e-4,
            "lr_scheduler": "constant",
        },
        "checkpoint": {"path": str(folder / "runs")},
    }
    for section, values in changes.items():
        sections[section] = {**sections[section], **values} if section in sections else values
    return sections


def write_recipe(path: Path, sections: dict[str, Any]) -> Path:
    """A recipe file (JSON is YAML)."""
    path.write_text(json.dumps(sections))
    return path
