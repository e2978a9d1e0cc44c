"""The ranks of benchmarks/checkpoint_save.py: each holds shards of a random model, and saves them in several ways."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from save_model import Model, Side, Wait
from transformers import LlamaConfig

from ftlaunch.distributed import storage
from ftlaunch.distributed.background import Work
from ftlaunch.distributed.checkpoint.content import Content
from ftlaunch.distributed.checkpoint.save import CheckpointWriter

PART_BYTES = 8 * 2**20
"""Of the raw uploads."""

WEIGHTS = {"model": torch.bfloat16}
STATE = {**WEIGHTS, "master": torch.float32, "exp_avg": torch.float32, "exp_avg_sq": torch.float32}
CONTENTS = {"weights": WEIGHTS, "state": STATE}
"""What is saved: parts of a checkpoint and their dtypes."""


@dataclass(frozen=True)
class Turn:
    """What one rank saw: seconds that the side counts, and by how much its resident memory rose meanwhile [bytes]."""

    seconds: float
    extra_bytes: int
    written_bytes: int


def raw(model: Model, place: str) -> None:
    """The limit: every rank writes its bytes from memory into a file of its own, whose space is reserved."""
    with (Path(place) / f"rank-{model.rank}").open("wb", buffering=0) as file:
        os.posix_fallocate(file.fileno(), 0, model.num_bytes())
        for shard in model.all_shards():
            file.write(shard.view(torch.uint8).numpy().data)
        os.fsync(file.fileno())


def raw_upload(model: Model, place: str) -> None:
    """The limit of an object store: every rank uploads its bytes from memory into an object of its own, in parts of
    8 MiB, four at once, with botocore alone."""
    from concurrent.futures import ThreadPoolExecutor

    bucket, _, key = f"{place}/rank-{model.rank}".removeprefix("s3://").partition("/")
    client, blocks = model.kept["client"], model.kept["blocks"]
    upload = {"Bucket": bucket, "Key": key}
    upload["UploadId"] = client.create_multipart_upload(**upload)["UploadId"]

    def send(number: int) -> dict[str, Any]:
        sent = client.upload_part(**upload, PartNumber=number, Body=blocks[number - 1])
        return {"PartNumber": number, "ETag": sent["ETag"]}

    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(send, range(1, len(blocks) + 1)))
    client.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts})


def prepare_raw_upload(model: Model) -> None:
    """The bytes in blocks, and a client."""
    import botocore.session

    whole = torch.cat([shard.view(torch.uint8).flatten() for shard in model.all_shards()]).numpy().data
    model.kept["blocks"] = [bytearray(whole[start : start + PART_BYTES]) for start in range(0, len(whole), PART_BYTES)]
    model.kept["client"] = botocore.session.get_session().create_client("s3")


def ours(model: Model, place: str, *, in_place: bool = True) -> None:
    """A whole save of ours: written, synced, read back in samples, committed."""
    model.writer(place, in_place=in_place).save(1, model.content())


# --- what holds training up -----------------------------------------------------------------------------------------


def memcpy(model: Model, place: str) -> None:
    """The limit: a copy of the same bytes into memory that is there."""
    for part, ones in model.shards.items():
        for name, shard in ones.items():
            if (part, name) not in model.kept:
                model.kept[part, name] = torch.ones_like(shard)  # type: ignore[index]
            model.kept[part, name].copy_(shard)  # type: ignore[index]


def ours_async(model: Model, place: str) -> Wait:
    """The copy, and the start of the work in the background."""
    writer, content = model.writer(place, in_place=True), model.content()
    copied = model.staging.copy(content, writer.plan(content))
    return Work(partial(_save, writer, copied), "checkpoint").wait


def _save(writer: CheckpointWriter, content: Content) -> None:
    writer.save(1, content)


# --- turns ----------------------------------------------------------------------------------------------------------


def all_sides() -> dict[str, Side]:
    """By name. Peers are imported here: some take seconds."""
    import save_peers

    mine: dict[str, Side] = {
        "raw": raw,
        "raw_upload": raw_upload,
        "ours": ours,
        "ours_streamed": partial(ours, in_place=False),
        "ours_uploaded": partial(ours, in_place=False),
        "memcpy": memcpy,
        "ours_async": ours_async,
    }
    return {**mine, **save_peers.SIDES}


def take_turn(model: Model, act: Side, place: str) -> Turn:
    """One save by one side, begun by all ranks at once."""
    local = storage.is_local(place)
    if model.rank == 0 and local:
        Path(place).mkdir(parents=True)
    dist.barrier()
    before = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM, the peak, back to now (proc(5))
    begin = time.perf_counter()
    wait = act(model, place)
    seconds = time.perf_counter() - begin
    extra = resident_bytes("VmHWM") - before
    if wait is not None:
        wait()
    dist.barrier()
    written = written_bytes(place) if model.rank == 0 else 0
    dist.barrier()
    if model.rank == 0:
        shutil.rmtree(place) if local else storage.delete_tree(place)
        os.sync()  # deleting is nobody's turn
    return Turn(seconds, extra, written)


def written_bytes(place: str) -> int:
    """Of all files in a folder, or below a URL."""
    if storage.is_local(place):
        return sum(path.stat().st_size for path in Path(place).rglob("*") if path.is_file())
    fs, path = storage.filesystem(place)
    return int(fs.du(path))


def resident_bytes(key: str) -> int:
    """VmRSS or VmHWM of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


@dataclass(frozen=True)
class Setting:
    """What every rank is told: `place` is a local folder, `target` the folder or URL that is saved to."""

    size: int
    config: Mapping[str, Any]
    content: str
    seed: int
    place: str
    target: str
    environment: Mapping[str, str]


def serve(rank: int, setting: Setting, line: Connection) -> None:
    """A rank: takes turns by name until the line is closed."""
    os.environ.update(setting.environment)
    torch.set_num_threads(1)
    store = dist.FileStore(f"{setting.place}/rendezvous-{setting.size}", setting.size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=setting.size)
    model = Model.draw(LlamaConfig(**setting.config), CONTENTS[setting.content], rank, setting.size, setting.seed)
    if not storage.is_local(setting.target):
        prepare_raw_upload(model)
        model.kept["local"] = f"{setting.place}/local"
    sides = all_sides()
    line.send(model.num_bytes())
    turn = 0
    with suppress(EOFError):  # nobody has another turn to give
        while True:
            side, turn = line.recv(), turn + 1
            line.send(take_turn(model, sides[side], f"{setting.target}/{setting.size}-{turn}"))
    dist.destroy_process_group()
