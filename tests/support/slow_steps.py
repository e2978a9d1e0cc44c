"""Optimizer steps that take as long as those of a larger model, without the work: for ranks of real commands, through
Python's own `sitecustomize`. Processes can be had to stand by earlier in the same way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SITE = """
import importlib.abc, importlib.util, os, sys, time

def slow(module):
    step = module._optimizer_step

    def slowly(*arguments):
        time.sleep({seconds})
        while os.path.exists({hold!r}):
            time.sleep(0.05)
        return step(*arguments)

    module._optimizer_step = slowly

def soon(module):
    module.AFTER_S = {standby_after_s}

class Changed(importlib.abc.MetaPathFinder):
    changes = {{"ftlaunch.distributed.loop": slow, "ftlaunch.launcher.spares": soon}}

    def find_spec(self, name, path, target=None):
        change = self.changes.pop(name, None)
        if change is None:
            return None
        spec = importlib.util.find_spec(name)
        make = spec.loader.exec_module

        def make_changed(module):
            make(module)
            change(module)

        spec.loader.exec_module = make_changed
        return spec

sys.meta_path.insert(0, Changed())
"""


def slow_steps(folder: Path, seconds: float, path: str = "", standby_after_s: float = 15.0) -> dict[str, str]:
    """Variables for a command whose ranks are to be slow. `path`: what PYTHONPATH is already. `standby_after_s`: behind
    a start of ranks, when processes are to stand by."""
    site = folder / "slow-steps"
    site.mkdir(exist_ok=True)
    values = {"seconds": seconds, "standby_after_s": standby_after_s, "hold": str(_hold(folder))}
    (site / "sitecustomize.py").write_text(SITE.format(**values))
    return {"PYTHONPATH": f"{site}:{path}" if path else str(site)}


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Ranks that run with `slow_steps(folder, …)` take no step meanwhile, however long that is."""
    _hold(folder).touch()
    try:
        yield
    finally:
        _hold(folder).unlink()


def _hold(folder: Path) -> Path:
    return folder / "slow-steps" / "hold"
