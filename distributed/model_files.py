"""Where a model's files are: a folder, an object store, a finished run, or a model hub. No torch.

`model.path` may name any of them; everything later works on the folder URL found here.
"""

from __future__ import annotations

import json
import re
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..recipes.errors import InfrastructureError, UserError
from . import storage
from .checkpoint.commit import COMMITS, resolve

SMALL_FILES = re.compile(r".*\.(json|jinja|txt|model)$")
"""Configuration, tokenizer and template files: everything beside the weights that belongs to a model."""

NOT_COPIED = re.compile(
    r".*(\.index\.json|^MANIFEST\.json|^EXPORT\.json|^IMPORT\.json|^adapter_config\.json|trainer_state\.json)$"
)
"""Small files that describe one folder's own weights, and so are not handed on to a new checkpoint."""

WEIGHTS = ("*.safetensors",)
PICKLES = ("pytorch_model*.bin",)

HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[\w.-]+)?$")


@dataclass(frozen=True)
class ModelFolder:
    """A folder with config.json, a tokenizer, and perhaps weights. `url` is a local path or an fsspec URL."""

    url: str

    @cached_property
    def _temporary(self) -> tempfile.TemporaryDirectory[str]:
        """Made when it is needed: ranks that are killed leave it behind."""
        return tempfile.TemporaryDirectory(prefix="ftlaunch-model-")

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The files in the folder."""
        return tuple(storage.list_names(self.url))

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json. Raises UserError where it is missing or broken."""
        if "config.json" not in self.names:
            raise UserError(
                f"model.path: {self.url} has no config.json, so it is not a model folder. "
                f"It holds: {', '.join(self.names[:10]) or 'nothing'}."
            )
        try:
            config: dict[str, Any] = json.loads(storage.read_bytes(storage.join(self.url, "config.json")))
        except ValueError as error:
            raise UserError(f"model.path: {self.url}/config.json is not JSON: {error}") from error
        return config

    def small_files(self) -> dict[str, bytes]:
        """Everything that is not weights, by name: what a new checkpoint takes over."""
        return {
            name: storage.read_bytes(storage.join(self.url, name))
            for name in self.names
            if SMALL_FILES.match(name) and not NOT_COPIED.match(name)
        }

    @cached_property
    def local_small_files(self) -> Path:
        """A local folder with the small files, for libraries that read paths only."""
        if storage.is_local(self.url):
            return Path(self.url)
        folder = Path(self._temporary.name)
        for name, data in self.small_files().items():
            (folder / name).write_bytes(data)
        return folder


def template_text(chat_template: str) -> str:
    """A template given inline, or the content of the .jinja file it names."""
    path = Path(chat_template)
    return path.read_text() if chat_template.endswith(".jinja") else chat_template


def find_model(path: str, revision: str | None = None, *, weights: bool = True, pickles: bool = False) -> ModelFolder:
    """The folder that `model.path` (or `model.tokenizer`) means.

    A run directory means its latest committed checkpoint. A hub id is downloaded into the hub's own cache; with
    `weights=False` only the small files are; with `pickles` pickled weights too, where it has no others.
    Raises UserError for what does not exist.
    """
    if "://" in path or Path(path).is_dir():
        return ModelFolder(_inside_a_run(path))
    if not is_hub_id(path):
        raise UserError(f"model.path: there is no folder {path!r} (and it is not the name of a model on a hub).")
    folder = _from_hub(path, revision, weights=WEIGHTS if weights else ())
    if pickles and weights and not any(Path(folder).glob("*.safetensors")):
        folder = _from_hub(path, revision, weights=PICKLES)
    return ModelFolder(folder)


def is_hub_id(path: str) -> bool:
    """Whether a path can only be the name of a model on a hub: no URL, and no folder that is there."""
    return HUB_ID.match(path) is not None and "://" not in path and not Path(path).is_dir()


def pinned_revision(path: str, revision: str | None) -> str | None:
    """The commit that a hub id means today, so that a run keeps its base when the hub's branch moves; None for what is
    no hub id. Downloads the small files. Raises UserError and InfrastructureError as `find_model` does."""
    # The hub's cache names each snapshot's folder after its commit; this works offline too.
    return Path(find_model(path, revision, weights=False).url).name if is_hub_id(path) else None


def _inside_a_run(url: str) -> str:
    if not storage.exists(storage.join(url, COMMITS)):
        return url
    try:
        return storage.join(url, resolve(url, "latest").directory)
    except UserError as error:
        raise UserError(f"model.path: {error}") from error


def _from_hub(path: str, revision: str | None, *, weights: tuple[str, ...]) -> str:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    patterns = ["*.json", "*.jinja", "*.txt", "*.model", *weights]
    try:
        return str(snapshot_download(path, revision=revision, allow_patterns=patterns))
    except GatedRepoError as error:
        raise UserError(f"model.path: {path} is gated: accept its licence on its page and set HF_TOKEN.") from error
    except RepositoryNotFoundError as error:
        raise UserError(f"model.path: there is no folder {path!r}, and no model of that name on the hub.") from error
    except RevisionNotFoundError as error:
        raise UserError(f"model.revision: {path} has no revision {revision!r} on the hub.") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise InfrastructureError(
            f"model.path: there is no folder {path!r}, and the model hub cannot be reached to look there: {error}"
        ) from error
