"""Write k8s/samples/NAME.yaml: what `ftlaunch plan` shows of k8s/samples/NAME.recipe.yaml as the job that it submits.

python k8s/make_samples.py
"""

from __future__ import annotations

from pathlib import Path

from ftlaunch.cluster.base import Need
from ftlaunch.cluster.table import build_submitted
from ftlaunch.recipes.load import load_recipe

FOLDER = Path(__file__).resolve().parent / "samples"
HEAD = "# Made from {source} by k8s/make_samples.py; the Secret's values are made at submission.\n"


def samples() -> dict[Path, str]:
    """File -> its text."""
    made = {}
    for source in sorted(FOLDER.glob("*.recipe.yaml")):
        recipe = load_recipe(source, environ={}).recipe
        text = build_submitted(recipe.cluster, Need(folder="/", name=recipe.name)).render()
        made[FOLDER / source.name.replace(".recipe", "")] = HEAD.format(source=source.name) + text
    return made


if __name__ == "__main__":
    for path, text in samples().items():
        path.write_text(text, encoding="utf-8")
