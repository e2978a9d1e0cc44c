"""Stacks of ranks as they are taken while they hang."""

from __future__ import annotations

from ftlaunch.launcher.stacks import TRAINING, Call, Stack

C10D = "/lib/torch/distributed/distributed_c10d.py"
OURS = "/lib/ftlaunch/distributed"


def stack(*calls: tuple[str, int, str]) -> list[Stack]:
    return [
        Stack(f"{TRAINING}(train)", tuple(Call(*call) for call in calls)),
        Stack("pulse", (Call("t.py", 1, "wait"),)),
    ]


LOOP = (f"{OURS}/loop.py", 80, "take_steps")
SUMS = stack(LOOP, (f"{OURS}/group.py", 40, "Group.sum"), ("/lib/torch/x.py", 1, "wrapper"), (C10D, 9, "all_reduce"))
GATHERS = stack(
    LOOP, (f"{OURS}/checkpoint/peers.py", 40, "Peers.gather"), (C10D, 8, "all_gather_object"), (C10D, 9, "all_gather")
)
READS = stack(LOOP, (f"{OURS}/storage_read.py", 7, "read_range"), ("/usr/lib/python3/ssl.py", 5, "read"))
STEPS = stack(LOOP, (f"{OURS}/loop.py", 90, "_optimizer_step"))
