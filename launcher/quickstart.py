"""`ftlaunch quickstart`: the main job on real input that every machine has, start to end.

A tokenizer and a small base model are trained on Python's own source files, the base is fine-tuned on a task, and a
table says what that gained and what it cost. The folder keeps the recipes, for the user to go on from.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.text import Text

from ..distributed.again import Flags
from ..distributed.checkpoint.commit import latest
from ..distributed.run_directory import RunDirectory
from ..recipes.errors import InfrastructureError, UserError
from ..recipes.json_schema import schema_json
from ..recipes.load import load_recipe
from . import quickstart_data as data
from .history import read_record
from .quickstart_model import CONFIG, VOCABULARY, build_model_folder
from .quickstart_table import Outcome, Side, show_outcome
from .record import before_and_after
from .start import start

SEQUENCE_LENGTH = 256
BASE_STEPS = 1_200
TUNED_STEPS = 800
"""Together about four minutes on two processor cores."""
NUM_WRITTEN = 24
"""Held-out rows that both models answer."""


def quickstart(folder: Path, environ: Mapping[str, str]) -> int:
    """Run the whole of it in `folder`; returns the exit code. A second call answers from what is there, `environ`
    fills variables that the user has written into the recipes."""
    return run(folder, Console(), environ)


def run(folder: str | Path, console: Console, environ: Mapping[str, str]) -> int:
    """As `quickstart`, on a console of the caller's."""
    place = Path(folder).absolute()
    prepare(place, console)
    for number, (name, what) in enumerate(TRAINING.items(), start=2):
        say(console, f"{number} of 4: {what} ({name}.yaml)")
        code = start(load_recipe(place / f"{name}.yaml", environ=environ), Flags(), environ)
        if code != 0:
            return code
    say(console, "4 of 4: comparing both models on files that neither has seen")
    show_outcome(compare(place), shown_path(place), console)
    return 0


TRAINING = {
    "base": "training a base model from random weights, on raw text, on two ranks",
    "tuned": "fine-tuning it on the task, with replay, sharded over two ranks",
}


def say(console: Console, line: str) -> None:
    """The heading of a phase."""
    console.print(Text(f"\n── {line}", style="bold"), soft_wrap=True, highlight=False)


def prepare(place: Path, console: Console) -> None:
    """Data, tokenizer, model shape and recipes; what is there already stays as it is."""
    say(console, "1 of 4: making data, a tokenizer and two recipes from Python's standard library")
    try:
        place.mkdir(parents=True, exist_ok=True)
        counts = data.build_data(place / "data")
        build_model_folder(place / "model", data.read_texts(place / "data"))
        write_recipes(place)
    except OSError as error:
        raise UserError(f"{place} cannot be written: {error}. Name another folder: ftlaunch quickstart DIR") from error
    for line in describe(counts):
        console.print(Text(line), soft_wrap=True, highlight=False)


def describe(counts: data.Counts) -> list[str]:
    """What the data is, in words."""
    return [
        f"Python {counts.python}: {counts.train_files} files to learn from, {counts.heldout_files} others held out",
        f"raw text: {counts.train_text} pages, {counts.heldout_text} held out (parquet)",
        f"task, a function's docstring and names -> its signature: {counts.train_pairs} pairs, "
        f"{counts.heldout_pairs} held out, no docstring twice (jsonl.gz)",
        f"model: Llama type, {CONFIG['num_hidden_layers']} layers of {CONFIG['hidden_size']}, "
        f"vocabulary {VOCABULARY} (byte-level BPE)",
    ]


def write_recipes(place: Path) -> None:
    """Both recipes, and the schema that lets editors complete them. A recipe that is there is the user's."""
    for name in TRAINING:
        recipe = place / f"{name}.yaml"
        if not recipe.exists():
            recipe.write_text(render_recipe(name, place))
    (place / "recipe.schema.json").write_text(json.dumps(schema_json(), indent=2) + "\n")


def render_recipe(name: str, place: Path) -> str:
    """A recipe's text, with absolute paths, so that it works from any folder."""
    from importlib.resources import files

    from jinja2 import Environment, StrictUndefined

    template = files("ftlaunch.launcher").joinpath(f"quickstart_{name}.yaml.j2").read_text(encoding="utf-8")
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)  # noqa: S701 - YAML
    return environment.from_string(template).render(
        # A JSON string is a YAML string, whatever the folder is called.
        path=lambda relative: json.dumps(f"{place.as_posix()}/{relative}", ensure_ascii=False),
        sequence_length=SEQUENCE_LENGTH,
        base_steps=BASE_STEPS,
        tuned_steps=TUNED_STEPS,
    )


def compare(place: Path) -> Outcome:
    """The table's figures. Losses are those the tuned run measured, at its start (the base) and at its end."""
    from .quickstart_probe import probe

    rows = data.read_jsonl_gz(place / "data/task/heldout.jsonl.gz")
    losses = before_and_after(read_record(RunDirectory(str(place / "runs/tuned"))))
    probes = {name: probe(newest_checkpoint(place / "runs" / name), rows, NUM_WRITTEN) for name in TRAINING}
    sides = [
        Side(
            task_loss=losses["task/loss"][index],
            general_loss=losses["general/loss"][index],
            reloaded_loss=probes[name].loss,
            shuffled_loss=probes[name].shuffled_loss,
            parsing_share=probes[name].parsing_share,
            written=probes[name].written,
        )
        for index, name in enumerate(TRAINING)
    ]
    return Outcome(base=sides[0], tuned=sides[1], rows=tuple(rows[:NUM_WRITTEN]))


def newest_checkpoint(run_folder: Path) -> str:
    """The folder of a run's newest committed checkpoint."""
    commit = latest(str(run_folder), lambda _line: None)
    if commit is None:
        raise InfrastructureError(f"{run_folder} has no checkpoint, although its run ended well")
    return str(run_folder / commit.directory)


def shown_path(place: Path) -> str:
    """A folder as the user would type it from here."""
    here = Path.cwd()
    return str(place.relative_to(here)) if place.is_relative_to(here) and place != here else str(place)
