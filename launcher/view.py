"""What a person sees while a run goes on: a live panel on a terminal, plain lines anywhere else.

Events are dicts with a `kind`: "phase" (phase), "step" (step, progress 0..1, loss, learning_rate, tokens_per_s,
memory_bytes, and if known eta_s, grad_norm, data_wait_s), "evaluation" (step, losses), "checkpoint" (step, path) and
"message" (text, level). Folding events into a state is pure; the two views only draw it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Protocol, Self

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from . import units

Event = Mapping[str, Any]
Clock = Callable[[], float]
LINE_EVERY_STEPS = 10
LINE_EVERY_S = 30.0
PATIENCE_S = 3.0
"""Phases that are over sooner do not show how long they take."""
LEVEL_STYLES = {"warning": "yellow", "error": "bold red", "info": ""}


@dataclass(frozen=True)
class State:
    """The latest of everything. Times are seconds of the view's clock."""

    phase: str = "starting"
    phase_since_s: float | None = None
    step: Event | None = None
    losses: Mapping[str, float] | None = None
    losses_step: int = 0
    checkpoint: Event | None = None
    first_progress: tuple[float, float] | None = None
    """(time, progress) at the first step seen: the remaining time is extrapolated from there."""
    eta_s: float | None = None


def advance(state: State, event: Event, now_s: float) -> State:
    """The state after an event; kinds that do not change it leave it as it is."""
    fold = FOLDS.get(event["kind"])
    return fold(state, event, now_s) if fold else state


def _fold_phase(state: State, event: Event, now_s: float) -> State:
    return replace(state, phase=event["phase"], phase_since_s=now_s)


def _fold_step(state: State, event: Event, now_s: float) -> State:
    first = state.first_progress or (now_s, event["progress"])
    eta_s = event.get("eta_s")
    if eta_s is None:
        eta_s = remaining_s(first, (now_s, event["progress"]))
    return replace(state, step=event, phase="training", first_progress=first, eta_s=eta_s)


def _fold_evaluation(state: State, event: Event, _now_s: float) -> State:
    return replace(state, losses=event["losses"], losses_step=event["step"])


def _fold_checkpoint(state: State, event: Event, _now_s: float) -> State:
    return replace(state, checkpoint=event)


FOLDS: Mapping[str, Callable[[State, Event, float], State]] = {
    "phase": _fold_phase,
    "step": _fold_step,
    "evaluation": _fold_evaluation,
    "checkpoint": _fold_checkpoint,
}


def remaining_s(first: tuple[float, float], latest: tuple[float, float]) -> float | None:
    """Seconds left if progress goes on as it did between two (time, progress) points; None without any progress."""
    gained = latest[1] - first[1]
    if gained <= 0:
        return None
    return (latest[0] - first[0]) * max(0.0, 1.0 - latest[1]) / gained


def step_line(event: Event, eta_s: float | None) -> str:
    """One step as one line."""
    parts = [f"step {event['step']:>6}", f"{event['progress']:6.1%}", f"loss {event['loss']:.4f}"]
    parts += [f"lr {event['learning_rate']:.2e}"]
    if event.get("grad_norm") is not None:
        parts += [f"grad norm {event['grad_norm']:.3f}"]
    parts += [f"{units.count(event['tokens_per_s'])} tokens/s", f"memory {units.size(event['memory_bytes'])}"]
    if eta_s is not None:
        parts += [f"{units.duration(eta_s)} left"]
    return "  ".join(parts)


def losses_line(losses: Mapping[str, float]) -> str:
    """`tickets/loss 1.2345  general/loss 2.3456`"""
    return "  ".join(f"{name} {loss:.4f}" for name, loss in losses.items())


def event_line(event: Event) -> str:
    """Any event but a step as one line."""
    return EVENT_LINES[event["kind"]](event)


EVENT_LINES: Mapping[str, Callable[[Event], str]] = {
    "phase": lambda event: f"{event['phase']} …",
    "evaluation": lambda event: f"evaluation at step {event['step']}: {losses_line(event['losses'])}",
    "checkpoint": lambda event: f"saved step {event['step']}: {event['path']}",
    "message": lambda event: str(event["text"]),
}


