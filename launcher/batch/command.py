"""`ftlaunch batch RECIPE…`: check everything, run it with a limit on how much at once, and compare."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.text import Text

from ...distributed import storage
from ...distributed.again import Flags
from ...recipes.errors import UserError
from ...recipes.redact import redact
from .. import units
from ..hardware import this_machine
from ..overview.listing import look
from . import compare
from .members import Load, Member, check_members, make_members
from .runner import Runner, Running, exit_code
from .slots import VISIBLE, make_slots

FOLDER = "batches"
LOCAL_EVERY_S, REMOTE_EVERY_S = 10.0, 60.0
"""Between lines that say how far runs are."""


@dataclass(frozen=True)
class Options:
    """What the command line says. `place`: its options that say where members run."""

    sweeps: Sequence[str]
    at_once: int
    name: str | None
    flags: Flags
    place: Sequence[str]
    dry_run: bool


def run_batch(
    recipes: Sequence[Path], overrides: Sequence[str], options: Options, load: Load, environ: Mapping[str, str]
) -> int:
    """Run a batch; its exit code. Raises UserError before anything starts, with all that is wrong."""
    console, machine = Console(), this_machine()
    members = make_members(recipes, overrides, options.sweeps, load)
    problems = check_members(members, machine, options.flags)
    slots = make_slots(members, options.at_once, machine, environ.get(VISIBLE), problems)
    if problems:
        raise UserError("\n".join(problems))
    name = options.name or f"{members[0].recipe.stem}-{'sweep' if options.sweeps else 'batch'}"
    _say(console, f"batch {name}: {len(members)} runs, {min(options.at_once, len(members))} at once")
    for member in members:
        _say(console, f"  {member.name}" + "".join(f"  {key}={value}" for key, value in member.settings))
    if options.dry_run:
        return 0
    folder = Path(FOLDER) / name
    folder.mkdir(parents=True, exist_ok=True)
    progress = _Progress(console, members, folder)
    runner = Runner(slots, environ, folder, options.flags, options.place, progress.watch, progress.ended)
    runner.run(members)
    _compare(members, runner, name, console)
    return exit_code(runner.exit_codes, interrupted=runner.interrupted)


def _compare(members: Sequence[Member], runner: Runner, name: str, console: Console) -> None:
    """The table, here and as files."""
    results = [compare.result_of(member, runner.exit_codes.get(member.name)) for member in members]
    secrets = [secret for member in members for secret in member.loaded.secrets]
    table, page = runner.folder / "comparison.json", runner.folder / "comparison.html"
    table.write_text(redact(json.dumps(compare.values(results), indent=2), secrets) + "\n")
    page.write_text(redact(compare.page(results, name), secrets))
    console.print()
    console.print(compare.terminal_table(results), highlight=False)
    _say(console, f"\ncomparison  {page}\n            {table}")
    if runner.interrupted:
        _say(console, "interrupted: the same command goes on from there")


@dataclass
class _Progress:
    """Lines about runs as they go on."""

    console: Console
    members: Sequence[Member]
    folder: Path
    _shown_s: float = 0.0
    _ended: int = 0

    def watch(self, running: Sequence[Running]) -> None:
        """Now and then, a line for each run."""
        remote = any(not storage.is_local(each.member.run.url) for each in running)
        now_s = time.monotonic()
        self._shown_s = self._shown_s or now_s
        if now_s - self._shown_s < (REMOTE_EVERY_S if remote else LOCAL_EVERY_S):
            return
        self._shown_s = now_s
        for each in running:
            _say(self.console, f"  {each.member.name}: {_how_far(each.member)}")

    def ended(self, member: Member, code: int, seconds: float) -> None:
        """A run is over."""
        self._ended += 1
        how = "done" if code == 0 else f"exit code {code}"
        line = f"[{self._ended}/{len(self.members)}] {member.name}: {how} after {units.duration(seconds)}"
        if code == 0:
            _say(self.console, line)
            return
        last = (self.folder / f"{member.name}.log").read_text(errors="replace").strip().splitlines()[-3:]
        told = redact("\n".join(f"    {each}" for each in last), member.loaded.secrets)
        _say(self.console, f"{line}; its output is in {self.folder / f'{member.name}.log'}\n{told}")


def _how_far(member: Member) -> str:
    listed = look(member.run.url, member.name)
    if listed is None or listed.step is None:
        return "starting"
    done = "" if listed.progress is None else f", {listed.progress:.0%}"
    return f"step {listed.step}{done}, loss {listed.loss:.4f}" if listed.loss is not None else f"step {listed.step}"


def _say(console: Console, line: str) -> None:
    console.print(Text(line), soft_wrap=True, highlight=False)
