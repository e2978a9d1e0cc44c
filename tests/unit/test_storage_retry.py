"""How long and how hard a store is asked again, without real time."""

from __future__ import annotations

import random
import threading

import pytest

from ftlaunch.distributed import storage, storage_retry, storage_throttle
from ftlaunch.distributed.storage_throttle import Gate
from ftlaunch.recipes.errors import InfrastructureError


def test_retry_after_is_kept_as_seconds_and_as_a_date():
    assert storage_retry.retry_after_s({"Retry-After": "7"}, 0.0) == 7.0
    assert storage_retry.retry_after_s({"retry-after": "Thu, 01 Jan 1970 00:00:09 GMT"}, 4.0) == 5.0
    assert storage_retry.retry_after_s({"Retry-After": "soon"}, 0.0) == 0.0
    assert storage_retry.retry_after_s({}, 0.0) == 0.0


def test_the_total_time_of_a_request_is_bounded():
    now = [0.0]
    policy = storage_retry.RetryPolicy(attempts=100, total_s=50.0, clock=lambda: now[0], sleep=lambda _: None)

    def call():
        now[0] += 20.0
        raise TimeoutError

    with pytest.raises(InfrastructureError, match="tried 3 times"):
        storage.retrying("read", "s3://slow/k", call, policy)


def test_a_store_that_is_gone_for_a_minute_is_waited_out():
    """Waits are random: of 300 outages few last longer than they are waited for (1 % would be 3, by chance up to 9)."""
    rng = random.Random(0)
    policy = storage_retry.RetryPolicy(random=rng.random)
    waits = [sum(policy.wait_s(attempt) for attempt in range(policy.attempts - 1)) for _ in range(300)]
    assert sum(wait < 60.0 for wait in waits) <= 9
    assert max(waits) < policy.total_s


def test_a_gate_halves_once_per_calm_time_and_grows_again():
    now, slept = [0.0], []
    gate = Gate(16, clock=lambda: now[0], sleep=lambda s: (slept.append(s), now.__setitem__(0, now[0] + s)))
    for _ in range(10):
        gate.slow_down(0.0)
    assert gate.limit == 8.0
    now[0] += 2.0
    gate.slow_down(5.0)
    assert gate.limit == 4.0
    with gate.slot():
        assert slept == [5.0]
    for _ in range(200):
        gate.succeeded()
    assert gate.limit == 16.0


def test_no_more_requests_than_the_gate_has_places():
    gate = Gate(3)
    busy, most, lock = [0], [0], threading.Lock()

    def work():
        with gate.slot():
            with lock:
                busy[0] += 1
                most[0] = max(most[0], busy[0])
            threading.Event().wait(0.002)
            with lock:
                busy[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(12)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert most[0] == 3


def test_a_store_where_most_requests_fail_uses_its_budget_up(monkeypatch):
    monkeypatch.setattr(storage_throttle, "RETRY_BUDGET", 5)
    gate = Gate()
    assert [gate.failed("x") for _ in range(5)] == [True] * 4 + [False]
    gate.succeeded()
    gate.succeeded()
    assert gate.failed("x")
