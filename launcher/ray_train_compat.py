"""The one touch of Ray Train's inside (as of 2.60): a trainer that starts only the actors a run of ours uses.

By default it also starts one for Ray Data's datasets, of which we have none; every actor is a Python process that
imports ray.train with pandas and ray.data, seconds of processor time that the first step has to wait for.
"""

from __future__ import annotations

from typing import Any

from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer


class LeanTrainer(DataParallelTrainer):  # type: ignore[misc]
    """`DataParallelTrainer` without Ray Data."""

    def _create_default_callbacks(self) -> list[Any]:
        return [
            callback for callback in super()._create_default_callbacks() if not isinstance(callback, DatasetsCallback)
        ]
