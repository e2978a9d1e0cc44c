"""The command line. Parsing only: each command imports what it needs when it runs, so that help is immediate."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from cyclopts import App, CycloptsError, Parameter

from ..recipes.errors import FtlaunchError, UserError
from ..recipes.problems import located
from .arguments import arrange
from .checkpoint_commands import export, import_checkpoint
from .cli_batch import batch
from .cli_nodes import doctor, download
from .cli_recipe import AS_WRITTEN, Overrides, Place, RecipePath, load, may_fork, origins, secrets
from .cli_runs import attach, list_runs, logs, retry, status, stop, verify

HELP = """Fine-tune a language model from one recipe, on one machine or on a cluster.

`ftlaunch recipe.yaml` trains (and continues a run that was interrupted). Values of the recipe can be set behind it: `train.learning_rate=1e-4`.
"""  # noqa: E501 - one paragraph: the help page wraps it


def _version() -> str:
    from importlib.metadata import version

    return version("ftlaunch")


app = App(
    name="ftlaunch",
    help=HELP,
    help_format="markdown",
    version=_version,
    suppress_keyboard_interrupt=False,
    default_parameter=Parameter(negative=()),
    usage="Usage: ftlaunch [OPTIONS] recipe.yaml [key.sub=value …]\n       ftlaunch COMMAND …\n",
)


@app.default
def run(
    recipe: RecipePath,
    /,
    *overrides: Overrides,
    place: Place = AS_WRITTEN,
    fresh: bool = False,
    accept_changes: bool = False,
    accept_changed_data: bool = False,
    detach: bool = False,
) -> int:
    """Train. The same recipe under the same name continues the unfinished run.

    Parameters
    ----------
    fresh
        Begin a new run (NAME-2, NAME-3, …) instead of continuing.
    accept_changes
        Continue although numbers that shape the training were changed.
    accept_changed_data
        Continue with data files as they are now: changed, gone or new. The epoch begins again.
    detach
        Submit the run to its cluster and do not follow it.
    """
    from ..distributed.again import Flags
    from .start import start

    flags = Flags(fresh, accept_changes, accept_changed_data)
    return start(load(recipe, overrides, place), flags, os.environ, detach=detach, kept=may_fork.get())


@app.command
def plan(
    recipe: RecipePath,
    /,
    *overrides: Overrides,
    place: Place = AS_WRITTEN,
    json: bool = False,
    sample: bool = False,
    strict: bool = False,
) -> int:
    """Show what would happen: every value, world, batch, steps, files, memory. Starts nothing.

    Parameters
    ----------
    json
        Print JSON.
    sample
        Tokenise some rows of each source for better estimates of steps and tokens.
    strict
        Fail (exit 1) on anything that cannot be known from here.
    """
    from .plan_view import show_plan

    return show_plan(load(recipe, overrides, place), as_json=json, sample=sample, strict=strict)


@app.command
def check(
    recipe: RecipePath,
    /,
    *overrides: Overrides,
    place: Place = AS_WRITTEN,
    rows: int | Literal["all"] = 1000,
    samples: int = 3,
    seed: int = 0,
    strict: bool = False,
    report: str | None = None,
    json: bool = False,
) -> int:
    """Look at the data: what the model would learn from it, and what is wrong with it.

    Parameters
    ----------
    rows
        Rows of each source to look at, spread over its files; `all`: every one.
    samples
        Rendered samples to show for each source.
    seed
        Which rows are looked at.
    strict
        Fail (exit 1) on warnings too, not only on errors.
    report
        File or URL for the HTML report; by default check.html in the run directory.
    json
        Print JSON.
    """
    from ..recipes.checks import method_reads_format
    from .check import Options, check_data

    if rows != "all" and rows < 1:
        raise UserError(f"--rows {rows}: at least 1, or all")
    options = Options(None if rows == "all" else rows, max(0, samples), seed, strict, report, json)
    # Rows that the method does not learn from are looked at all the same; that it does not is one of the findings.
    return check_data(load(recipe, overrides, place, without=(method_reads_format,)), options)


@app.command
def prepare(recipe: RecipePath, /, *overrides: Overrides, to: str, place: Place = AS_WRITTEN) -> int:
    """Tokenise the data ahead, on CPU nodes, and write the recipe that trains on the result.

    Parameters
    ----------
    to
        Folder or URL for the shards.
    """
    from .prepare import prepare as prepare_data

    # The cluster that prepares is the command line's; the recipe that trains has the one that is written.
    config = load(recipe, overrides, place).recipe.cluster
    kept = [override for override in overrides if not override.startswith("cluster")]
    return prepare_data(load(recipe, kept, AS_WRITTEN), config, to, os.environ)


@app.command
def quickstart(folder: Path = Path("ftlaunch-quickstart"), /) -> int:
    """Train a small model on this machine's own Python files, to see everything work.

    Parameters
    ----------
    folder
        Where data, recipes and runs go.
    """
    from .quickstart import quickstart as run_quickstart

    return run_quickstart(folder, os.environ)


@app.command
def selftest(
    recipe: RecipePath,
    /,
    *overrides: Overrides,
    place: Place = AS_WRITTEN,
    steps: int = 3,
    ranks: int | None = None,
    scale_down: bool = False,
) -> int:
    """Train a few steps in several layouts on this machine, and compare losses and gradient norms. Keeps nothing.

    Parameters
    ----------
    steps
        Optimizer steps of each layout.
    ranks
        Ranks of the largest layout; by default all GPUs, or 4 processes on a CPU.
    scale_down
        Take a small random model of the same kind, short sequences and a small batch.
    """
    from .selftest import Options
    from .selftest import selftest as run_selftest

    for name, value in (("--steps", steps), ("--ranks", 1 if ranks is None else ranks)):
        if value < 1:
            raise UserError(f"{name} {value}: at least 1")
    return run_selftest(load(recipe, overrides, place), Options(steps, ranks, scale_down))


@app.command
def recipes(name: str | None = None, file: Path | None = None, /) -> int:
    """List the recipes that come with ftlaunch; print one; copy one to a file.

    Parameters
    ----------
    name
        Recipe to print.
    file
        Copy it here (never over an existing file).
    """
    from .catalogue import show_recipes

    return show_recipes(name, file)


@app.command
def schema() -> int:
    """Print the recipe's JSON Schema, for editors."""
    from json import dumps

    from ..recipes.json_schema import schema_json

    print(dumps(schema_json(), indent=2))
    return 0


