"""The folder of a `slurm` job, which all its nodes see: what lies in it, who may read it, when it goes.

JOB/job.sbatch   what is submitted           JOB/bin/        what it runs (`slurm_shell.py`, `look`, `keep`)
JOB/spec.json    what nodes are judged by    JOB/package/    our code
JOB/driver.json  what the driver is told     JOB/token       of Ray, new for every job
JOB/env.json     variables that travel       JOB/proof       by which the folder is known
JOB/driver.log   all that is printed         JOB/start-N/    of one start; there is a second after a requeue
JOB/id           Slurm's number of it        JOB/exit        the exit code, once it is over for good
"""

from __future__ import annotations

import json
import secrets
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..recipes.errors import InfrastructureError, UserError
from ..recipes.schema_cluster import SlurmCluster
from .base import Need
from .host_agent import put
from .slurm_queue import Commands
from .slurm_shell import JOB_SH
from .ssh_facts import ALIKE, requirements
from .ssh_job import program, travelling

PREFIX = ".ftlaunch-job-"
SCRIPT, LOG, ID, EXIT = "job.sbatch", "driver.log", "id", "exit"
SECRETS = ("token", "env.json", "driver.json")
READ_BYTES = 1 << 16

KEPT_S = 7 * 24 * 3600.0
"""Logs of a job that is over stay so long."""


def place(need: Need) -> Path:
    """Where jobs' folders are: with the runs, or with what relative paths mean where these are in an object store."""
    return Path(need.shared or need.folder).absolute()


def folder_problems(config: SlurmCluster, shared: list[str]) -> list[str]:
    """Names of folders that Slurm or a container's runtime would take for something else."""
    found = [
        f"{folder}: Slurm has a meaning of its own for backslashes and line ends in names; use another folder"
        for folder in shared
        if "\\" in folder or not folder.isprintable()
    ]
    if config.container:
        mounts = [mount for mount in shared if set(mount) & set(",:")]
        found += [
            f"{mount}: a folder that is mounted in a container cannot have , or : in its name" for mount in mounts
        ]
    return found


def spec(config: SlurmCluster, need: Need, folder: Path, entry: str) -> dict[str, Any]:
    """What nodes are told before they start anything. No secrets."""
    wanted = {name: str(requirement) for name, requirement in requirements().items()}
    return {
        "cluster": config.model_dump(mode="json"),
        "folder": str(folder),
        "from": need.folder,
        "entry": entry,
        "paths": dict(need.paths),
        "wanted": wanted,
        "packages": sorted({*wanted, *ALIKE}),
        "proof": secrets.token_hex(16),
    }


def contents(
    told: Mapping[str, Any],
    driver: Mapping[str, Any],
    config: SlurmCluster,
    need: Need,
    package: Mapping[str, bytes],
    script: str,
) -> dict[str, bytes]:
    """The files of a job, by their path in its folder."""
    texts = {
        SCRIPT: script,
        "bin/job.sh": JOB_SH,
        "bin/look": program("ftlaunch.cluster.slurm_look:main"),
        "bin/keep": program("ftlaunch.cluster.slurm_keep:main"),
        "spec.json": json.dumps(told),
        "proof": told["proof"],
        "driver.json": json.dumps(driver),
        "env.json": json.dumps(travelling(config.env, need.environ)),
        "token": secrets.token_hex(32),
        LOG: "",
    }
    return {f"package/{name}": content for name, content in package.items()} | {
        name: text.encode() for name, text in texts.items()
    }


def write(folder: Path, files: Mapping[str, bytes]) -> None:
    """Make the folder, closed to others. Raises UserError where it cannot be."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700)
        for name, content in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)
            path.write_bytes(content)
    except OSError as error:
        raise UserError(f"{folder.parent} cannot be written, where the job's files are to be: {error}") from error


def exit_code(folder: Path) -> int | None:
    """None while the job is not over, or if it has left none."""
    with suppress(OSError, ValueError):
        # Listed first: clients of network file systems remember for a while that a file was not there.
        if any(path.name == EXIT for path in folder.iterdir()):
            return int((folder / EXIT).read_text())
    return None


def has_begun(folder: Path) -> bool:
    """Whether the job has ever had nodes."""
    return (folder / "start-0").is_dir()


def ask(folder: Path, what: str) -> None:
    """As the job's script does when it gets a signal. Raises InfrastructureError."""
    try:
        put(folder / "start-0" / "asked", what)
    except OSError as error:
        raise InfrastructureError(f"{folder} cannot be written from here: {error}") from error


def remove_secrets(folder: Path) -> None:
    """And our code: the job is over, and Slurm will not begin it again."""
    for name in SECRETS:
        with suppress(OSError):
            (folder / name).unlink()
    shutil.rmtree(folder / "package", ignore_errors=True)


def remove(folder: Path) -> None:
    """All of it: the job was never submitted."""
    shutil.rmtree(folder, ignore_errors=True)


def sweep(base: Path, commands: Commands) -> None:
    """Forget jobs that are long over, and secrets of those that Slurm ended."""
    if not base.is_dir():
        return
    for folder in base.glob(f"{PREFIX}*"):
        with suppress(OSError):
            _sweep_one(folder, commands)


def _sweep_one(folder: Path, commands: Commands) -> None:
    if exit_code(folder) is None and (folder / SECRETS[0]).exists():
        # A job of somebody else's cannot be read, which ends here too.
        job = (folder / ID).read_text().partition(".")[0]
        standing = commands.look(job)
        if standing is not None and not standing.is_over:
            return
        remove_secrets(folder)
    if time.time() - (folder / LOG).stat().st_mtime > KEPT_S:
        remove(folder)


class Log:
    """What a job prints, as it comes."""

    def __init__(self, folder: Path) -> None:
        self._path, self._offset = folder / LOG, 0

    def read(self) -> bytes:
        """What has come since the last call, in pieces; empty: nothing."""
        with suppress(OSError), self._path.open("rb") as log:
            log.seek(self._offset)
            data = log.read(READ_BYTES)
            self._offset += len(data)
            return data
        return b""
