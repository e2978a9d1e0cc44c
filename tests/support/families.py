"""Tiny configurations of the model families that tests go through; random weights, odd sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny import make_tokenizer
from transformers import AutoConfig

COMMON: dict[str, Any] = {
    "vocab_size": 307,
    "hidden_size": 40,
    "intermediate_size": 52,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

CHANGES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 24},
    "qwen3": {"head_dim": 12},
    "phi3": {"original_max_position_embeddings": 512},
    "olmo2": {},
    "granite": {"logits_scaling": 6.0},
    "gemma2": {"head_dim": 12, "sliding_window": 24, "final_logit_softcapping": 30.0, "query_pre_attn_scalar": 12},
    "gemma3_text": {
        "head_dim": 12,
        "sliding_window": 24,
        "query_pre_attn_scalar": 12,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gpt_neox": {"rotary_pct": 0.5},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4},
    "bloom": {"n_layer": 2, "n_head": 4},
    "mamba2": {"state_size": 8, "num_heads": 10, "head_dim": 8, "n_groups": 2, "expand": 2, "chunk_size": 16},
    "mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2, "head_dim": 12},
    "qwen3_moe": {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 28, "head_dim": 12},
    "olmoe": {"num_experts": 5, "num_experts_per_tok": 2},
    "minimax_m2": {"num_local_experts": 5, "num_experts_per_tok": 2, "head_dim": 12, "rotary_dim": 12},
    "glm4_moe": {
        "n_routed_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,  # its experts are trained in bfloat16 too: rows of a multiple of 16 bytes
        "head_dim": 12,
        "first_k_dense_replace": 1,
        "num_nextn_predict_layers": 0,
    },
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "n_routed_experts": 6,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 28,
        "first_k_dense_replace": 1,
        "q_lora_rank": 20,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 10,
        "num_nextn_predict_layers": 0,
    },
    "gemma4_text": {
        "vocab_size_per_layer_input": 307,
        "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 0,
        "head_dim": 12,
        "global_head_dim": 12,
        "sliding_window": 24,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "falcon_h1": {
        "head_dim": 12,
        "mamba_d_ssm": 40,
        "mamba_n_heads": 4,
        "mamba_d_head": 10,
        "mamba_n_groups": 1,
        "mamba_d_state": 8,
        "mamba_chunk_size": 16,
    },
}


def tiny_config(model_type: str, **changes: Any) -> Any:
    """The configuration of a tiny model."""
    return AutoConfig.for_model(model_type, **(COMMON | CHANGES[model_type] | changes))


def make_family(folder: Path, model_type: str, seed: int = 0) -> Path:
    """A tiny model with random weights, as transformers saves it, and a tokenizer beside it. Persistent buffers are not
    as they begin either: routers prefer some experts, layers are scaled."""
    import torch
    from transformers import AutoModelForCausalLM

    make_tokenizer(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(model_type))
        stored = model.state_dict().keys()
        for name, buffer in model.named_buffers():
            if name in stored:
                buffer.add_(torch.rand(buffer.shape) / 4 + 0.01)
        model.save_pretrained(folder)
    return folder


def make_config_folder(folder: Path, model_type: str, **changes: Any) -> Path:
    """config.json and a tokenizer, no weights: what `model.init: random` starts from."""
    make_tokenizer(folder)
    tiny_config(model_type, **changes).save_pretrained(folder)
    return folder


def random_recipe(folder: Path, model_type: str, **changes: Any) -> dict[str, Any]:
    """A recipe that draws a tiny model of a family; its data is never read."""
    model = make_config_folder(folder / model_type, model_type)
    recipe: dict[str, Any] = {
        "name": model_type,
        # Not every family has sdpa kernels (Gemma 2 caps attention scores too).
        "model": {"path": str(model), "init": "random", "dtype": "float32", "attention": "eager"},
        "data": {"train": [{"path": "never-read.jsonl", "format": "text"}]},
        "checkpoint": {"path": str(folder / "runs")},
    }
    for section, values in changes.items():
        recipe[section] = recipe.get(section, {}) | values
    return recipe
