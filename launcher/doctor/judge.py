"""What measurements of some nodes mean: findings by node, and which nodes are unfit. Pure.

A node is judged against the others, not against a table of hardware: what is right for this cluster is what most of its
nodes have.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .. import units
from .gpus import parse_smi, parse_xids

Verdict = Literal["good", "odd", "bad"]
"""`odd`: worth a look, and no reason to leave the node out."""

CLOCK_ODD_S, CLOCK_BAD_S = 1.0, 5.0
"""Off the others'. Signs of life and credentials of object stores carry the time."""

FREE_BYTES = 2 << 30
SLOW_ODD, SLOW_BAD = 0.6, 0.25
"""Of the nodes' median speed. Other work on a node explains half; a quarter is a broken one."""

LINK_ODD, LINK_BAD = 0.5, 0.2
SLOW_LINK_BYTES_PER_S = 50e6
"""Below this no link is fit for training, whatever the others are: less than half of one gigabit Ethernet."""

STORAGE_ODD_S = 10.0


@dataclass(frozen=True)
class Measured:
    """Of one node, what `cluster/host_probe.py` answers; a part that could not be measured is missing. `ahead_s`: its
    clock, against the asking machine's. `sent`: other node -> bytes a second, or an error."""

    facts: Mapping[str, Any]
    ahead_s: float = 0.0
    compute: Mapping[str, Any] | None = None
    storage: Mapping[str, Any] | None = None
    sent: Mapping[str, Mapping[str, Any]] | None = None
    error: str = ""
    """Why nothing else is known of it."""


@dataclass(frozen=True)
class Finding:
    """One check of one node."""

    node: str
    check: str
    verdict: Verdict
    text: str


Nodes = Mapping[str, Measured]


def judge(nodes: Nodes) -> list[Finding]:
    """Every check of every node, in the order of nodes."""
    found = [
        finding
        for node, measured in nodes.items()
        if measured.error
        for finding in [Finding(node, "reach", "bad", measured.error)]
    ]
    reached = {node: measured for node, measured in nodes.items() if not measured.error}
    for check in CHECKS:
        found += check(reached)
    order = {node: number for number, node in enumerate(nodes)}
    return sorted(found, key=lambda finding: order[finding.node])


def unfit(findings: Sequence[Finding]) -> dict[str, list[str]]:
    """Bad nodes, and why."""
    found: dict[str, list[str]] = {}
    for finding in findings:
        if finding.verdict == "bad":
            found.setdefault(finding.node, []).append(finding.text)
    return found


# --- one node by itself -----------------------------------------------------------------------------------------------


def _disks(nodes: Nodes) -> Iterator[Finding]:
    for node, measured in nodes.items():
        for folder, free in measured.facts["free_bytes"].items():
            where = folder or "the temporary folder"
            if free is None:
                yield Finding(node, "disk", "bad", f"{where} is not there")
                continue
            text = f"{units.size(free)} free at {where}"
            yield Finding(node, "disk", "bad" if free < FREE_BYTES else "good", text)


def _storage(nodes: Nodes) -> Iterator[Finding]:
    for node, measured in nodes.items():
        found = measured.storage
        if found is None:
            continue
        if "error" in found:
            yield Finding(node, "storage", "bad", f"cannot write and read at checkpoint.path: {found['error']}")
        elif not found["same"]:
            yield Finding(node, "storage", "bad", "reads something else at checkpoint.path than it has written")
        else:
            seconds = found["write_s"] + found["read_s"]
            text = f"{units.size(found['bytes'])} written and read in {units.duration(seconds)}"
            yield Finding(node, "storage", "odd" if seconds > STORAGE_ODD_S else "good", text)


def _gpus(nodes: Nodes) -> Iterator[Finding]:
    for node, measured in nodes.items():
        faults, remarks = parse_xids(measured.facts["kernel"] or "")
        text = measured.facts["smi"]
        gpus = []
        try:
            gpus = parse_smi(text) if text else []
        except ValueError as error:
            faults.append(str(error))
        for number, gpu in enumerate(gpus):
            faults += [f"GPU {number} ({gpu.name}): {fault}" for fault in gpu.faults]
            remarks += [f"GPU {number} ({gpu.name}): {remark}" for remark in gpu.remarks]
        yield from (Finding(node, "gpu health", "bad", fault) for fault in faults)
        yield from (Finding(node, "gpu health", "odd", remark) for remark in remarks)
        if gpus and not faults and not remarks:
            yield Finding(node, "gpu health", "good", f"{len(gpus)} GPUs without errors")


# --- one against the others -------------------------------------------------------------------------------------------


