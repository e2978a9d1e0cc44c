"""Packing a million sequence lengths: how full, how fast, how long a sample waits, and what is lost; beside TRL.

Ours is the buffer of a logical stream, in which 64 samples wait: it packs while it reads. TRL's `pack_dataset` is given
a table of token ids and sees a thousand rows at once; `bfd` cuts off what is longer than a sequence, `bfd_split`
splits it. For scale: how fast one core tokenises samples of these lengths.

python benchmarks/packing.py [--samples N] [--quick]
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import harness
import numpy as np

from ftlaunch.distributed.data.pack import Address, PackBuffer, Waiting, next_bin

SEQUENCE_LENGTH = 4096
BUFFER = 64
CLAIM = (
    "A million samples, packed into sequences of 4,096 tokens while 64 wait: at least 99.8 % full, no token lost, and "
    "no sample waits for more than 64 sequences, in under a tenth of the time that tokenising takes. What is longer "
    "than a sequence is split by us and by `bfd_split`, and cut off by `bfd`. TRL packs the first tenth of them (it "
    "looks at a thousand at a time); its time includes writing its table, which ours leaves to collating."
)


class Packed(NamedTuple):
    """What came out. `longest_wait`: sequences that were begun between a sample's arrival and its own."""

    sequences: int
    tokens: int
    seconds: float
    longest_wait: int | None = None


def log_normal(count: int, rng: np.random.Generator) -> list[int]:
    """Documents: median 245 tokens, a long tail."""
    return np.clip(rng.lognormal(5.5, 1.0, count).astype(int), 8, 4 * SEQUENCE_LENGTH).tolist()


def instructions(count: int, rng: np.random.Generator) -> list[int]:
    """Short questions and answers, a tenth of them long: what instruction sets look like."""
    short, long = rng.lognormal(5.0, 0.6, count), rng.lognormal(7.2, 0.5, count)
    return np.clip(np.where(rng.random(count) < 0.9, short, long).astype(int), 16, SEQUENCE_LENGTH).tolist()


def ours(lengths: list[int]) -> Packed:
    """The packing buffer, fed one sample at a time."""
    pieces = (piece for length in lengths for piece in split(length))
    coming = [Waiting((), Address(0, number), piece) for number, piece in enumerate(pieces)][::-1]
    buffer, entered = PackBuffer(), []
    bins: list[list[Waiting]] = []

    def refill() -> None:
        while len(buffer) < BUFFER and coming:
            buffer.add(coming.pop())
            entered.append(len(bins))

    start = time.perf_counter()
    while chosen := next_bin(buffer, SEQUENCE_LENGTH, refill):
        bins.append(chosen)
    seconds = time.perf_counter() - start
    wait = max(number - entered[one.address.row] for number, chosen in enumerate(bins) for one in chosen)
    return Packed(len(bins), sum(one.length for chosen in bins for one in chosen), seconds, wait)


def split(length: int) -> list[int]:
    """Whole sequences, and what is left."""
    whole, rest = divmod(length, SEQUENCE_LENGTH)
    return [SEQUENCE_LENGTH] * whole + ([rest] if rest else [])


def trl(lengths: list[int], strategy: str) -> Packed:
    """TRL's `pack_dataset` on a table of token ids."""
    import pyarrow as pa
    from datasets import Dataset, disable_progress_bars
    from trl import pack_dataset

    disable_progress_bars()
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(np.zeros(offsets[-1], np.int8)))
    data = Dataset(pa.table({"input_ids": ids}))
    start = time.perf_counter()
    packed = pack_dataset(data, SEQUENCE_LENGTH, strategy)
    seconds = time.perf_counter() - start
    sizes = np.asarray([len(column) for column in packed.data.column("input_ids")])
    return Packed(len(sizes), int(sizes.sum()), seconds)


def tokenise(lengths: list[int]) -> float:
    """Samples a second of a byte-level BPE tokenizer (Hugging Face `tokenizers`) on text of such lengths."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted((harness.ROOT / "distributed").rglob("*.py")))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.train_from_iterator([text], trainers.BpeTrainer(vocab_size=8_000, show_progress=False))
    offsets = tokenizer.encode(text).offsets
    some = lengths[:1_000]
    texts = [text[: offsets[min(length, len(offsets)) - 1][1]] for length in some]
    start = time.perf_counter()
    for each in texts:
        tokenizer.encode(each)
    return len(some) / (time.perf_counter() - start)


def side(lengths: list[int], pack: Callable[[list[int]], Packed], seen: dict[str, Any], name: str) -> float:
    """Samples a second; what was packed is noted."""
    packed = pack(lengths)
    total = sum(lengths)
    seen[name] = {
        "full": packed.tokens / (packed.sequences * SEQUENCE_LENGTH),
        "sequences": packed.sequences,
        "tokens_lost": total - packed.tokens,
        "share_lost": (total - packed.tokens) / total,
        "longest_wait_sequences": packed.longest_wait,
    }
    return len(lengths) / packed.seconds


def main() -> None:
    """Both length distributions."""
    parser = harness.arguments(__doc__ or "")
    parser.add_argument("--samples", type=int, default=1_000_000, help="lengths to pack")
    options = harness.parse(parser)
    count = 5_000 if options.quick else options.samples
    rng = np.random.default_rng(options.seed)
    tables, quality = [], {}
    for title, make in (("log-normal documents", log_normal), ("instructions", instructions)):
        lengths, seen = make(count, rng), {}
        sides = {"ftlaunch": partial(side, lengths, ours, seen, "ftlaunch")}
        for strategy in ("bfd", "bfd_split"):
            name = f"TRL {strategy}"
            sides[name] = partial(side, lengths[: count // 10], partial(trl, strategy=strategy), seen, name)
        sides["tokenising"] = partial(tokenise, lengths)
        values = harness.interleave(sides, options.rounds, title)
        tables.append(harness.Table(f"{title}: speed", "samples/s", "TRL bfd", values))
        quality[title] = seen
    settings = {"samples": count, "sequence_length": SEQUENCE_LENGTH, "buffer": BUFFER, "quality": quality}
    harness.write_results("packing", options, CLAIM + "\n\n" + described(quality), tables, settings)


def described(quality: dict[str, dict[str, Any]]) -> str:
    """What was packed, as a table."""
    lines = ["| lengths | side | full | tokens lost | longest wait [sequences] |", "|---|---|---|---|---|"]
    for title, sides in quality.items():
        for name, seen in sides.items():
            wait = "" if seen["longest_wait_sequences"] is None else seen["longest_wait_sequences"]
            lines.append(f"| {title} | {name} | {seen['full']:.2%} | {seen['share_lost']:.2%} | {wait} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
