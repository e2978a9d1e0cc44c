"""`make` finds a Python that starts, says what is missing otherwise, and installs only when it must."""

from __future__ import annotations

import os
import subprocess
import sys


def make(root, venv, *arguments):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    command = ["make", "--no-print-directory", f"VENV={venv}", *arguments]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)


def test_no_python_at_all_is_said(root, tmp_path):
    done = make(root, tmp_path / "venv", "PYTHONS=/nowhere/python3", "test")
    assert done.returncode == 2
    assert "ftlaunch needs Python 3.11 or newer" in done.stderr
    assert "tried: /nowhere/python3." in done.stderr
    assert "make PYTHON=/path/to/python3.12 test" in done.stderr


def python_of_version(folder, version):
    """A python3 that says it is of another version."""
    program = folder / "python3"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -c "import sys; sys.version_info = {version}; $2"\n')
    program.chmod(0o755)
    return program


def test_an_old_python_is_passed_over(root, tmp_path):
    done = make(root, tmp_path / "venv", f"PYTHONS={python_of_version(tmp_path, (3, 10))}", "install")
    assert done.returncode == 2
    assert "ftlaunch needs Python 3.11 or newer" in done.stderr


def test_a_new_one_is_taken_where_others_do_not_start(root, tmp_path):
    new = python_of_version(tmp_path, (3, 11))
    done = make(root, tmp_path / "venv", f"PYTHONS=/bin/false {new}", "install")
    assert "Making" in done.stdout
    assert "ftlaunch needs Python" not in done.stderr


def test_installs_again_only_when_pyproject_changed(root, tmp_path):
    changed = (root / "pyproject.toml").stat().st_mtime
    for stamp, age in ((".created", 0), (".installed", 10), (".installed-test", 10)):
        (tmp_path / stamp).touch()
        os.utime(tmp_path / stamp, (changed + age, changed + age))
    assert "pip install" not in make(root, tmp_path, "--dry-run", "test", "quickstart").stdout
    os.utime(tmp_path / ".installed-test", (changed - 10, changed - 10))
    assert "pip install" not in make(root, tmp_path, "--dry-run", "quickstart").stdout
    assert "-e '.[test]'" in make(root, tmp_path, "--dry-run", "test").stdout
