"""Where Ray keeps the logs of a node."""

from __future__ import annotations

from pathlib import Path


def logs_folder() -> Path:
    """Of this node; in one of Ray's processes."""
    from ray._private import worker

    return Path(worker._global_node.get_logs_dir_path())
