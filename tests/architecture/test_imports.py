"""Who imports whom: the contracts of pyproject.toml, no cycles, no torch where the laptop must stay light."""

from __future__ import annotations

import graphlib
import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import grimp

HEAVY = {"torch", "ray", "transformers", "pandas"}

# `plan`, `check` and submitting use these; whoever imports torch here at module level makes `ftlaunch --help` slow.
LIGHT = (
    "recipes/*.py",
    "recipes/methods/*.py",
    "cluster/*.py",
    "launcher/cli.py",
    "launcher/plan.py",
    "launcher/submit.py",
    "launcher/runs.py",
    "launcher/cli_*.py",
    "launcher/status.py",
    "launcher/logs.py",
    "launcher/history.py",
    "launcher/goodput/*.py",
    "launcher/overview/*.py",
    "distributed/again.py",
    "distributed/indexing.py",
    "distributed/attempt.py",
    "distributed/model_files.py",
    "distributed/schedule.py",
    "distributed/checkpoint/manifest.py",
    "distributed/checkpoint/verify.py",
    "distributed/checkpoint/exchange.py",
    "distributed/checkpoint/retention.py",
    "distributed/checkpoint/peers.py",
    "distributed/world.py",
    "distributed/storage.py",
    "distributed/run_directory.py",
    "distributed/data/*.py",
    "distributed/estimate/*.py",
    "distributed/row_encoder.py",
    "distributed/checkpoint/layout.py",
    "distributed/checkpoint/commit.py",
    "distributed/checkpoint/fragments.py",
)

# Prints "MODULE HEAVY" for every heavy package that appears when MODULE is imported.
IMPORT_EACH = """
import importlib, sys
heavy, modules = set(sys.argv[1].split(",")), sys.argv[2:]
for module in modules:
    before = heavy & set(sys.modules)
    importlib.import_module(module)
    for name in sorted((heavy & set(sys.modules)) - before):
        print(module, name)
"""


def imported_heavily(modules: list[str], cwd: Path) -> list[str]:
    command = [sys.executable, "-c", IMPORT_EACH, ",".join(sorted(HEAVY)), *modules]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_contracts_of_pyproject_are_kept(root):
    command = [Path(sys.executable).parent / "lint-imports", "--no-cache"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"[1-9]\d* kept, 0 broken", done.stdout), done.stdout


def test_no_import_cycles(sources):
    graph = grimp.build_graph("ftlaunch", cache_dir=None)
    assert {source.module for source in sources} <= graph.modules
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    graphlib.TopologicalSorter(imports).prepare()  # raises CycleError, which names the cycle


def test_light_modules_import_nothing_heavy(sources, tmp_path):
    light = [s.module for s in sources if any(fnmatch(s.name, pattern) for pattern in LIGHT)]
    assert len(light) > 10
    assert imported_heavily(light, tmp_path) == []


def test_a_heavy_import_is_seen(tmp_path):
    (tmp_path / "innocent.py").write_text("import pandas\n")
    assert imported_heavily(["json", "innocent"], tmp_path) == ["innocent pandas"]


def test_help_imports_nothing_heavy(tmp_path):
    command = [sys.executable, "-X", "importtime", "-m", "ftlaunch.launcher.cli", "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ftlaunch" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "cyclopts" in imported, "-X importtime printed no list"
    assert imported & HEAVY == set()
