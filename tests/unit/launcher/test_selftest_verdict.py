"""Which differences between layouts are mistakes, and what is said about them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ftlaunch.launcher.selftest_verdict import Circumstances, Curve, Differing, Verdict, explain, judge

REFERENCE = Curve(losses=(5.0, 4.0, 3.0), grad_norms=(2.0, 1.0, 0.5), tokens=(100.0, 90.0, 95.0))


def off(what: str, step: int, relative: float) -> Curve:
    """The reference with one number of one step that much off."""
    values = list(getattr(REFERENCE, what))
    values[step - 1] *= 1 + relative
    return replace(REFERENCE, **{what: tuple(values)})


@pytest.mark.parametrize(
    ("curve", "about", "outcome", "where"),
    [
        (REFERENCE, {}, "agrees", ""),
        (off("losses", 1, 9e-6), {}, "agrees", ""),
        (off("losses", 1, -1.1e-5), {}, "differs", "the loss of step 1 is 1.1e-05 off (tolerance 1e-05)"),
        (off("losses", 2, 1.1e-5), {}, "agrees", ""),
        (off("losses", 3, 2.1e-4), {}, "differs", "the loss of step 3 is 2.1e-04 off (tolerance 0.0002)"),
        (off("grad_norms", 1, 1.1e-5), {}, "differs", "the gradient norm of step 1"),
        (off("grad_norms", 2, -1.9e-4), {}, "agrees", ""),
        (off("grad_norms", 2, -2.1e-4), {}, "differs", "the gradient norm of step 2"),
        (off("losses", 2, float("nan")), {}, "differs", "the loss of step 2 is inf off"),
        (off("losses", 2, float("inf")), {}, "differs", "the loss of step 2 is inf off"),
        # The optimizer has done nothing before the first step's numbers, whatever it is.
        (off("losses", 2, 0.1), {"layout_bound": True}, "layout-bound", ""),
        (off("losses", 1, 1.1e-5), {"layout_bound": True}, "differs", "the loss of step 1"),
        (off("grad_norms", 1, 1.1e-5), {"layout_bound": True}, "differs", "the gradient norm of step 1"),
        (REFERENCE, {"layout_bound": True}, "layout-bound", ""),
        (off("losses", 1, 0.1), {"other_dropout": True}, "other dropout", ""),
        # Rows are the same whatever is dropped.
        (
            off("tokens", 2, 0.1),
            {"other_dropout": True},
            "differs",
            "step 2 learns from 99 tokens, the reference's from",
        ),
        (off("tokens", 1, -0.5), {}, "differs", "step 1 learns from 50 tokens"),
        (Curve((5.0,), (2.0,), (100.0,)), {}, "differs", "1 steps, where the reference took 3"),
    ],
)
def test_verdict(curve, about, outcome, where):
    verdict = judge(curve, REFERENCE, **about)
    assert verdict.outcome == outcome
    assert where in verdict.where and bool(where) == bool(verdict.where)


def test_the_largest_differences_of_all_steps_are_shown():
    curve = Curve((5.0, 4.0004, 3.0), (2.0, 1.0, 0.50005), REFERENCE.tokens)
    verdict = judge(curve, REFERENCE)
    assert verdict.loss == pytest.approx(1e-4) and verdict.grad_norm == pytest.approx(1e-4)


def test_a_loss_of_zero_is_compared_too():
    zero = Curve((0.0,), (0.0,), (3.0,))
    assert judge(zero, zero).outcome == "agrees"
    assert judge(replace(zero, losses=(1e-3,)), zero).outcome == "differs"


def differing(curve: Curve, ranks: int = 3, micro_batch_size: int = 2) -> Differing:
    return Differing("ddp", ranks, micro_batch_size, curve, REFERENCE, judge(curve, REFERENCE))


def scaled(factor: float) -> Curve:
    return replace(REFERENCE, grad_norms=tuple(norm * factor for norm in REFERENCE.grad_norms))


@pytest.mark.parametrize(
    ("curve", "about", "meaning"),
    [
        (off("losses", 1, 1e-3), Circumstances(), "which sequences share a micro-batch"),
        (scaled(1 / 3), Circumstances(), "0.3333 times the reference's, which is the number of ranks (3)"),
        (scaled(3), Circumstances(), "3 times the reference's, which is the number of ranks (3)"),
        (scaled(0.5), Circumstances(), "which is the micro-batch size (2)"),
        (scaled(0.9), Circumstances(), "0.9 times the reference's: a sum over ranks or micro-batches is incomplete"),
        (off("losses", 2, 1e-3), Circumstances(), "clipping, weight decay or the update"),
        (off("tokens", 2, 1e-3), Circumstances(), "did not train on the same rows"),
        (off("losses", 1, 1e-3), Circumstances(dropout=True), "dropout is on"),
        (off("losses", 1, 1e-3), Circumstances(experts=True), "a router that is nearly undecided"),
        (off("losses", 2, 1e-3), Circumstances(only_bfloat16=True), "rounded elsewhere than under fsdp"),
        (
            off("losses", 1, 1e-3),
            Circumstances(agreeing_sizes=frozenset({1, 4})),
            "no layout with micro-batches of 2 agrees, those of 1, 4 do",
        ),
    ],
)
def test_what_it_may_mean(curve, about, meaning):
    assert any(meaning in line for line in explain([differing(curve)], about)), explain([differing(curve)], about)


def test_meanings_are_said_once_and_others_not_at_all():
    lines = explain([differing(off("losses", 1, 1e-3)), differing(off("losses", 1, 2e-3))], Circumstances())
    assert len(lines) == 1
    sizes = Circumstances(agreeing_sizes=frozenset({2}))
    assert len(explain([differing(off("losses", 1, 1e-3))], sizes)) == 1, "others of this size agree"


def test_a_verdict_is_plain_data():
    assert judge(REFERENCE, REFERENCE) == Verdict("agrees", 0.0, 0.0)
