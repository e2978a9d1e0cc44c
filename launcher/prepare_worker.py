"""Pieces prepared by Ray Data's tasks, wherever the cluster has cores."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import ray.data

from ..distributed.prepare import Piece, Preparation, Prepared, prepare_piece
from ..distributed.row_encoder import RowEncoder
from ..recipes.errors import UserError


def prepared_pieces(preparation: Preparation, encode: RowEncoder, pieces: Sequence[Piece]) -> Iterator[Prepared | str]:
    """What became of the pieces as they are done, in no order: made, or what the user must mend."""

    def make(row: dict[str, Any]) -> dict[str, Any]:
        # What it closes over is unpickled, and the tokenizer loaded, once for each of Ray's workers. A mistake in the
        # data is an answer: Ray would try the piece again, and show a traceback.
        try:
            return {"answer": prepare_piece(preparation, row["item"], encode)}
        except UserError as error:
            return {"answer": str(error)}

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    made = ray.data.from_items(list(pieces), override_num_blocks=len(pieces)).map(make, num_cpus=1)
    for row in made.iter_rows():
        yield row["answer"]
