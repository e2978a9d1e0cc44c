"""What every benchmark shares: sides that take turns, ratios of medians with their spread, results as files.

Times on a shared machine drift by more than what is measured, so nothing is said about a time alone. The sides take
turns (A B A B …), each round gives one ratio between neighbours in time, and the median of those ratios is the result.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("ftlaunch", "torch", "transformers", "deepspeed", "ray", "accelerate", "numpy")
MIN_ROUNDS = 5

Rounds = dict[str, list[float]]
"""Side -> one value a round."""


def arguments(description: str) -> argparse.ArgumentParser:
    """The options that every benchmark takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=MIN_ROUNDS, help="rounds in which every side has one turn")
    parser.add_argument("--quick", action="store_true", help="the smallest setting, to see that it runs; one round")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results")
    parser.add_argument("--seed", type=int, default=0, help="seed of models and data")
    parser.add_argument("--commit", help="what is measured, where the code lies in no repository")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Read the options; fewer rounds than five count only with --quick."""
    options = parser.parse_args()
    options.rounds = 1 if options.quick else max(MIN_ROUNDS, options.rounds)
    return options


def interleave(sides: Mapping[str, Callable[[], float]], rounds: int, title: str) -> Rounds:
    """Give every side one turn a round, in the same order."""
    values: Rounds = {name: [] for name in sides}
    for number in range(1, rounds + 1):
        for name, measure in sides.items():
            values[name].append(measure())
            print(f"{title}, round {number}/{rounds}: {name} {values[name][-1]:.4g}", file=sys.stderr, flush=True)
    return values


@dataclass(frozen=True)
class Ratio:
    """Of one side to another, paired by round: the median and the extremes."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float], base: Sequence[float]) -> Ratio:
        """values / base, round by round."""
        ratios = [value / other for value, other in zip(values, base, strict=True)]
        return cls(statistics.median(ratios), min(ratios), max(ratios))

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.low:.3g} … {self.high:.3g})"


def spread(values: Sequence[float]) -> float:
    """Half the distance between the extremes, as a share of the median."""
    return (max(values) - min(values)) / 2 / statistics.median(values)


@dataclass(frozen=True)
class Table:
    """One setting: the sides' values, and each side's ratio to the base."""

    title: str
    unit: str
    base: str
    values: Rounds
    note: str = ""
    """What the numbers do not say."""

    def ratios(self) -> dict[str, Ratio]:
        """Every side but the base, to the base."""
        base = self.values[self.base]
        sides = {name: values for name, values in self.values.items() if name != self.base}
        return {name: Ratio.of(values, base) for name, values in sides.items()}

    def markdown(self) -> str:
        """A table for people."""
        ratios = self.ratios()
        head = f"| side | median [{self.unit}] | spread | side / {self.base} (range) |"
        lines = [f"### {self.title}", "", head, "|---|---|---|---|"]
        for name, values in self.values.items():
            ratio = str(ratios[name]) if name in ratios else "1"
            lines.append(f"| {name} | {statistics.median(values):.4g} | ± {spread(values):.1%} | {ratio} |")
        return "\n".join([*lines, *(["", self.note] if self.note else [])])

    def record(self) -> dict[str, Any]:
        """The same for programs."""
        return {
            "title": self.title,
            "unit": self.unit,
            "base": self.base,
            "values": self.values,
            "medians": {name: statistics.median(values) for name, values in self.values.items()},
            "ratios": {name: vars(ratio) for name, ratio in self.ratios().items()},
        }


def write_results(
    name: str, options: argparse.Namespace, claim: str, tables: Sequence[Table], settings: Mapping[str, Any]
) -> None:
    """Print the tables, and write NAME.json and NAME.md."""
    about = _about(options)
    record = {"benchmark": name, "claim": claim, **about, "settings": dict(settings)}
    text = "\n\n".join([f"# {name}", claim, _provenance(about), *(table.markdown() for table in tables)]) + "\n"
    options.out.mkdir(parents=True, exist_ok=True)
    body = json.dumps({**record, "tables": [table.record() for table in tables]}, indent=1)
    (options.out / f"{name}.json").write_text(body + "\n")
    (options.out / f"{name}.md").write_text(text)
    print(text)


def _provenance(about: Mapping[str, Any]) -> str:
    load = ", ".join(f"{value:.1f}" for value in about["load_average"])
    machine = f"{about['cores']} cores" + (f", {about['gpu']}" if about["gpu"] else "")
    return (
        f"`{about['command']}` at {about['commit'][:12]}, {about['rounds']} rounds, seed {about['seed']}, {machine}; "
        f"load average at the end (1, 5, 15 minutes): {load}."
    )


def _about(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "commit": options.commit or _git("rev-parse", "HEAD"),
        "uncommitted_changes": _git("status", "--porcelain", "--untracked-files=no") != "",
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *_shown(sys.argv[1:])]),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "rounds": options.rounds,
        "quick": options.quick,
        "seed": options.seed,
        "cores": len(os.sched_getaffinity(0)),
        "gpu": gpu_name() if getattr(options, "device", "cpu") == "cuda" else None,
        "machine": platform.machine(),
        "python": platform.python_version(),
        "versions": versions(),
        "load_average": os.getloadavg(),
    }


def _shown(words: Sequence[str]) -> list[str]:
    """Arguments as they may be published: a folder of this machine is its name."""
    return [Path(word).name if os.sep in word else word for word in words]


def versions() -> dict[str, str]:
    """Of what is compared."""
    found = {distribution.name for distribution in importlib.metadata.distributions()}
    return {name: importlib.metadata.version(name) for name in PACKAGES if name in found}


def gpu_name() -> str:
    """The first GPU."""
    import torch

    return torch.cuda.get_device_name(0)


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def program(name: str) -> str:
    """A console script of the environment that this runs in."""
    return str(Path(sys.executable).parent / name)


def run_checked(command: Sequence[str], cwd: Path, environment: Mapping[str, str] | None = None) -> str:
    """Run to the end; standard output. What a failing command said is shown."""
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **(environment or {})}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        raise SystemExit(f"{' '.join(command)} failed with {done.returncode}:\n{said}")
    return done.stdout
