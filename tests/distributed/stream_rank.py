"""One rank as a process of its own: reads the stream, writes what it saw and its state after every step.

Usage: stream_rank.py RECIPE.json RANK WORLD STREAMS STATES.json|- OUT_FOLDER STEPS|- READER_PROCESSES

The rows that a batch holds are read back from its token ids. With a number of steps it then waits to be killed, having
read ahead; without, a world of one goes on to the end.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
from stream_rows import encode

from ftlaunch.distributed.data.index import Index
from ftlaunch.distributed.data.stream import open_stream
from ftlaunch.recipes.methods.causal import lay_out
from ftlaunch.recipes.schema import Recipe


def seen(step):
    """First token id of every sample in every bin, by the bin's place."""
    found = []
    for micro in step.micro_batches:
        for place, rows in enumerate(micro.batch.rows):
            starts = np.flatnonzero(micro.batch.position_ids[place] == 0)[: len(rows)]
            if len(rows):
                found.append([micro.first_bin, micro.batch.input_ids[place, starts].tolist()])
    return found


def write(path, content):
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content))
    temporary.rename(path)


def main():
    recipe_file, rank, world, streams, states, out, steps, readers = sys.argv[1:]
    stream = open_stream(
        index=Index.load(str(Path(recipe_file).parent), "train"),
        recipe=Recipe.model_validate_json(Path(recipe_file).read_text()),
        world_rank=int(rank),
        world_size=int(world),
        streams=int(streams),
        encode=encode,
        collate=lay_out,
        reader_processes=int(readers),
    )
    if states != "-":
        stream.restore(json.loads(Path(states).read_text()))
    number = 0
    while steps == "-" or number < int(steps):
        step = stream.next_step()
        content = {"bins": seen(step), "served": step.served_bytes, "state": stream.state()}
        write(Path(out) / f"{number:04}-{rank}.json", content)
        number += 1
        if steps == "-" and not step.num_bins:
            break
    if steps != "-":
        while True:
            time.sleep(1)
    stream.close()


if __name__ == "__main__":
    main()
