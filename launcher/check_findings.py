"""What `ftlaunch check` can find: one table of codes, and the findings of one check."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from ..recipes.methods.base import RowId

Severity = Literal["error", "warning", "advice"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "advice")
"""Worst first. Errors stop a run or leave it nothing to learn; warnings change what is learned; advice does neither."""

NAMED_ROWS = 1_000
"""Rows that are named of each kind of finding; all are counted."""


class Kind(NamedTuple):
    """A kind of finding: how bad, what it is (behind `N rows:`, or its title), and what to do about it."""

    severity: Severity
    what: str
    remedy: str


KINDS: Mapping[str, Kind] = {
    # --- what cannot be used ---
    "unreadable-source": Kind("error", "cannot be used", "mend what the message names; training would stop on it too"),
    "unreadable-file": Kind("error", "cannot be read", "write the file again"),
    "unreadable-row": Kind("error", "not a row", "mend or remove the line; training stops on it"),
    "malformed-row": Kind("error", "malformed", "mend or remove the row; training stops on it"),
    "overlong-refused": Kind(
        "error", "longer than data.sequence_length, which data.overlong refuses", "raise it, or set data.overlong"
    ),
    "teaches-nothing": Kind("error", "no row that was looked at gives a sample", "see the rows' own findings"),
    # --- what is learned from a row ---
    "nothing-learned": Kind(
        "warning", "left out, because nothing is learned from it", "give it an answer, or remove it"
    ),
    "overlong": Kind(
        "warning",
        "left out, because it is longer than data.sequence_length",
        "raise data.sequence_length, or choose another data.overlong",
    ),
    "prompt-fills-sequence": Kind(
        "warning",
        "the prompt alone fills data.sequence_length, so that no answer is left",
        "raise data.sequence_length, shorten the prompts, or set data.overlong: truncate_left",
    ),
    "truncated": Kind("warning", "cut to data.sequence_length", "raise data.sequence_length, if the cut parts matter"),
    "split": Kind("advice", "documents split over several sequences", "nothing, if that is meant"),
    "missing-prompt": Kind(
        "warning", "an answer to an empty prompt", "fill the prompt, map another column, or remove it"
    ),
    "blank-turn": Kind("warning", "an assistant turn without text, which is learned", "remove the turn or the row"),
    "ends-without-answer": Kind(
        "warning", "the conversation does not end with the assistant", "the last turns teach nothing; remove them"
    ),
    "repeated-role": Kind("warning", "two turns in a row by the same side", "join them, or find the missing turn"),
    "empty-answer": Kind("warning", "an answer to compare, or to judge, is blank", "fill it, or remove the row"),
    "equal-answers": Kind(
        "warning", "two of the answers to compare are the same", "remove the row: it prefers nothing"
    ),
    "equal-scores": Kind(
        "warning", "all responses have the same score or rank", "remove the row, or give the order of the responses"
    ),
    "glued": Kind(
        "warning",
        "no blank between prompt and completion: they become one word",
        "begin the completion, or end the prompt, with a space or a line break",
    ),
    "doubled-bos": Kind(
        "warning",
        "more than one begin-of-sequence token",
        "remove it from the text: tokenizer or chat template already write one",
    ),
    "unknown-token": Kind(
        "warning",
        "characters or words that the tokenizer does not know",
        "use a tokenizer that knows them, or mend them",
    ),
    "special-token-in-text": Kind(
        "warning",
        "the text spells one of the tokenizer's special tokens, and becomes one",
        "remove it; if the rows were rendered by a template before, give the messages instead",
    ),
    "template-marks": Kind(
        "warning",
        "marks of a chat template that is not this model's stand in the text",
        "give the messages themselves (format chat), so that this model's own template renders them",
    ),
    # --- the text itself ---
    "replacement-character": Kind(
        "warning",
        "U+FFFD, which stands where a character was lost",
        "decode the original files again, as what they are",
    ),
    "wrong-encoding": Kind(
        "warning", "UTF-8 that was read as Latin-1 (Ã©, â€™)", "decode the original files as UTF-8, or run ftfy"
    ),
    "control-character": Kind("warning", "control characters", "remove them; few tokenizers have seen any"),
    "repetitive": Kind("warning", "the same few tokens over and over", "remove the row: models pick loops up quickly"),
    "secret": Kind("warning", "what looks like a key or a password", "remove it: models repeat what they saw"),
    "very-long": Kind("advice", "far longer than the others", "look at it"),
    "very-short": Kind("advice", "far shorter than the others", "look at it"),
    # --- copies ---
    "duplicate": Kind(
        "warning", "exact copies of another row of the source", "remove copies; they weigh more than others"
    ),
    "near-duplicate": Kind(
        "advice", "the same but for case, blanks and punctuation", "remove copies, if they are no accident"
    ),
    "duplicate-across-sources": Kind("warning", "exact copies of a row of another source", "remove one of them"),
    "leaked": Kind(
        "warning",
        "the same row on the training and the held-out side",
        "remove it from one side: the held-out loss looks better than it is",
    ),
    "leaked-prompt": Kind(
        "warning",
        "the same prompt, with another answer, on the training and the held-out side",
        "keep all answers to a prompt on one side",
    ),
    "several-answers": Kind("advice", "a prompt that has another answer elsewhere", "keep one, if they contradict"),
    # --- a source as a whole ---
    "empty-column": Kind("warning", "a column is blank in every row", "map the right column with `columns:`"),
    "one-label": Kind(
        "warning", "one label only, so that nothing tells it from the other", "add rows with the other label"
    ),
    "same-answer": Kind(
        "advice", "one and the same answer", "expected of labels; else the model learns to say just that"
    ),
    "few-supervised": Kind(
        "advice",
        "very little of what is read is learned",
        "shorten the prompts; most of the compute goes into tokens that teach nothing",
    ),
    "end-not-learned": Kind(
        "warning",
        "answers do not end in a special token that is learned",
        "the model would not learn to stop: let the template close the assistant's turn inside its supervised part",
    ),
    "small-eval": Kind("advice", "few held-out rows", "a hundred or more make differences of the loss mean something"),
    # --- the recipe ---
    "no-eval": Kind("advice", "nothing is held out", "set data.eval to {fraction: 0.02}, to see overfitting"),
    "few-examples": Kind("warning", "few examples", "hundreds are wanted for a style, thousands for a task"),
    "many-epochs": Kind("warning", "many epochs", "lower train.num_epochs, or stop early (evaluate.early_stopping)"),
    "few-steps": Kind(
        "warning",
        "few optimizer steps",
        "lower train.global_batch_size, or train longer; the rate hardly has time to act",
    ),
    "repeated-source": Kind("warning", "a source is repeated many times", "lower its weight, or set repeat: false"),
    "learning-rate-high": Kind("warning", "the learning rate is far above the usual", "lower train.learning_rate"),
    "learning-rate-low": Kind("warning", "the learning rate is far below the usual", "raise train.learning_rate"),
    "sequence-short": Kind("warning", "data.sequence_length is short for this data", "raise data.sequence_length"),
    "sequence-long": Kind(
        "advice", "data.sequence_length is far above every sample", "lower it: memory is set aside for it"
    ),
    "packing-off": Kind("advice", "packing would save much", "set data.packing: true, if the model can"),
    "no-replay": Kind(
        "advice",
        "one narrow source and several epochs: what the model could do before may be forgotten",
        "mix some general data in (a second source with a small weight), or train an adapter",
    ),
}
"""Every code with its kind. Codes are stable: scripts and pages name them."""


class NamedRow(NamedTuple):
    """A row that a finding is about."""

    row: str
    detail: str


@dataclass
class Finding:
    """Something to look at. `where`: a source, or a key of the recipe. `count`: rows concerned; 0 where it is not about
    rows."""

    code: str
    where: str
    what: str
    count: int = 0
    rows: list[NamedRow] = field(default_factory=list)

    @property
    def severity(self) -> Severity:
        """How bad it is."""
        return KINDS[self.code].severity

    @property
    def remedy(self) -> str:
        """What to do."""
        return KINDS[self.code].remedy


def about(code: str, where: str, figures: str) -> Finding:
    """A finding that is not about single rows: what it is, and the figures that say so."""
    return Finding(code, where, f"{KINDS[code].what}: {figures}")


class Note(NamedTuple):
    """One row's part in a finding. Notes of different `group` (a reason) become findings of their own."""

    code: str
    detail: str = ""
    group: str = ""


