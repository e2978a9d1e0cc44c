"""How long until training has begun? From the command to the end of the first optimizer step, and the light commands.

`ftlaunch recipe.yaml` brings up Ray, starts ranks, opens the run directory, indexes the data and probes the model;
`torchrun` with a plain script forms a process group, loads model, tokenizer and data, and takes one step: the limit.
`ftlaunch's rank under torchrun` is the same program of ours without Ray, and tells its share from Ray's.
"""

from __future__ import annotations

import itertools
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime
from functools import partial
from pathlib import Path

from harness import Table, arguments, interleave, parse, program, run_checked, write_results
from workload import Size, recipe, write_model, write_recipe, write_text

CLAIM = (
    "From the command to the end of the first optimizer step: less than 1.5 times a torchrun script that does the "
    "same. `--help` and `plan` answer in well under a second, without importing torch."
)
SIZE = Size(hidden=256, layers=4, vocab=4096, sequence=256, batch=4)
ROWS = 256


def write_inputs(folder: Path, seed: int) -> None:
    """Model, text, and a recipe of one step."""
    model = write_model(folder / "model", SIZE, seed)
    text = write_text(folder / "text.jsonl", SIZE, ROWS, seed)
    sections = recipe(folder, model, text, SIZE, train={"max_steps": 1, "micro_batch_size": 1})
    write_recipe(folder / "recipe.yaml", sections)


def first_step_s(folder: Path, command: list[str]) -> float:
    """Seconds to the end of our first step: the run then says that it saves."""
    shutil.rmtree(folder / "runs", ignore_errors=True)
    started = time.time()
    run_checked(command, folder)
    lines = (folder / "runs" / "benchmark" / "events.jsonl").read_text().splitlines()
    saving = next(event for event in map(json.loads, lines) if event.get("phase") == "saving")
    return datetime.fromisoformat(saving["time"]).timestamp() - started


def plain_first_step_s(folder: Path, command: list[str]) -> float:
    """The same of the plain script, which writes the time down."""
    started = time.time()
    run_checked(command, folder)
    return float((folder / "first_step").read_text()) - started


def command_s(folder: Path, command: list[str]) -> float:
    """Seconds of a whole command."""
    started = time.perf_counter()
    run_checked(command, folder)
    return time.perf_counter() - started


def launches(folder: Path, ranks: int, *, quick: bool) -> dict[str, Callable[[], float]]:
    """The sides for a number of ranks."""
    torchrun = [program("torchrun"), "--standalone", "--nproc-per-node", str(ranks)]
    plain = str(Path(__file__).resolve().parent / "plain_launch.py")
    ray = [program("ftlaunch"), "recipe.yaml", f"cluster.processes_per_node={ranks}"]
    sides: dict[str, Callable[[], float]] = {
        "torchrun, plain script": partial(plain_first_step_s, folder, [*torchrun, plain, "model", "text.jsonl"]),
        "ftlaunch": partial(first_step_s, folder, ray),
        "ftlaunch's rank under torchrun": partial(
            first_step_s, folder, [*torchrun, "-m", "ftlaunch.distributed.entry", "recipe.yaml"]
        ),
    }
    return dict(itertools.islice(sides.items(), 2)) if quick else sides


def light_commands(folder: Path) -> dict[str, Callable[[], float]]:
    """What must not wait for torch."""
    commands = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "python -c 'import torch'": [sys.executable, "-c", "import torch"],
        "ftlaunch --help": [program("ftlaunch"), "--help"],
        "ftlaunch plan": [program("ftlaunch"), "plan", "recipe.yaml"],
    }
    return {name: partial(command_s, folder, command) for name, command in commands.items()}


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--only", choices=["launch", "light"], help="one half of the benchmark")
    options = parse(parser)
    tables = []
    with tempfile.TemporaryDirectory(prefix="launch-") as place:
        folder = Path(place)
        write_inputs(folder, options.seed)
        for ranks in [] if options.only == "light" else [1] if options.quick else options.ranks:
            title = f"{ranks} rank{'s' if ranks > 1 else ''}"
            values = interleave(launches(folder, ranks, quick=options.quick), options.rounds, title)
            tables.append(Table(f"Command to first step, {title}", "s", "torchrun, plain script", values))
        if options.only != "launch":
            values = interleave(light_commands(folder), options.rounds, "light")
            tables.append(Table("Commands that need no torch", "s", "python -c 'import torch'", values))
    write_results("launch", options, CLAIM, tables, {**asdict(SIZE), "rows": ROWS, "micro_batch_size": 1})


if __name__ == "__main__":
    main()
