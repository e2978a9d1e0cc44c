"""The peers that cannot share our environment: each has one of its own, made on first use.

MosaicML Streaming pins an old numpy and pulls torchvision; LitData pins what it reads from object stores with.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

PLACE = Path(sys.prefix) / "peers"
PACKAGES = {
    "mosaic": ["mosaicml-streaming==0.13.*", "torch>=2.11,<2.14", "tokenizers", "pyarrow"],
    "lit": ["litdata>=0.2.50", "zstd", "torch>=2.11,<2.14", "tokenizers", "pyarrow", "boto3"],
}


def python_of(side: str) -> str:
    """The interpreter that a side runs in."""
    if side not in PACKAGES:
        return sys.executable
    folder = PLACE / side
    if not (folder / "ready").exists():
        print(f"installing {', '.join(PACKAGES[side])} into an environment of its own …", file=sys.stderr)
        venv.create(folder, with_pip=True)
        subprocess.run([str(folder / "bin/python"), "-m", "pip", "install", "--quiet", *PACKAGES[side]], check=True)
        (folder / "ready").touch()
    return str(folder / "bin/python")


if __name__ == "__main__":
    for name in PACKAGES:
        python_of(name)
