"""The commands that look at a run that is there, or act on it. Registered by `cli.py`; parsing only, as there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from .cli_recipe import AS_WRITTEN, Overrides, Place, environment, load_stored, may_fork

if TYPE_CHECKING:
    from ..distributed.run_directory import RunDirectory


def verify(run: str, /, *, no_logits: bool = False) -> int:
    """Read every byte of a checkpoint again, and compare its logits with those that transformers gives.

    Parameters
    ----------
    run
        A run (all its checkpoints), RUN@best, RUN@latest, RUN@STEP, or a checkpoint's folder or URL.
    no_logits
        Do not open the model: for one that does not fit into this machine's memory.
    """
    from .verify import verify as verify_checkpoints

    return verify_checkpoints(run, logits=not no_logits)


def list_runs(path: str = "runs", /, *, json: bool = False) -> int:
    """List the runs below a checkpoint path: how they stand, how far they are, where they run.

    Parameters
    ----------
    path
        The folder or URL that recipes name as `checkpoint.path`.
    json
        Print JSON.
    """
    import time

    from .overview.listing import show_list

    return show_list(path, time.time(), as_json=json)


def status(run: str, /, *, json: bool = False) -> int:
    """Show how far a run is, its attempts, and where its time went.

    Parameters
    ----------
    run
        A run: NAME under ./runs, or a URL.
    json
        Print JSON.
    """
    from .status import show_status

    return show_status(run, as_json=json)


def logs(run: str, /, *, follow: Annotated[bool, Parameter(alias="-f")] = False, rank: int | None = None) -> int:
    """Show what a run has printed: the driver of a submitted run, or one rank.

    Parameters
    ----------
    run
        A run: NAME under ./runs, or a URL.
    follow
        Go on until it ends; the lines come some seconds late. `attach` asks the cluster itself.
    rank
        What this rank of the newest attempt printed.
    """
    from .logs import show_logs

    return show_logs(_run_directory(run), rank, follow_it=follow)


def retry(
    run: str,
    /,
    *overrides: Overrides,
    place: Place = AS_WRITTEN,
    accept_changes: bool = False,
    accept_changed_data: bool = False,
    detach: bool = False,
) -> int:
    """Start a run again from the recipe that it keeps, without the recipe's file: it goes on where it was.

    Parameters
    ----------
    run
        A run: NAME under ./runs, or a URL.
    accept_changes
        Continue although numbers that shape the training were changed.
    accept_changed_data
        Continue with data files as they are now: changed, gone or new. The epoch begins again.
    detach
        Submit the run to its cluster and do not follow it.
    """
    from ..distributed.again import Flags
    from .retry import enter_folder
    from .start import start

    directory = _run_directory(run)
    loaded = load_stored(directory, overrides, place)
    enter_folder(directory, loaded.recipe)
    flags = Flags(False, accept_changes, accept_changed_data)
    return start(loaded, flags, environment(), detach=detach, kept=may_fork.get())


def attach(run: str, /) -> int:
    """Follow a submitted run again, to its end. Ctrl-C lets go.

    Parameters
    ----------
    run
        A run: NAME under ./runs, or a URL.
    """
    from .submit import attach as attach_to

    return attach_to(_run_directory(run))


def stop(run: str, /, *, now: bool = False) -> int:
    """Let a submitted run save and end; whatever of it is left on its nodes goes too.

    Parameters
    ----------
    run
        A run: NAME under ./runs, or a URL.
    now
        End it at once, without saving.
    """
    from .submit import stop as stop_run

    return stop_run(_run_directory(run), now=now)


def _run_directory(run: str) -> RunDirectory:
    from ..distributed.run_directory import RunDirectory
    from .runs import find_run

    return RunDirectory(find_run(run, Path.cwd()))
