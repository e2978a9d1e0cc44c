"""Progress and learning rate: pure functions of what has been done."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftlaunch.distributed.schedule import Extent, is_bounded_by_data, learning_rate, progress
from ftlaunch.recipes.schema import Train

SHAPES = ["constant", "linear", "cosine", "wsd"]
PEAK = 1e-3


def rates(train: Train, count: int) -> list[float]:
    """The rate of every step of a run of `count` equal steps: of 10 tokens and 100 bytes each."""
    extents = [Extent(n, 10 * n, 100 * n) for n in range(count + 1)]
    return [learning_rate(train, before, after, 100 * count) for before, after in itertools.pairwise(extents)]


def train(**settings: Any) -> Train:
    return Train(learning_rate=PEAK, **settings)


lengths = st.integers(1, 200)
ratios = st.floats(0.0, 1.0)


@given(
    st.sampled_from(SHAPES),
    lengths,
    st.one_of(
        st.builds(lambda r: {"warmup_ratio": r}, ratios), st.builds(lambda n: {"warmup_steps": n}, st.integers(0, 50))
    ),
    ratios,
    ratios,
)
def test_every_step_learns_and_none_exceeds_the_peak(shape, count, warmup, decay_ratio, min_lr_ratio):
    settings = train(lr_scheduler=shape, max_steps=count, decay_ratio=decay_ratio, min_lr_ratio=min_lr_ratio, **warmup)
    for rate in rates(settings, count):
        assert 0.0 < rate <= PEAK * (1 + 1e-12)


@given(st.sampled_from(SHAPES), lengths, ratios, ratios, st.integers(0, 50))
def test_up_in_the_warmup_and_never_up_again(shape, count, decay_ratio, min_lr_ratio, warmup_steps):
    settings = train(
        lr_scheduler=shape,
        max_steps=count,
        decay_ratio=decay_ratio,
        min_lr_ratio=min_lr_ratio,
        warmup_steps=warmup_steps,
    )
    every = rates(settings, count)
    warm, rest = every[:warmup_steps], every[warmup_steps:]
    assert warm == sorted(warm)
    assert rest == sorted(rest, reverse=True)
    assert all(rate >= min_lr_ratio * PEAK * (1 - 1e-12) for rate in rest)


@given(st.sampled_from(SHAPES), lengths, ratios, ratios)
def test_a_run_is_measured_in_what_its_length_is_given_in(shape, count, warmup_ratio, decay_ratio):
    """Equal steps: the same rates whether the run ends by steps, by tokens, or with its data."""
    shared = {"lr_scheduler": shape, "warmup_ratio": warmup_ratio, "decay_ratio": decay_ratio}
    by_steps = rates(train(max_steps=count, **shared), count)
    assert rates(train(max_tokens=10 * count, **shared), count) == pytest.approx(by_steps, rel=1e-9)
    assert rates(train(num_epochs=1, **shared), count) == pytest.approx(by_steps, rel=1e-9)


@given(st.floats(0.01, 0.99), st.integers(1, 5))
def test_a_warmup_of_a_share_of_the_run_ends_there(warmup_ratio, factor):
    count = 40 * factor
    every = rates(train(lr_scheduler="constant", max_steps=count, warmup_ratio=warmup_ratio), count)
    for number, rate in enumerate(every):
        middle = (number + 0.5) / count
        assert rate == pytest.approx(PEAK * min(1.0, middle / warmup_ratio), rel=1e-9)


def test_the_shapes_by_hand():
    """Four steps, in whose middle 1/8, 3/8, 5/8 and 7/8 of the run are done."""
    assert rates(train(lr_scheduler="constant", max_steps=4), 4) == [PEAK] * 4
    linear = rates(train(lr_scheduler="linear", max_steps=4, min_lr_ratio=0.2), 4)
    assert linear == pytest.approx([PEAK * value for value in (0.9, 0.7, 0.5, 0.3)])
    cosine = rates(train(lr_scheduler="cosine", max_steps=4), 4)
    assert cosine == pytest.approx([PEAK * value for value in (0.96193977, 0.69134172, 0.30865828, 0.03806023)])
    wsd = rates(train(lr_scheduler="wsd", max_steps=4, decay_ratio=0.5), 4)
    assert wsd == pytest.approx([PEAK * value for value in (1.0, 1.0, 0.75, 0.25)])
    warmup = rates(train(lr_scheduler="constant", max_steps=4, warmup_steps=2), 4)
    assert warmup == pytest.approx([PEAK * value for value in (0.25, 0.75, 1.0, 1.0)])


def test_wsd_falls_over_a_share_of_the_whole_run():
    """Also behind a warm-up: the last fifth of the run, not of what is left of it."""
    every = rates(train(lr_scheduler="wsd", max_steps=10, warmup_ratio=0.5, decay_ratio=0.2), 10)
    assert every == pytest.approx([PEAK * value for value in (0.1, 0.3, 0.5, 0.7, 0.9, 1.0, 1.0, 1.0, 0.75, 0.25)])


def test_progress_and_its_end():
    by_steps, by_tokens, by_data = train(max_steps=4), train(max_tokens=100), train(num_epochs=2)
    assert progress(by_steps, Extent(1, 99, 99), 100) == 0.25
    assert progress(by_tokens, Extent(1, 50, 99), 100) == 0.5
    assert progress(by_tokens, Extent(1, 150, 99), 100) == 1.0
    assert progress(by_data, Extent(1, 50, 75), 100) == 0.75
    assert progress(by_data, Extent(), 0) == 0.0
    assert [is_bounded_by_data(one) for one in (by_steps, by_tokens, by_data, train())] == [False, False, True, True]


def test_steps_that_are_counted():
    assert Extent(3, 100, 1000).after(tokens=7, served_bytes=11) == Extent(4, 107, 1011)
