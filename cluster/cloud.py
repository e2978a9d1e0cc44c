"""Machines of a cloud, made for one run and gone with it.

They are made and ended through Ray's node providers (`cloud_machines.py`); on them the run is what it is on hosts that
one can log in to (`ssh.py`). Nobody has to be there to end them: each has a watchdog of its own (`cloud_watchdog.py`),
from when it first starts. This process ends them where it can: after a failure here, at the end of a run that is
followed, when it is asked to stop.

Ray's own launcher ends idle machines from the head, which needs the head to have been set up, to live, and to have
rights to end machines. A machine that looks after itself needs none of these.
"""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

from ..recipes.errors import FtlaunchError, InfrastructureError, UserError
from ..recipes.schema_cloud import CloudCluster
from ..recipes.schema_nodes import least_nodes, most_nodes
from . import cloud_checks
from .base import CodeFolder, Driver, Need, Record, Stop
from .cloud_access import Access, key_file, own_key, public_key
from .cloud_config import as_yaml, launcher_config
from .cloud_machines import Machine, Machines, NoRoom
from .clouds.base import Boot, Values
from .ssh import Ssh
from .ssh_connection import HostError
from .ssh_job import JobPlan

AT_ONCE = 64
REMARK = """# What Ray's cluster launcher is told of the machines (`ray up` takes it). ftlaunch makes them itself,
# in the first region that has room, of {regions}.
# Each has a program that ends it: {idle:g} minutes after the last sign of a run{most}.
"""
NO_KEY = "made when it is first needed"


class _Hosts(Ssh):
    """The machines as hosts. `record` makes a submission's record of theirs."""

    def __init__(self, access: Access, addresses: Sequence[str], need: Need, job: str) -> None:
        super().__init__(access.section(addresses), need)
        self._job = job
        self.record: Callable[[dict[str, Any]], dict[str, Any]] = dict

    def _record(self, plan: JobPlan) -> dict[str, Any]:
        return self.record(super()._record(plan))

    def connect(self) -> None:
        """To hosts on which a job runs. Raises InfrastructureError where none answers."""
        self._lost = list(map(str, self._connect(self._config.hosts)))
        if not self._fleet.hosts:
            raise InfrastructureError("\n".join(self._lost))


