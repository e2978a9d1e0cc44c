"""A folder with a small model, data and a recipe, made without any hub."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

HIDDEN, LAYERS, VOCABULARY, INNER = 8, 2, 32, 16
WORDS = ["<unk>", "<s>", "</s>", "what", "is", "one", "plus", "two", "three", "?", "."]


def weights() -> dict[str, np.ndarray]:
    """A Llama's tensors, by their published names."""
    tensors = {
        "model.embed_tokens.weight": np.zeros((VOCABULARY, HIDDEN), np.float32),
        "model.norm.weight": np.zeros(HIDDEN, np.float32),
        "lm_head.weight": np.zeros((VOCABULARY, HIDDEN), np.float32),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        tensors |= {f"{prefix}self_attn.{name}_proj.weight": np.zeros((HIDDEN, HIDDEN), np.float32) for name in "qkvo"}
        tensors |= {f"{prefix}mlp.{name}_proj.weight": np.zeros((INNER, HIDDEN), np.float32) for name in ("gate", "up")}
        tensors[f"{prefix}mlp.down_proj.weight"] = np.zeros((HIDDEN, INNER), np.float32)
        tensors[f"{prefix}input_layernorm.weight"] = np.zeros(HIDDEN, np.float32)
        tensors[f"{prefix}post_attention_layernorm.weight"] = np.zeros(HIDDEN, np.float32)
    return tensors


CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}


def write_model(folder: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(weights(), folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    tokens = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))


def write_rows(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


RECIPE = """\
# A small recipe for tests
model: {path: base, dtype: float32}
data:
  sequence_length: 16
  train:
    - {path: rows.jsonl}
  eval:
    - {path: held-out.parquet}
train: {global_batch_size: 4, max_steps: 3}
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory of the test: base/, rows.jsonl, held-out.parquet, bot.yaml."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    write_model(tmp_path / "base")
    write_rows(tmp_path / "rows.jsonl", [{"prompt": "what is one plus two ?", "completion": "three ."}] * 10)
    pq.write_table(pa.table({"text": ["one plus two is three ."] * 5}), tmp_path / "held-out.parquet")
    (tmp_path / "bot.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path
