"""Imports without garbage collection, which is on again afterwards whatever happens."""

from __future__ import annotations

import gc
import sys

import pytest

from ftlaunch.launcher.imports import import_all


def test_no_collection_while_importing_and_again_afterwards(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "watches_gc.py").write_text("import gc\nwas_on = gc.isenabled()\n")
    import_all(["json", "watches_gc"])
    assert sys.modules["watches_gc"].was_on is False
    assert gc.isenabled()


def test_a_module_that_is_missing_is_told(tmp_path):
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        import_all(["no_such_module"])
    assert gc.isenabled()
