"""Does `plan` say how much memory a rank takes? Whole runs on the CPU, whose tensors are counted, against the estimate.

A row is a run of one step of two micro-batches a rank (`plan_memory_ranks.py`). What is counted stands for
`torch.cuda.max_memory_allocated`: the peak of what torch's allocator has handed out for tensors. It differs from a
GPU's in four ways that the estimate knows, by the device that it is made for: gloo gathers and scatters through a copy;
packed samples are kept apart by masks (CUDA has variable-length attention in bfloat16); sums of mixed dtypes are cast
first; and what is offloaded lies in the same memory, so that device and host are added up.

The model is a Llama of 62 M parameters, as wide as one of half a billion and of four layers.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import random
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness import arguments, parse, write_results
from plan_memory_ranks import Job, planned, serve

from ftlaunch.distributed.world import World
from ftlaunch.recipes.schema import Recipe

CLAIM = "Most bytes that tensors took on a rank of a run / bytes that `plan` says: the whole within 0.9 and 1.2."
VOCABULARY = 8192
SIZES = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4}
TINY = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": VOCABULARY, "tie_word_embeddings": False}
WORDS = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta")


@dataclass(frozen=True)
class Row:
    """A run: its recipe's sections on top of the common ones, and how many ranks on how many nodes."""

    name: str
    ranks: int = 2
    nodes: int = 1
    dtype: str = "bfloat16"
    length: int = 512
    strategy: Mapping[str, Any] = field(default_factory=lambda: {"type": "fsdp"})
    adapter: Mapping[str, Any] | None = None
    train: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    rows: str = "short"
    model: Mapping[str, Any] = field(default_factory=dict)


def zero(stage: int, **more: Any) -> dict[str, Any]:
    """A strategy of DeepSpeed's."""
    return {"type": "deepspeed", "stage": stage, **more}


BUCKETS = {"deepspeed_config": {"zero_optimization": {
    "reduce_bucket_size": 10_000_000, "stage3_max_live_parameters": 20_000_000, "stage3_max_reuse_distance": 1_000_000,
}}}  # fmt: skip
SMALL_BUCKET = {"deepspeed_config": {"zero_optimization": {"reduce_bucket_size": 10_000_000}}}
AGAIN = {"activation_checkpointing": True}
DDP, OFFLOAD = {"type": "ddp"}, {"offload_optimizer": "cpu"}

ROWS = (
    Row("float32, one rank", ranks=1, dtype="float32"),
    Row("ddp", strategy=DDP),
    Row("ddp, float32", strategy=DDP, dtype="float32"),
    Row("fsdp"),
    Row("fsdp, one rank", ranks=1),
    Row("fsdp, float32", dtype="float32"),
    Row("fsdp, 1,024 tokens", length=1024),
    Row("fsdp, 2,048 tokens", length=2048),
    Row("fsdp, 2,048 tokens, no packing", length=2048, data={"packing": False}, rows="long"),
    Row("fsdp, recomputed", train=AGAIN),
    Row("fsdp, recomputed, 2,048 tokens", length=2048, train=AGAIN),
    Row("fsdp, 4 ranks", ranks=4),
    Row("fsdp by node, 2 x 2 ranks", ranks=4, nodes=2, strategy={"type": "fsdp", "shard": "node"}),
    Row("fsdp, blocks stay gathered", strategy={"type": "fsdp", "reshard_after_forward": False}),
    Row("fsdp, offload (device and host)", strategy={"type": "fsdp", "offload": "cpu"}),
    Row("ZeRO-1", strategy=zero(1)),
    Row("ZeRO-2", strategy=zero(2)),
    Row("ZeRO-2, small buckets", strategy=zero(2, **SMALL_BUCKET)),
    Row("ZeRO-3", strategy=zero(3)),
    Row("ZeRO-3, small buckets", strategy=zero(3, **BUCKETS)),
    Row("ZeRO-3, recomputed, 2,048 tokens", strategy=zero(3), train=AGAIN, length=2048),
    Row("ZeRO-2, optimizer offloaded (device and host)", strategy=zero(2, **OFFLOAD)),
    Row("ZeRO-3, all offloaded (device and host)", strategy=zero(3, **OFFLOAD, offload_param="cpu")),
    Row("lora, ddp", adapter={"rank": 16}, strategy=DDP),
    Row("lora", adapter={"rank": 16}),
    Row("lora with dropout, 1,024 tokens", adapter={"rank": 16, "dropout": 0.1}, length=1024),
    Row("lora, recomputed, 2,048 tokens", adapter={"rank": 16}, train=AGAIN, length=2048),
    Row("lora, ZeRO-3", adapter={"rank": 16}, strategy=zero(3)),
    Row("qlora", adapter={"type": "qlora", "rank": 16}),
    Row("adamw_8bit", train={"optimizer": "adamw_8bit"}),
    Row("adafactor", train={"optimizer": "adafactor"}),
    Row("muon", train={"optimizer": "muon"}),
    Row("273 M parameters", model={"hidden_size": 1536, "intermediate_size": 4096, "num_hidden_layers": 10}),
    Row("Qwen3, tied embeddings", model={"model_type": "qwen3", "tie_word_embeddings": True, "head_dim": 128}),
    Row("GPT-NeoX", model={"model_type": "gpt_neox"}),
    Row("GPT-NeoX, recomputed", model={"model_type": "gpt_neox"}, train=AGAIN),
)


