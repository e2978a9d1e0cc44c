"""Nodes of a Slurm cluster: one batch job, in which Ray is started on every node.

This process asks Slurm what it knows, writes the job's files into a folder that all nodes share, and submits
(`slurm_script.py`). In the job (`slurm_shell.py`) every node says what it is, all is judged, and a keeper on each node
starts Ray, the first one the driver too. What happens then is Slurm's, the script's and the driver's: this process may
watch. Inside an allocation the same script runs as a process here, on the allocation's nodes.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from ..recipes.errors import InfrastructureError, Interrupted
from ..recipes.schema_cluster import SlurmCluster
from . import slurm_files
from .base import CodeFolder, Demand, Driver, Need, Record, Stop
from .slurm_queue import CANCELLED, Commands, Standing, partition_problems
from .slurm_script import OPTIONS, Script
from .ssh_job import read_package, unset

READ_S = 0.25
LOOK_S = 5.0
"""Between questions to Slurm while a job is followed; controllers are shared with everybody else on the site."""

FIRST_LOOK_S = 0.5
SILENCE_S = 1800.0
"""Without an answer of Slurm's, after which a job is not followed any longer."""

REASON_S = 5.0
LATE_S = 30.0
"""For the exit code of a job that is over to be seen on this machine too."""

GONE_S = 120.0
"""For a job that has been cancelled to leave its nodes: Slurm's own KillWait, and an epilogue."""


