"""`ftlaunch check`: what the model would learn from the data, and what is wrong with it. Imports no torch."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.text import Text

from ..distributed import storage
from ..distributed.data.build import build_index
from ..distributed.data.held_out import held_out
from ..distributed.data.intake import policies
from ..distributed.data.template import TextEncoder
from ..distributed.run_directory import CHECK_REPORT
from ..recipes.errors import FtlaunchError, UserError
from ..recipes.formats import require_readable
from ..recipes.load import LoadedRecipe
from ..recipes.methods.base import Row
from ..recipes.methods.table import build_method
from ..recipes.redact import redact, redact_values
from ..recipes.schema import EvalSplit, Recipe, RowFormat, Source
from .check_advice import Overview, advise
from .check_copies import Copies, Side, fingerprint
from .check_fill import estimate_fill
from .check_findings import Finding, about, by_severity
from .check_page import render_page
from .check_progress import Progress
from .check_result import Result
from .check_rows import Vocabulary, row_notes
from .check_tally import Tally
from .check_view import as_json, result_lines
from .plan_data import SourcePlan, describe, named_sources
from .plan_duration import plan_duration
from .sampling import Eye, Looked, look_at, make_encoder
from .unknown import QUICK, Unknown

VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {
    code: ord("␡") for code in range(127, 160)
}
"""Control characters as their pictures: what stands in data shall not drive a terminal."""


@dataclass(frozen=True)
class Options:
    """`rows`: to look at in each source, None: all. `samples`: to show of each. `report`: where the page goes, None:
    into the run directory."""

    rows: int | None
    samples: int
    seed: int
    strict: bool
    report: str | None
    as_json: bool


def check_data(loaded: LoadedRecipe, options: Options) -> int:
    """Look, and show what was found. Exit code 1 when there is an error, and with `strict` a warning."""
    encoder = make_encoder(loaded.recipe, ask_hub=True)
    if isinstance(encoder, Unknown):
        raise UserError(encoder.reason)
    progress = Progress(sys.stderr, drawn_over=sys.stderr.isatty())
    try:
        result = Checker(loaded.recipe, encoder, options, progress).check()
    finally:
        progress.done()
    place = _write_page(loaded, result, encoder, options)
    _show(loaded, result, encoder, place, options)
    refused = ("error", "warning") if options.strict else ("error",)
    return int(any(finding.severity in refused for finding in result.findings))


class Checker:
    """One check: all sources of a recipe, looked at one after the other."""

    def __init__(self, recipe: Recipe, encoder: TextEncoder, options: Options, progress: Progress) -> None:
        self._recipe, self._encoder, self._options, self._progress = recipe, encoder, options, progress
        self._method = build_method(recipe.method)
        self._vocabulary = Vocabulary.of(encoder)
        self._copies = Copies()
        self._fraction = recipe.data.eval.fraction if isinstance(recipe.data.eval, EvalSplit) else 0.0

    def check(self) -> Result:
        """Look at every source; one that cannot be used is a finding, not the end."""
        tallies: list[Tally] = []
        findings: list[Finding] = []
        plans: list[SourcePlan | Unknown] = []
        named = named_sources(self._recipe)
        for number, (split, name, source) in enumerate(named):
            side: Side = "train" if split == "train" else "eval"
            try:
                tally = self._source(side, name, source, (number, len(named)))
            except UserError as error:
                findings.append(about("unreadable-source", name, str(error)))
                plans += [Unknown(f"source {name} cannot be used")] if side == "train" else []
                continue
            tallies.append(tally)
            findings += tally.findings()
            unlearned = Unknown(f"nothing is learned from source {name}")
            plans += [unlearned if tally.refusal else tally.plan] if side == "train" else []
        return self._result(tallies, findings, plans)

    def _result(
        self, tallies: Sequence[Tally], findings: list[Finding], plans: Sequence[SourcePlan | Unknown]
    ) -> Result:
        learned = [tally for tally in tallies if not tally.refusal]
        training = {tally.name: tally for tally in learned if tally.side == "train"}
        duration = plan_duration(self._recipe, plans, {name: tally.stats() for name, tally in training.items()})
        fitted = [length for tally in training.values() for length in tally.fitted]
        fill = estimate_fill(fitted, self._recipe, self._options.seed) if fitted else None
        findings += advise(Overview(self._recipe, learned, duration, fill))
        return Result(self._recipe, self._options.seed, tallies, duration, fill, by_severity(findings))

    def _source(self, side: Side, name: str, source: Source, place: tuple[int, int]) -> Tally:
        index = build_index([source], [name])
        row_format = index.sources[0].format
        refusal = _refusal(row_format, self._recipe.method.type, name)
        overlong = policies(index, self._recipe.data, [source])[0]
        tally = Tally(name, side, describe(side, name, source, index), row_format, index.num_rows(0), overlong, refusal)
        eye = Eye(index, self._recipe, overlong, None if refusal else self._method, self._encoder)
        number, sources = place
        for glimpse in look_at(eye, self._options.rows, self._options.seed):
            tally.add(glimpse, self._vocabulary, self._options.samples)
            self._note(side, glimpse.looked, tally)
            self._progress.update(name, tally.rows, (number + glimpse.share) / sources)
        eye.blocks.close()
        limit = self._options.rows
        tally.complete = limit is None or tally.rows < limit or tally.rows == tally.known_rows
        return tally

    def _note(self, side: Side, looked: Looked, tally: Tally) -> None:
        """Everything there is to say about a row."""
        length = self._recipe.data.sequence_length
        for note in row_notes(looked, tally.row_format, self._vocabulary, length):
            tally.notes.add(looked.row, note)
        if looked.values is not None:
            row_side = self._side(side, looked.values, tally)
            for note in self._copies.add(looked.row, row_side, fingerprint(looked.values, looked.sample)):
                tally.notes.add(looked.row, note)

    def _side(self, side: Side, values: Row, tally: Tally) -> Side:
        """The side of the held-out line that a row is on."""
        if self._fraction and held_out(values, self._fraction):
            tally.held_out += 1
            return "eval"
        return side


def _refusal(row_format: RowFormat, method: str, name: str) -> str:
    """Why a method learns nothing from a source; empty when it does."""
    try:
        require_readable(row_format, method, f"source {name}")
    except UserError as error:
        return str(error)
    return ""


def _write_page(loaded: LoadedRecipe, result: Result, encoder: TextEncoder, options: Options) -> str:
    """Write the page, and say where it is. The run directory may be out of reach from here, which is no failure."""
    recipe = loaded.recipe
    place = options.report or storage.join(recipe.checkpoint.path, recipe.name, CHECK_REPORT)
    page = render_page(result, encoder, loaded.secrets)
    try:
        storage.write_bytes(place, page.encode("utf-8", "replace"), QUICK)
    except FtlaunchError as error:
        if options.report:
            raise
        return f"not written: {error}"
    return place


def _show(loaded: LoadedRecipe, result: Result, encoder: TextEncoder, place: str, options: Options) -> None:
    if options.as_json:
        found = redact_values({**as_json(result), "report": place}, loaded.secrets)
        print(json.dumps(found, indent=2, ensure_ascii=True))
        return
    console = Console()
    for line in result_lines(result, encoder, colours=console.is_terminal):
        line.plain = line.plain.translate(VISIBLE)
        console.print(_redacted(line, loaded.secrets), soft_wrap=True, highlight=False)
    console.print(Text(f"report: {redact(place, loaded.secrets)}"), soft_wrap=True, highlight=False)


def _redacted(line: Text, secrets: Sequence[str]) -> Text:
    """A line without secrets, which paths may hold; a line that holds none keeps its styles."""
    clean = redact(line.plain, secrets)
    return line if clean == line.plain else Text(clean, style=line.style)
