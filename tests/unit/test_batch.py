"""A batch on its way to the model."""

from __future__ import annotations

import numpy as np
import torch

from ftlaunch.distributed.batch import on_device
from ftlaunch.recipes.methods.base import RowId, Sample
from ftlaunch.recipes.methods.causal import lay_out


def sample(length: int) -> Sample:
    ids = np.arange(1, length + 1, dtype=np.int32)
    return Sample(ids, np.ones(length, np.bool_), RowId("s", "f", 0, 0))


def test_positions_go_along_only_where_they_restart():
    packed, single = [sample(3), sample(4)], [sample(5)]
    tensors = on_device(lay_out([single, packed], 8), "cpu")
    assert tensors["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 0, 1, 2, 3, 0]]
    tensors = on_device(lay_out([single, [], single], 8), "cpu")
    assert set(tensors) == {"input_ids", "targets"}
    assert all(tensor.shape == (3, 8) and tensor.dtype == torch.int64 for tensor in tensors.values())
