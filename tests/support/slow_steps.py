"""Optimizer steps that take as long as those of a larger model, without the work: for ranks of real commands, through
Python's own `sitecustomize`."""

from __future__ import annotations

from pathlib import Path

SITE = """
import importlib.abc, importlib.util, sys, time

class Slow(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "ftlaunch.distributed.loop":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        make = spec.loader.exec_module

        def make_slow(module):
            make(module)
            step = module._optimizer_step

            def slow(*arguments):
                time.sleep({seconds})
                return step(*arguments)

            module._optimizer_step = slow

        spec.loader.exec_module = make_slow
        return spec

sys.meta_path.insert(0, Slow())
"""


def slow_steps(folder: Path, seconds: float, path: str = "") -> dict[str, str]:
    """Variables for a command whose ranks are to be slow. `path`: what PYTHONPATH is already."""
    site = folder / "slow-steps"
    site.mkdir(exist_ok=True)
    (site / "sitecustomize.py").write_text(SITE.format(seconds=seconds))
    return {"PYTHONPATH": f"{site}:{path}" if path else str(site)}
