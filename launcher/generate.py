"""`ftlaunch generate RUN|CHECKPOINT "prompt"`: what a trained model answers, through plain transformers."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..distributed import storage
from ..distributed.model_files import find_model
from ..recipes.errors import UserError
from .pull import copy_checkpoint, find_checkpoint

ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class Writer:
    """A model and its tokenizer, ready to write."""

    model: Any
    tokenizer: Any

    def answer(
        self, prompt: str, *, max_new_tokens: int, temperature: float, raw: bool = False, streamer: Any = None
    ) -> str:
        """The answer to a prompt, without special tokens. The chat template is applied where there is one, unless
        `raw`; with temperature 0 the likeliest token is taken each time. `streamer` sees the tokens as they come."""
        inputs = self._inputs(prompt, raw)
        sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
        output = self.model.generate(**inputs, max_new_tokens=max_new_tokens, streamer=streamer, **sampling)
        text: str = self.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return text

    def _inputs(self, prompt: str, raw: bool) -> Any:
        if raw or self.tokenizer.chat_template is None:
            inputs = self.tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        else:
            messages = [{"role": "user", "content": prompt}]
            inputs = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        return inputs.to(self.model.device)


def generate(reference: str, prompt: str, *, max_new_tokens: int, temperature: float, raw: bool) -> int:
    """Print what the model writes, token by token. Raises UserError where there is no model."""
    if temperature < 0:
        raise UserError(f"--temperature {temperature}: it must be 0 or more")
    with checkpoint_folder(reference) as folder:
        writer = load_writer(folder)
    from transformers import TextStreamer

    streamer = TextStreamer(writer.tokenizer, skip_prompt=True, skip_special_tokens=True)
    writer.answer(prompt, max_new_tokens=max_new_tokens, temperature=temperature, raw=raw, streamer=streamer)
    return 0


@contextmanager
def checkpoint_folder(reference: str) -> Iterator[Path]:
    """A local folder with the model that a reference means: a checkpoint's folder, or RUN[@best|@latest|@STEP]. From
    an object store it is copied, verified, and deleted afterwards."""
    if is_model_folder(Path(reference)):
        yield Path(reference)
        return
    url, record = find_checkpoint(reference)
    source = storage.join(url, record.directory)
    if storage.is_local(source):
        yield storage.local_path(source)
        return
    with tempfile.TemporaryDirectory(prefix="ftlaunch-") as temporary:
        copy_checkpoint(source, Path(temporary) / "model", training=False, say=lambda _line: None)
        yield Path(temporary) / "model"


def is_model_folder(folder: Path) -> bool:
    """Whether transformers or peft could open it."""
    return any((folder / name).is_file() for name in ("config.json", ADAPTER_CONFIG))


def load_writer(folder: Path) -> Writer:
    """Load a model, or an adapter on its base model, onto the GPU if there is one."""
    import torch
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():  # what libraries deprecate among themselves is nothing a user could mend
            warnings.simplefilter("ignore", FutureWarning)
            model = _load_adapted(folder) if (folder / ADAPTER_CONFIG).is_file() else _load_model(str(folder))
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} cannot be opened as a model: {error}") from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Writer(model.to(device).eval(), tokenizer)


def _load_model(path: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype="auto")


def _load_adapted(folder: Path) -> Any:
    from peft import PeftModel

    base = json.loads((folder / ADAPTER_CONFIG).read_text())["base_model_name_or_path"]
    found = find_model(base)
    if not storage.is_local(found.url):
        raise UserError(f"{folder} is an adapter of {base}; pull that model to this machine first")
    return PeftModel.from_pretrained(_load_model(found.url), str(folder))
