"""The folder that a node's ranks share: private, and gone with its last holder."""

from __future__ import annotations

import os
from contextlib import closing

import pytest

from ftlaunch.distributed.node_folder import NodeFolder
from ftlaunch.recipes.errors import InfrastructureError


def test_the_folder_goes_with_its_last_holder(tmp_path):
    first, second = NodeFolder("run attempt 1", tmp_path), NodeFolder("run attempt 1", tmp_path)
    assert first.path == second.path
    assert first.path.stat().st_mode & 0o777 == 0o700
    other = NodeFolder("run attempt 2", tmp_path)
    first.close()
    assert second.path.is_dir()
    second.close()
    assert not second.path.exists()
    assert other.path.is_dir()
    other.close()
    assert [*other.path.parent.iterdir()] == []


def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path):
    left = NodeFolder("killed", tmp_path)
    (left.path / "0.arrow").write_bytes(b"x")
    os.close(left._lock)  # what the system does for a killed process
    with closing(NodeFolder("next", tmp_path)):
        assert not left.path.exists()


def test_somebody_elses_folder_is_refused(tmp_path):
    (tmp_path / f"ftlaunch-blocks-{os.getuid()}").mkdir(mode=0o755)
    (tmp_path / f"ftlaunch-blocks-{os.getuid()}").chmod(0o755)
    with pytest.raises(InfrastructureError, match="others may read it"):
        NodeFolder("run", tmp_path)
