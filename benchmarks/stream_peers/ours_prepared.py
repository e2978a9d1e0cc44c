"""ftlaunch's stream over shards of tokens that `ftlaunch prepare` made of the same rows."""

from __future__ import annotations

from functools import partial

from common import run
from ours import open_data

if __name__ == "__main__":
    run(partial(open_data, path="s3://bench/prepared/train/rows", row_format="tokenized"))
