"""Ray takes its settings from the environment, before it is imported; they are made here and nowhere else."""

from __future__ import annotations

import os
from collections.abc import Mapping

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Relative paths of a recipe mean the folder the user is in, not one that Ray Train makes.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # Ray's advice on its own internals is not for our users.
    "RAY_TRAIN_METRICS_ENABLED": "0",
    # A process that polls for preemption notices of cloud nodes: the launcher looks for them itself.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # Seconds between looks at the ranks: how late an end or a death is noticed. Ray's own is 2.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # What asks Ray something when the run is over must not start another one.
    "RAY_ENABLE_AUTO_CONNECT": "0",
    # Seconds for room to be found, after which the cluster is looked at again. Ray's own is 60.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def configure(settings: Mapping[str, str]) -> None:
    """Set variables for Ray in this process and the ones it starts."""
    os.environ.update(settings)


def quiet() -> None:
    """Settings that every run wants; what the user has set stays."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
