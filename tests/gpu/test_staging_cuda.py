"""Copies of a GPU's shards in page-locked memory: what a checkpoint in the background is written from."""

from __future__ import annotations

import torch

from ftlaunch.distributed.checkpoint.content import Content
from ftlaunch.distributed.checkpoint.fragments import Fragment, TensorSpec
from ftlaunch.distributed.checkpoint.peers import Peers
from ftlaunch.distributed.checkpoint.reader import CheckpointReader, read_whole
from ftlaunch.distributed.checkpoint.save import CheckpointWriter
from ftlaunch.distributed.checkpoint.staging import Staging


def test_what_changes_on_the_gpu_after_the_copy_is_not_saved(tmp_path):
    masters = {f"w{i}": torch.randn(1001 + i, 333, device="cuda") for i in range(4)}
    frozen = {"frozen": torch.randn(77, 5, device="cuda").bfloat16()}
    expected = {name: value.bfloat16().cpu() for name, value in (masters | frozen).items()}

    def source():
        for name, value in (masters | frozen).items():
            yield Fragment(TensorSpec(name, tuple(value.shape), "BF16"), ((0, value.numel()),), value.flatten())

    writer = CheckpointWriter(str(tmp_path), 1, lambda *_, **__: None, Peers(), in_place=True)
    staging, content = Staging(pinned=True), Content({"model": source}, frozen=frozenset(frozen))
    for step in (1, 2):
        copied = staging.copy(content, writer.plan(content))
        for value in masters.values():
            value.add_(1.0)
        writer.save(step, copied)
        read = CheckpointReader(str(tmp_path / f"step-00000{step}.a1"))
        assert all(torch.equal(read_whole(read, name), value) for name, value in expected.items())
        expected = {name: value.bfloat16().cpu() for name, value in (masters | frozen).items()}
