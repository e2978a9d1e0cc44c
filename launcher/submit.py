"""Hands a run over to a cluster where its driver runs too, and follows it from here."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from ..cluster.base import Demand, Driver, Need, Record, SubmittedCluster
from ..cluster.table import build_submitted, find_submitted, is_run_here
from ..distributed import storage
from ..distributed.again import Flags
from ..distributed.model_files import is_hub_id
from ..distributed.run_directory import RunDirectory
from ..recipes.errors import FtlaunchError, InfrastructureError, Interrupted, UserError
from ..recipes.load import LoadedRecipe
from ..recipes.schema import Recipe
from ..recipes.schema_cluster import ClusterConfig
from . import submissions
from .doctor.preflight import has_spares, with_fit_hosts
from .handover import pack
from .job_state import ask
from .package import write_package
from .say import say
from .settle import announce, renamed, run_of, settle

ENTRY = "ftlaunch.launcher.drive:main"
PATTERN = frozenset("*?[")


def submit(loaded: LoadedRecipe, flags: Flags, environ: Mapping[str, str], console: Console, *, detach: bool) -> int:
    """Start the run on its cluster; returns its exit code, or 0 at once with `detach`. Raises UserError and
    InfrastructureError."""
    if is_run_here(loaded.recipe.cluster):
        loaded = renamed(loaded) if flags.fresh else loaded
        decision = settle(run_of(loaded), loaded, flags, console)
        if not decision.trains:
            from .sum_up import sum_up

            announce(console, decision)
            sum_up(run_of(loaded), console)
            return 0
        refuse_twice(run_of(loaded))
        run_of(loaded).check()
        flags = replace(flags, fresh=False)  # its name is chosen now
    say(console, f"looking at the {loaded.recipe.cluster.type} cluster …")
    loaded, cluster = _fit(loaded, environ, console)
    try:
        say(console, "starting the run there …")
        with tempfile.TemporaryDirectory(prefix="ftlaunch-code-") as folder:
            record = cluster.up(Driver(ENTRY, job_of(loaded, flags)), lambda: write_package(Path(folder)))
        run = RunDirectory(storage.join(_absolute(loaded.recipe.checkpoint.path), loaded.recipe.name))
        if is_run_here(loaded.recipe.cluster):
            submissions.expect(run, record)
        _say_submitted(console, run.url, record["job"], cluster.standing() or "has begun")
        return 0 if detach else follow(cluster, run, record, console)
    finally:
        cluster.down()


def _fit(loaded: LoadedRecipe, environ: Mapping[str, str], console: Console) -> tuple[LoadedRecipe, SubmittedCluster]:
    """The cluster, with nothing wrong with it. What is unfit is left out, and what is wrong is told of what is left;
    where nothing could stand in, all that is wrong is told first."""
    need = replace(need_of(loaded.recipe, environ), tell=lambda line: say(console, line))
    cluster = None if has_spares(loaded) else checked(loaded.recipe.cluster, need)
    try:
        fit = with_fit_hosts(loaded, environ, lambda line: say(console, f"warning: {line}", "yellow"))
    except BaseException:
        if cluster is not None:
            cluster.down()
        raise
    return fit, cluster or checked(fit.recipe.cluster, need)


def checked(config: ClusterConfig, need: Need) -> SubmittedCluster:
    """A cluster to submit to. Raises UserError with all that is wrong with it."""
    cluster = build_submitted(config, need)
    try:
        if problems := cluster.problems():
            raise UserError("\n".join(problems))
    except BaseException:
        cluster.down()
        raise
    return cluster


def _say_submitted(console: Console, run: str, job: str, standing: str) -> None:
    say(console, f"submitted as job {job}: it goes on without this command", "bold")
    say(console, f"  it {standing}\n  run: {run}\n  ftlaunch logs -f {run}\n  ftlaunch stop {run}")


def refuse_twice(run: RunDirectory) -> None:
    """Raises UserError for a run that waits for its nodes, or has just got them."""
    submission = submissions.latest(run)
    if submission is None or submission.exit_code is not None:
        return
    try:
        standing = ask(submission)
    except InfrastructureError:
        return  # where that cluster is gone, only the run directory counts
    if standing is not None:
        job = submission.record["job"]
        raise UserError(
            f"run {run.url} is submitted already: job {job} {standing}. Follow it (ftlaunch attach {run.url}), end it "
            f"(ftlaunch stop {run.url}), or begin another run with --fresh."
        )


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


def follow(cluster: SubmittedCluster, run: RunDirectory, record: Record, console: Console) -> int:
    """Show what the driver prints, to its end or to Ctrl-C, which only lets go; the exit code."""
    shown: list[bytes] = []

    def write(text: bytes) -> None:
        shown.append(text)
        show(text)

    try:
        code = cluster.follow(write)
        clean_up(cluster, console)
        _write_down(run, record, code, shown)
    except FtlaunchError as error:
        if cluster.standing() is None:
            _write_down(run, record, error.exit_code, shown)
        raise
    except KeyboardInterrupt:
        say(console, "let go: the run goes on; `ftlaunch attach RUN` follows it again, `ftlaunch stop RUN` ends it")
        return 0
    return code


def clean_up(cluster: SubmittedCluster, console: Console) -> None:
    """The driver has ended: wait until its nodes are clean. One that does not answer says nothing of the run."""
    try:
        cluster.stop("now")
    except InfrastructureError as error:
        say(console, f"it has ended; whether everything of it has, could not be seen: {error}")


def _write_down(run: RunDirectory, record: Record, code: int, shown: Sequence[bytes] = ()) -> None:
    """How a submission ended whose driver could not say so, or never began; then what it printed too. One that was
    refused is not in the run directory: the newest there is another, which may be running."""
    submission = submissions.latest(run)
    if submission is None or submission.exit_code is not None or submission.record["job"] != record["job"]:
        return
    if shown and not submissions.read_log(run, submission.name):
        submissions.write_log(run, submission.name, b"".join(shown))
    submissions.finish(run, submission.name, code)


def show(text: bytes) -> None:
    """What a driver has printed, here."""
    sys.stdout.write(text.decode(errors="replace"))
    sys.stdout.flush()


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
        show(submissions.read_log(run, submission.name))
        return submission.exit_code
    cluster = find_submitted(submission.record)
    try:
        return follow(cluster, run, submission.record, Console())
    finally:
        cluster.down()


def stop(run: RunDirectory, *, now: bool) -> int:
    """End the newest submission; whatever of it is left on its nodes goes too."""
    submission, console = submissions.newest(run), Console()
    cluster = find_submitted(submission.record)
    try:
        say(console, "ending it …" if now else "asking it to save and end …")
        cluster.stop("now" if now else "save")
    finally:
        cluster.down()
    _write_down(run, submission.record, Interrupted.exit_code)
    say(console, f"job {submission.record['job']} is over, and nothing of it is left on its nodes")
    return 0
