"""The batch script of a `slurm` job, as text. Pure.

Every value is quoted: in `#SBATCH` lines as sbatch reads them, which is not quite as a shell does, and everywhere else
by `shlex`. What the job does lies in a file of its folder (`slurm_shell.py`): here is only what the recipe says.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass

from ..recipes.schema_cluster import SlurmCluster, SlurmContainer

OPTIONS = {
    "partition": "partition",
    "account": "account",
    "qos": "qos",
    "constraint": "constraint",
    "reservation": "reservation",
    "gres": "gres",
    "time": "time",
    "cpus_per_node": "cpus-per-task",
    "memory": "mem",
    "mail_user": "mail-user",
}
"""Key of the section -> option of sbatch that has its value."""


@dataclass(frozen=True)
class Script:
    """What a script is made of. `folder`: the job's, on every node; `python`: on the nodes; `commands`: the folder that
    Slurm's commands are in here, where it is known; `shared`: folders that a container must see."""

    config: SlurmCluster
    name: str
    folder: str
    python: str
    commands: str | None = None
    shared: tuple[str, ...] = ()

    def text(self) -> str:
        """The script."""
        return "\n".join(["#!/bin/bash -l", *self.directives(), "", *self._body()]) + "\n"

    # --- what is asked of Slurm ---------------------------------------------------------------------------------------

    def directives(self) -> list[str]:
        """The `#SBATCH` lines."""
        return [f"#SBATCH {directive(option, value)}" for option, value in self._options()]

    def _options(self) -> Iterator[tuple[str, str | None]]:
        config = self.config
        yield "job-name", self.name
        yield "nodes", str(config.nodes)
        yield "ntasks-per-node", "1"
        for key, option in OPTIONS.items():
            value = getattr(config, key)
            if value is not None:
                yield option, str(value)
        if config.gpus_per_node and config.gres is None:
            yield "gpus-per-node", str(config.gpus_per_node)
        if config.exclusive:
            yield "exclusive", None
        if config.mail_types:
            yield "mail-type", ",".join(config.mail_types)
        for option in config.options:
            name, separator, value = option.removeprefix("--").partition("=")
            yield name, value if separator else None
        yield from self._ours()

    def _ours(self) -> Iterator[tuple[str, str | None]]:
        """What saving and going on need."""
        yield "requeue" if self.config.requeue else "no-requeue", None
        # To the shell alone (B): the ranks are told by the driver, and save.
        yield "signal", f"B:USR1@{self.config.leave_before_s}"
        yield "output", output_pattern(f"{self.folder}/driver.log")
        yield "open-mode", "append"
        # No variable of the submitting shell travels by itself; Slurm would keep them all.
        yield "export", "NIL"

    # --- what runs ----------------------------------------------------------------------------------------------------

    def _body(self) -> Iterator[str]:
        config = self.config
        yield f"JOB={shlex.quote(self.folder)}"
        yield '. "$JOB/bin/job.sh" || exit 2'
        if self.commands:
            yield f'PATH="$PATH":{shlex.quote(self.commands)}'
        for module in config.modules:
            yield f"module load {shlex.quote(module)} || unfit {shlex.quote(f'cluster.modules: {module}')}"
        for line in config.setup:
            yield f"eval {shlex.quote(line)} || unfit {shlex.quote(f'cluster.setup: {line}')}"
        yield f"REQUEUE={'yes' if config.requeue else 'no'}"
        yield f"PYTHON={shlex.quote(self.python)}"
        yield f"NODES={config.nodes}"
        yield f'STEP=(srun --nodes="$NODES" --ntasks="$NODES" {shlex.join(self._step())})'
        yield f"INSIDE=({shlex.join(inside(config, self._mounts()))})"
        yield "run_job"

    def _step(self) -> list[str]:
        """Options of srun: one task on each node, which has all that the job has there."""
        step = ["--ntasks-per-node=1", "--overlap", "--cpu-bind=none", "--mem=0", "--export=ALL"]
        if self.config.cpus_per_node:
            step.append(f"--cpus-per-task={self.config.cpus_per_node}")
        container = self.config.container
        return [*step, *(pyxis(container, self._mounts()) if container and container.runtime == "pyxis" else [])]

    def _mounts(self) -> list[str]:
        given = self.config.container.mounts if self.config.container else ()
        return list(dict.fromkeys([*self.shared, *given]))


def pyxis(container: SlurmContainer, mounts: list[str]) -> list[str]:
    """Options of srun. The name keeps the unpacked image for the job's second step."""
    pairs = ",".join(mount if ":" in mount else f"{mount}:{mount}" for mount in mounts)
    named = ["--container-name=ftlaunch", f"--container-image={container.image}", "--no-container-mount-home"]
    return [*named, *([f"--container-mounts={pairs}"] if pairs else [])]


def inside(config: SlurmCluster, mounts: list[str]) -> list[str]:
    """What stands before a command that is to run in the container; nothing where srun sees to that."""
    container = config.container
    if container is None or container.runtime != "apptainer":
        return []
    binds = [word for mount in mounts for word in ("--bind", mount)]
    return ["apptainer", "exec", *(["--nv"] if config.gpus_per_node != 0 else []), *binds, container.image]


def directive(option: str, value: str | None) -> str:
    """An option as a `#SBATCH` line has it. sbatch knows a shell's quotes, but takes a backslash inside of them for
    an escape too."""
    if value is None:
        return f"--{option}"
    return f"--{option}={shlex.quote(value.replace(chr(92), chr(92) * 2))}"


def output_pattern(path: str) -> str:
    """A path as sbatch's --output means it literally: %j and the like would be replaced."""
    return path.replace("%", "%%")
