"""What is installed is what the folders hold: the list in pyproject.toml, and a wheel that is really built."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest


def test_packages_are_the_folders_with_an_init(root, sources):
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    folders = sorted(source.module for source in sources if source.path.name == "__init__.py")
    assert sorted(project["tool"]["setuptools"]["packages"]) == folders


def test_every_folder_with_code_has_an_init(root, sources):
    folders = {source.path.parent for source in sources}
    assert [str(folder.relative_to(root)) for folder in folders if not (folder / "__init__.py").is_file()] == []


@pytest.fixture(scope="module")
def wheel_names(root, files, tmp_path_factory):
    """Names in a wheel built from a copy: building in place leaves folders behind, and takes stale ones along."""
    tmp = tmp_path_factory.mktemp("wheel")
    for name in files:
        (tmp / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / name, tmp / "copy" / name)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp / "out"]
    command = [sys.executable, "-m", "pip", "wheel", *options, tmp / "copy"]
    done = subprocess.run(command, cwd=tmp, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp / "out").glob("ftlaunch-*.whl")
    return set(zipfile.ZipFile(wheel).namelist())


def test_the_wheel_holds_the_package_and_nothing_else(root, files, sources, wheel_names):
    code = {source.name for source in sources if source.name in files}
    data = {
        name
        for name in files
        if name.startswith(("recipes/", "launcher/")) and name.endswith((".yaml", ".json", ".j2"))
    }
    shipped = {name for name in wheel_names if ".dist-info/" not in name}
    assert shipped == {f"ftlaunch/{name}" for name in code | data}


def test_the_wheel_carries_license_and_command(wheel_names):
    ends = {name.partition(".dist-info/")[2] for name in wheel_names}
    assert {"licenses/LICENSE", "entry_points.txt"} <= ends
