"""The quickstart's result, on the terminal: what was learned, what was forgotten, and what to try next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from .quickstart_data import Row, parses

NUM_SHOWN = 4
LINES_SHOWN = 4


@dataclass(frozen=True)
class Side:
    """One model. Losses in nats a token, over held-out files; `reloaded_loss`: the task loss once more, as plain
    transformers finds it with the checkpoint; `shuffled_loss`: the same with each other's prompts."""

    task_loss: float
    reloaded_loss: float
    general_loss: float
    shuffled_loss: float
    parsing_share: float
    written: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """Both models, and the held-out rows that `written` answers."""

    base: Side
    tuned: Side
    rows: tuple[Row, ...]


def show_outcome(outcome: Outcome, folder: str, console: Console) -> None:
    """Print the whole result; long commands are not wrapped, so that they can be copied."""
    console.print(Group(Text(), figures(outcome), Text(reading(outcome.tuned), style="dim"), Text(), answers(outcome)))
    console.print(Text(), next_commands(folder), sep="\n", soft_wrap=True, highlight=False)


def figures(outcome: Outcome) -> Table:
    """The table of losses and shares."""
    base, tuned = outcome.base, outcome.tuned
    table = Table(title="on files that neither model was trained on", title_justify="left", title_style="bold")
    table.add_column("", no_wrap=True)
    for heading in ("base", "tuned", "change"):
        table.add_column(heading, justify="right")
    table.add_row("loss on the task", *compared(base.task_loss, tuned.task_loss))
    table.add_row("  the same, prompts exchanged among rows", *compared(base.shuffled_loss, tuned.shuffled_loss))
    table.add_row("loss on general text (a rise is forgetting)", *compared(base.general_loss, tuned.general_loss))
    table.add_row(
        f"answers that parse as Python, of {len(outcome.rows)}",
        f"{base.parsing_share:.0%}",
        f"{tuned.parsing_share:.0%}",
        "",
    )
    return table


def compared(before: float, after: float) -> tuple[str, str, str]:
    """Two losses and the change between them."""
    return f"{before:.3f}", f"{after:.3f}", f"{(after - before) / before:+.0%}"


def reading(tuned: Side) -> str:
    """What the figures mean, in words."""
    return (
        f"With the prompt of another row, the tuned model's loss changes by "
        f"{tuned.shuffled_loss - tuned.reloaded_loss:+.3f}: so much of its answer comes from reading the prompt.\n"
        f"Plain transformers, given the checkpoint, finds the task loss that training measured, up to "
        f"{abs(tuned.reloaded_loss - tuned.task_loss):.0e}."
    )


def answers(outcome: Outcome) -> Table:
    """A few questions with both answers, side by side."""
    table = Table(title="what they write", title_justify="left", title_style="bold", show_lines=True)
    for heading in ("asked", "base", "tuned"):
        table.add_column(heading, ratio=1, overflow="fold")
    for index in range(min(NUM_SHOWN, len(outcome.rows))):
        asked = outcome.rows[index]["messages"][0]["content"]
        table.add_row(Text(asked), answer(outcome.base.written, index), answer(outcome.tuned.written, index))
    return table


def answer(written: Sequence[str], index: int) -> Text:
    """One answer, as far as it fits; red if it is no Python."""
    lines = [line for line in written[index].splitlines() if line.strip()]
    shown = "\n".join(lines[:LINES_SHOWN]) + (" …" if len(lines) > LINES_SHOWN else "")
    return Text(shown or "(nothing)", style="" if parses(written[index]) else "red")


def next_commands(folder: str) -> Text:
    """What to try next, to be copied."""
    question = "Read all lines of the file path.\\nSignature of the function read_lines with path?"
    lines = [
        f"ftlaunch plan {folder}/tuned.yaml                 what a run will do, without starting it",
        f"ftlaunch check {folder}/tuned.yaml                what the model learns from, token by token",
        f"ftlaunch {folder}/tuned.yaml --fresh              train again, after you edited the recipe",
        f"ftlaunch generate {folder}/runs/tuned $'{question}'",
        f"{folder}/runs/tuned/report.html                   curves, counts, environment (for a browser)",
    ]
    return Text("\n").join([Text("next", style="bold"), *(Text(f"  {line}") for line in lines)])
