"""Data sets on the Hugging Face hub by name: `path: hub:ORG/NAME`, or `hub:ORG/NAME@REVISION`.

`datasets` knows which files a subset and a split are made of; they are then read as they lie there, through `hf://`
URLs that name the commit. So an index keeps the commit that a run began on, and nothing has to be compared later.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ...recipes.errors import InfrastructureError, UserError

HUB = "hub:"


def is_hub(path: str) -> bool:
    """Whether a path names a data set of the hub (or a folder with the layout of one, `hub:./folder`)."""
    return path.startswith(HUB)


def is_pinned(path: str) -> bool:
    """Whether its files are those of one commit. A local folder has none."""
    return is_hub(path) and not _folder(path).is_dir()


def _folder(path: str) -> Path:
    return Path(path.removeprefix(HUB))


def hub_files(path: str, subset: str | None, split: str | None) -> list[str]:
    """URLs (or local paths) of the files of a split, in order. Raises UserError that lists the subsets or splits when
    there is none of that name, or several and none was named."""
    name, revision = path.removeprefix(HUB), None
    if is_pinned(path):
        name, _, revision = name.partition("@")
    splits = _splits(name, revision or None, subset)
    if split is None and len(splits) == 1:
        return list(next(iter(splits.values())))
    if split is None or split not in splits:
        said = f"no split {split!r}" if split else "which split is meant?"
        raise UserError(f"{path}: {said} It has: {', '.join(splits) or 'none'}. Name one with `split:`.")
    return list(splits[split])


def _splits(name: str, revision: str | None, subset: str | None) -> Mapping[str, Sequence[str]]:
    try:
        from datasets import load_dataset_builder
        from datasets.exceptions import DatasetNotFoundError
    except ImportError as error:
        raise UserError(f"{HUB}{name}: data sets of the hub need a package: pip install 'ftlaunch[hub]'") from error
    try:
        builder = load_dataset_builder(name, subset, revision=revision)
    except DatasetNotFoundError as error:
        raise UserError(f"{HUB}{name}: {error}. A private or gated one needs HF_TOKEN in the environment.") from error
    except (ValueError, FileNotFoundError) as error:  # no such subset; several; no data files
        what = " ".join(str(error).partition("\nExample of usage")[0].split())
        raise UserError(f"{HUB}{name}: {what} (a subset is named with `subset:`)") from error
    except (OSError, RuntimeError) as error:
        raise InfrastructureError(f"{HUB}{name}: the hub cannot be reached: {error}") from error
    return {str(split): [str(file) for file in files] for split, files in (builder.config.data_files or {}).items()}
