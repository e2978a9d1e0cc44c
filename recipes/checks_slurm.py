"""What a `slurm` section may not say: options of sbatch that have a key, or that only ftlaunch can choose."""

from __future__ import annotations

from collections.abc import Iterator

from .problems import Problem
from .schema import Recipe
from .schema_cluster import SlurmCluster

KEYS = {
    "partition": "cluster.partition",
    "account": "cluster.account",
    "qos": "cluster.qos",
    "constraint": "cluster.constraint",
    "reservation": "cluster.reservation",
    "gres": "cluster.gres",
    "time": "cluster.time",
    "cpus-per-task": "cluster.cpus_per_node",
    "mem": "cluster.memory",
    "mail-user": "cluster.mail_user",
    "mail-type": "cluster.mail_types",
    "nodes": "cluster.nodes",
    "gpus-per-node": "cluster.gpus_per_node",
    "gpus": "cluster.gpus_per_node",
    "exclusive": "cluster.exclusive",
    "requeue": "cluster.requeue",
    "no-requeue": "cluster.requeue",
    "signal": "cluster.leave_before_s",
}
"""Option -> the key that says it."""

OURS = frozenset(
    {
        *("array", "chdir", "clusters", "error", "export", "export-file", "gpus-per-task", "help"),
        *("input", "job-name", "ntasks", "ntasks-per-core", "ntasks-per-gpu", "ntasks-per-node", "open-mode", "output"),
        *("overcommit", "parsable", "test-only", "usage", "version", "wait", "wrap"),
    }
)
"""Those that contradict how the job runs."""


def options_of_slurm(recipe: Recipe) -> Iterator[Problem]:
    """Raw options that are said elsewhere, or that only ftlaunch can choose."""
    cluster = recipe.cluster
    if not isinstance(cluster, SlurmCluster):
        return
    for number, option in enumerate(cluster.options):
        name = option.removeprefix("--").partition("=")[0]
        if name in KEYS:
            yield Problem(f"cluster.options.{number}", f"--{name} has a key of its own", f"set {KEYS[name]}")
        elif name in OURS:
            yield Problem(f"cluster.options.{number}", f"--{name} is ftlaunch's own to choose", "leave it out")
