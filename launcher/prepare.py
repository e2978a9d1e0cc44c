"""`ftlaunch prepare recipe.yaml --to PLACE`: rows tokenised on CPU nodes with Ray Data, for GPU nodes that never do."""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.table import Table
from ruamel.yaml import YAML

from ..cluster.base import Demand
from ..cluster.table import build_cluster, is_submitted
from ..distributed import storage
from ..distributed.data.build import build_index
from ..distributed.data.index import Index
from ..distributed.indexing import Indexed, eval_index, train_index
from ..distributed.model_files import find_model
from ..distributed.prepare import Preparation, Prepared, counts_by_source, encoder_digest, prepared_recipe
from ..distributed.row_encoder import RowEncoder, open_encoder, spec_of
from ..recipes.errors import InfrastructureError, UserError
from ..recipes.load import LoadedRecipe
from ..recipes.redact import redact_values
from ..recipes.schema import Recipe
from ..recipes.schema_cluster import LocalCluster
from . import units
from .check_progress import Progress
from .hardware import this_machine
from .package import write_package
from .plan_world import nodes_of

MANIFEST = "prepared.json"
RECIPE = "recipe.yaml"
MADE = "# Made by `ftlaunch prepare`"
"""Begins a recipe that may be written over."""

NAMED = 8
"""Refused rows that are shown."""


def prepare(loaded: LoadedRecipe, to: str) -> int:
    """Tokenise everything that the recipe reads into shards below `to`, and write the recipe that trains on them.

    What is there already from an earlier, broken-off try is kept. Raises UserError, InfrastructureError."""
    recipe, began = loaded.recipe, time.monotonic()
    if storage.is_local(to):
        to = str(storage.local_path(to).absolute())  # workers have folders of their own
    _refuse_other_file(_beside(loaded))
    encode = open_encoder(_encoder_spec(recipe))
    preparation = Preparation(
        recipe.data, _index(train_index(recipe.data)), _eval_index(recipe), encoder_digest(encode), to
    )
    storage.check_writable(to, setting="--to")
    done = _prepare_all(loaded, preparation, encode)
    written = _write_recipe(loaded, preparation)
    _write_manifest(loaded, preparation, done)
    _show(done, time.monotonic() - began, written)
    return 0


def _encoder_spec(recipe: Recipe) -> Any:
    folder = find_model(recipe.model.path, recipe.model.revision, weights=False)
    return spec_of(recipe, folder, now=datetime.now(UTC))


def _index(indexed: Indexed) -> Index:
    return build_index(indexed.sources, indexed.names, keys=indexed.keys)


def _eval_index(recipe: Recipe) -> Index | None:
    indexed = eval_index(recipe.data)
    return _index(indexed) if indexed.sources else None


def _prepare_all(loaded: LoadedRecipe, preparation: Preparation, encode: RowEncoder) -> list[Prepared]:
    pieces = preparation.pieces()
    progress = Progress(sys.stderr, drawn_over=sys.stderr.isatty())
    done: list[Prepared] = []
    problems: list[str] = []
    with _cluster(loaded):
        from .prepare_worker import prepared_pieces

        for answer in prepared_pieces(preparation, encode, pieces):
            if isinstance(answer, Prepared):
                done.append(answer)
            else:
                problems.append(answer)
            rows = sum(one.counts.get("rows", 0) for one in done)
            progress.update("preparing", rows, (len(done) + len(problems)) / len(pieces))
    progress.done()
    if problems:
        raise UserError("\n".join(sorted(set(problems))))
    if len(done) != len(pieces):
        raise InfrastructureError(f"{len(pieces) - len(done)} of {len(pieces)} pieces were not made; run it again")
    return done


@contextmanager
def _cluster(loaded: LoadedRecipe) -> Iterator[None]:
    """Ray, on every core of this machine or where the recipe says; no GPUs are asked for."""
    cores = this_machine().cores
    config = loaded.recipe.cluster
    if is_submitted(config):
        raise UserError(
            "ftlaunch prepare runs on this machine or on a cluster of type ray: give --cluster, or run it on one of "
            "the hosts with cluster.type=local"
        )
    nodes = 1 if isinstance(config, LocalCluster) else nodes_of(config)
    cluster = build_cluster(config, Demand(nodes=nodes, ranks=cores, uses_gpus=False, cpus_per_rank=1))
    with TemporaryDirectory(prefix="ftlaunch-code-") as folder:
        try:
            cluster.up(lambda: write_package(Path(folder)))
            yield
        finally:
            cluster.down()


def _write_recipe(loaded: LoadedRecipe, preparation: Preparation) -> Path:
    """The recipe over the shards: in their folder, and beside the one it was made of. Returns the latter."""
    values = redact_values(prepared_recipe(loaded.recipe, preparation), loaded.secrets)
    text = io.StringIO()
    text.write(f"{MADE} from {Path(loaded.path).name}: the rows below {preparation.to} are tokens.\n")
    YAML().dump(values, text)
    storage.write_bytes(storage.join(preparation.to, RECIPE), text.getvalue().encode())
    _beside(loaded).write_text(text.getvalue())
    return _beside(loaded)


def _beside(loaded: LoadedRecipe) -> Path:
    return Path(loaded.path).with_suffix(".prepared.yaml")


def _refuse_other_file(path: Path) -> None:
    """Only a recipe that was made here is written over."""
    if path.exists() and not path.read_text().startswith(MADE):
        raise UserError(f"{path} is there, and `ftlaunch prepare` did not make it. Move it, or rename the recipe.")


def _write_manifest(loaded: LoadedRecipe, preparation: Preparation, done: Sequence[Prepared]) -> None:
    about = {
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "digests": preparation.digests,
        "encoder": preparation.encoder,
        "sequence_length": preparation.data.sequence_length,
        "sources": counts_by_source(list(done)),
        "shards": {one.piece.path: one.nbytes for one in sorted(done, key=lambda one: one.piece.path)},
    }
    storage.write_bytes(storage.join(preparation.to, MANIFEST), json.dumps(about, indent=1).encode())


def _show(done: Sequence[Prepared], seconds: float, recipe: Path) -> None:
    console = Console()
    table = Table("source", "rows", "tokens", "supervised", "refused", "shards", "size")
    for name, counts in counts_by_source(list(done)).items():
        mine = [one for one in done if one.piece.folder == name]
        refused = sum(number for counter, number in counts.items() if counter.startswith("rejected/"))
        numbers = [counts.get("rows", 0), counts.get("tokens", 0), counts.get("supervised", 0), refused, len(mine)]
        table.add_row(name, *map(units.count, numbers), units.size(sum(one.nbytes for one in mine)))
    console.print(table)
    for line in [line for one in done for line in one.rejected][:NAMED]:
        console.print(f"  refused: {line}", markup=False, highlight=False, soft_wrap=True)
    console.print(
        f"prepared in {units.duration(seconds)}; train on it: ftlaunch {recipe}", markup=False, soft_wrap=True
    )
