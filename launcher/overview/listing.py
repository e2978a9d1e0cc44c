"""`ftlaunch list`: the runs below a checkpoint path, whatever kind of cluster they are on. Their directories are all
that is asked."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import datetime

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ...distributed import storage
from ...distributed.run_directory import RunDirectory
from ...recipes.errors import UserError
from .. import units
from ..record import Line, parse_lines
from ..submissions import latest
from .standing import Standing, standing_of

AT_ONCE = 16
"""Runs that are looked at together: on an object store each takes some round trips."""

TAIL_BYTES = 64 << 10
"""Of metrics.jsonl: the last step is in them, unless saves and evaluations follow it by the hundred."""

CLUSTER = re.compile(r"^cluster:\n(?:  .*\n)*?  type: (\S+)$", re.MULTILINE)
"""In a recipe as it is stored. Parsing hundreds of them as YAML takes seconds."""

STYLES = {
    "running": "bold green",
    "queued": "cyan",
    "starting": "cyan",
    "failed": "bold red",
    "lost": "red",
    "interrupted": "yellow",
}


@dataclass(frozen=True)
class Listed:
    """One run. `progress` 0 to 1; `begun_at` and `seen_at` (its last sign of life) in seconds since 1970."""

    name: str
    state: str
    step: int | None = None
    progress: float | None = None
    loss: float | None = None
    cluster: str = ""
    job: str = ""
    attempts: int = 0
    begun_at: float | None = None
    seen_at: float | None = None
    message: str = ""


def show_list(place: str, now_s: float, *, as_json: bool) -> int:
    """Print the runs below `place`, the newest last. Raises UserError where it is no folder."""
    runs = list_runs(place)
    if as_json:
        print(json.dumps([asdict(run) for run in runs], indent=2))
    else:
        Console().print(_table(runs, now_s) if runs else Text(f"no runs in {place}"), highlight=False)
    return 0


def list_runs(place: str) -> list[Listed]:
    """The runs right below a folder or URL, by when they began."""
    if storage.is_local(place) and not storage.local_path(place).is_dir():
        raise UserError(f"{place}: there is no such folder; give the checkpoint.path of your recipes")
    with ThreadPoolExecutor(AT_ONCE) as pool:
        looked = pool.map(lambda name: look(storage.join(place, name), name), storage.list_names(place))
    return sorted(filter(None, looked), key=lambda run: (run.begun_at or 0.0, run.name))


def look(url: str, name: str) -> Listed | None:
    """One run; None for what is none."""
    run = RunDirectory(url)
    if storage.is_local(run.url) and not storage.local_path(run.url).is_dir():
        return None
    try:
        text = run.read_recipe()
        if text is None and latest(run) is None:
            return None
        return _listed(run, name, text or "")
    except (UserError, ValueError, KeyError, TypeError) as error:  # one broken directory must not hide the others
        return Listed(name, "broken", message=str(error))


def _listed(run: RunDirectory, name: str, recipe: str) -> Listed:
    standing, submission = standing_of(run), latest(run)
    steps = [line for line in _tail(run.path("metrics.jsonl")) if line.get("kind") == "step"]
    last: Line = steps[-1] if steps else {}
    found = CLUSTER.search(recipe)
    submitted = str(submission.record["cluster"]["type"]) if submission else ""
    return Listed(
        name=name,
        state=standing.word,
        step=last.get("step"),
        progress=last.get("progress"),
        loss=last.get("loss"),
        cluster=found[1] if found else submitted,
        job=str(submission.record["job"]) if submission else "",
        attempts=len(standing.tried),
        begun_at=_seconds(standing.tried[0].info.started_at) if standing.tried else None,
        seen_at=_seen_at(run, standing, last.get("time")),
        message=standing.message,
    )


def _tail(url: str) -> Sequence[Line]:
    """The last lines of a file."""
    if not storage.exists(url):
        return []
    size = storage.info(url).size
    data = storage.read_range(url, max(0, size - TAIL_BYTES), size) if size else b""
    return parse_lines(data.decode(errors="replace"))


def _seen_at(run: RunDirectory, standing: Standing, line_s: float | None) -> float | None:
    if not standing.tried:
        return None
    newest = standing.tried[-1]
    beat = None if newest.end else run.last_beat(newest.info.number)
    said = [newest.end["ended_at"]] if newest.end else [newest.info.started_at, *([beat["at"]] if beat else [])]
    return max([*map(_seconds, said), line_s or 0.0])


def _seconds(moment: str) -> float:
    return datetime.fromisoformat(moment).timestamp()


def _table(runs: Sequence[Listed], now_s: float) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading, justify in (
        ("run", "left"), ("state", "left"), ("step", "right"), ("done", "right"), ("loss", "right"),
        ("cluster", "left"), ("job", "left"), ("begun", "right"), ("last sign", "right"),
    ):  # fmt: skip
        table.add_column(heading, justify=justify, no_wrap=heading in ("run", "state"))  # type: ignore[arg-type]
    for run in runs:
        cells = [
            "" if run.step is None else str(run.step),
            "" if run.progress is None else f"{run.progress:.1%}",
            "" if run.loss is None else f"{run.loss:.4f}",
            run.cluster,
            run.job,
            _ago(run.begun_at, now_s),
            _ago(run.seen_at, now_s),
        ]
        table.add_row(Text(run.name), Text(run.state, style=STYLES.get(run.state, "")), *map(Text, cells))
    return table


def _ago(moment_s: float | None, now_s: float) -> str:
    return "" if moment_s is None else f"{units.duration(max(0.0, now_s - moment_s))} ago"
