"""The driver of a submitted run, on a node of its cluster: what `ftlaunch recipe.yaml` does on one machine, with Ray
there already. `python .../drive driver.json ADDRESS [--kept [WHY]]`; --kept: it would be started again; WHY: the one
before it ended, for this reason."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from ..cluster.base import Demand
from ..cluster.joined import Joined
from ..cluster.restarts import AGAIN, BEGUN, ELSEWHERE, LEFT, LEFT_EARLY, SPOKE, UNFIT
from ..distributed.again import Flags
from ..distributed.checkpoint.commit import latest_resumable
from ..distributed.run_directory import RunDirectory
from ..recipes.errors import Interrupted
from ..recipes.load import LoadedRecipe
from . import submissions
from .cli import guarded
from .cli_recipe import remember
from .handover import unpack
from .keep import Beginning
from .log_copy import LogCopy
from .restarted import answer_before, earlier_of, name_of, why_again
from .settle import renamed, run_of
from .start import run_on
from .supervisor import Nodes

LOG = "driver.log"
"""Where whoever started this has sent its output, beside the file with what it is told."""


def main() -> int:
    """Drive; returns the exit code of the run, as the command line would."""
    file, address, *kept = Path(sys.argv[1]), *sys.argv[2:]
    job = json.loads(file.read_text())
    again = kept[1] if len(kept) > 1 else None
    beginning = Beginning(job["record"]["job"], again, is_kept=bool(kept))
    if job["record"].get("replaces"):
        beginning = replace(beginning, give_back=lambda unfit: file.with_name(UNFIT).write_text("\n".join(unfit)))
    driven = Driven(file.parent, job, beginning)
    signal.signal(signal.SIGUSR1, driven.leave)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})  # whoever started this may have held it back
    code = driven.close(guarded(lambda: driven.run(address)))
    file.with_name(SPOKE).touch()
    return code


@dataclass
class Driven:
    """One submitted run. `job` is what `submit.job_of` made, with the cluster's record; `folder` the job's."""

    folder: Path
    job: Mapping[str, Any]
    beginning: Beginning
    _run: RunDirectory | None = None
    _name: str = ""
    _copy: LogCopy | None = None
    _leaves: bool = False
    _step: int = -1
    """That of the newest checkpoint when this driver began; -1: there was none."""

    def leave(self, _number: int, _frame: FrameType | None) -> None:
        """The nodes are wanted back: save and end, to go on later."""
        if not self._leaves:
            self._leaves = True
            signal.raise_signal(signal.SIGINT)

    def run(self, address: str) -> int:
        """Decide and train, as `start` does."""
        flags = Flags(**self.job["flags"])
        loaded = self._named(unpack(self.job["loaded"]), flags)
        remember(loaded)
        sys.argv = list(self.job["command"])  # what the run directory says it was started with
        demand = Demand(**self.job["demand"])
        if (code := self._take_over(run_of(loaded))) is not None:
            return code
        nodes = Nodes(demand, Joined(address, demand), self.beginning.launch)
        console = Console(width=self.job["columns"])
        return run_on(lambda: nodes, loaded, flags, console, self.beginning, begun=self._begin)

    def _take_over(self, run: RunDirectory) -> int | None:
        """From an earlier driver of this job, where there was one; its answer if that is final."""
        earlier = earlier_of(run, self.job["record"]["job"])
        if earlier is None:
            return None
        if not (self.folder / BEGUN).exists() and (code := answer_before(run, earlier)) is not None:
            return code  # in place of one that died on this very node, it goes on; ranks there end by themselves
        self._run, self._name, self._step = run, earlier.name, _newest_step(run)
        if self.beginning.again is None:  # the first on these nodes, but not of the job
            self.beginning = replace(self.beginning, again=why_again(earlier))
        return None

    def _named(self, loaded: LoadedRecipe, flags: Flags) -> LoadedRecipe:
        """With `fresh` under a new name, which a driver that takes over keeps."""
        if not flags.fresh:
            return loaded
        chosen = self.folder / "name"
        if not chosen.exists():
            before = name_of(loaded, self.job["record"]["job"])  # where it began on other nodes
            chosen.write_text(before or renamed(loaded).recipe.name)
        recipe = loaded.recipe.model_copy(update={"name": chosen.read_text()})
        return replace(loaded, recipe=recipe)

    def _begin(self, run: RunDirectory) -> None:
        """The run will train, so its directory is to know where."""
        self._run, self._name = run, submissions.register(run, self.job["record"])
        self._step = _newest_step(run)
        (self.folder / BEGUN).touch()
        self._copy = LogCopy(submissions.log_url(run, self._name), self.folder / LOG)

    def close(self, code: int) -> int:
        """Write down how it ended, unless it goes on; the exit code."""
        if self._copy:
            self._copy.close()
        if code == AGAIN:
            return code
        if code == ELSEWHERE and self._run:
            submissions.leave(self._run, self._name, code)
            return code
        if self._leaves and code == Interrupted.exit_code:
            return self._left()
        if self._run:
            submissions.finish(self._run, self._name, code)
        return code

    def _left(self) -> int:
        if self._run is None:
            return LEFT_EARLY
        code = LEFT if _newest_step(self._run) > self._step else LEFT_EARLY
        submissions.leave(self._run, self._name, code)
        return code


def _newest_step(run: RunDirectory) -> int:
    newest = latest_resumable(run.url, lambda _line: None)
    return newest.step if newest else -1
