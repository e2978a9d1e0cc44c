"""The code archive that is shipped to workers."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

from ftlaunch.launcher.package import FOLDERS, SUFFIXES, build_archive, content_hash, package_files

ROOT = Path(__file__).resolve().parents[3]


def test_another_python_imports_the_package_from_the_archive(tmp_path):
    archive = build_archive(tmp_path)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import ftlaunch, ftlaunch.recipes.schema, ftlaunch.distributed.world, ftlaunch.launcher.cli\n"
        "assert ftlaunch.__file__.startswith(sys.argv[1]), ftlaunch.__file__\n"
        "from ftlaunch.launcher.report import render_report\n"
        "from ftlaunch.launcher.record import make_record\n"
        "print(render_report(make_record([], [], {}), name='x', state='', recipe_text=''))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(archive)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "<!doctype html>" in done.stdout


def test_every_name_lies_below_the_package(tmp_path):
    names = zipfile.ZipFile(build_archive(tmp_path)).namelist()
    assert all(name.startswith("ftlaunch/") for name in names)
    assert "ftlaunch/__init__.py" in names
    assert [name for name in names if "test" in name or "__pycache__" in name] == []


def test_the_archive_has_what_the_wheel_has():
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = {name.partition(".")[2].replace(".", "/") for name in tool["packages"]}
    assert {str(Path(name).parent).replace(".", "") for name in package_files()} == packages
    assert {folder.partition("/")[0] for folder in packages if folder} == set(FOLDERS)
    data = {pattern.lstrip("*") for patterns in tool["package-data"].values() for pattern in patterns}
    assert [suffix for suffix in data if not suffix.endswith(SUFFIXES)] == []


def test_the_same_code_has_the_same_archive(tmp_path):
    one, two = build_archive(tmp_path / "one"), build_archive(tmp_path / "two")
    assert one.name == two.name
    assert one.read_bytes() == two.read_bytes()
    assert build_archive(tmp_path / "one") == one


def test_other_code_has_another_name():
    files = {"a.py": b"1", "b.py": b"2"}
    assert len({content_hash(files), content_hash({"a.py": b"12", "b.py": b""}), content_hash({"a.py": b"1"})}) == 3
