"""The code that is shipped to workers."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

from ftlaunch.launcher.package import FOLDERS, SUFFIXES, package_files, write_package

ROOT = Path(__file__).resolve().parents[3]


def test_another_python_imports_the_shipped_package(tmp_path):
    write_package(tmp_path)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import ftlaunch, ftlaunch.recipes.schema, ftlaunch.distributed.world, ftlaunch.launcher.cli\n"
        "assert ftlaunch.__file__.startswith(sys.argv[1]), ftlaunch.__file__\n"
        "from ftlaunch.launcher.report import render_report\n"
        "from ftlaunch.launcher.record import make_record\n"
        "print(render_report(make_record([], [], {}), name='x', state='', recipe_text=''))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "<!doctype html>" in done.stdout


def test_every_name_lies_below_the_package(tmp_path):
    root = write_package(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["ftlaunch"]
    assert (root / "__init__.py").exists()
    unwanted = ("test_", "tests", "conftest", "__pycache__")
    assert [path for path in root.rglob("*") if path.name.startswith(unwanted)] == []


def test_what_is_shipped_is_what_the_wheel_has():
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = {name.partition(".")[2].replace(".", "/") for name in tool["packages"]}
    assert {str(Path(name).parent).replace(".", "") for name in package_files()} == packages
    assert {folder.partition("/")[0] for folder in packages if folder} == set(FOLDERS)
    data = {pattern.lstrip("*") for patterns in tool["package-data"].values() for pattern in patterns}
    assert [suffix for suffix in data if not suffix.endswith(SUFFIXES)] == []
