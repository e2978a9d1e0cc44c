"""Where there is room for copies, checkpoints are written beside the training; elsewhere not, and that is said."""

from __future__ import annotations

import pytest

from ftlaunch.distributed.save_mode import Room, choose_mode, hosts_of
from ftlaunch.recipes.errors import UserError

GIB = 2**30


def hosts(*rooms):
    return hosts_of([Room(*room) for room in rooms])


def test_ranks_of_a_host_share_its_memory():
    found = hosts(("a", 3 * GIB, 20 * GIB), ("b", GIB, 50 * GIB), ("a", 4 * GIB, 19 * GIB))
    assert found == [("a", 7 * GIB, 19 * GIB), ("b", GIB, 50 * GIB)]


@pytest.mark.parametrize(
    ("wanted", "copies", "mode"),
    [("auto", 5, "async"), ("auto", 6, "sync"), ("async", 6, "async"), ("async", 10, "async"), ("sync", 1, "sync")],
)
def test_half_of_the_free_memory_is_for_copies(wanted, copies, mode):
    chosen, note = choose_mode(wanted, hosts(("a", copies * GIB, 10 * GIB), ("b", GIB, 99 * GIB)))
    assert chosen == mode
    assert ("a: 6.0 GiB of copies, 10.0 GiB free" in note) == (wanted == "auto" and mode == "sync")


def test_async_that_cannot_be_is_refused():
    with pytest.raises(UserError, match=r"checkpoint\.mode: async .*b: 11\.0 GiB of copies, 10\.0 GiB free.* Set sync"):
        choose_mode("async", hosts(("a", GIB, 10 * GIB), ("b", 11 * GIB, 10 * GIB)))
