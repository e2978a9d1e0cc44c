"""The commands that look at a run that is there, or act on it. Registered by `cli.py`; parsing only, as there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

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


def status(run: str, /) -> int:
    """Show how far a run is.

    Parameters
    ----------
    run
        A run: NAME under ./runs, or a URL.
    """
    from .status import show_status

    return show_status(run)


def logs(run: str, /, *, follow: Annotated[bool, Parameter(alias="-f")] = False) -> int:
    """Show what a submitted run has printed.

    Parameters
    ----------
    run
        A run: NAME under ./runs, or a URL.
    follow
        Go on until it ends; the lines come some seconds late. `attach` asks the cluster itself.
    """
    from .submit import show_logs

    return show_logs(_submitted(run), follow_it=follow)


def attach(run: str, /) -> int:
    """Follow a submitted run again, to its end. Ctrl-C lets go.

    Parameters
    ----------
    run
        A run: NAME under ./runs, or a URL.
    """
    from .submit import attach as attach_to

    return attach_to(_submitted(run))


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

    return stop_run(_submitted(run), now=now)


def _submitted(run: str) -> RunDirectory:
    from ..distributed.run_directory import RunDirectory
    from .runs import find_run

    return RunDirectory(find_run(run, Path.cwd()))
