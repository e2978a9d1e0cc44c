"""An import holds blocks of one tensor, never a model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from tiny import make_model
from transformers import AutoModelForCausalLM

MARGIN = 160 * 2**20
"""A block of 16 MiB, its cast, and what looking for values that the cast cannot hold takes: some 60 MiB, which the
allocator keeps; the model's structure on the meta device, about as much (measured, besides a chunk: 100 to 140 MiB, of
310 MB of tensors)."""

# Samples its own memory that is no file's: mapped pages belong to the page cache, and leave when others need room.
PROGRAM = """
import sys, threading, time
from pathlib import Path
from ftlaunch.distributed.importing import dcp, model, pickled
from ftlaunch.launcher.import_checkpoint import Wanted, import_checkpoint
from transformers import AutoModelForCausalLM, LlamaForCausalLM

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

source, base, to = sys.argv[1:]
model.Model.of(model.find_base(source, base))
before, most, done = anonymous(), [0], threading.Event()

def watch():
    while not done.wait(0.002):
        most[0] = max(most[0], anonymous())

thread = threading.Thread(target=watch)
thread.start()
import_checkpoint(source, to, Wanted(base, "bfloat16", False, False))
done.set()
thread.join()
print(most[0] - before)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Tensors of 63 MB and 189 MB as a whole, saved by one rank, so that each is one chunk."""
    folder = tmp_path_factory.mktemp("large")
    make_model(folder / "model", vocab_size=40_000, hidden_size=392, intermediate_size=39_000, num_hidden_layers=1)
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    dcp.save({"model": model.state_dict()}, checkpoint_id=str(folder / "dcp"), no_dist=True)
    (folder / "pickled").mkdir()
    torch.save(model.state_dict(), folder / "pickled" / "pytorch_model.bin")
    return folder


@pytest.mark.parametrize(("kind", "tensors"), [("dcp", 1), ("pickled", 0)])
def test_memory_does_not_grow_with_the_model(kind, tensors, large, tmp_path):
    """Of a chunk of torch.distributed.checkpoint the whole tensor; of what can be mapped nothing but blocks."""
    command = [sys.executable, "-c", PROGRAM, str(large / kind), str(large / "model"), str(tmp_path / "to")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    extra = int(done.stdout.splitlines()[-1])
    assert extra < tensors * 63e6 + MARGIN < Path(large / "pickled" / "pytorch_model.bin").stat().st_size
