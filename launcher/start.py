"""`ftlaunch recipe.yaml`: see what is there, decide, hand over to the supervisor, and sum up."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import TYPE_CHECKING

from rich.console import Console

from ..cluster.restarts import AGAIN, ELSEWHERE
from ..cluster.table import is_submitted
from ..distributed.again import Flags
from ..distributed.checkpoint.layout import open_folder
from ..distributed.indexing import accept_changed_data, index_data
from ..distributed.model_files import find_model, is_hub_id
from ..distributed.run_directory import RunDirectory
from ..recipes.errors import InfrastructureError, UserError
from ..recipes.load import LoadedRecipe
from ..recipes.redact import dump_recipe, redact
from ..recipes.schema_cluster import RayCluster
from .budget import Budget, read_failures
from .failure import Failure, Response
from .hardware import Machine, this_machine
from .history import write_report
from .keep import Beginning, keep, new_launch
from .plan_world import WorldPlan, plan_world, world_problems, world_warnings
from .say import say
from .settle import announce, renamed, run_of, settle
from .sum_up import sum_up
from .supervision import SPENT
from .unknown import Unknown
from .view import make_view

if TYPE_CHECKING:
    from .supervisor import Nodes

OLD_RANKS_S = 60.0
"""For ranks of a driver that has died to end; Ray ends them within some seconds."""

POLL_S = 0.1


def start(
    loaded: LoadedRecipe, flags: Flags, environ: Mapping[str, str], *, detach: bool = False, kept: bool = False
) -> int:
    """Run a recipe as "Running it again" has it, from here or where it is submitted to; returns the exit code. Raises
    UserError for a refusal. `environ`: of which variables may travel. `kept`: what drives the run gets a process of its
    own, and is started again when it dies; this call then returns in both."""
    console, machine = Console(), this_machine()
    config = loaded.recipe.cluster
    world = plan_world(config, machine)
    _look_at(console, loaded, world, machine)
    if is_submitted(config):
        from .submit import submit

        return submit(loaded, flags, environ, console, detach=detach)
    if detach:
        raise UserError(f"--detach: a run on a cluster of type {config.type} lives as long as this command does")
    chosen = renamed(loaded) if flags.fresh else loaded

    def drive(beginning: Beginning) -> int:
        def find() -> Nodes:
            from .supervisor import find_nodes

            return find_nodes(config, machine, beginning.launch)

        return run_on(find, chosen, flags, console, beginning)

    return keep(drive) if kept else drive(Beginning(new_launch()))


def run_on(
    find: Callable[[], Nodes],
    loaded: LoadedRecipe,
    flags: Flags,
    console: Console,
    beginning: Beginning,
    *,
    begun: Callable[[RunDirectory], None] = lambda _run: None,
) -> int:
    """Decide, and train on the nodes that `find` finds; `begun` is told of a run that will train. Returns the exit
    code; AGAIN asks to be started again, ELSEWHERE on other nodes."""
    run = run_of(loaded)
    takes_over = beginning.again is not None
    if takes_over:
        _take_over(run, loaded, beginning, console)
        flags = Flags(accept_changes=flags.accept_changes)  # changed data has been accepted, and that counts once
    decision = settle(run, loaded, flags, console, takes_over=takes_over)
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
    return _train(loaded, run, find, console, beginning)


def _take_over(run: RunDirectory, loaded: LoadedRecipe, beginning: Beginning, console: Console) -> None:
    """From a driver that has died. Raises InfrastructureError where that has happened too often."""
    # Its ranks may save once more before they end: what is said, and kept, of the newest checkpoint is to be true.
    deadline_s = time.monotonic() + OLD_RANKS_S
    while (alive := run.live_attempt()) and alive.process.is_here() and time.monotonic() < deadline_s:
        time.sleep(POLL_S)
    if beginning.again:
        response: Response = "moved" if _is_counted(run, beginning.launch) else "again"
        _spend(run, loaded, beginning, Failure("driver", response, beginning.again), console)


def _is_counted(run: RunDirectory, launch: str) -> bool:
    """Whether what has ended a driver was counted before, as the end of ranks that have not been started again since:
    when a node is lost, they notice first, and who looks after the job last."""
    failures = [entry for entry in read_failures(run) if entry.launch == launch]
    attempts = run.attempts()
    if not failures or not attempts or failures[-1].by != "ranks":
        return False
    return datetime.fromisoformat(failures[-1].at) >= datetime.fromisoformat(attempts[-1].started_at)


def _spend(run: RunDirectory, loaded: LoadedRecipe, beginning: Beginning, failure: Failure, console: Console) -> None:
    """Say that the driver is started again, or raise InfrastructureError where the budget is spent."""
    account = Budget(run, beginning.launch, loaded.recipe.cluster.max_restarts).spend(failure, "driver")
    if account.is_spent:
        raise InfrastructureError(f"{failure}; the run is not started again: {SPENT}")
    text = f"warning: {failure}; it is started again, {account.where} (restart {account.used} of {account.limit})"
    say(console, text, "yellow")


def _preflight(loaded: LoadedRecipe, run: RunDirectory) -> list[str]:
    """Find what is wrong with files that are seen from here, before Ray is started; what became of them since the run
    began. The index it makes is the run's."""
    recipe = loaded.recipe
    if not is_hub_id(recipe.model.path):
        folder = find_model(recipe.model.path)
        if recipe.model.init == "pretrained" and not recipe.model.allow_pickle:
            open_folder(folder.url)
    return index_data(recipe, run, begin=lambda: run.store_recipe(dump_recipe(recipe, loaded.secrets)))


def _train(
    loaded: LoadedRecipe, run: RunDirectory, find: Callable[[], Nodes], console: Console, beginning: Beginning
) -> int:
    from .doctor.preflight import UnfitNodes
    from .supervisor import ClusterLost, supervise

    try:
        nodes = find()
        with make_view(console) as view:
            ending = supervise(loaded, nodes, view)
    except ClusterLost as error:
        if not beginning.is_kept:
            raise
        _spend(run, loaded, beginning, Failure("cluster", "again", str(error)), console)
        return AGAIN
    except UnfitNodes as error:
        if beginning.give_back is None:
            raise
        _spend(run, loaded, beginning, Failure("unfit", "elsewhere", error.says), console)
        beginning.give_back(error.addresses)
        return ELSEWHERE
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
