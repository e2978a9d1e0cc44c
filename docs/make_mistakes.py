"""Write docs/mistakes.md: each mistake of tests/support/mistakes.py, made for real at a terminal.

python docs/make_mistakes.py
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "support"))

from mistakes import MISTAKES, Mistake, prepare  # noqa: E402 - from the tests' folder, which is no package

HEAD = """# What mistakes look like

Each of these was made at a terminal, in a folder with a small model and some rows. The answer says what is wrong,
where, and what to do; the exit code is 1, and nothing that was there is lost. Made by `python docs/make_mistakes.py`
from the cases that the tests try.
"""


def transcript(mistake: Mistake) -> str:
    """The command and its answer, with the temporary folder written as it would look from inside."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        arguments = prepare(mistake, folder)
        if mistake is MISTAKES["recipe"]:
            arguments[0] = "recpie.yaml"
        done = subprocess.run(
            [str(Path(sys.executable).parent / "ftlaunch"), *arguments],
            cwd=folder,
            capture_output=True,
            text=True,
            env={**os.environ, "COLUMNS": "110"},
            check=False,
        )
        text = (done.stdout + done.stderr).replace(f"{place}/", "").strip()
    command = " ".join(["ftlaunch", *arguments])
    return f"## {mistake.title}\n\n```console\n$ {command}\n{text}\n$ echo $?\n{done.returncode}\n```\n"


if __name__ == "__main__":
    parts = [transcript(mistake) for mistake in MISTAKES.values()]
    (ROOT / "docs" / "mistakes.md").write_text("\n".join([HEAD, *parts]))