@dataclass(frozen=True)
class Found:
    """A row's worst rank [bytes]: at the peak of the steps, what stays from step to step, and what was planned."""

    row: Row
    peak: int
    kept: int
    plan: Mapping[str, Any]

    @property
    def planned(self) -> int:
        """With what is offloaded, which is in the same memory here."""
        return int(self.plan["total"] + self.plan["offloaded"])

    @property
    def ratio(self) -> float:
        """Measured / planned."""
        return self.peak / self.planned

    def cells(self) -> Iterator[str]:
        """Of the table."""
        parts = ("weights", "gradients", "optimizer", "gathered", "activations", "loss", "offloaded")
        yield self.row.name
        yield f"{self.peak / 2**20:.0f}"
        yield f"{self.planned / 2**20:.0f}"
        yield f"{self.ratio:.2f}"
        yield self.plan["moment"]
        yield from (f"{self.plan[part] / 2**20:.0f}" for part in parts)

    def record(self) -> dict[str, Any]:
        """For programs."""
        values = {"peak": self.peak, "kept": self.kept, "ratio": self.ratio}
        return {"row": self.row.name, **values, "plan": dict(self.plan)}


@dataclass(frozen=True)
class Comparison:
    """All rows, as `harness.write_results` wants a table."""

    title: str
    found: tuple[Found, ...]

    def markdown(self) -> str:
        """A table for people."""
        names = ["run", "measured", "planned", "ratio", "planned peak at", "weights", "gradients", "optimizer"]
        names += ["gathered", "activations", "loss", "offloaded"]
        lines = [f"### {self.title}", "", f"| {' | '.join(names)} |", "|---|" + "---:|" * (len(names) - 1)]
        return "\n".join([*lines, *(f"| {' | '.join(found.cells())} |" for found in self.found)])

    def record(self) -> dict[str, Any]:
        """The same for programs."""
        values = {one.row.name: [float(one.peak)] for one in self.found}
        ratios = {one.row.name: one.ratio for one in self.found}
        return {"title": self.title, "unit": "bytes", "base": "plan", "values": {"plan": [1.0], **values},
                "ratios": ratios, "rows": [one.record() for one in self.found]}  # fmt: skip


def make_documents(place: Path, seed: int) -> None:
    """Most of them shorter than a sequence, or all longer."""
    rng = random.Random(seed)
    for name, count, lengths in (("short", 400, (50, 700)), ("long", 40, (2100, 4000))):
        rows = ({"text": " ".join(rng.choices(WORDS, k=rng.randint(*lengths)))} for _ in range(count))
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_model(folder: Path, sizes: Mapping[str, Any], seed: int) -> None:
    """A random model with a tokenizer."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    about = {"model_type": "llama", "max_position_embeddings": 4096, "bos_token_id": None, "eos_token_id": 1}
    config = AutoConfig.for_model(**(about | HEADS | sizes))
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    vocabulary = {word: number for number, word in enumerate(["[pad]", "[end]", "[unk]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[unk]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "[end]", "pad_token": "[pad]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))


def model_of(row: Row, place: Path, options: argparse.Namespace) -> Path:
    """The row's model; rows with the same share it."""
    sizes = {**(TINY if options.quick else SIZES), **row.model}
    folder = place / "-".join(["model", *(f"{name}={value}" for name, value in sorted(row.model.items()))])
    if not folder.exists():
        make_model(folder, sizes, options.seed)
    return folder


