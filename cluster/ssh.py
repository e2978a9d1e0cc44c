"""Ray on hosts that one can log in to, started for one run over OpenSSH and gone with it.

On every host a keeper (`host_keeper.py`) starts Ray and ends it, on the first one the driver too. This process asks the
hosts what they are, lays the job's files out, waits until everything is up, and lets go.
"""

from __future__ import annotations

import base64
import contextlib
import json
import secrets
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self

from ..recipes.errors import InfrastructureError
from ..recipes.schema_cluster import SshCluster
from ..recipes.schema_nodes import NodeRange
from . import ssh_checks, ssh_facts
from .base import CodeFolder, Demand, Driver, Need, Record, Stop
from .ssh_connection import HostError, ssh_command
from .ssh_facts import Facts
from .ssh_fleet import Fleet, open_fleet
from .ssh_hosts import hosts_of, needed_count, node_count
from .ssh_job import JobPlan, Node, packed, read_package, travelling, unset

UP_S = 180.0
"""For Ray to be up on all hosts, Python's start on cold file systems included."""

POLL_S = 0.25
GONE_S = 60.0
"""For keepers to have ended everything."""


class Ssh:
    """The `ssh` cluster."""

    run_is_here = False  # hosts share their folders with each other

    def __init__(self, config: SshCluster, need: Need) -> None:
        self._config, self._need = config, need
        self._python = config.python or sys.executable
        self._fleet = Fleet({})
        self._facts: dict[str, Facts] = {}
        self._addresses: dict[str, str] = {}
        self._job = ""
        self._lost: list[str] = []
        """What is wrong with hosts of a job that do not answer any more."""

    # --- before anything starts ---------------------------------------------------------------------------------------

    def problems(self) -> list[str]:
        """See `SubmittedCluster`. Hosts that answer are asked everything, whatever is wrong with others."""
        hosts = hosts_of(self._config)
        wanted, needed = node_count(self._config), needed_count(self._config)
        found = [f"cluster.env: {name} is not set here" for name in unset(self._config.env, self._need.environ)]
        if needed > len(hosts):
            found.append(
                f"cluster.nodes: {wanted} nodes are asked for, cluster.hosts names {len(hosts)}. Add hosts, or ask for "
                f"fewer (--nodes {len(hosts)})."
            )
        failed = self._connect(hosts[:wanted])
        if len(self._fleet.hosts) >= needed and not any(error.mendable for error in failed):
            failed = []  # a run that goes on without hosts that are lost begins without them too
        try:
            found += self._ask() if self._fleet.hosts else []
        except HostError as error:
            failed.append(error)
        if failed and not found and not any(error.mendable for error in failed):
            raise InfrastructureError("\n".join(map(str, failed)))
        return [*map(str, failed), *found]

    def _connect(self, hosts: Iterable[str]) -> list[HostError]:
        """Why hosts cannot be asked; the others are then there to be."""
        opened = open_fleet({host: ssh_command(self._config, host, self._python) for host in hosts})
        self._fleet = opened.fleet
        return list(opened.failed.values())

    def _ask(self) -> list[str]:
        """What is wrong with each, and with all together."""
        self._facts = self._fleet.each(self._ask_facts)
        unfit = ssh_facts.problems(self._config, self._facts, ssh_facts.requirements())
        self._addresses, found = ssh_checks.network(self._fleet, self._facts[self._fleet.hosts[0]]["addresses"])
        return [*unfit, *found, *ssh_checks.shared(self._fleet, self._need), *ssh_checks.paths(self._fleet, self._need)]

    def _ask_facts(self, host: str) -> Facts:
        before = time.time()
        said = self._fleet.ask(host, "facts", packages=sorted({*ssh_facts.requirements(), *ssh_facts.ALIKE}))
        return Facts(said, said["time"] - (before + time.time()) / 2)  # it looked at its clock somewhere in between

    # --- starting -----------------------------------------------------------------------------------------------------

    @property
    def demand(self) -> Demand:
        """Ranks and cores, from what the hosts have; after `problems`."""
        facts = list(self._facts.values())
        gpus = min(each["gpus"] for each in facts) if self._config.gpus_per_node is None else self._config.gpus_per_node
        ranks = gpus or self._config.processes_per_node or 1
        cores = min(each["cores"] for each in facts)
        cpus, nodes = max(1, cores // ranks), len(facts)
        least = needed_count(self._config) if isinstance(self._config.nodes, NodeRange) else None
        return Demand(nodes, ranks * nodes, uses_gpus=gpus > 0, cpus_per_rank=cpus, least_nodes=least)

    def render(self) -> str:
        """As far as it is known before the hosts are asked: ports, folders and cores are theirs to say."""
        config = self._config
        hosts = hosts_of(config)[: node_count(config)]
        ranks = config.gpus_per_node or config.processes_per_node or 1
        demand = Demand(len(hosts), ranks * len(hosts), uses_gpus=config.gpus_per_node != 0, cpus_per_rank=1)
        nodes = tuple(Node(host, self._python, "TMPDIR/ft-UID/JOB", host) for host in hosts)
        return JobPlan("JOB", nodes, None, demand, "", self._need.folder, {}).text()

    def up(self, driver: Driver, code: CodeFolder) -> Record:
        """See `SubmittedCluster`; after `problems` has found none."""
        self._job = self._job or secrets.token_hex(4)
        package, token = read_package(code()), secrets.token_hex(32)
        try:
            plan = self._plan(driver.entry)
            # From here on it is these hosts': one that was down is none of them.
            self._config = self._config.model_copy(update={"hosts": tuple(self._fleet.hosts), "hostfile": None})
            record = self._record(plan)
            job = {**driver.job(self.demand), "record": record}
            self._fleet.each(
                lambda host: self._fleet.ask(
                    host,
                    "start",
                    job=self._job,
                    files=packed(plan.files(self._fleet.hosts.index(host), token, job, package)),
                )
            )
            self._wait_until_up()
            self._fleet.ask_all("release", job=self._job)
        except HostError as error:
            with contextlib.suppress(InfrastructureError):
                self.stop("now")
            raise InfrastructureError(str(error)) from error
        return record

    def _plan(self, entry: str) -> JobPlan:
        nodes = tuple(
            Node(host, self._facts[host]["executable"], f"{self._facts[host]['scratch']}/{self._job}", address)
            for host, address in self._addresses.items()
        )
        environ = travelling(self._config.env, self._need.environ)
        port = self._fleet.ask(nodes[0].host, "free_port")["port"]
        return JobPlan(self._job, nodes, port, self.demand, entry, self._need.folder, environ)

    def _record(self, plan: JobPlan) -> dict[str, Any]:
        return {
            "job": self._job,
            "driver": plan.nodes[0].host,
            "cluster": self._config.model_dump(mode="json") | {"python": self._python},
            "submitted_at": time.time(),
        }

    def _wait_until_up(self) -> None:
        """Until Ray runs everywhere, or the driver has ended: it looks at the run first, and may refuse it."""
        deadline_s = time.monotonic() + UP_S
        first = self._fleet.hosts[0]
        while True:
            states = self._fleet.ask_all("state", job=self._job)
            if states[first]["exit"] is not None or all(state["up"] is not None for state in states.values()):
                return
            for host, state in states.items():
                if state["ended"] is not None:
                    raise HostError(f"host {host}: {state['ended']}: {_last(state)}")
            if time.monotonic() > deadline_s:
                late = [host for host, state in states.items() if state["up"] is None]
                said = "; ".join(f"{host}: {_last(states[host])}" for host in late)
                raise HostError(f"Ray was not up within {UP_S:g} s on {said}")
            time.sleep(POLL_S)

    # --- afterwards ---------------------------------------------------------------------------------------------------

    @classmethod
    def find(cls, record: Record) -> Self:
        """The cluster of a submission. Raises InfrastructureError where no host answers."""
        cluster = cls(SshCluster.model_validate_json(json.dumps(record["cluster"])), Need(folder="."))
        cluster._job = record["job"]
        cluster._lost = list(map(str, cluster._connect(cluster._config.hosts)))
        if not cluster._fleet.hosts:
            raise InfrastructureError("\n".join(cluster._lost))
        return cluster

    def follow(self, write: Callable[[bytes], None]) -> int:
        """See `SubmittedCluster`."""
        first, offset = hosts_of(self._config)[0], 0
        if first not in self._fleet.hosts:
            raise InfrastructureError("\n".join(self._lost))
        while True:
            try:
                answer = self._fleet.ask(first, "read", job=self._job, offset=offset)
            except HostError as error:
                raise InfrastructureError(f"the connection to {first} is lost ({error}); the run may go on") from error
            data = base64.b64decode(answer["data"])
            offset += len(data)
            write(data)
            if data:
                continue
            if answer["exit"] is not None:
                return int(answer["exit"])
            if answer["ended"] is not None or answer.get("gone"):
                raise InfrastructureError(f"the job on {first} is over: {answer['ended'] or 'its folder is gone'}")
            time.sleep(POLL_S)

    def standing(self) -> str | None:
        """See `SubmittedCluster`."""
        first = hosts_of(self._config)[0]
        if first not in self._fleet.hosts:
            raise InfrastructureError("\n".join(self._lost))
        try:
            state = self._fleet.ask(first, "state", job=self._job)
        except HostError as error:
            raise InfrastructureError(str(error)) from error
        return None if state["exit"] is not None or state["ended"] is not None else f"runs on {first}"

    def stop(self, how: Stop) -> None:
        """See `SubmittedCluster`. With `save` it ends when the first host's driver has."""
        try:
            self._fleet.ask_all("stop", job=self._job, how=how)
            deadline_s = time.monotonic() + GONE_S
            while any(state["processes"] for state in self._fleet.ask_all("state", job=self._job).values()):
                if how == "now" and time.monotonic() > deadline_s:
                    raise InfrastructureError(f"some processes do not end within {GONE_S:g} s of SIGKILL")
                time.sleep(POLL_S)
        except HostError as error:
            raise InfrastructureError(str(error)) from error
        if self._lost:
            lost = "\n".join(self._lost)
            raise InfrastructureError(
                f"{lost}\nWhat runs there ends by itself, as soon as its first host does not answer."
            )

    def down(self) -> None:
        """See `SubmittedCluster`."""
        self._fleet.close()


def _last(state: Mapping[str, Any]) -> str:
    lines = (state["ray_log"] or state["keeper_log"]).strip().splitlines()
    return lines[-1] if lines else "no word"