class View(Protocol):
    """Something that shows events. A context: leaving it gives the terminal back."""

    def update(self, event: Event) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class PlainView:
    """Lines for logs: each phase once; of steps the first, one in ten, and one after each half minute; all else."""

    def __init__(self, console: Console, clock: Clock = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._state = State()
        self._last_line_s = float("-inf")
        self._last_ten = -1
        self._phases: set[str] = set()

    def update(self, event: Event) -> None:
        """Print the event's line, if it is due."""
        now_s = self._clock()
        self._state = advance(self._state, event, now_s)
        if not self._is_due(event, now_s):
            return
        if event["kind"] == "step":
            self._last_line_s = now_s
            self._last_ten = event["step"] // LINE_EVERY_STEPS
            self._print(step_line(event, self._state.eta_s), "")
        else:
            self._print(event_line(event), LEVEL_STYLES[event.get("level", "info")])

    def _is_due(self, event: Event, now_s: float) -> bool:
        if event["kind"] == "step":
            # Not every step is told of where steps are quick, so the tenth itself may not be.
            new_ten = event["step"] // LINE_EVERY_STEPS != self._last_ten
            return new_ten or now_s - self._last_line_s >= LINE_EVERY_S
        if event["kind"] == "phase":
            is_new = event["phase"] not in self._phases
            self._phases.add(event["phase"])
            return is_new
        return True

    def _print(self, line: str, style: str) -> None:
        # One event is one line of a log, however narrow a pipe claims to be.
        self._console.print(Text(line, style=style), soft_wrap=True, highlight=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


class LiveView:
    """A panel that stays at the bottom of the terminal; evaluations, saves and messages scroll above it."""

    def __init__(self, console: Console, clock: Clock = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._state = State()
        # Drawn anew at each refresh: a phase without news still shows that time goes on.
        self._live = Live(get_renderable=self._panel, console=console, refresh_per_second=4, transient=True)

    def _panel(self) -> Panel:
        return panel(self._state, self._clock())

    def update(self, event: Event) -> None:
        """Redraw with the event."""
        self._state = advance(self._state, event, self._clock())
        if event["kind"] not in ("step", "phase"):
            line = Text(event_line(event), style=LEVEL_STYLES[event.get("level", "info")])
            # Not wrapped, so that paths can be copied.
            self._console.print(line, highlight=False, soft_wrap=True)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()
        if self._state.step is not None:  # the panel vanishes; its last figures stay
            self._console.print(Text(step_line(self._state.step, None)), highlight=False)


def panel(state: State, now_s: float) -> Panel:
    """The live panel for a state."""
    step = state.step
    if step is None:
        return Panel(Text(f"{state.phase} …{_waited(state, now_s)}"), title="ftlaunch", title_align="left")
    title = Text(f"{state.phase}: step {step['step']}")
    bar = Table.grid(expand=True, padding=(0, 1))
    bar.add_column(ratio=1)
    bar.add_column(justify="right")
    left = "" if state.eta_s is None else f"  {units.duration(state.eta_s)} left"
    bar.add_row(ProgressBar(total=1.0, completed=step["progress"]), f"{step['progress']:.1%}{left}")
    return Panel(Group(bar, _figures(step), _past(state)), title=title, title_align="left")


def _waited(state: State, now_s: float) -> str:
    """How long a phase has taken, once a person would wonder."""
    waited_s = 0.0 if state.phase_since_s is None else now_s - state.phase_since_s
    return f"  {units.duration(waited_s)}" if waited_s >= PATIENCE_S else ""


def _figures(step: Event) -> Table:
    table = Table.grid(padding=(0, 2))
    rows = [
        ("loss", f"{step['loss']:.4f}", "learning rate", f"{step['learning_rate']:.3e}"),
        ("tokens/s", units.count(step["tokens_per_s"]), "memory", units.size(step["memory_bytes"])),
    ]
    if step.get("grad_norm") is not None:
        rows += [("grad norm", f"{step['grad_norm']:.3f}", "waited for data", f"{step.get('data_wait_s', 0.0):.2f} s")]
    for label, value, other_label, other in rows:
        table.add_row(Text(label, style="dim"), Text(value), Text(other_label, style="dim"), Text(other))
    return table


def _past(state: State) -> Table:
    """The last evaluation and save; a grid of its own, because losses may take a whole line."""
    table = Table.grid(padding=(0, 2))
    if state.losses:
        table.add_row(Text("evaluated", style="dim"), Text(f"{losses_line(state.losses)} (step {state.losses_step})"))
    if state.checkpoint:
        table.add_row(Text("saved", style="dim"), Text(f"step {state.checkpoint['step']}"))
    return table


def make_view(console: Console, clock: Clock = time.monotonic) -> View:
    """The live view on a terminal, plain lines elsewhere."""
    return LiveView(console, clock) if console.is_terminal else PlainView(console, clock)
