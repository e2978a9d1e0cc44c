"""`ftlaunch retry RUN`: a run goes on by the recipe that it keeps."""

from __future__ import annotations

import os
from pathlib import Path

from ..distributed import storage
from ..distributed.run_directory import RunDirectory
from ..recipes.errors import UserError
from ..recipes.schema import Recipe


def stored_text(run: RunDirectory) -> str:
    """The recipe as it is kept. Raises UserError where there is none."""
    text = run.read_recipe()
    if text is None:
        raise UserError(f"{run.url} has no recipe yet: nothing was started there")
    return text


def enter_folder(run: RunDirectory, recipe: Recipe) -> None:
    """Go to where the recipe's relative paths begin: the folder of the newest attempt, if it is on this machine.
    Raises UserError where the recipe would then mean another run."""
    folders = [attempt.folder for attempt in run.attempts() if attempt.folder]
    here = _absolute(run.url)
    if folders and Path(folders[-1]).is_dir():
        os.chdir(folders[-1])
    meant = _absolute(storage.join(recipe.checkpoint.path, recipe.name))
    if meant != here:
        raise UserError(
            f"{here}: its recipe names {meant} as its run. Call this from the folder where the run was started"
            + (f" ({folders[-1]})" if folders else "")
            + ", or set name and checkpoint.path: `ftlaunch retry RUN checkpoint.path=PATH`."
        )


def _absolute(url: str) -> str:
    return str(storage.local_path(url).resolve()) if storage.is_local(url) else url
