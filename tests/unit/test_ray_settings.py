"""Ray's settings are made before anything can import Ray, because it reads them only then."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import os, sys
from ftlaunch.cluster.base import Demand
from ftlaunch.cluster.table import build_cluster
from ftlaunch.recipes.schema_cluster import LocalCluster

build_cluster(LocalCluster(), Demand(nodes=1, ranks=1, uses_gpus=False, cpus_per_rank=1))
print("ray" in sys.modules, os.environ["RAY_AUTH_MODE"], len(os.environ["RAY_AUTH_TOKEN"]))
"""


def test_a_local_cluster_settles_its_token_when_it_is_built(tmp_path):
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "token", "64"]