class Collector:
    """The rows' findings of one source."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._found: dict[tuple[str, str], Finding] = {}

    def add(self, row: RowId, note: Note) -> None:
        """Count a note, and name its row."""
        what = KINDS[note.code].what + (f" ({note.group})" if note.group else "")
        finding = self._found.setdefault((note.code, note.group), Finding(note.code, self._source, what))
        finding.count += 1
        if len(finding.rows) < NAMED_ROWS:
            detail = note.detail.removeprefix(f"{row}: ").removeprefix(f"{row.file}, ")
            finding.rows.append(NamedRow(str(row), detail))

    def findings(self, rows: int) -> Iterator[Finding]:
        """The findings, with their share of the source's `rows`."""
        for finding in self._found.values():
            yield replace(finding, what=f"{_counted(finding, rows)}: {finding.what}")


def _counted(finding: Finding, rows: int) -> str:
    """`3 rows (1.5%)`; a block that cannot be read holds nobody knows how many."""
    noun = "block" if finding.code == "unreadable-file" else "row"
    share = f" ({finding.count / rows:.1%})" if rows and noun == "row" else ""
    return f"{finding.count:,} {noun}{'' if finding.count == 1 else 's'}{share}"


def by_severity(findings: list[Finding]) -> list[Finding]:
    """Worst first, else as they were found."""
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))


def counts(findings: list[Finding]) -> dict[Severity, int]:
    """Findings of each severity."""
    return {severity: sum(finding.severity == severity for finding in findings) for severity in SEVERITIES}
