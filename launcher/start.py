"""`ftlaunch recipe.yaml`: see what is there, decide, hand over to the supervisor, and sum up."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from rich.console import Console

from ..cluster.table import is_submitted
from ..distributed.again import Flags
from ..distributed.checkpoint.layout import open_folder
from ..distributed.indexing import accept_changed_data, index_data
from ..distributed.model_files import find_model, is_hub_id
from ..distributed.run_directory import RunDirectory
from ..recipes.errors import UserError
from ..recipes.load import LoadedRecipe
from ..recipes.redact import dump_recipe, redact
from ..recipes.schema_cluster import RayCluster
from .hardware import Machine, this_machine
from .history import write_report
from .plan_world import WorldPlan, plan_world, world_problems, world_warnings
from .say import say
from .settle import announce, renamed, run_of, settle
from .sum_up import sum_up
from .unknown import Unknown
from .view import make_view

if TYPE_CHECKING:
    from .supervisor import Nodes


def start(loaded: LoadedRecipe, flags: Flags, environ: Mapping[str, str], *, detach: bool = False) -> int:
    """Run a recipe as "Running it again" has it, from here or where it is submitted to; returns the exit code. Raises
    UserError for a refusal. `environ`: of which variables may travel."""
    console, machine = Console(), this_machine()
    config = loaded.recipe.cluster
    world = plan_world(config, machine)
    _look_at(console, loaded, world, machine)
    if is_submitted(config):
        from .submit import submit

        return submit(loaded, flags, environ, console, detach=detach)
    if detach:
        raise UserError(f"--detach: a run on a cluster of type {config.type} lives as long as this command does")

    def find() -> Nodes:
        from .supervisor import find_nodes

        return find_nodes(config, machine)

    return run_on(find, loaded, flags, console)


def run_on(
    find: Callable[[], Nodes],
    loaded: LoadedRecipe,
    flags: Flags,
    console: Console,
    *,
    begun: Callable[[RunDirectory], None] = lambda _run: None,
) -> int:
    """Decide, and train on the nodes that `find` finds; `begun` is told of a run that will train."""
    loaded = renamed(loaded) if flags.fresh else loaded
    run = run_of(loaded)
    decision = settle(run, loaded, flags, console)
    announce(console, decision)
    if not decision.trains:
        sum_up(run, console)
        return 0
    run.check()
    begun(run)
    if flags.accept_changed_data and decision.action != "new":
        accept_changed_data(run)
    if not isinstance(loaded.recipe.cluster, RayCluster):  # whose nodes may see files that this machine does not
        for note in _preflight(loaded, run):
            say(console, f"warning: {note}", "yellow")
    return _train(loaded, run, find, console)


def _preflight(loaded: LoadedRecipe, run: RunDirectory) -> list[str]:
    """Find what is wrong with files that are seen from here, before Ray is started; what became of them since the run
    began. The index it makes is the run's."""
    recipe = loaded.recipe
    if not is_hub_id(recipe.model.path):
        folder = find_model(recipe.model.path)
        if recipe.model.init == "pretrained" and not recipe.model.allow_pickle:
            open_folder(folder.url)
    return index_data(recipe, run, begin=lambda: run.store_recipe(dump_recipe(recipe, loaded.secrets)))


def _train(loaded: LoadedRecipe, run: RunDirectory, find: Callable[[], Nodes], console: Console) -> int:
    from .supervisor import supervise

    nodes = find()
    with make_view(console) as view:
        ending = supervise(loaded, nodes, view)
    if ending.outcome == "failed" and (attempts := run.attempts()):
        # Rank 0 may have been ended before it could say so; if it has, its word stays.
        run.finish_attempt(attempts[-1].number, "failed", ending.message)
    if ending.message:
        failed = ending.outcome == "failed"
        message = redact(ending.message, loaded.secrets)
        say(console, f"error: {message}" if failed else message, "bold red" if failed else "")
    if ending.exit_code == 0:
        sum_up(run, console)
    else:
        say(console, f"what happened so far: {write_report(run, ending.outcome)}", "")
    return ending.exit_code


def _look_at(console: Console, loaded: LoadedRecipe, world: WorldPlan | Unknown, machine: Machine) -> None:
    """Say what is odd about recipe and machine. Raises UserError for a world that is not there."""
    cluster = loaded.recipe.cluster
    if not isinstance(world, Unknown) and (problems := world_problems(cluster, world, machine)):
        raise UserError("\n".join(problems))
    warnings = [] if isinstance(world, Unknown) else world_warnings(cluster, world, machine)
    for warning in [*loaded.warnings, *warnings]:
        say(console, f"warning: {warning}", "yellow")
