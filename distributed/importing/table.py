"""The table of formats that `import-checkpoint` reads, in the order in which they are looked for."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from ...recipes.errors import UserError
from .base import Foreign

FORMATS = {
    "deepspeed": "deepspeed:find",
    "dcp": "dcp:find",
    "pickled": "pickled:find",
}

LOOKED_FOR = (
    "a DeepSpeed checkpoint (mp_rank_00_model_states.pt and its kin, or a `latest` file that names their folder)",
    "one of torch.distributed.checkpoint (.metadata, or folders pytorch_model_fsdp_0 and optimizer_0 with one)",
    "pickled weights (pytorch_model.bin, or several with pytorch_model.bin.index.json)",
)

SHOWN = 12


def open_foreign(source: str) -> Foreign:
    """The checkpoint in a folder. Raises UserError for one that is damaged, that cannot be imported, or that none of
    the formats knows."""
    if "://" in source and not source.startswith("file://"):
        raise UserError(
            f"{source}: is read from a local disk only, where its files can be mapped; copy it to one first."
        )
    folder = Path(source.removeprefix("file://"))
    if not folder.is_dir():
        there = "is a file; name the folder that holds the checkpoint" if folder.exists() else "is not there"
        raise UserError(f"{source} {there}.")
    for target in FORMATS.values():
        module, _, name = target.partition(":")
        found: Foreign | None = getattr(import_module(f".{module}", __package__), name)(folder)
        if found is not None:
            return found
    raise UserError(_unknown(folder))


def _unknown(folder: Path) -> str:
    names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())
    if any(name.endswith(".safetensors") for name in names):
        return f"{folder} holds safetensors already: nothing has to be imported. Give it to a recipe as model.path."
    listed = ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
    inside = [name for name in names if name.startswith(("checkpoint-", "global_step")) and name.endswith("/")]
    hint = f" Name one of {', '.join(inside[:SHOWN])}" if inside else ""
    looked = "".join(f"\n  {kind}" for kind in LOOKED_FOR)
    return (
        f"{folder} is no checkpoint that can be imported. Looked for:{looked}\nThere is: {listed or 'nothing'}.{hint}"
    )
