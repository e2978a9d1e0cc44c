"""A checkpoint's model, opened again in one process without training it, and what it answers.

Two ways that must agree: `own_logits` builds it as a run does (`build_model`, `CheckpointReader`, `LossModel`), and
`plain_logits` opens the folder with transformers and peft as anybody would. Both compute in fp32 on the CPU, so that
they differ by no more than the order of additions.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..recipes.errors import UserError
from ..recipes.schema import Recipe
from . import storage
from .buffers import Buffers
from .checkpoint.layout import num_elements
from .checkpoint.reader import CheckpointReader, read_whole
from .initialise import fill_buffers
from .loss_model import own_logits as logits_of
from .model import build_model
from .model_files import ModelFolder, find_model
from .persistent import persistent_buffers

ADAPTER_CONFIG = "adapter_config.json"

SEQUENCES, TOKENS = 2, 24

MEMORY_FACTOR = 1.3
"""Memory to be had for a comparison, in units of the weights in fp32: one model at a time, and what it computes."""


def adapter_config(directory: str) -> dict[str, Any] | None:
    """peft's description of an adapter; None for a whole model."""
    url = storage.join(directory, ADAPTER_CONFIG)
    if not storage.exists(url):
        return None
    config: dict[str, Any] = json.loads(storage.read_bytes(url))
    return config


def base_folder(config: dict[str, Any]) -> ModelFolder:
    """Where the base of an adapter lies. Raises UserError where it is no more."""
    return find_model(config["base_model_name_or_path"], config.get("revision"))


def needed_bytes(folders: list[str]) -> int:
    """Memory that opening the weights in these folders takes."""
    stems = ("adapter_model", "model")
    present = [
        (url, stem) for url in folders for stem in stems if any(n.startswith(stem) for n in storage.list_names(url))
    ]
    readers = [CheckpointReader(url, stem) for url, stem in present]
    return int(
        MEMORY_FACTOR * 4 * sum(num_elements(reader.spec(name)) for reader in readers for name in reader.names())
    )


def probe(vocabulary: int) -> Tensor:
    """The same tokens each time, [SEQUENCES, TOKENS]."""
    return torch.randint(vocabulary, (SEQUENCES, TOKENS), generator=torch.Generator().manual_seed(0))


def plain_logits(folder: Path, base: Path | None) -> Tensor:
    """Logits [B, S, V] as transformers, and with a base peft, give them. Raises UserError for what they cannot open."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():  # what libraries deprecate among themselves is nothing a user could mend
            warnings.simplefilter("ignore")
            model, report = AutoModelForCausalLM.from_pretrained(
                base or folder, dtype=torch.float32, output_loading_info=True
            )
            if base is not None:
                from peft import PeftModel

                model = PeftModel.from_pretrained(model, str(folder))
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{folder} cannot be opened with from_pretrained: {error}") from error
    _refuse_leftovers(base or folder, report)
    tokens = probe(model.config.get_text_config().vocab_size)
    with torch.no_grad():
        logits: Tensor = model.eval()(input_ids=tokens, use_cache=False).logits
    return logits


def _refuse_leftovers(folder: Path, report: dict[str, Any]) -> None:
    """transformers draws tensors that it does not find, and says so where nobody looks."""
    found = {kind: sorted(map(str, report[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if any(found.values()):
        listed = "; ".join(f"{kind}: {', '.join(names[:3])}" for kind, names in found.items() if names)
        raise UserError(f"{folder}: the weights do not fit config.json ({listed})")


def own_logits(directory: str, base: ModelFolder | None, config: dict[str, Any] | None) -> Tensor:
    """Logits [B, S, V] of the same tokens, through the parts that train. Raises UserError."""
    folder = base or ModelFolder(directory)
    built = build_model(_recipe(folder, config), folder)
    stored = built.layout.joined(CheckpointReader(folder.url))
    values = {name: read_whole(stored, there).float() for name, there in built.base.items()}
    if config is not None:
        adapter = CheckpointReader(directory, "adapter_model")
        values |= {name: read_whole(adapter, there).float() for name, there in built.published.items()}
    built.loss_model.load_state_dict(values, strict=False, assign=True)
    built.loss_model.causal_lm.tie_weights()
    fill_buffers(built.loss_model, torch.device("cpu"))
    Buffers(built, 1).load_base(stored)
    tokens = probe(built.config.get_text_config().vocab_size)
    with torch.no_grad():
        return logits_of(built.loss_model.eval(), {"input_ids": tokens})


def precise_buffers(folder: ModelFolder) -> frozenset[str]:
    """Stored names of a model's buffers that transformers holds in fp32 whatever its dtype is: they are not to be cast.
    Raises UserError."""
    built = build_model(_recipe(folder, None, "bfloat16"), folder)
    precise = {name for name, place in persistent_buffers(built.loss_model) if place.value.dtype == torch.float32}
    return frozenset(built.layout.names(built.buffers[name] for name in precise))


def _recipe(folder: ModelFolder, config: dict[str, Any] | None, dtype: str = "float32") -> Recipe:
    """What `build_model` has to know, from the files themselves: a pulled folder has no run around it. An adapter that
    started within the weights is stored as a plain one, and read as that."""
    adapter = config and {
        "type": "lora",
        "rank": config["r"],
        "alpha": config["lora_alpha"],
        "use_rslora": bool(config.get("use_rslora")),
        "use_dora": bool(config.get("use_dora")),
        # Experts are parameters of their own to peft, which finds them again by itself.
        "target_modules": "all-linear" if config.get("target_parameters") else config["target_modules"],
        "modules_to_save": config.get("modules_to_save") or [],
    }
    return Recipe.model_validate(
        {
            "name": "verify",
            "model": {"path": folder.url, "dtype": dtype},
            "data": {"train": [{"path": "none.jsonl"}]},
            "adapter": adapter,
        }
    )
