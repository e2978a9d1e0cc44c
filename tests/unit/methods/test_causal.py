"""Batches of causal methods: what each position sees and predicts."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ftlaunch.recipes.methods.base import IGNORED, RowId, Sample
from ftlaunch.recipes.methods.causal import count_targets, lay_out

ROW = RowId("s", "f", 0, 0)


def sample(ids: list[int], supervised: list[bool]) -> Sample:
    return Sample(np.array(ids, dtype=np.int32), np.array(supervised), ROW)


samples = st.lists(
    st.lists(st.tuples(st.integers(1, 99), st.booleans()), min_size=1, max_size=9).map(
        lambda pairs: sample([i for i, _ in pairs], [s for _, s in pairs])
    ),
    max_size=4,
)


@given(st.lists(samples, min_size=1, max_size=4), st.integers(0, 7))
def test_every_supervised_token_is_predicted_once_from_its_own_sample(bins, padding):
    length = max(1, max(sum(len(s) for s in b) for b in bins) + padding)
    batch = lay_out(bins, length)
    assert count_targets(batch) == sum(s.num_targets for b in bins for s in b)
    for b, members in enumerate(bins):
        start = 0
        for member in members:
            stop = start + len(member)
            assert batch.input_ids[b, start:stop].tolist() == member.input_ids.tolist()
            assert batch.position_ids[b, start:stop].tolist() == list(range(len(member)))
            expected = [
                int(t) if s else IGNORED for t, s in zip(member.input_ids[1:], member.supervised[1:], strict=True)
            ]
            assert batch.targets[b, start:stop].tolist() == [*expected, IGNORED]
            start = stop
        assert (batch.targets[b, start:] == IGNORED).all()
        if len(members) > 1 and start < length:
            assert batch.position_ids[b, start] == 0


def test_one_sample_a_sequence_never_restarts_positions():
    batch = lay_out([[sample([5, 6], [True, True])], []], 6)
    assert (batch.position_ids == np.arange(6)).all()
    assert batch.num_tokens == 2
