"""Ranks are killed while they save: the newest committed checkpoint is always whole, and the run goes on from it.

Saves are made slow enough to be met in every phase (`slow_disk.py`, `slow_link.py`); the product knows nothing of it.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  takes long: once, before the ranks are forked
import pytest
import transformers.models.llama.modeling_llama  # noqa: F401  imported before the ranks are forked
from harness import Ranks, run_distributed, start_distributed
from kills import Aim, Left, Medium, contents, draw_aims, look, metrics, plain_rank, strike, watched_rank
from ledger import RESULTS, Ledger, commit
from save_phases import PHASES, Marks
from servers import moto_process, slow_link_process
from tiny import recipe_for
from training import STRATEGIES

from ftlaunch.distributed.checkpoint.layout import MAX_FILE_BYTES

SEED = 5
SAVE_S = 2.0
"""What a save takes at least."""

PAUSE_S = 0.01
SMALL_FILE_BYTES = 150_000
"""A small model has several of these, and each rank some to write."""

ADAPTER = {"adapter": {"type": "lora", "rank": 16, "alpha": 32}}
BF16 = {"model": {"dtype": "bfloat16"}}
PART_FROZEN = {"model": {"dtype": "bfloat16", "train_layers": ["model.layers.2.*", "lm_head*"]}}


@dataclass(frozen=True)
class Case:
    """A run that is to be killed `kills` times."""

    medium: str
    strategy: str
    size: int
    kills: int
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        kind = next((name for name, changes in KINDS.items() if changes is self.changes), "full")
        return f"{self.medium.replace(' ', '-').lower()}-{self.strategy}-{self.size}-{kind}"

    def recipe(self, folder: Path, where: str, name: str, max_steps: int, mode: str = "sync") -> dict[str, Any]:
        train = {"max_steps": max_steps, "lr_scheduler": "constant", "global_batch_size": 6, "micro_batch_size": 1}
        return recipe_for(
            folder,
            name=name,
            strategy=STRATEGIES[self.strategy],
            train=train,
            evaluate={"at_start": False, "at_end": False},
            checkpoint={"path": where, "every_steps": 1, "mode": mode},
            **self.changes,
        )


KINDS = {"adapter": ADAPTER, "bf16": BF16, "part-frozen": PART_FROZEN}

CASES = (
    Case("local disk", "fsdp", 2, 15, BF16),
    Case("local disk", "zero3", 2, 15),
    Case("local disk", "ddp", 3, 15),
    Case("local disk", "fsdp", 2, 15, ADAPTER),
    Case("local disk", "fsdp", 2, 15, PART_FROZEN),
    Case("shared disk", "fsdp", 3, 15),
    Case("shared disk", "zero1", 2, 15, BF16),
    Case("shared disk", "zero2", 2, 15),
    Case("shared disk", "zero3", 2, 15, ADAPTER),
    Case("shared disk", "fsdp", 2, 15, PART_FROZEN),
    Case("S3", "fsdp", 2, 13, BF16),
    Case("S3", "zero3", 2, 13),
    Case("S3", "ddp", 2, 13),
    Case("S3", "fsdp", 3, 13, ADAPTER),
)


class Campaign:
    """One case, carried through below `folder`."""

    def __init__(self, case: Case, folder: Path, save_s: float) -> None:
        self.case, self.folder = case, folder
        one_file = case.changes is ADAPTER  # peft reads no other
        self.medium = Medium(case.medium, max_file_bytes=MAX_FILE_BYTES if one_file else SMALL_FILE_BYTES)
        self.marks = Marks(case.size)
        self.kills: list[dict[str, Any]] = []
        self.save_bytes = sum(map(len, self.undisturbed(1).values()))
        self.rate = self.save_bytes / save_s

    def undisturbed(self, max_steps: int) -> dict[str, bytes]:
        """The files that a run of so many steps ends with."""
        where = str(self.folder / "plain")
        recipe = self.case.recipe(self.folder, where, f"to-{max_steps}", max_steps)
        place = str(self.scratch())
        run_distributed(plain_rank, self.case.size, recipe, place, self.medium, timeout_s=300.0, connect=False)
        return contents(f"{where}/to-{max_steps}")

    def scratch(self) -> Path:
        """A new folder for a start: a place to meet, and what was said."""
        starts = self.folder / "starts"
        starts.mkdir(exist_ok=True)
        place = starts / str(len(list(starts.iterdir())))
        place.mkdir()
        return place

    def carry_through(self, where: str, rng: random.Random) -> None:
        """Kill after kill, until so many fell in a save; then to the end, which is that of a run left alone."""
        writers = 1 if self.case.changes is ADAPTER and self.case.medium != "local disk" else self.case.size
        rate = 1e9 if self.case.medium == "S3" else self.rate / writers
        self.medium = replace(self.medium, bytes_per_s=rate, pause_s=PAUSE_S)
        left, missing = Left(), self.case.kills
        while missing:
            for aim in draw_aims(rng, self.medium, self.case.size, missing):
                left = self.kill_once(where, aim, left)
            missing = self.case.kills - sum(kill["phase"] != PHASES[0] for kill in self.kills)
            assert len(self.kills) < 3 * self.case.kills
        self.end(where, left)

    def start(self, where: str, mode: str, max_steps: int = 10_000) -> tuple[Ranks, Path]:
        """The run's next attempt, on the slow medium."""
        self.marks.begin_attempt()
        recipe, place = self.case.recipe(self.folder, where, "run", max_steps, mode), self.scratch()
        watched = recipe, str(place), self.medium, self.marks
        return start_distributed(watched_rank, self.case.size, *watched, connect=False), place

    def look(self, where: str) -> Left:
        """Raises for a checkpoint that is not whole."""
        return look(f"{where}/run", str(self.folder / "model"), is_adapter=self.case.changes is ADAPTER)

    def kill_once(self, where: str, aim: Aim, left: Left) -> Left:
        """What the attempt leaves, which found `left`."""
        mode = ("sync", "async")[len(self.kills) % 2]
        ranks, place = self.start(where, mode)
        kill = strike(ranks, self.marks, aim, mode)
        check_resumed(place, left)
        found = self.look(where)
        assert found.step >= left.step
        self.kills.append({**asdict(kill), "newest": found.step, "bytes": found.bytes, "files": found.files})
        return found

    def end(self, where: str, left: Left) -> None:
        steps = left.step + 2
        ranks, place = self.start(where, "sync", steps)
        outcomes = ranks.join(300.0)
        assert [outcome.value for outcome in outcomes] == ["finished"] * self.case.size, outcomes
        check_resumed(place, left)
        assert self.look(where).step == steps
        ours, theirs = contents(f"{where}/run"), self.undisturbed(steps)
        assert ours.keys() == theirs.keys()
        assert [name for name in theirs if ours[name] != theirs[name]] == []


