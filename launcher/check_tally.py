"""What a source amounts to: its rows added up, and what only all of them together show."""

from __future__ import annotations

import random
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ..recipes.formats import REQUIRED
from ..recipes.methods.base import RowId, Sample
from ..recipes.rows import BinaryPreference
from ..recipes.schema import Overlong, RowFormat
from .check_copies import Side, answer_digest
from .check_findings import Collector, Finding, Note, about
from .check_rows import Vocabulary, ends_in_special
from .plan_data import SourcePlan
from .plan_duration import SampleStats
from .sampling import Fault, Glimpse

FEW_SUPERVISED = 0.05
SAME_ANSWER_SHARE = 0.2
SAME_ANSWER_ROWS = 10
SMALL_EVAL_ROWS = 50
OUTLIER_DEVIATIONS = 5.0
OUTLIER_ROWS = 20
"""Fewer rows have no typical length."""

OUTLIER_FACTOR = 8.0
"""An outlier is also this many times longer or shorter than the median: even lengths have tiny deviations."""


@dataclass
class Tally:
    """A source in numbers. `lengths`: tokens of whole samples, before anything is cut; `fitted`: of the pieces that go
    into sequences. `known_rows` None: only reading would tell. `refusal`: why the method learns from none of its rows,
    which are then only read; empty where it does."""

    name: str
    side: Side
    plan: SourcePlan
    row_format: RowFormat
    known_rows: int | None
    overlong: Overlong
    refusal: str = ""
    rows: int = 0
    complete: bool = False
    """Every row was looked at."""
    lengths: array[int] = field(default_factory=lambda: array("l"))
    fitted: array[int] = field(default_factory=lambda: array("l"))
    supervised: int = 0
    held_out: int = 0
    read_bytes: float = 0.0
    shown: list[Sample] = field(default_factory=list)
    places: list[RowId] = field(default_factory=list)
    """Rows of `lengths`."""
    blank: Counter[str] = field(default_factory=Counter)
    answers: Counter[int] = field(default_factory=Counter)
    labels: Counter[bool] = field(default_factory=Counter)
    open_ends: int = 0
    notes: Collector = field(init=False)
    _dice: random.Random = field(default_factory=lambda: random.Random(0))  # noqa: S311 - what is shown

    def __post_init__(self) -> None:
        self.notes = Collector(self.name)

    def add(self, glimpse: Glimpse, vocabulary: Vocabulary, samples: int) -> None:
        """Count one row; `samples` good ones are kept to be shown."""
        looked = glimpse.looked
        if isinstance(looked.fitted, Fault) and looked.fitted.code == "unreadable-file":
            return
        self.rows += 1
        self.read_bytes += glimpse.num_bytes
        self.blank.update(_blank_columns(looked.values or {}, self.row_format))
        if isinstance(looked.parsed, BinaryPreference):
            self.labels[looked.parsed.label] += 1
        if looked.sample is not None:
            self.lengths.append(len(looked.sample))
            self.places.append(looked.row)
        if isinstance(looked.fitted, list) and looked.sample is not None:
            self.fitted.extend(map(len, looked.fitted))
            self.supervised += sum(piece.num_targets for piece in looked.fitted)
            self.answers[answer_digest(looked.sample)] += 1
            self.open_ends += not ends_in_special(looked.sample, vocabulary)
            self._keep(looked.fitted[0], samples)

    def _keep(self, sample: Sample, samples: int) -> None:
        """Each good row has the same chance to be shown (reservoir sampling)."""
        if len(self.shown) < samples:
            self.shown.append(sample)
        elif (place := self._dice.randrange(self.answers.total())) < samples:
            self.shown[place] = sample

    @property
    def is_split(self) -> bool:
        """Long rows are split, so that nothing of them is lost."""
        return self.overlong == "split"

    @property
    def tokens(self) -> int:
        """Tokens that go into sequences, of the rows looked at."""
        return sum(self.fitted)

    @property
    def supervised_share(self) -> float:
        """Supervised tokens by tokens."""
        return self.supervised / self.tokens if self.fitted else 0.0

    @property
    def estimated_rows(self) -> float:
        """Rows of the whole source."""
        if self.complete:
            return self.rows
        if self.known_rows is not None:
            return self.known_rows
        return self.plan.bytes * self.rows / self.read_bytes if self.read_bytes else 0.0

    @property
    def estimated_tokens(self) -> float:
        """Tokens of the whole source, as far as they go into sequences."""
        return self.estimated_rows * self.tokens / self.rows if self.rows else 0.0

    @property
    def estimated_samples(self) -> float:
        """Samples that one pass over the whole source gives."""
        return self.estimated_rows * len(self.fitted) / self.rows if self.rows else 0.0

    def stats(self) -> SampleStats:
        """As `plan` reckons with them."""
        each = max(1, self.rows)
        size = self.plan.bytes / self.rows if self.complete and self.rows else self.read_bytes / each
        return SampleStats(self.rows, len(self.fitted) / each, self.tokens / each, size)

    def findings(self) -> list[Finding]:
        """The rows' findings, and those of the source as a whole."""
        for row, note in _outliers(self.lengths, self.places):
            self.notes.add(row, note)
        return [*self.notes.findings(self.rows), *(finding for rule in SOURCE_RULES for finding in rule(self))]