def recipe_of(row: Row, place: Path, model: Path, number: int) -> dict[str, Any]:
    """One step of two micro-batches a rank: the optimizer's state is there from the start."""
    recipe: dict[str, Any] = {
        "name": f"run-{number}",
        "model": {"path": str(model), "dtype": row.dtype},
        "method": {"type": "cpt"},
        "data": {
            "sequence_length": row.length,
            "train": [{"path": str(place / f"{row.rows}.jsonl"), "format": "text"}],
            **row.data,
        },
        "train": {"max_steps": 1, "global_batch_size": 2 * row.ranks, "micro_batch_size": 1, **row.train},
        "strategy": dict(row.strategy),
        "evaluate": {"at_start": False},
        "checkpoint": {"path": str(place / "runs"), "mode": "sync"},
        "track": {"tensorboard": False},
    }
    return recipe if row.adapter is None else {**recipe, "adapter": dict(row.adapter)}


@dataclass
class Ranks:
    """Processes that are the ranks of one run after the other, as many as the row before asked for."""

    processes: list[Any] = field(default_factory=list)
    lines: list[Any] = field(default_factory=list)

    def measure(self, row: Row, place: Path, model: Path, number: int) -> Found:
        """One run; the rank that took most."""
        if len(self.lines) != row.ranks:
            self.close()
            self.start(row.ranks)
        for line in self.lines:
            line.send(Job(recipe_of(row, place, model, number), row.nodes, f"file://{place}/store-{number}"))
        worst = max((line.recv() for line in self.lines), key=lambda answer: int(answer["peak"]))
        return Found(row, worst["peak"], worst["kept"], worst["plan"])

    def start(self, size: int) -> None:
        """Ready for a run."""
        context = multiprocessing.get_context("spawn")
        for rank in range(size):
            here, there = context.Pipe()
            self.processes.append(context.Process(target=serve, args=(rank, size, there)))
            self.processes[-1].start()
            there.close()
            self.lines.append(here)

    def close(self) -> None:
        """Let them end."""
        for line in self.lines:
            line.close()
        for process in self.processes:
            process.join()
        self.lines.clear()
        self.processes.clear()


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--done", type=Path, help="file of rows that are measured: they are not run again")
    parser.add_argument("--rows", nargs="+", help="numbers of the rows to run; by default all")
    options = parse(parser)
    options.rounds = 1  # they are counts
    print_rows(options, measure_all(options))


def measure_all(options: argparse.Namespace) -> list[Found]:
    """The chosen rows, one after the other. They are exact counts, so none is repeated."""
    chosen = [ROWS[int(number)] for number in options.rows] if options.rows else list(ROWS)
    if options.quick:
        chosen = [ROWS[3]]
    found, ranks = [], Ranks()
    with tempfile.TemporaryDirectory(prefix="plan-memory-") as folder, contextlib.closing(ranks):
        place = Path(folder)
        make_documents(place, options.seed)
        for number, row in enumerate(chosen):
            model = model_of(row, place, options)
            before = known(options, row, place, model)
            found.append(before or ranks.measure(row, place, model, number))
            if before is None:
                remember(options, found[-1])
            print(" | ".join(found[-1].cells()), flush=True)
    return found


def remember(options: argparse.Namespace, found: Found) -> None:
    """For a run of this script that goes on with `--done`."""
    if options.done:
        line = {"row": found.row.name, "peak": found.peak, "kept": found.kept}
        with options.done.open("a") as file:
            file.write(json.dumps(line) + "\n")


def known(options: argparse.Namespace, row: Row, place: Path, model: Path) -> Found | None:
    """What an earlier run of this script measured, against the estimate of now."""
    if not options.done or not options.done.exists():
        return None
    lines = [json.loads(line) for line in options.done.read_text().splitlines()]
    measured = next((one for one in lines if one["row"] == row.name), None)
    if measured is None:
        return None
    plan = planned(Recipe.model_validate(recipe_of(row, place, model, 0)), World(size=row.ranks, num_nodes=row.nodes))
    return Found(row, measured["peak"], measured["kept"], plan)


def print_rows(options: argparse.Namespace, found: list[Found]) -> None:
    """Write the results."""
    table = Comparison("Peak of a rank's tensors [MiB]", tuple(found))
    settings = {"model": {**HEADS, **(TINY if options.quick else SIZES)}, "micro_batches": 2, "steps": 1}
    write_results("plan_memory", options, CLAIM, [table], settings)


if __name__ == "__main__":
    main()