class Cloud:
    """The `cloud` cluster."""

    run_is_here = False

    def __init__(self, config: CloudCluster, need: Need) -> None:
        self._config, self._need = config, need
        self._job = ""
        self._machines: Machines | None = None
        self._access: Access | None = None
        self._hosts: _Hosts | None = None
        self._is_ours = False
        """Whether the machines end with this process: until the run is under way."""

    # --- before anything starts ---------------------------------------------------------------------------------------

    def problems(self) -> list[str]:
        """See `SubmittedCluster`."""
        return cloud_checks.problems(self._config, self._need)

    def render(self) -> str:
        """What Ray's launcher would be told in the first region, without what ends the machines by themselves: there
        Ray's autoscaler does."""
        config = self._config
        most = "" if config.max_hours is None else f", and {config.max_hours:g} hours after it was made"
        remark = REMARK.format(regions=", ".join(config.regions), idle=config.idle_minutes, most=most)
        path = key_file(config)
        boot = Boot((public_key(path) if path.is_file() else None) or NO_KEY, watched=False)
        return remark + as_yaml(launcher_config(config, config.regions[0], boot, str(path), f"{path}.pub"))

    # --- starting -----------------------------------------------------------------------------------------------------

    def up(self, driver: Driver, code: CodeFolder) -> Record:
        """See `SubmittedCluster`; after `problems` has found none."""
        self._job, self._is_ours = secrets.token_hex(4), True
        try:
            record = self._up(driver, code)
        except BaseException as error:
            try:
                self._end_ours()
            except FtlaunchError as left:
                said = f"Its machines could not be ended ({left}). They end by themselves."
                raise InfrastructureError(f"{error}\n{said}") from error
            raise
        self._is_ours = False
        return record

    def _up(self, driver: Driver, code: CodeFolder) -> Record:
        if self._config.identity_file is None:
            own_key()
        access = self._access = Access(self._config)
        machines = self._make()
        found = machines.running(least_nodes(self._config.nodes))
        self._need.tell(f"{len(found)} machines run in {machines.region}; they are set up when they let us in …")
        self._make_ready(found)
        self._need.tell("they are ready; starting Ray there …")
        hosts = self._hosts = _Hosts(access, [_address(each) for each in found], self._need, self._job)
        if problems := hosts.problems():
            raise UserError("\n".join(problems))
        # Before the run is under way: afterwards, who takes these machines for left-overs would end it.
        machines.under_way()
        hosts.record = lambda theirs: self._record(theirs, machines.region, access.host_keys)
        record = hosts.up(driver, code)
        access.release()
        return record

    def _end_ours(self) -> None:
        """The machines of a run that is not under way."""
        if self._is_ours and self._machines is not None:
            self._machines.end()
        self._is_ours = False

    def _make(self) -> Machines:
        """In the first region that has them. Raises InfrastructureError with what all have said."""
        config, refused = self._config, []
        for region in config.regions:
            machines = self._machines = Machines(config, region, self._job)
            if stale := machines.end_stale():
                self._need.tell(f"{region}: {', '.join(stale)} were left by a launcher that died, and are ended")
            self._need.tell(f"{region}: asking for {most_nodes(config.nodes)} machines of {config.instance_type} …")
            try:
                machines.make(
                    self._need.name, most_nodes(config.nodes), least_nodes(config.nodes), self._described(region)
                )
            except NoRoom as error:
                refused.append(str(error))
                self._need.tell(str(error))
                machines.end()
            else:
                return machines
        self._machines = None
        raise InfrastructureError(
            "\n".join(
                [f"there is no room for {least_nodes(config.nodes)} machines of {config.instance_type}:", *refused]
            )
            + "\nTry later, name more of cluster.regions, or another cluster.instance_type."
        )

    def _described(self, region: str) -> Values:
        path = key_file(self._config)
        public = public_key(path)
        if public is None:
            raise UserError(f"cluster.identity_file: {path} cannot be read")
        assert self._access is not None
        boot = Boot(public, watched=True)
        return launcher_config(self._config, region, boot, str(path), str(self._access.write_public(public)))

    def _make_ready(self, machines: Sequence[Machine]) -> None:
        """All at once. Raises UserError or InfrastructureError with what all say that failed."""
        assert self._access is not None
        access, failed = self._access, []
        pool = ThreadPoolExecutor(min(len(machines), AT_ONCE))
        try:
            for done in [pool.submit(access.make_ready, _address(each)) for each in machines]:
                try:
                    done.result()
                except HostError as error:
                    failed.append(error)
        finally:
            access.give_up()  # nothing is going on any more, unless somebody does not want to wait
            pool.shutdown()
        if failed:
            kind = UserError if any(error.mendable for error in failed) else InfrastructureError
            raise kind("\n".join(map(str, failed)))

    def _record(self, theirs: Mapping[str, Any], region: str, host_keys: str) -> dict[str, Any]:
        """With which the machines are found again, and known again."""
        config = self._config.model_dump(mode="json", exclude_unset=True) | {"type": "cloud"}
        config["identity_file"] = str(key_file(self._config))
        hosts = theirs["cluster"]["hosts"]
        return {**theirs, "cluster": config, "region": region, "hosts": hosts, "host_keys": host_keys}

    # --- afterwards ---------------------------------------------------------------------------------------------------

    @classmethod
    def find(cls, record: Record) -> Self:
        """The cluster of a submission. Raises UserError and InfrastructureError where its provider cannot be asked."""
        cluster = cls(CloudCluster.model_validate_json(json.dumps(record["cluster"])), Need(folder="."))
        cluster._job = record["job"]
        cluster._machines = Machines(cluster._config, record["region"], record["job"])
        cluster._access = Access(cluster._config, record["host_keys"])
        try:
            there = {each.address for each in cluster._machines.listed()}
            left = [host for host in record["hosts"] if host in there]
            # Without its driver the run is over, and the other machines end by themselves.
            if record["driver"] in there:
                cluster._hosts = _Hosts(cluster._access, left, cluster._need, record["job"])
                with contextlib.suppress(InfrastructureError):
                    cluster._hosts.connect()
        except BaseException:
            cluster.down()
            raise
        return cluster

    def follow(self, write: Callable[[bytes], None]) -> int:
        """See `SubmittedCluster`."""
        if self._hosts is None:
            raise InfrastructureError(f"the machines of job {self._job} are gone")
        return self._hosts.follow(write)

    def standing(self) -> str | None:
        """See `SubmittedCluster`."""
        assert self._machines is not None
        if not (there := self._machines.listed()) or self._hosts is None:
            return None
        try:
            said = self._hosts.standing()
        except InfrastructureError as error:
            return f"has {len(there)} machines in {self._machines.region}, which do not answer ({error})"
        return None if said is None else f"{said}, in {self._machines.region}"

    def stop(self, how: Stop) -> None:
        """See `SubmittedCluster`: then its machines are gone."""
        assert self._machines is not None
        if self._hosts is not None:
            try:
                self._hosts.stop(how)
            except InfrastructureError as error:
                if how == "save" and self._machines.listed():
                    raise InfrastructureError(
                        f"{error}\n`ftlaunch stop --now` ends the machines without asking."
                    ) from error
        self._machines.end()

    def down(self) -> None:
        """See `SubmittedCluster`."""
        try:
            self._end_ours()
        finally:
            if self._hosts is not None:
                self._hosts.down()
            if self._access is not None:
                self._access.close()


def _address(machine: Machine) -> str:
    assert machine.address is not None, "it runs"
    return machine.address
