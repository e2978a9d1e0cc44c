"""Hands a run over to a cluster where its driver runs too, and follows it from here."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from ..cluster.base import Demand, Driver, Need, SubmittedCluster
from ..cluster.table import build_submitted, find_submitted
from ..distributed import storage
from ..distributed.again import Flags
from ..distributed.model_files import is_hub_id
from ..distributed.run_directory import RunDirectory
from ..recipes.errors import UserError
from ..recipes.load import LoadedRecipe
from ..recipes.schema import Recipe
from . import submissions
from .doctor.preflight import has_spares, with_fit_hosts
from .handover import pack
from .package import write_package

ENTRY = "ftlaunch.launcher.drive:main"
PATTERN = frozenset("*?[")


def submit(loaded: LoadedRecipe, flags: Flags, environ: Mapping[str, str], console: Console, *, detach: bool) -> int:
    """Start the run on its cluster; returns its exit code, or 0 at once with `detach`. Raises UserError and
    InfrastructureError."""
    _say(console, f"looking at the {loaded.recipe.cluster.type} cluster …")
    loaded, cluster = _fit(loaded, environ, console)
    try:
        _say(console, "starting Ray on it …")
        with tempfile.TemporaryDirectory(prefix="ftlaunch-code-") as folder:
            record = cluster.up(Driver(ENTRY, job_of(loaded, flags)), lambda: write_package(Path(folder)))
        run = storage.join(_absolute(loaded.recipe.checkpoint.path), loaded.recipe.name)
        _say(console, f"submitted as job {record['job']}: it goes on without this command", "bold")
        _say(console, f"  ftlaunch logs -f {run}\n  ftlaunch stop {run}")
        return 0 if detach else follow(cluster, console)
    finally:
        cluster.down()


def _fit(loaded: LoadedRecipe, environ: Mapping[str, str], console: Console) -> tuple[LoadedRecipe, SubmittedCluster]:
    """The cluster, with nothing wrong with it. What is unfit is left out, and what is wrong is told of what is left;
    where nothing could stand in, all that is wrong is told first."""
    cluster = None if has_spares(loaded) else _checked(loaded, environ)
    try:
        fit = with_fit_hosts(loaded, environ, lambda line: _say(console, f"warning: {line}", "yellow"))
    except BaseException:
        if cluster is not None:
            cluster.down()
        raise
    return fit, cluster or _checked(fit, environ)


def _checked(loaded: LoadedRecipe, environ: Mapping[str, str]) -> SubmittedCluster:
    """Raises UserError with all that is wrong."""
    cluster = build_submitted(loaded.recipe.cluster, need_of(loaded.recipe, environ))
    try:
        if problems := cluster.problems():
            raise UserError("\n".join(problems))
    except BaseException:
        cluster.down()
        raise
    return cluster


def job_of(loaded: LoadedRecipe, flags: Flags) -> Any:
    """What the driver is told, once the demand is known."""

    def job(demand: Demand) -> dict[str, Any]:
        return {
            "loaded": pack(loaded),
            "flags": asdict(flags),
            "demand": asdict(demand),
            "command": sys.argv,
            "columns": Console().width,
        }

    return job


def follow(cluster: SubmittedCluster, console: Console) -> int:
    """Show what the driver prints, to its end or to Ctrl-C, which only lets go; the exit code."""
    try:
        code = cluster.follow(_show)
        cluster.stop("now")  # the driver has ended: wait until its nodes are clean
    except KeyboardInterrupt:
        _say(console, "let go: the run goes on; `ftlaunch attach RUN` follows it again, `ftlaunch stop RUN` ends it")
        return 0
    return code


def _show(text: bytes) -> None:
    sys.stdout.write(text.decode(errors="replace"))
    sys.stdout.flush()


def _say(console: Console, line: str, style: str = "") -> None:
    console.print(Text(line, style=style), soft_wrap=True, highlight=False)


# --- what the nodes must have -----------------------------------------------------------------------------------------


def need_of(recipe: Recipe, environ: Mapping[str, str]) -> Need:
    """What a recipe's run needs of nodes that are elsewhere."""
    place = recipe.checkpoint.path
    return Need(
        folder=str(Path.cwd()),
        shared=_absolute(place) if storage.is_local(place) else None,
        paths={key: _absolute(path) for key, path in _read_paths(recipe) if _is_file(path)},
        patterns={
            key: _absolute(path) for key, path in _read_paths(recipe) if _is_on_disk(path) and not _is_file(path)
        },
        name=recipe.name,
        environ=environ,
    )


def _read_paths(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """(key, path) of everything that a run reads."""
    for key, path in (("model.path", recipe.model.path), ("model.tokenizer", recipe.model.tokenizer)):
        if path is not None and not is_hub_id(path):
            yield key, path
    held_out = recipe.data.eval if isinstance(recipe.data.eval, tuple) else ()
    for part, sources in (("train", recipe.data.train), ("eval", held_out)):
        for number, source in enumerate(sources):
            yield from ((f"data.{part}.{number}.path", path) for path in source.paths)


def _is_file(path: str) -> bool:
    """Whether it names one local file or folder."""
    return _is_on_disk(path) and not PATTERN & set(path)


def _is_on_disk(path: str) -> bool:
    return storage.is_local(path) and not path.startswith("hub:")


def _absolute(path: str) -> str:
    return str(storage.local_path(path).absolute()) if storage.is_local(path) else path


# --- a run that was submitted before ----------------------------------------------------------------------------------


def attach(run: RunDirectory) -> int:
    """Follow the newest submission, wherever it runs; its exit code."""
    submission = submissions.newest(run)
    if submission.exit_code is not None:
        _show(submissions.read_log(run, submission.name))
        return submission.exit_code
    cluster = find_submitted(submission.record)
    try:
        return follow(cluster, Console())
    finally:
        cluster.down()


def stop(run: RunDirectory, *, now: bool) -> int:
    """End the newest submission; whatever of it is left on its nodes goes too."""
    submission, console = submissions.newest(run), Console()
    cluster = find_submitted(submission.record)
    try:
        _say(console, "ending it …" if now else "asking it to save and end …")
        cluster.stop("now" if now else "save")
    finally:
        cluster.down()
    _say(console, f"job {submission.record['job']} is over, and nothing of it is left on its nodes")
    return 0
