"""How others save what a rank of benchmarks/checkpoint_save.py holds, each as its documentation has it.

All must end with files that `from_pretrained` reads, and with the optimizer's state where that is saved. Whoever writes
to local disks only uploads what it has written.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from save_model import FILE_BYTES, Model, Side, Wait
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.checkpoint._consolidate_hf_safetensors import consolidate_safetensors_files_on_every_rank
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from transformers import LlamaForCausalLM

from ftlaunch.distributed import storage

ZERO = {
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 2},
    "zero_allow_untested_optimizer": True,
}
"""DeepSpeed as it is used most; bf16 with fp32 masters."""


def _whole(model: Model) -> dict[str, Any]:
    """What DCP saves: one flat dictionary, in which weights have their own names."""
    return {
        name if part == "model" else f"{part}.{name}": tensor
        for part, ones in model.tensors.items()
        for name, tensor in ones.items()
    }


def _files(model: Model) -> dict[str, int]:
    """Tensor -> number of its final file, as torch wants it."""
    numbers, filled, number = {}, 0, 1
    for name, tensor in _whole(model).items():
        size = tensor.dtype.itemsize * tensor.numel()
        if filled and filled + size > FILE_BYTES:
            filled, number = 0, number + 1
        numbers[name], filled = number, filled + size
    return numbers


def rank_0_gather(model: Model, place: str) -> None:
    """One tensor after the other is gathered; rank 0 keeps them all, calls `save_pretrained`, and `torch.save` for the
    optimizer."""
    whole: dict[str, dict[str, torch.Tensor]] = {part: {} for part in model.tensors}
    for part, ones in model.tensors.items():
        for name, tensor in ones.items():
            full = tensor.full_tensor()
            if model.rank == 0:
                whole[part][name] = full
    if model.rank == 0:
        with torch.device("meta"):
            published = LlamaForCausalLM(model.config)
        published.save_pretrained(place, state_dict=whole.pop("model"), max_shard_size=FILE_BYTES)
        if whole:
            torch.save(whole, Path(place) / "optimizer.pt")
        sync_files(Path(place))


def dcp_consolidated(model: Model, place: str) -> None:
    """DCP's shards, then consolidation on every rank."""
    sharded = Path(place) / "sharded"
    writer = HuggingFaceStorageWriter(str(sharded), fqn_to_index_mapping=_files(model), save_distributed=True)
    dcp.save(_whole(model), storage_writer=writer)
    consolidate_safetensors_files_on_every_rank(str(sharded), place, _files(model))
    dist.barrier()
    if model.rank == 0:
        sync_files(Path(place))


def hf_storage_writer(model: Model, place: str) -> None:
    """The same by the writer itself, which consolidates on rank 0."""
    writer = HuggingFaceStorageWriter(
        place, fqn_to_index_mapping=_files(model), save_distributed=True, enable_consolidation=True
    )
    dcp.save(_whole(model), storage_writer=writer)
    if model.rank == 0:
        sync_files(Path(place))


def zero_to_fp32(model: Model, place: str) -> None:
    """DeepSpeed's checkpoint, then its own conversion (`zero_to_fp32.py --safe_serialization`), which runs once."""
    from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict

    engine = _engine(model)
    engine.save_checkpoint(place, tag="save")
    dist.barrier()
    if model.rank == 0:
        convert_zero_checkpoint_to_fp32_state_dict(
            place, f"{place}/converted", max_shard_size="512MB", safe_serialization=True, tag="save"
        )
        sync_files(Path(place))


def _engine(model: Model) -> Any:
    """DeepSpeed's, with a model of the same shapes; made before the first turn that counts."""
    if "engine" not in model.kept:
        from ftlaunch.distributed.strategies.deepspeed_compat import attach
        from ftlaunch.distributed.world import World

        deepspeed = attach(World(rank=model.rank, size=model.size, local_rank=model.rank))
        module = LlamaForCausalLM(model.config).to(torch.bfloat16)
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4)
        config = {**ZERO, "train_batch_size": model.size}
        model.kept["engine"] = engine = deepspeed.initialize(model=module, optimizer=optimizer, config=config)[0]
        ids = torch.zeros(1, 8, dtype=torch.long)
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()  # before the first step there are no moments to save
    return model.kept["engine"]


def sync_files(folder: Path) -> None:
    """Peers leave their files to the page cache; the limit and ours do not."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


# --- object stores --------------------------------------------------------------------------------------------------


def then_uploaded(model: Model, place: str, *, save: Side) -> None:
    """Saved to a local folder, from which every rank uploads some of the final files with s3fs."""
    folder = Path(model.kept["local"]) / place.rpartition("/")[2]
    if model.rank == 0:
        folder.mkdir(parents=True)
    dist.barrier()
    save(model, str(folder))
    dist.barrier()
    fs, path = storage.filesystem(place)
    for file in sorted(one for one in folder.iterdir() if one.is_file())[model.rank :: model.size]:
        fs.put_file(str(file), f"{path}/{file.name}")
    dist.barrier()
    if model.rank == 0:
        shutil.rmtree(folder)


# --- what holds training up -----------------------------------------------------------------------------------------


def dcp_async(model: Model, place: str, *, kind: AsyncCheckpointerType) -> Wait:
    """`dcp.async_save` until it returns."""
    done = dcp.async_save(_whole(model), checkpoint_id=place, async_checkpointer_type=kind)
    assert isinstance(done, Future)
    return partial(_wait, done)


def _wait(done: Future[Any]) -> None:
    done.result()


SIDES: Mapping[str, Side] = {
    "rank_0_gather": rank_0_gather,
    "dcp_consolidated": dcp_consolidated,
    "hf_storage_writer": hf_storage_writer,
    "zero_to_fp32": zero_to_fp32,
    "rank_0_gather_uploaded": partial(then_uploaded, save=rank_0_gather),
    "dcp_consolidated_uploaded": partial(then_uploaded, save=dcp_consolidated),
    "dcp_async_thread": partial(dcp_async, kind=AsyncCheckpointerType.THREAD),
    "dcp_async_process": partial(dcp_async, kind=AsyncCheckpointerType.PROCESS),
}
