"""`ftlaunch check`: what the model would learn from the head of the data, row by row."""

from __future__ import annotations

import itertools
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from rich.console import Console
from rich.text import Text

from ..distributed.data.build import build_index
from ..distributed.data.template import TextEncoder
from ..recipes.errors import UserError
from ..recipes.load import LoadedRecipe
from ..recipes.methods.base import Rejected, Sample
from ..recipes.methods.table import build_method
from ..recipes.redact import redact
from .plan_data import named_sources
from .sampling import Looked, look_at_rows, make_encoder
from .unknown import Unknown

NAMED_ROWS = 3
"""Rows that are named of each kind of trouble; all are counted."""

SHOWN_TOKENS = 400
REMEDIES = {
    "overlong": "longer than data.sequence_length; raise it, or see data.overlong",
    "no_targets_after_truncation": "every supervised token was cut off; raise data.sequence_length",
}
"""What to do about rows that are lost to the layout, not to the rows themselves."""

SUPERVISED, CONTEXT = "bold green", "dim"


@dataclass
class Tally:
    """What became of the rows of a source; `rejected` and `named` are by reason, `lengths` in tokens per sequence."""

    rows: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    named: dict[str, list[str]] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)
    truncated: int = 0
    split: int = 0
    lengths: list[int] = field(default_factory=list)
    supervised: int = 0
    shown: list[Sample] = field(default_factory=list)

    def add(self, looked: Looked, samples: int) -> None:
        """Count one row, and keep it if it is among the first `samples` good ones."""
        self.rows += 1
        if isinstance(looked.fitted, str):
            self.broken.append(looked.fitted if str(looked.row) in looked.fitted else f"{looked.row}: {looked.fitted}")
        elif isinstance(looked.fitted, Rejected):
            self.rejected[looked.fitted.reason] += 1
            rows = self.named.setdefault(looked.fitted.reason, [])
            rows += [str(looked.row)] if len(rows) < NAMED_ROWS else []
        else:
            self._add_pieces(looked.sample, looked.fitted, samples)

    def _add_pieces(self, sample: Sample | None, pieces: Sequence[Sample], samples: int) -> None:
        assert sample is not None
        self.split += len(pieces) > 1
        self.truncated += len(pieces) == 1 and len(pieces[0]) < len(sample)
        self.lengths += map(len, pieces)
        self.supervised += sum(piece.num_targets for piece in pieces)
        self.shown += pieces[: max(0, samples - len(self.shown))]


def check_data(loaded: LoadedRecipe, *, rows: int, samples: int) -> int:
    """Print what the head of each source gives. Exit code 1 when a row is broken, or a source teaches nothing."""
    recipe, console = loaded.recipe, Console()
    encoder = make_encoder(recipe, ask_hub=True)
    if isinstance(encoder, Unknown):
        raise UserError(encoder.reason)
    method = build_method(recipe.method)
    good = True
    for split, name, source in named_sources(recipe):
        index = build_index([source], [name])
        tally = count(look_at_rows(index, recipe, method, encoder, rows), samples)
        lines = [Text(f"\n{name} ({split}, {index.sources[0].format})", style="bold"), *tally_lines(tally)]
        lines += sample_lines(tally.shown, encoder, colours=console.is_terminal)
        for line in lines:
            console.print(_redacted(line, loaded.secrets), soft_wrap=True, highlight=False)
        good = good and not tally.broken and bool(tally.lengths)
    return 0 if good else 1


def count(rows: Iterable[Looked], samples: int) -> Tally:
    """The tally of these rows."""
    tally = Tally()
    for looked in rows:
        tally.add(looked, samples)
    return tally


def tally_lines(tally: Tally) -> Iterator[Text]:
    """A source's figures."""
    yield Text(f"  {tally.rows} rows read, {len(tally.lengths)} samples")
    if tally.lengths:
        tokens = sum(tally.lengths)
        middle, longest = round(statistics.median(tally.lengths)), max(tally.lengths)
        yield Text(
            f"  tokens in a sample: {min(tally.lengths)} to {longest}, median {middle}; "
            f"{tally.supervised / tokens:.1%} of {tokens} tokens supervised"
        )
    for number, what in ((tally.truncated, "truncated"), (tally.split, "split over several sequences")):
        if number:
            yield Text(f"  {number} rows {what}", style="yellow")
    for reason, number in tally.rejected.most_common():
        remedy = f"; {REMEDIES[reason]}" if reason in REMEDIES else ""
        yield Text(f"  {number} rows rejected ({number / tally.rows:.0%}): {reason}{remedy}", style="yellow")
        yield from (Text(f"    {row}") for row in tally.named[reason])
    if tally.broken:
        yield Text(f"  {len(tally.broken)} rows broken", style="bold red")
        yield from (Text(f"    {message}") for message in tally.broken[:NAMED_ROWS])
    if not tally.lengths:
        yield Text("  nothing to learn from here", style="bold red")


def sample_lines(samples: Sequence[Sample], encoder: TextEncoder, *, colours: bool) -> Iterator[Text]:
    """The samples as the model sees them, with what it learns to write standing out."""
    if samples:
        legend = Text("this is supervised", style=SUPERVISED) if colours else Text("⟦this is supervised⟧")
        yield Text("\n  samples: ").append_text(legend)
    for sample in samples:
        yield Text(f"  {sample.row} ({len(sample)} tokens)", style="underline" if colours else "")
        yield render_sample(sample, encoder, colours=colours)


def render_sample(sample: Sample, encoder: TextEncoder, *, colours: bool) -> Text:
    """One sample as text; supervised tokens are coloured, or between ⟦ and ⟧."""
    shown = Text()
    for text, supervised in spans(sample, encoder):
        if colours:
            shown.append(text, style=SUPERVISED if supervised else CONTEXT)
        else:
            shown.append(f"⟦{text}⟧" if supervised else text)
    more = len(sample) - SHOWN_TOKENS
    return shown.append(f" … {more} more tokens") if more > 0 else shown


def spans(sample: Sample, encoder: TextEncoder) -> Iterator[tuple[str, bool]]:
    """(text, supervised) of consecutive tokens. Texts are cut out of the whole, because tokenizers treat the
    beginning of a text in their own way."""
    ids = sample.input_ids[:SHOWN_TOKENS].tolist()
    supervised = sample.supervised[:SHOWN_TOKENS].copy()
    supervised[:1] = False  # nothing comes before it to predict it from
    cuts = [0, *(np.flatnonzero(np.diff(supervised)) + 1).tolist(), len(ids)]
    before = ""
    for start, stop in itertools.pairwise(cuts):
        text = encoder.decode(ids[:stop])
        yield text[len(before) :], bool(supervised[start])
        before = text


def _redacted(line: Text, secrets: Sequence[str]) -> Text:
    """A line without secrets, which paths may hold; a line that holds none keeps its styles."""
    clean = redact(line.plain, secrets)
    return line if clean == line.plain else Text(clean, style=line.style)