def check_resumed(place: Path, left: Left) -> None:
    """The attempt went on from the newest committed checkpoint, and found no fault with any."""
    said = (place / "said.txt").read_text().splitlines()
    assert next(line for line in said if line.startswith("step ")) == f"step {left.step + 1}", (said, left)
    assert [line for line in said if "checkpoint" in line] == []


@contextmanager
def medium_of(case: Case, folder: Path, bytes_per_s: float) -> Iterator[str]:
    """Where runs lie on the case's medium."""
    if case.medium != "S3":
        yield str(folder / "runs")
        return
    with moto_process(folder) as port, slow_link_process(folder, port, bytes_per_s, PAUSE_S) as slow_port:
        bucket = urllib.request.Request(f"http://127.0.0.1:{port}/kills", method="PUT")
        urllib.request.urlopen(bucket).close()
        settings = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{slow_port}", "AWS_DEFAULT_REGION": "us-east-1"}
        with patch.dict(os.environ, {**settings, "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}):
            yield "s3://kills/runs"


def show(case: Case, folder: Path, seed: str, save_s: float) -> dict[str, Any]:
    """Carry a case through; what happened."""
    folder.mkdir()
    campaign = Campaign(case, folder, save_s)
    with medium_of(case, folder, campaign.rate) as where:
        campaign.carry_through(where, random.Random(seed))
        seconds = [line["seconds"] for line in metrics(f"{where}/run") if line["kind"] == "checkpoint"]
    shutil.rmtree(folder)
    saves = {"count": len(seconds), "shortest_s": min(seconds), "longest_s": max(seconds)}
    made_up = {"save_bytes": campaign.save_bytes, "bytes_per_s": round(campaign.rate)}
    return {**made_up, "saves_that_ended": saves, "final_files_equal": True, "kills": campaign.kills}


@pytest.mark.parametrize("case", [Case("local disk", "fsdp", 2, 3, BF16), Case("S3", "ddp", 2, 1)], ids=str)
def test_some_kills_in_saves(tmp_path, case):
    shown = show(case, tmp_path / "run", f"{SEED} {case.name}", save_s=0.3)
    assert sum(kill["phase"] != PHASES[0] for kill in shown["kills"]) == case.kills


@pytest.mark.evidence
def test_kills_in_saves(tmp_path):
    """200 kills in saves of 2 s or longer; writes benchmarks/results/killed_saves.{json,md}."""
    ledger = Ledger("killed-saves", seed=SEED, cases=[(case.name, case.kills) for case in CASES])
    for case in CASES:
        if ledger.begin(case.name):
            ledger.add({case.name: show(case, tmp_path / case.name, f"{SEED} {case.name}", save_s=1.3 * SAVE_S)})
    if len(ledger.pieces) < len(CASES):
        ledger.pause()
    report = report_of(ledger.pieces)
    (RESULTS / "killed_saves.json").write_text(json.dumps(report, indent=1) + "\n")
    (RESULTS / "killed_saves.md").write_text(page_of(report))
    assert report["kills_in_saves"] >= 200
    assert set(report["by_phase"]) == set(PHASES[1:])
    assert report["shortest_save_s"] >= SAVE_S
    ledger.close()


# --- what is written down -------------------------------------------------------------------------------------------


def report_of(pieces: dict[str, Any]) -> dict[str, Any]:
    kills = [
        {"case": case.name, "medium": case.medium, **kill} for case in CASES for kill in pieces[case.name]["kills"]
    ]
    hits = [kill for kill in kills if kill["phase"] != PHASES[0]]
    by_phase = {
        phase: dict(Counter(kill["medium"] for kill in hits if kill["phase"] == phase))
        for phase in PHASES[1:]
        if any(kill["phase"] == phase for kill in hits)
    }
    cases = {name: {key: value for key, value in piece.items() if key != "kills"} for name, piece in pieces.items()}
    return {
        "claim": "a rank, or all ranks, killed at any moment of a save leave the newest committed checkpoint whole, "
        "and the run goes on from it, to the very bytes of a run that nobody disturbed (all checked after every kill)",
        "command": "make evidence NAME=test_kills_in_saves",
        "commit": commit(),
        "seed": SEED,
        "slow_media": "disk: the system's calls of a rank write 4 KiB at a time at `bytes_per_s` of the case over its "
        f"ranks, and wait {PAUSE_S} s before fsync, link, rename and unlink; S3: moto behind a proxy whose uplink has "
        f"`bytes_per_s` and whose answers come {PAUSE_S} s late; the product's code is as it is",
        "kills_in_saves": len(hits),
        "kills_between_saves": len(kills) - len(hits),
        "by_phase": by_phase,
        "by_victim": dict(Counter("all ranks" if kill["victim"] == "all ranks" else "one rank" for kill in hits)),
        "by_mode": dict(Counter(kill["mode"] for kill in hits)),
        "shortest_save_s": min(case["saves_that_ended"]["shortest_s"] for case in cases.values()),
        "cases": cases,
        "kills": kills,
    }


def page_of(report: dict[str, Any]) -> str:
    """The histogram, for readers."""
    media = list(dict.fromkeys(case.medium for case in CASES))
    lines = [
        "# Kills in saves",
        "",
        f"{report['kills_in_saves']} SIGKILLs ({report['by_victim']['one rank']} of one rank, "
        f"{report['by_victim']['all ranks']} of all ranks at once) in saves that take {report['shortest_save_s']:.1f} "
        f"s or longer; {report['by_mode']['async']} of them in mode async. After each: every byte of every committed "
        "checkpoint is what its manifest says, `from_pretrained` opens the newest, and the next attempt goes on from "
        f"it. All {len(CASES)} runs end with the very bytes of a run that nobody disturbed.",
        "",
        f"`{report['command']}`, seed {report['seed']}, commit {report['commit'][:12]}. Slow media: "
        f"{report['slow_media']}.",
        "",
        "| Phase | " + " | ".join(media) + " | all | |",
        "|---|" + "--:|" * (len(media) + 1) + "---|",
    ]
    for phase, counts in report["by_phase"].items():
        total = sum(counts.values())
        cells = [str(counts.get(medium, 0)) for medium in media]
        lines.append(f"| {phase} | " + " | ".join(cells) + f" | {total} | {'█' * total} |")
    lines += ["", "| Run | kills | bytes of a save | saves that ended, s |", "|---|--:|--:|---|"]
    for case in CASES:
        shown = report["cases"][case.name]
        saves = shown["saves_that_ended"]
        kills = sum(kill["case"] == case.name for kill in report["kills"])
        spread = f"{saves['count']}: {saves['shortest_s']:.1f} to {saves['longest_s']:.1f}"
        lines.append(f"| {case.name} | {kills} | {shown['save_bytes']:,} | {spread} |")
    return "\n".join(lines) + "\n"
