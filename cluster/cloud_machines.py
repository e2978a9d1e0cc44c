"""A run's machines at a cloud, made, listed and ended by Ray's node providers."""

from __future__ import annotations

import importlib.util
import logging
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..recipes.errors import FtlaunchError, InfrastructureError, UserError
from ..recipes.schema_cloud import CloudCluster
from . import cloud_config as described
from .clouds.base import Cloud, Values
from .clouds.table import cloud_of

POLL_S = 2.0
RUNNING_S = 900.0
"""For machines to run and have addresses."""

LISTED_S = 60.0
"""For machines that were made to be listed."""

GONE_S = 600.0
"""For machines to be gone after that was asked."""

STALE_S = 2 * 3600.0
"""Machines of a run that did not get under way for so long have been left by a launcher that died."""


class NoRoom(InfrastructureError):
    """A region has too few machines to give now."""


@dataclass(frozen=True)
class Machine:
    """One of them. `address`: by which this machine reaches it; None: it has none yet."""

    key: str
    is_running: bool
    address: str | None


class Machines:
    """Those of one job in one region. `describe` gives the configuration of Ray's launcher, when machines are made."""

    def __init__(self, config: CloudCluster, region: str, job: str) -> None:
        self._config, self._job, self.region = config, job, region
        self._cloud = cloud_of(config.provider)
        self._provider: Any = None

    def make(self, run: str, count: int, least: int, values: Values) -> None:
        """Ask for machines; with `least` of them it is content. Raises NoRoom, and what `meant` makes of other
        failures. There may be machines then."""
        with meant(self._cloud, self.region):
            self._prepare_ray()
            values = self._cloud.ready(values)
            self._open(values["provider"])
            node = values["available_node_types"][described.WORKER]["node_config"]
            self._cloud.complete(self._provider, node)
            tags = described.tags_of(run, self._job, time.time())
        refused, given = None, 0
        try:
            with meant(self._cloud, self.region):
                given = len(self._provider.create_node(node, tags, count) or ())
        except NoRoom as error:
            refused = error
        made = self._count(given)
        if made < least:
            raise refused or NoRoom(f"{self.region}: {made} of {count} machines were given")

    def _count(self, given: int) -> int:
        """Machines that there are. What was just made may not be listed at once (EC2 calls itself eventually
        consistent)."""
        deadline_s = time.monotonic() + LISTED_S
        while (made := len(self.listed())) < given and time.monotonic() < deadline_s:
            time.sleep(POLL_S)
        return made

    def running(self, least: int) -> list[Machine]:
        """All that there are, at `least` so many, once they run and have addresses; in a fixed order. Raises
        InfrastructureError."""
        deadline_s = time.monotonic() + RUNNING_S
        while True:
            found = self.listed()
            late = [each.key for each in found if not (each.is_running and each.address)]
            if len(found) < least:
                raise InfrastructureError(f"{self.region}: machines have gone again, {len(found)} are left")
            if not late:
                return found
            if time.monotonic() > deadline_s:
                raise InfrastructureError(f"{self.region}: {', '.join(late)} did not start within {RUNNING_S:g} s")
            time.sleep(POLL_S)

    def listed(self) -> list[Machine]:
        """Those that are not over, by their names at the provider."""
        with meant(self._cloud, self.region):
            provider = self._opened()
            keys = sorted(provider.non_terminated_nodes({described.JOB: self._job}))
            return [Machine(key, provider.is_running(key), self._address(provider, key)) for key in keys]

    def _address(self, provider: Any, key: str) -> str | None:
        found = provider.internal_ip(key) if self._config.private_addresses else provider.external_ip(key)
        return str(found) if found else None

    def under_way(self) -> None:
        """The run is: nobody is to take its machines for left-overs."""
        with meant(self._cloud, self.region), ThreadPoolExecutor(32) as pool:
            provider = self._opened()
            keys = provider.non_terminated_nodes({described.JOB: self._job})
            list(pool.map(lambda key: provider.set_node_tags(key, {described.STATE: described.RUNNING}), keys))

    def end(self) -> None:
        """End all, and wait until the provider says so. Raises InfrastructureError."""
        deadline_s = time.monotonic() + GONE_S
        with meant(self._cloud, self.region):
            provider, ours = self._opened(), {described.JOB: self._job}
            while keys := provider.non_terminated_nodes(ours):
                if time.monotonic() > deadline_s:
                    raise InfrastructureError(f"{self.region}: {', '.join(keys)} are not gone after {GONE_S:g} s")
                provider.terminate_nodes(keys)
                if provider.non_terminated_nodes(ours):
                    time.sleep(POLL_S)

    def end_stale(self) -> list[str]:
        """End what launchers that died have left of any run; their names at the provider."""
        with meant(self._cloud, self.region):
            provider = self._opened()
            keys = provider.non_terminated_nodes({described.STATE: described.STARTING})
            stale = [key for key in keys if _age_s(provider.node_tags(key)) > STALE_S]
            if stale:
                provider.terminate_nodes(stale)
            return stale

    def _prepare_ray(self) -> None:
        """Its launcher tells its every step, on two ways; only why it gives up is of interest."""
        if missing := missing_packages(self._config.provider):
            raise UserError(missing)
        from ray.autoscaler._private.cli_logger import cli_logger

        logging.getLogger("ray.autoscaler").setLevel(logging.CRITICAL)
        cli_logger._print = _hear

    def _open(self, section: Values) -> None:
        from ray.autoscaler._private.providers import _get_node_provider

        self._provider = _get_node_provider(section, described.NAME, use_cache=False)

    def _opened(self) -> Any:
        if self._provider is None:
            self._prepare_ray()
            self._open(self._cloud.provider(self._config, self.region))
        return self._provider


_complaints: deque[str] = deque(maxlen=4)
"""What Ray's launcher has printed lately of what is wrong; what it raises may say nothing."""


def _hear(message: str, _level_str: str = "INFO", **_options: Any) -> None:
    if _level_str in ("ERROR", "PANIC"):
        _complaints.append(message.strip())


def _age_s(tags: dict[str, str]) -> float:
    """Machines without a time are somebody else's."""
    begun = tags.get(described.BEGUN, "")
    return time.time() - int(begun) if begun.isdigit() else 0.0


@contextmanager
def meant(cloud: Cloud, place: str) -> Iterator[None]:
    """What a provider refuses, in our words: raises NoRoom, UserError and InfrastructureError for what its clients
    raise."""
    _complaints.clear()
    try:
        yield
    except FtlaunchError:
        raise
    except Exception as caught:
        error = _cause(caught)
        said = f"{place}: {said_by(error)}"
        match cloud.meaning(error):
            case "room":
                raise NoRoom(said) from error
            case "down":
                raise InfrastructureError(said) from error
            case _:
                raise UserError(said) from error


def _cause(error: Exception) -> BaseException:
    """Ray's launcher prints what a provider has said, and goes on to raise something that says nothing."""
    from click import ClickException

    return error.__context__ if isinstance(error, ClickException) and error.__context__ else error


def said_by(error: BaseException) -> str:
    """An error's own words, with its code where there is one."""
    category, description = getattr(error, "category", None), getattr(error, "description", None)
    if category and description:
        return f"{category}: {description}"
    return str(error) or " / ".join(_complaints) or type(error).__name__


def missing_packages(provider: str) -> str | None:
    """What to install for a provider; None: all is there."""
    missing = [name for name in cloud_of(provider).modules if not _is_there(name)]
    if not missing:
        return None
    return f"cluster.provider {provider} needs {', '.join(missing)}: pip install 'ftlaunch[{provider}]'"


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a package around it
        return False
