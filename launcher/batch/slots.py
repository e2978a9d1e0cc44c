"""Which GPUs of this machine each of several runs at once may use. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...recipes.schema_cluster import LocalCluster
from ..hardware import Machine
from ..plan_world import plan_world
from ..unknown import Unknown
from .members import Member

VISIBLE = "CUDA_VISIBLE_DEVICES"


def make_slots(
    members: Sequence[Member], at_once: int, machine: Machine, visible: str | None, problems: list[str]
) -> list[dict[str, str]]:
    """Variables of each place in which runs take turns. Runs on this machine's GPUs share them out; what they would
    take of each other is added to `problems`."""
    needed = max((_gpus(member, machine) for member in members), default=0)
    if at_once == 1 or not needed:
        return [{} for _ in range(at_once)]
    names = visible.split(",") if visible else [str(number) for number in range(machine.gpus)]
    if needed * at_once > machine.gpus:
        problems.append(
            f"--at-once {at_once}: runs of {needed} GPUs each, and this machine has {machine.gpus}. Give each fewer "
            f"(--gpus-per-node {max(1, machine.gpus // at_once)}), or run fewer at once."
        )
    return [{VISIBLE: ",".join(names[slot * needed : (slot + 1) * needed])} for slot in range(at_once)]


def _gpus(member: Member, machine: Machine) -> int:
    """GPUs of this machine that a run takes."""
    cluster = member.loaded.recipe.cluster
    world = plan_world(cluster, machine)
    if not isinstance(cluster, LocalCluster) or isinstance(world, Unknown) or world.device == "cpu":
        return 0
    return world.ranks


def with_slot(environ: Mapping[str, str], slot: Mapping[str, str]) -> dict[str, str]:
    """The variables of a run."""
    return {**environ, **slot}
