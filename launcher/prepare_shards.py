"""All shards of a preparation on one cluster, with what is said of them and the recipe that reads them."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..cluster.base import Cluster
from ..distributed import storage
from ..distributed.data.build import build_index
from ..distributed.data.index import Index
from ..distributed.indexing import Indexed, eval_index, train_index
from ..distributed.model_files import find_model
from ..distributed.prepare import Preparation, Prepared, counts_by_source, encoder_digest, prepared_recipe
from ..distributed.row_encoder import RowEncoder, open_encoder, spec_of
from ..recipes.errors import InfrastructureError, UserError
from ..recipes.load import LoadedRecipe
from ..recipes.redact import dump_as_written
from ..recipes.schema import Recipe
from . import units
from .check_progress import Progress
from .package import joined
from .say import say

MANIFEST = "prepared.json"
RECIPE = "recipe.yaml"
MADE = "# Made by `ftlaunch prepare`"
"""Begins a recipe that may be written over."""

NAMED = 8
"""Refused rows that are shown."""


def make_shards(
    loaded: LoadedRecipe, to: str, cluster: Cluster, console: Console, done: Callable[[], None] = lambda: None
) -> None:
    """Tokenise everything that the recipe reads into shards below `to`; `done` is called after each that was not there.
    Then the recipe over them, and their counts, are there too. Raises UserError, InfrastructureError."""
    recipe, began = loaded.recipe, time.monotonic()
    encode = open_encoder(_encoder_spec(recipe))
    preparation = Preparation(
        recipe.data, _index(train_index(recipe.data)), _eval_index(recipe), encoder_digest(encode), to
    )
    storage.check_writable(to, setting="--to")
    made = _make_all(preparation, encode, cluster, done)
    _write_recipe(loaded, preparation)
    _write_manifest(preparation, made)
    _show(made, time.monotonic() - began, console)


def _encoder_spec(recipe: Recipe) -> Any:
    folder = find_model(recipe.model.path, recipe.model.revision, weights=False)
    return spec_of(recipe, folder, now=datetime.now(UTC))


def _index(indexed: Indexed) -> Index:
    return build_index(indexed.sources, indexed.names, keys=indexed.keys)


def _eval_index(recipe: Recipe) -> Index | None:
    indexed = eval_index(recipe.data)
    return _index(indexed) if indexed.sources else None


def _make_all(
    preparation: Preparation, encode: RowEncoder, cluster: Cluster, done: Callable[[], None]
) -> list[Prepared]:
    pieces = preparation.pieces()
    progress = Progress(sys.stderr, drawn_over=sys.stderr.isatty())
    made: list[Prepared] = []
    problems: list[str] = []
    with joined(cluster):
        from .prepare_worker import prepared_pieces

        for answer in prepared_pieces(preparation, encode, pieces):
            if isinstance(answer, Prepared):
                made.append(answer)
                if not answer.was_there:
                    done()
            else:
                problems.append(answer)
            rows = sum(one.counts.get("rows", 0) for one in made)
            progress.update("preparing", rows, (len(made) + len(problems)) / len(pieces))
    progress.done()
    if problems:
        raise UserError("\n".join(sorted(set(problems))))
    if len(made) != len(pieces):
        raise InfrastructureError(f"{len(pieces) - len(made)} of {len(pieces)} pieces were not made; run it again")
    return made


def _write_recipe(loaded: LoadedRecipe, preparation: Preparation) -> None:
    head = f"{MADE} from {Path(loaded.path).name}: the rows below {preparation.to} are tokens.\n"
    text = head + dump_as_written(prepared_recipe(loaded.recipe, preparation), loaded.secrets)
    storage.write_bytes(storage.join(preparation.to, RECIPE), text.encode())


def _write_manifest(preparation: Preparation, made: Sequence[Prepared]) -> None:
    about = {
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "digests": preparation.digests,
        "encoder": preparation.encoder,
        "sequence_length": preparation.data.sequence_length,
        "sources": counts_by_source(list(made)),
        "shards": {one.piece.path: one.nbytes for one in sorted(made, key=lambda one: one.piece.path)},
    }
    storage.write_bytes(storage.join(preparation.to, MANIFEST), json.dumps(about, indent=1).encode())


def _show(made: Sequence[Prepared], seconds: float, console: Console) -> None:
    table = Table("source", "rows", "tokens", "supervised", "refused", "shards", "size")
    for name, counts in counts_by_source(list(made)).items():
        mine = [one for one in made if one.piece.folder == name]
        refused = sum(number for counter, number in counts.items() if counter.startswith("rejected/"))
        numbers = [counts.get("rows", 0), counts.get("tokens", 0), counts.get("supervised", 0), refused, len(mine)]
        table.add_row(name, *map(units.count, numbers), units.size(sum(one.nbytes for one in mine)))
    console.print(table)
    for line in [line for one in made for line in one.rejected][:NAMED]:
        say(console, f"  refused: {line}")
    say(console, f"prepared in {units.duration(seconds)}")
