"""The folder of a DeepSpeed checkpoint: which files it should have, by their names alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...recipes.errors import UserError

MODEL = re.compile(r"(?:zero_pp_rank_(?P<rank>\d+)_)?mp_rank_(?P<mp>\d+)_model_states\.pt")
OPTIMIZER = re.compile(r"(?P<kind>bf16_|fp16_)?zero_pp_rank_(?P<rank>\d+)_mp_rank_(?P<mp>\d+)_optim_states\.pt")

REFUSED = (
    (re.compile(r"layer_\d+-model_\d+.*"), "pipeline parallelism: its layers lie in files of their own"),
    (re.compile(r"(layer_\d+_)?expert_\d+_.*|expp_rank_\d+_.*"), "a mixture of experts: its experts are spread out"),
    (re.compile(r"(.*_)?mp_rank_0*[1-9]\d*_.*"), "tensor parallelism: its tensors are cut in pieces"),
)
"""Names that say how the model was cut -> what of it cannot be put together here."""

SHOWN = 5


@dataclass(frozen=True)
class DeepspeedFiles:
    """The files of one checkpoint, by rank. `model` is one file (ZeRO-0, 1, 2) or one of each rank (ZeRO-3);
    `optimizer` is empty where ZeRO was off."""

    folder: Path
    model: tuple[Path, ...]
    optimizer: tuple[Path, ...]
    is_bf16: bool


def find_files(folder: Path) -> DeepspeedFiles | None:
    """The files in a folder or in the one that its `latest` names; None where there is nothing of DeepSpeed's.

    Raises UserError for a layout that cannot be imported."""
    place = _place(folder)
    names = sorted(path.name for path in place.iterdir()) if place.is_dir() else []
    _refuse_parallel(place, names)
    model = {int(match["rank"] or 0): match[0] for match in map(MODEL.fullmatch, names) if match}
    optimizer = [match for match in map(OPTIMIZER.fullmatch, names) if match]
    if not model and not optimizer:
        return None
    if not model:
        raise UserError(
            f"{place}: mp_rank_00_model_states.pt is missing beside {optimizer[0][0]}. Copy it again, whole."
        )
    kinds = {match["kind"] for match in optimizer}
    if len(kinds) > 1:
        raise UserError(f"{place} holds optimizer files of two checkpoints ({optimizer[0][0]} and others). Remove one.")
    by_rank = {int(match["rank"]): match[0] for match in optimizer}
    return DeepspeedFiles(place, _paths(place, model), _paths(place, by_rank), kinds == {"bf16_"})


def _paths(place: Path, names: dict[int, str]) -> tuple[Path, ...]:
    return tuple(place / names[rank] for rank in sorted(names))


def _place(folder: Path) -> Path:
    """The folder itself, or the one that `latest` names, or the only global_stepN in it."""
    pointer = folder / "latest"
    if pointer.is_file():
        tag = pointer.read_text(errors="replace").strip()
        if not tag or "/" in tag or not (folder / tag).is_dir():
            raise UserError(
                f"{pointer} names {tag!r}, which is no folder in {folder}. Copy the checkpoint again, whole."
            )
        return folder / tag
    tagged = sorted(path for path in folder.glob("global_step*") if path.is_dir())
    if len(tagged) > 1:
        listed = ", ".join(path.name for path in tagged[:SHOWN])
        raise UserError(
            f"{folder} holds several checkpoints and no file `latest` that says which counts: name {listed}."
        )
    return tagged[0] if tagged else folder


def _refuse_parallel(place: Path, names: Sequence[str]) -> None:
    if (place / "zero").is_dir() and not any(map(OPTIMIZER.fullmatch, names)):
        raise UserError(
            f"{place} is a universal checkpoint of DeepSpeed; import the one that it was made from, or let DeepSpeed "
            "save again."
        )
    for pattern, what in REFUSED:
        found = [name for name in names if name.endswith(".pt") and pattern.fullmatch(name)]
        if found:
            raise UserError(
                f"{place} was saved under {what} ({found[0]}), which cannot be imported. Save it with "
                "transformers' save_pretrained, or convert it with the program that wrote it."
            )


def check_ranks(files: DeepspeedFiles, world_size: int, stage: int) -> None:
    """Raises UserError for files that the ranks of this world size should have left, and for more of them."""
    there = {path.name for path in (*files.model, *files.optimizer)}
    kind = "bf16_" if files.is_bf16 else "fp16_" if files.optimizer[0].name.startswith("fp16_") else ""
    optimizer = [f"{kind}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(world_size)]
    shards = [f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in range(world_size)]
    expected = optimizer + (shards if stage == 3 else ["mp_rank_00_model_states.pt"])
    missing, extra = sorted(set(expected) - there), sorted(there - set(expected))
    if missing:
        raise UserError(
            f"{files.folder}: of the files of {world_size} ranks {len(missing)} are missing: {_some(missing)}. Each "
            "rank saves its own, perhaps on its own machine: copy all of them here."
        )
    if extra:
        raise UserError(
            f"{files.folder}: was saved by {world_size} ranks, and there are files of more: {_some(extra)}. They are "
            "of another checkpoint; remove them."
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
