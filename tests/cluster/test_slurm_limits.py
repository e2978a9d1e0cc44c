"""Real time limits, which are whole minutes: a run that needs three of them, and ends with the weights of one that had
none. `make evidence NAME=limits` writes what the user sees to benchmarks/results/slurm_time_limits.md."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from pathlib import Path

import pytest
from ledger import RESULTS, commit
from processes import WAIT_S, ftlaunch, run
from processes import Command as Started
from slow_steps import slow_steps
from slurm_site import Site
from tiny import recipe_for, write_recipe
from training import read_run, train

RANKS = 2
MINUTES = 2
LEAVE_S = 45
STEPS = 450
STEP_S = 0.25


def weights(directory: Path) -> str:
    files = sorted(read_run(directory).checkpoint.rglob("*.safetensors"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


@pytest.mark.evidence
def test_time_limits(slurm: Site):
    """Some minutes; writes benchmarks/results/slurm_time_limits.md and .json."""
    work = slurm.hosts.folder / "limits"
    work.mkdir()
    cluster = slurm.cluster(nodes=RANKS, time=str(MINUTES), leave_before_s=LEAVE_S, env=["OMP_NUM_THREADS", "HF_HUB_*"])
    recipe = {**recipe_for(work, train={"max_steps": STEPS}, checkpoint={"every_steps": 100}), "name": "limits"}
    site = slow_steps(work, STEP_S)["PYTHONPATH"]
    cluster["setup"] = [f"export PYTHONPATH={shlex.quote(site)}:$PYTHONPATH"]
    write_recipe(work / "limits.yaml", {**recipe, "cluster": cluster})
    started = Started(ftlaunch("limits.yaml"), work, slurm.environ)
    code = started.process.wait(4 * WAIT_S)
    assert code == 0, started.text
    directory = work / "runs/limits"
    requeued = started.text.count("the job goes back into the queue")
    assert requeued >= 2, started.text
    _, status = run(ftlaunch("status", "limits"), work, slurm.environ)
    undisturbed = weights(train({**recipe, "name": "plain", "cluster": {"type": "local"}}, RANKS).directory)
    assert weights(directory) == undisturbed
    assert [line["step"] for line in read_run(directory).steps] == list(range(1, STEPS + 1))

    ends = [json.loads(path.read_text()) for path in sorted((directory / "attempts").glob("*.end.json"))]
    result = {
        "claim": "a run that needs several time limits of Slurm ends with the weights of one that had none",
        "commit": commit(),
        "command": "make evidence NAME=limits",
        "minutes": MINUTES, "leave_before_s": LEAVE_S, "nodes": RANKS, "steps": STEPS, "step_s": STEP_S,
        "requeued": requeued, "outcomes": [end["outcome"] for end in ends],
        "weights": weights(directory), "undisturbed": undisturbed,
    }  # fmt: skip
    (RESULTS / "slurm_time_limits.json").write_text(json.dumps(result, indent=2) + "\n")
    seen = re.sub(
        re.escape(str(work)), "/shared", f"$ ftlaunch limits.yaml\n{started.text}$ ftlaunch status limits\n{status}"
    )
    (RESULTS / "slurm_time_limits.md").write_text(PAGE.format(transcript=thinned(seen), **result))


PAGE = """# Time limits of Slurm

A run of {steps} steps of {step_s} s on {nodes} nodes, in a job with a limit of {minutes} minutes
(`leave_before_s: {leave_before_s}`). It was requeued {requeued} times by itself, and ended with the weights, bit for
bit, of a run without any cluster. Commit {commit}; `{command}`.

```console
{transcript}
```
"""
SHOWN_STEPS = 3


def thinned(text: str) -> str:
    """Of neighbouring lines about steps only the first few."""
    kept, streak = [], 0
    for line in text.splitlines():
        streak = streak + 1 if line.startswith("step ") else 0
        if streak <= SHOWN_STEPS:
            kept.append(line)
    return "\n".join(kept)