class Slurm:
    """The `slurm` cluster."""

    run_is_here = True

    def __init__(self, config: SlurmCluster, need: Need) -> None:
        self._config, self._need = config, need
        self._commands = Commands(need.environ)
        inside = need.environ.get("SLURM_JOB_ID", "") if config.allocation == "auto" else ""
        self._allocation, self._allocated = inside, int(need.environ.get("SLURM_JOB_NUM_NODES") or 1)
        self._job = ""
        self._folder = Path()
        self._submitted_s = 0.0
        self._silent_since_s: float | None = None
        """Since when Slurm does not answer."""
        self._process: subprocess.Popen[bytes] | None = None
        """The script, where it was started here."""
        self._is_held = False
        """Whether the job is to end with this process."""
        self._said = ""
        """What sbatch had to say although it took the job."""

    # --- before anything starts ---------------------------------------------------------------------------------------

    def problems(self) -> list[str]:
        """See `SubmittedCluster`: what is known before there are nodes. They are looked at when the job begins."""
        config = self._config
        found = [f"cluster.env: {name} is not set here" for name in unset(config.env, self._need.environ)]
        found += slurm_files.folder_problems(config, self._shared())
        if not self._allocation:
            known = self._commands.partitions()
            return [*found, *partition_problems(config.partition, config.nodes, known)]
        if config.nodes > self._allocated:
            found.append(
                f"cluster.nodes: {config.nodes} nodes are asked for, allocation {self._allocation} has "
                f"{self._allocated}. Ask for fewer (--nodes {self._allocated}), or submit a job of its own with "
                "cluster.allocation=new."
            )
        return found

    def _shared(self) -> list[str]:
        """Folders that all nodes must see."""
        return list(dict.fromkeys([*([self._need.shared] if self._need.shared else []), self._need.folder]))

    def render(self) -> str:
        """The batch script; JOB stands for what is chosen at submission."""
        return self._script(slurm_files.place(self._need) / f"{slurm_files.PREFIX}JOB").text()

    def _script(self, folder: Path) -> Script:
        config = self._config
        python = config.python or ("python3" if config.container else sys.executable)
        shared = tuple(self._shared()) if config.container else ()
        return Script(config, self._need.name, str(folder), python, self._commands.folder, shared)

    # --- starting -----------------------------------------------------------------------------------------------------

    def up(self, driver: Driver, code: CodeFolder) -> Record:
        """See `SubmittedCluster`; after `problems` has found none."""
        base = slurm_files.place(self._need)
        slurm_files.sweep(base, self._commands)
        self._folder, self._submitted_s = base / f"{slurm_files.PREFIX}{secrets.token_hex(4)}", time.time()
        name = f"{self._allocation}.{self._folder.name.rpartition('-')[2]}" if self._allocation else None
        record = self._record(name)
        spec = slurm_files.spec(self._config, self._need, self._folder, driver.entry)
        try:
            slurm_files.write(
                self._folder,
                slurm_files.contents(
                    spec, {**driver.job(self._guess()), "record": record}, self._config, self._need,
                    read_package(code()), self._script(self._folder).text(),
                ),
            )  # fmt: skip
            self._job = self._start_inside(name) if name else self._submit()
        except BaseException:
            slurm_files.remove(self._folder)
            raise
        self._is_held = True
        (self._folder / slurm_files.ID).write_text(self._job)
        self._await_reason()
        self._is_held = False
        return {**record, "job": self._job}

    def _guess(self) -> Demand:
        """What the driver is told for now; the first node knows better."""
        config = self._config
        ranks, nodes = config.gpus_per_node or config.processes_per_node or 1, config.nodes
        return Demand(nodes, ranks * nodes, uses_gpus=bool(config.gpus_per_node), cpus_per_rank=1)

    def _record(self, name: str | None) -> dict[str, Any]:
        return {
            "job": name,
            "driver": "",
            "ends_first": True,
            "replaces": self._config.requeue and name is None,
            "cluster": self._config.model_dump(mode="json"),
            "folder": str(self._folder),
            "submitted_at": self._submitted_s,
        }

    def _submit(self) -> str:
        config = self._config
        given = {option for key, option in OPTIONS.items() if getattr(config, key) is not None}
        raw = {option.removeprefix("--").partition("=")[0] for option in config.options}
        job, self._said = self._commands.submit(self._folder / slurm_files.SCRIPT, overruling({*given, *raw}))
        return job

    def _await_reason(self) -> None:
        """Until Slurm has looked at it, so that whoever submits is told what it waits for."""
        deadline_s = time.monotonic() + REASON_S
        with contextlib.suppress(InfrastructureError):
            while (standing := self._look()) is not None and standing.waits and not standing.reason:
                if time.monotonic() > deadline_s:
                    return
                time.sleep(FIRST_LOOK_S)

    def _start_inside(self, name: str) -> str:
        """The script as a process of its own, which goes on without this one as long as the allocation lasts."""
        with (self._folder / slurm_files.LOG).open("ab") as log:
            self._process = subprocess.Popen(
                ["bash", str(self._folder / slurm_files.SCRIPT)], cwd=self._folder, env=dict(self._need.environ),
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        return name

    # --- afterwards ---------------------------------------------------------------------------------------------------

    @classmethod
    def find(cls, record: Record) -> Self:
        """The cluster of a submission."""
        cluster = cls(SlurmCluster.model_validate_json(json.dumps(record["cluster"])), Need(folder="."))
        cluster._job, cluster._folder = record["job"], Path(record["folder"])
        cluster._submitted_s = record["submitted_at"]
        return cluster

    @property
    def _number(self) -> str:
        """Of the Slurm job that it is, or that it runs in."""
        return self._job.partition(".")[0]

    @property
    def _is_inside(self) -> bool:
        return "." in self._job

    def standing(self) -> str | None:
        """See `SubmittedCluster`."""
        standing = self._look()
        if standing is None or standing.is_over:
            return None
        if self._is_inside:
            return f"runs inside allocation {self._number}, on {standing.nodes}"
        return f"{standing}; sbatch says: {self._said}" if self._said else str(standing)

    def _look(self) -> Standing | None:
        """None too for what has run in an allocation and is over."""
        killed = self._process is not None and self._process.poll() is not None
        if self._is_inside and (killed or self._exit_code() is not None):
            return None
        return self._commands.look(self._number)

    def _exit_code(self) -> int | None:
        return slurm_files.exit_code(self._folder)

    def follow(self, write: Callable[[bytes], None]) -> int:
        """See `SubmittedCluster`. Says how the job stands whenever that changes."""
        if not self._folder.is_dir():
            raise InfrastructureError(
                f"{self._folder} is not to be seen from here, or gone: `ftlaunch logs -f RUN` shows what was printed"
            )
        log = slurm_files.Log(self._folder)
        shown, next_look_s, every_s = "", 0.0, FIRST_LOOK_S
        while True:
            # In this order: what is read after the job was over is then whole.
            code, now_s = self._exit_code(), time.monotonic()
            standing = Standing("RUNNING")
            if code is None and now_s >= next_look_s:
                standing = self._look_patiently()
                every_s = min(LOOK_S, every_s * 2)
                next_look_s = now_s + every_s
            if data := log.read():
                write(data)
                continue
            if code is not None:
                return code
            if standing.is_over:
                return self._ended(standing)
            if standing.waits:
                self._check_deadline(standing)
            if standing.waits or standing.nodes:
                shown = self._tell(standing, shown, write)
            time.sleep(READ_S)

    def _look_patiently(self) -> Standing:
        """Controllers are restarted now and then, which is no reason to let go of a job. Raises InfrastructureError
        where one does not come back."""
        try:
            standing = self._look() or Standing("FORGOTTEN")
        except InfrastructureError:
            self._silent_since_s = self._silent_since_s or time.monotonic()
            if time.monotonic() - self._silent_since_s > SILENCE_S:
                raise
            return Standing("RUNNING")
        self._silent_since_s = None
        return standing

    def _tell(self, standing: Standing, shown: str, write: Callable[[bytes], None]) -> str:
        """What is new; an expected start that moves is not."""
        new = f"{standing.reason} {standing.nodes}"
        if new != shown and standing.state != "COMPLETING":
            write(f"job {self._job} {standing}\n".encode())
            return new
        return shown

    def _check_deadline(self, standing: Standing) -> None:
        limit_s = self._config.queue_timeout_s
        if limit_s is None or time.time() - self._submitted_s < limit_s or slurm_files.has_begun(self._folder):
            return
        self.stop("now")
        raise InfrastructureError(
            f"job {self._job} did not begin within {limit_s} s (cluster.queue_timeout_s) and was cancelled. It "
            f"waited for: {standing.why}"
        )

    def _ended(self, standing: Standing) -> int:
        """A job that is over: its exit code, or why there is none, because Slurm ended it."""
        deadline_s = time.monotonic() + (LATE_S if standing.state in ("COMPLETED", "FAILED") else 0.0)
        while (code := self._exit_code()) is None and time.monotonic() < deadline_s:
            time.sleep(READ_S)
        if code is not None:
            return code
        slurm_files.remove_secrets(self._folder)
        if standing.state in CANCELLED:
            raise Interrupted(f"job {self._job} was cancelled; the same command goes on from what is saved")
        why = {"FORGOTTEN": "Slurm knows it no more"}.get(standing.state, standing.state)
        raise InfrastructureError(f"job {self._job} is over: {why}. See {self._folder / slurm_files.LOG}")

    def stop(self, how: Stop) -> None:
        """See `SubmittedCluster`."""
        standing = self._look()
        if self._exit_code() is None and standing is not None and not standing.is_over:
            self._ask(standing, how)
        self._wait_until_gone(how)
        slurm_files.remove_secrets(self._folder)

    def _ask(self, standing: Standing, how: Stop) -> None:
        if self._is_inside:
            slurm_files.ask(self._folder, "stop" if how == "save" else "now")
        elif standing.waits:
            self._commands.cancel(self._job)
        elif how == "save":
            self._commands.signal(self._job, "USR2")
        else:
            self._commands.signal(self._job, "HUP")  # first: on SIGTERM alone it would begin to save
            self._commands.cancel(self._job)

    def _wait_until_gone(self, how: Stop) -> None:
        started_s, every_s = time.monotonic(), FIRST_LOOK_S
        while (standing := self._look()) is not None and not standing.is_over:
            if how == "now" and time.monotonic() - started_s > GONE_S:
                raise InfrastructureError(f"job {self._job} is still {standing.state} {GONE_S:g} s after its end")
            if standing.waits and how == "save":  # it was about to go back into the queue
                self._commands.cancel(self._job)
            time.sleep(every_s)
            every_s = min(LOOK_S, every_s * 1.5)

    def down(self) -> None:
        """See `SubmittedCluster`."""
        if self._is_held:
            self._is_held = False
            self.stop("now")
            slurm_files.remove(self._folder)


_VARIABLES = {"time": "TIMELIMIT", "mem": "MEM_PER_NODE"}


def overruling(options: set[str]) -> list[str]:
    """Variables by which sbatch would overrule what the script says: of these options, and of those that are always
    ours."""
    ours = {"job-name", "signal", "output", "open-mode", "export", "requeue", "no-requeue", "wait"}
    return [
        f"SBATCH_{_VARIABLES.get(option, option.upper().replace('-', '_'))}" for option in sorted({*options, *ours})
    ]
