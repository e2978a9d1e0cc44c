"""`ray start` on a host of ours, without the processes that nobody asks (see `ray_node_compat.py`)."""

from __future__ import annotations


def main() -> None:
    """With the arguments of `ray`."""
    from .ray_node_compat import start_only_what_runs_work

    start_only_what_runs_work()
    from ray.scripts.scripts import main as ray

    ray()


if __name__ == "__main__":
    main()