def _clocks(nodes: Nodes) -> Iterator[Finding]:
    usual = statistics.median_low([0.0, *(measured.ahead_s for measured in nodes.values())])
    for node, measured in nodes.items():
        off = measured.ahead_s - usual
        verdict: Verdict = "bad" if abs(off) > CLOCK_BAD_S else "odd" if abs(off) > CLOCK_ODD_S else "good"
        yield Finding(node, "clock", verdict, f"{off:+.1f} s off the others'; let NTP set it" if off else "right")


def _versions(nodes: Nodes) -> Iterator[Finding]:
    """Where there is no majority, what the first nodes have is right: one of them holds the driver."""
    names = dict.fromkeys(name for measured in nodes.values() for name in measured.facts["versions"])
    usual = {
        name: Counter(measured.facts["versions"].get(name) for measured in nodes.values()).most_common(1)[0][0]
        for name in names
    }
    for node, measured in nodes.items():
        has = measured.facts["versions"]
        other = [name for name in names if has.get(name) != usual[name]]
        said = ", ".join(f"{name} {has.get(name) or 'is missing'} (others: {usual[name] or 'none'})" for name in other)
        yield Finding(node, "versions", "bad" if other else "good", said or "as the others'")


def _compute(nodes: Nodes) -> Iterator[Finding]:
    cpus = {node: m.compute["cpu"] for node, m in nodes.items() if m.compute is not None}
    yield from _devices("compute", {(node, "CPU"): cpu for node, cpu in cpus.items()}, "gflops", "GFLOP/s")
    gpus: dict[tuple[str, str], Mapping[str, Any]] = {}
    for node, measured in nodes.items():
        found = (measured.compute or {}).get("gpu")
        if isinstance(found, Mapping):
            yield Finding(node, "gpu compute", "bad", f"no GPU computes: {found.get('error')}")
        for each in found if isinstance(found, list) else []:
            gpus[node, f"GPU {each['index']}"] = each
    yield from _devices("gpu compute", gpus, "tflops", "TFLOP/s")


def _devices(
    check: str, devices: Mapping[tuple[str, str], Mapping[str, Any]], key: str, unit: str
) -> Iterator[Finding]:
    speeds = [device[key] for device in devices.values() if key in device]
    usual = statistics.median(speeds) if speeds else 0.0
    for (node, name), device in devices.items():
        if "error" in device:
            yield Finding(node, check, "bad", f"{name}: {device['error']}")
        elif not device["exact"]:
            yield Finding(node, check, "bad", f"{name} computes wrong products of small integers")
        elif not device["memory_kept"]:
            yield Finding(node, check, "bad", f"memory of {name} does not keep what is written to it")
        else:
            share = device[key] / usual
            verdict: Verdict = "bad" if share < SLOW_BAD else "odd" if share < SLOW_ODD else "good"
            slow = f", {share:.0%} of the usual" if verdict != "good" else ""
            text = f"{name}: {device[key]:.1f} {unit}{slow}; {units.size(device['memory_bytes'])} of memory kept"
            yield Finding(node, check, verdict, text)


def _links(nodes: Nodes) -> Iterator[Finding]:
    """A node is as good as its best link, by the worse of the two ways: with one bad node among few, most links are
    bad, but every good node has a good one."""
    ways = {(a, b): way for a, m in nodes.items() for b, way in (m.sent or {}).items() if b in nodes}
    for (a, b), way in ways.items():
        if "error" in way:
            yield Finding(a, "network", "odd", f"does not reach {b}: {way['error']}")
    speed = {pair: way.get("bytes_per_s", 0.0) for pair, way in ways.items()}
    both = {(a, b): min(speed[a, b], speed[b, a]) for a, b in speed if (b, a) in speed}
    best = {node: max((rate for (a, _), rate in both.items() if a == node), default=None) for node in nodes}
    known = [rate for rate in best.values() if rate is not None]
    if not known:
        return
    usual = statistics.median_high(known)
    for node, rate in best.items():
        if rate is None:
            continue
        text = f"{units.size(rate)}/s on its best link"
        if rate < LINK_BAD * usual:
            yield Finding(node, "network", "bad", f"{text}, where the others have {units.size(usual)}/s")
        else:
            slow = rate < LINK_ODD * usual or rate < SLOW_LINK_BYTES_PER_S
            yield Finding(node, "network", "odd" if slow else "good", text)


CHECKS: tuple[Callable[[Nodes], Iterator[Finding]], ...] = (
    _versions, _clocks, _disks, _compute, _gpus, _links, _storage,
)  # fmt: skip
