"""What holds for every test, however pytest was started: nothing phones home, and a failure can be repeated."""

from __future__ import annotations

import os
import signal

import fsspec
import pytest
from hypothesis import settings

# Ranks and readers of a test are processes of their own and inherit these; set before anything imports torch or ray.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    RAY_USAGE_STATS_ENABLED="0",
    TOKENIZERS_PARALLELISM="false",
)
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Started in the background of a script (`make test &`), Ctrl-C would be ignored by all that tests start, which try it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# A cluster that the developer happens to be connected to is not ours to test on.
os.environ.pop("RAY_ADDRESS", None)


@pytest.fixture(autouse=True)
def _no_connection_of_an_earlier_test():
    """fsspec keeps file systems with the endpoint they first saw; every test module has a store of its own."""
    yield
    for name in ("s3", "http"):
        if name in fsspec.registry:
            fsspec.get_filesystem_class(name).clear_instance_cache()


# No deadlines: shared machines are slow at times, and a test has no opinion about time.
# A change is not to be refused by what another's drawing of examples finds: CI draws the same ones each time.
settings.register_profile("ftlaunch", deadline=None, print_blob=True, derandomize="CI" in os.environ)
settings.load_profile("ftlaunch")
