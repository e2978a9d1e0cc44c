"""A small model of the user's own kind: fewer layers, narrower, random weights that are the same each time."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

from ..distributed.model_files import ModelFolder
from ..recipes.errors import UserError

LAYERS = 2
WIDTH = 128
"""A hidden size that is not gone below: narrower ones are all rounding."""
EXPERTS = 8

LAYER_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
HIDDEN_KEYS = ("hidden_size", "n_embd", "d_model")
HEAD_KEYS = ("num_attention_heads", "n_head", "n_heads")
SHARED_HEAD_KEYS = ("num_key_value_heads",)
INNER_KEYS = ("intermediate_size", "n_inner", "ffn_dim", "moe_intermediate_size", "shared_expert_intermediate_size")
EXPERT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts")


class Small(NamedTuple):
    """A model folder, and what was made smaller, in words."""

    folder: Path
    description: str


def write_small_model(source: ModelFolder, target: Path, dtype: str, seed: int) -> Small:
    """A model of the same family at `target`, with the source's tokenizer. Raises UserError for a family that cannot be
    made smaller by its usual keys."""
    target.mkdir(parents=True)
    for name, data in source.small_files().items():
        (target / name).write_bytes(data)
    reasons = []
    for config in candidates(source.config):
        (target / "config.json").write_text(json.dumps(config))
        try:
            _write_weights(target, dtype, seed)
        except (ValueError, RuntimeError, KeyError, TypeError, IndexError, AttributeError) as error:
            reasons.append(f"{describe(source.config, config)}: {type(error).__name__}: {error}")
            continue
        return Small(target, describe(source.config, config))
    raise UserError(
        f"--scale-down: {source.url} (model type {source.config.get('model_type')!r}) cannot be made smaller:\n  "
        + "\n  ".join(reasons)
        + "\nLeave --scale-down out to test the whole model."
    )


def _write_weights(folder: Path, dtype: str, seed: int) -> None:
    """Random ones for the configuration that is there, if it makes a model that answers."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # Saving imports DeepSpeed where it is there, which greets.
    with redirect_stdout(io.StringIO()), torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
        model(torch.arange(8)[None] % model.config.get_text_config().vocab_size)
        model.to(getattr(torch, dtype)).save_pretrained(folder)


def candidates(config: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Configurations to try, the smallest first: fewer layers and narrower; fewer layers."""
    narrow = _in_text_config(config, lambda text: _narrower(_fewer_layers(text)))
    shallow = _in_text_config(config, _fewer_layers)
    yield narrow
    if shallow != narrow:
        yield shallow


def _in_text_config(config: Mapping[str, Any], change: Any) -> dict[str, Any]:
    """Multimodal models keep the language model's figures one level down."""
    if isinstance(config.get("text_config"), dict):
        return {**config, "text_config": change(config["text_config"])}
    changed: dict[str, Any] = change(config)
    return changed


def _fewer_layers(config: Mapping[str, Any]) -> dict[str, Any]:
    """At most `LAYERS`; lists with an entry for every layer get shorter with them."""
    key = next((key for key in LAYER_KEYS if key in config), None)
    if key is None or config[key] <= LAYERS:
        return dict(config)
    before = config[key]
    cut = {name: value[:LAYERS] for name, value in config.items() if isinstance(value, list) and len(value) == before}
    return {**config, key: LAYERS, **cut}


def _narrower(config: Mapping[str, Any]) -> dict[str, Any]:
    """Hidden size, heads and inner sizes divided by one power of two, so that a head keeps its size."""
    hidden = next((config[key] for key in HIDDEN_KEYS if key in config), 0)
    heads = next((config[key] for key in HEAD_KEYS if key in config), 0)
    factor = 1
    while heads and heads % (2 * factor) == 0 and hidden % (2 * factor) == 0 and hidden // (2 * factor) >= WIDTH:
        factor *= 2
    changed = dict(config)
    for keys, least in ((HIDDEN_KEYS, 1), (HEAD_KEYS, 1), (SHARED_HEAD_KEYS, 1), (INNER_KEYS, 8)):
        changed |= {key: max(least, config[key] // factor) for key in keys if isinstance(config.get(key), int)}
    return changed | {key: min(config[key], EXPERTS) for key in EXPERT_KEYS if isinstance(config.get(key), int)}


def describe(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """`2 of 32 layers, hidden_size 512 of 4096`."""
    before, after = before.get("text_config", before), after.get("text_config", after)
    changes = [
        f"{key} {after[key]} of {before[key]}"
        for key in (*LAYER_KEYS, *HIDDEN_KEYS, *HEAD_KEYS, *EXPERT_KEYS)
        if key in before and before[key] != after[key]
    ]
    return ", ".join(changes) or "nothing smaller"


def dropouts(config: Mapping[str, Any]) -> list[str]:
    """Keys of config.json that drop values in training."""
    shape = config.get("text_config", config)
    return sorted(
        key
        for key, value in shape.items()
        if ("dropout" in key or key.endswith("pdrop")) and isinstance(value, int | float) and value > 0
    )


def has_experts(config: Mapping[str, Any]) -> bool:
    """Whether a router chooses among parts of the model."""
    shape = config.get("text_config", config)
    return any(isinstance(shape.get(key), int) and shape[key] > 1 for key in EXPERT_KEYS)
