"""What the stream benchmarks share: rows with names, the store they lie in, and one side's turn."""

from __future__ import annotations

import json
import random
import shutil
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from harness import run_checked
from peers import python_of

HERE = Path(__file__).resolve().parent
SIDES = HERE / "stream_peers"
END = "<|endoftext|>"
WORDS = 4000


@dataclass(frozen=True)
class Shape:
    """The data: `files` of `groups` row groups of `rows` rows of about `words` words."""

    files: int
    groups: int
    rows: int
    words: int

    @property
    def num_rows(self) -> int:
        """All of them."""
        return self.files * self.groups * self.rows


def write_shards(folder: Path, shape: Shape, seed: int) -> int:
    """Parquet shards whose rows begin with their own name (`r17`); their bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = random.Random(seed)
    folder.mkdir(parents=True)
    name = 0
    for file in range(shape.files):
        texts = []
        for _ in range(shape.groups * shape.rows):
            length = max(4, int(rng.lognormvariate(0, 0.6) * shape.words))
            texts.append(" ".join([f"r{name}", *(f"w{rng.randrange(WORDS)}" for _ in range(length))]))
            name += 1
        table = pa.table({"text": texts, "id": list(range(len(texts)))})
        pq.write_table(table, folder / f"{file:04d}.parquet", row_group_size=shape.rows, compression="zstd")
    return sum(file.stat().st_size for file in folder.iterdir())


def write_tokenizer(folder: Path, rows: int) -> Path:
    """One token for every word, and one for every row's name."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = [END, *(f"w{number}" for number in range(WORDS)), *(f"r{number}" for number in range(rows))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=END))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([END])
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def convert(store: Path, sides: list[str], shard_bytes: int) -> None:
    """The formats of the peers that need one of their own, with shards of about our blocks' size."""
    for side, program, name in (("mosaic", "convert_mds.py", "mds"), ("lit", "convert_lit.py", "lit")):
        if side in sides:
            command = [
                python_of(side),
                str(SIDES / program),
                str(store / "parquet"),
                str(store / name),
                str(shard_bytes),
            ]
            run_checked(command, SIDES)


def prepare_shards(store: Path, tokenizer: Path, sequence_length: int) -> int:
    """What `ftlaunch prepare` makes of the shards, without a cluster that does so at once in many places; its bytes."""
    from ftlaunch.distributed.data.build import build_index
    from ftlaunch.distributed.prepare import Preparation, encoder_digest, prepare_piece
    from ftlaunch.distributed.row_encoder import EncoderSpec, open_encoder
    from ftlaunch.recipes.schema import Cpt, Data, TrainSource

    source = TrainSource(path=str(store / "parquet"), format="text", name="rows")
    data = Data(train=(source,), sequence_length=sequence_length)
    encode = open_encoder(EncoderSpec(Cpt(), str(tokenizer), None, {}, datetime.now(UTC), None))
    index = build_index(data.train, ["rows"])
    preparation = Preparation(data, index, None, encoder_digest(encode), str(store / "prepared"))
    return sum(prepare_piece(preparation, piece, encode).nbytes for piece in preparation.pieces())


@contextmanager
def serving(root: Path, mb_per_s: float, latency_ms: float) -> Iterator[str]:
    """The store's endpoint."""
    command = [sys.executable, str(HERE / "object_store.py"), str(root)]
    command += ["--mb-per-s", str(mb_per_s), "--latency-ms", str(latency_ms)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


def counts(endpoint: str) -> dict[str, int]:
    """Bytes and requests that the store has served."""
    with urllib.request.urlopen(f"{endpoint}/-/counts") as answer:
        served: dict[str, int] = json.load(answer)
    return served


@dataclass(frozen=True)
class Turn:
    """What every turn of a side shares."""

    folder: Path
    endpoint: str
    shape: Shape
    seed: int
    batch_rows: int = 64
    sequence_length: int = 2048
    shuffle_rows: int = 2000

    def take(self, side: str, **job: Any) -> dict[str, Any]:
        """Run a side in a fresh process with empty caches; what it measured, with the bytes and requests it cost."""
        before = counts(self.endpoint)
        (measured,) = self.take_together(side, 1, **job)
        after = counts(self.endpoint)
        return measured | {name: after[name] - before[name] for name in after}

    def take_together(self, side: str, ranks: int, **job: Any) -> list[dict[str, Any]]:
        """The same in several processes at once that share the data; what each measured."""
        scratch = self.folder / "scratch"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        fields = {name: value for name, value in asdict(self).items() if name not in ("folder", "shape")}
        fields |= {"rows": self.shape.num_rows, "tokenizer": str(self.folder / "tokenizer"), "ranks": ranks, **job}
        port = str(free_port())

        def run(rank: int) -> dict[str, Any]:
            place = self.folder / f"job-{rank}.json"
            place.write_text(json.dumps(fields | {"rank": rank, "scratch": str(scratch)}))
            command = [python_of(side), str(SIDES / f"{side}.py"), str(place)]
            said = run_checked(command, SIDES, {**quiet(side), **(group_of(rank, ranks, port) if ranks > 1 else {})})
            measured: dict[str, Any] = json.loads(said.strip().splitlines()[-1])
            return measured

        with ThreadPoolExecutor(ranks) as pool:
            return list(pool.map(run, range(ranks)))


def free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def group_of(rank: int, ranks: int, port: str) -> Mapping[str, str]:
    """What torchrun tells a process of a group on one machine."""
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
    }  # fmt: skip


def quiet(side: str) -> Mapping[str, str]:
    """Environment of a side."""
    return {
        "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1",
        "TOKENIZERS_PARALLELISM": "true" if side in ("hf_datasets", "ray_data") else "false",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "RAY_USAGE_STATS_ENABLED": "0",
    }  # fmt: skip