def _blank_columns(values: Mapping[str, Any], row_format: RowFormat) -> list[str]:
    """Columns that the format needs and the row leaves blank."""
    needed = [(name, values.get(name)) for name in REQUIRED[row_format]]
    return [name for name, value in needed if value is None or (isinstance(value, str) and not value.strip())]


def _outliers(lengths: Sequence[int], places: Sequence[RowId]) -> Iterator[tuple[RowId, Note]]:
    """Lengths far from the others, measured in the logarithm by the median absolute deviation."""
    if len(lengths) < OUTLIER_ROWS:
        return
    logs = np.log(np.asarray(lengths, np.float64))
    middle = float(np.median(logs))
    spread = max(1.4826 * float(np.median(np.abs(logs - middle))), np.log(OUTLIER_FACTOR) / OUTLIER_DEVIATIONS)
    for number in np.flatnonzero(np.abs(logs - middle) > OUTLIER_DEVIATIONS * spread).tolist():
        code = "very-long" if logs[number] > middle else "very-short"
        yield places[number], Note(code, f"{lengths[number]:,} tokens; the median is {np.exp(middle):,.0f}")


# --- the source as a whole --------------------------------------------------------------------------------------------


def _not_learned_from(tally: Tally) -> Iterator[Finding]:
    if tally.refusal:
        yield about("unreadable-source", tally.name, tally.refusal)


def _one_label(tally: Tally) -> Iterator[Finding]:
    if len(tally.labels) == 1 and tally.labels.total() > 1:
        ((label, rows),) = tally.labels.items()
        yield about("one-label", tally.name, f"{str(label).lower()} in all {rows:,}")


def _teaches_nothing(tally: Tally) -> Iterator[Finding]:
    if not tally.fitted and not tally.refusal:
        yield about("teaches-nothing", tally.name, f"{tally.rows:,} looked at")


def _empty_columns(tally: Tally) -> Iterator[Finding]:
    for column, blank in tally.blank.items():
        if blank == tally.rows > 1:
            yield about("empty-column", tally.name, column)


def _same_answer(tally: Tally) -> Iterator[Finding]:
    most = max(tally.answers.values(), default=0)
    if most >= SAME_ANSWER_ROWS and most >= SAME_ANSWER_SHARE * tally.rows:
        yield about("same-answer", tally.name, f"{most:,} of {tally.rows:,} rows")


def _few_supervised(tally: Tally) -> Iterator[Finding]:
    if tally.fitted and tally.supervised_share < FEW_SUPERVISED:
        yield about("few-supervised", tally.name, f"{tally.supervised_share:.1%} of the tokens")


def _end_not_learned(tally: Tally) -> Iterator[Finding]:
    """A cut-off end is another matter, so nearly all rows must have none."""
    good = tally.answers.total()
    if good and tally.open_ends > 0.95 * good:
        yield about("end-not-learned", tally.name, f"{tally.open_ends:,} of {good:,} samples")


def _small_eval(tally: Tally) -> Iterator[Finding]:
    if tally.side == "eval" and tally.fitted and tally.estimated_rows < SMALL_EVAL_ROWS:
        yield about("small-eval", tally.name, f"{tally.estimated_rows:,.0f} rows")


SOURCE_RULES = (
    _not_learned_from,
    _teaches_nothing,
    _empty_columns,
    _one_label,
    _same_answer,
    _few_supervised,
    _end_not_learned,
    _small_eval,
)


# --- lengths ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Histogram:
    """Counts [bins] of lengths within edges [bins + 1], the last one included."""

    edges: npt.NDArray[np.float64]
    counts: npt.NDArray[np.int64]


LEAST_BINS, MOST_BINS = 8, 32
WIDE = 12.0
"""Longest by shortest from which on bins widen with the length."""


def histogram(lengths: Sequence[int]) -> Histogram:
    """Of at least one length. Lengths of about one size fall into even bins, others into bins of equal ratio. No bin is
    narrower than one token, so that none is empty for want of whole numbers."""
    values = np.asarray(lengths, np.float64)
    bins = round(min(MOST_BINS, max(LEAST_BINS, 2 * len(lengths) ** 0.5)))
    low, high = float(values.min()), float(values.max()) + 1
    if high / low > WIDE:
        edges = np.unique(np.round(np.geomspace(low, high, bins + 1)))
    else:
        edges = np.unique(np.round(np.linspace(low, high, min(bins, int(high - low)) + 1)))
    counts, _ = np.histogram(values, edges)
    return Histogram(edges, counts.astype(np.int64))


def quantile(lengths: Sequence[int], share: float) -> int:
    """The length that `share` of all do not exceed."""
    return int(np.quantile(np.asarray(lengths), share, method="inverted_cdf"))