@app.command
def generate(
    run: str, prompt: str, /, *, max_new_tokens: int = 128, temperature: float = 0.0, raw: bool = False
) -> int:
    """Let a trained model answer a prompt.

    Parameters
    ----------
    run
        A run (NAME under ./runs, or a URL), RUN@best, RUN@latest, RUN@STEP, or a checkpoint folder.
    prompt
        What the model is asked.
    max_new_tokens
        Longest answer.
    temperature
        0: the most likely token each time.
    raw
        Give the prompt to the model as it is, without the chat template.
    """
    from .generate import generate as generate_text

    return generate_text(run, prompt, max_new_tokens=max_new_tokens, temperature=temperature, raw=raw)


@app.command
def pull(run: str, folder: Path, /, *, training: bool = False) -> int:
    """Copy a checkpoint to a folder on this machine, and verify it.

    Parameters
    ----------
    run
        RUN, RUN@best, RUN@latest or RUN@STEP.
    folder
        An empty or new folder.
    training
        Copy the optimizer state too.
    """
    from .pull import pull as pull_checkpoint

    return pull_checkpoint(run, folder, training=training)


for command in (verify, status, logs, attach, stop, retry, batch, doctor, download, export, import_checkpoint):
    app.command(command)
app.command(list_runs, name="list")


VERBS = (
    "plan",
    "check",
    "prepare",
    "quickstart",
    "selftest",
    "recipes",
    "schema",
    "generate",
    "pull",
    "verify",
    "export",
    "import-checkpoint",
    "list",
    "status",
    "logs",
    "attach",
    "stop",
    "retry",
    "batch",
    "doctor",
    "download",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code: 0 done, 1 the user can mend it, 2 infrastructure (or a bug),
    130 interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    if argv is None and sys.platform == "linux":
        may_fork.set(True)
    return guarded(lambda: _dispatch(words))


def guarded(command: Callable[[], int]) -> int:
    """What a command returns; what it raises is shown, and becomes an exit code."""
    try:
        return command()
    except FtlaunchError as error:
        return _fail(located(error, origins), error.exit_code)
    except CycloptsError as error:
        return _fail(f"{error}\n`ftlaunch --help` shows how it is used", 1)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:
        # The reader (head, less) went away; Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception:  # the last line of defence: a bug must not look like success
        bug = "this is a bug in ftlaunch; please report it with these lines and what `ftlaunch --version` says"
        return _fail(f"{bug}\n{traceback.format_exc()}", 2)


def _dispatch(words: list[str]) -> int:
    if not words:
        app.help_print([])
        return 1
    arranged = arrange(words, VERBS, Path.cwd())
    code = app(arranged, exit_on_error=False, print_error=False, result_action="return_value")
    return int(code or 0)  # --help and --version give None


def _fail(message: str, code: int) -> int:
    from rich.console import Console
    from rich.text import Text

    from ..recipes.redact import redact

    # Text, not a string: what a message quotes from files must never be taken for markup.
    Console(stderr=True).print(
        Text("error: ", style="bold red") + Text(redact(message, secrets)), soft_wrap=True, highlight=False
    )
    return code


if __name__ == "__main__":
    sys.exit(main())
