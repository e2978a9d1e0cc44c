"""Measures nodes: everything at once where that disturbs nothing, pairs of nodes in rounds."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol

from ...recipes.errors import InfrastructureError
from .judge import Measured, judge

ALIKE = ("ray", "torch", "transformers", "peft", "numpy", "safetensors", "tokenizers", "pyarrow")
"""Packages of which all nodes must have the same version: they speak with each other, or compute the same numbers."""

LONGEST_S = 75.0
"""For all that is measured; pairs of nodes that have not had their turn by then are left out."""

AT_ONCE = 64

SPEEDS = ("network", "compute")
"""Checks of `judge` that other work on a node can disturb."""


class NodeError(InfrastructureError):
    """A node could not be asked."""


class Prober(Protocol):
    """Something that calls the functions of `cluster/host_probe.py` on nodes. A context: leaving it leaves nothing
    there."""

    @property
    def nodes(self) -> Sequence[str]:
        """Their names."""
        ...

    @property
    def addresses(self) -> Mapping[str, str]:
        """By which nodes reach each other; empty for a single node."""
        ...

    @property
    def unreached(self) -> Mapping[str, str]:
        """Nodes that cannot be asked, and why."""
        ...

    def ask(self, node: str, probe: str, **question: Any) -> Any:
        """Raises NodeError."""
        ...


@dataclass(frozen=True)
class Wanted:
    """What to look at. `storage`: URL that runs write to; `environ`: variables that they get; `folders`: on nodes'
    disks, "" for their temporary folder; `gpus`: whether nodes are to have any."""

    storage: str | None = None
    environ: Mapping[str, str] | None = None
    folders: Sequence[str] = ("",)
    gpus: bool = True


Say = Callable[[str], None]


def examine(
    prober: Prober, wanted: Wanted, say: Say, clock: Callable[[], float] = time.monotonic
) -> dict[str, Measured]:
    """What all nodes measured, by name."""
    began_s = clock()
    measured = {node: Measured({}, error=why) for node, why in prober.unreached.items()}
    say(f"asking {_nodes(len(prober.nodes))} what there is …")
    measured |= _together(prober.nodes, lambda node: _facts(prober, node, wanted))
    fit = [node for node in prober.nodes if not measured[node].error]
    say("computing on all of them …")
    gpus = wanted.gpus and any(measured[node].facts["smi"] for node in fit)
    measured |= _together(fit, lambda node: _computed(prober, node, measured[node], gpus=gpus))
    if wanted.storage is not None:
        say(f"writing to and reading from {wanted.storage} …")
        measured |= _together(fit, lambda node: _stored(prober, node, measured[node], wanted))
    if len(fit) > 1 and prober.addresses:
        say("sending between them …")
        pairs = [pair for round_ in rounds(fit) for pair in round_]
        sent = _send(prober, fit, rounds(fit), began_s + LONGEST_S, clock)
        measured |= {node: replace(measured[node], sent=sent[node]) for node in fit}
        measured = _look_again(prober, measured, pairs, began_s + LONGEST_S, clock)
    return measured


def _look_again(
    prober: Prober,
    measured: dict[str, Measured],
    pairs: Sequence[tuple[str, str]],
    until_s: float,
    clock: Callable[[], float],
) -> dict[str, Measured]:
    """Nodes that seem slow are measured once more, one after the other, and the better of the two counts: they may
    have had something else to do for a moment."""
    slow = {finding.node for finding in judge(measured) if finding.verdict == "bad" and finding.check in SPEEDS}
    if not slow or slow == set(measured):
        return measured
    again = [[pair] for pair in pairs if slow & set(pair)]
    sent = _send(prober, list({node for pair in again for node in pair[0]}), again, until_s, clock)
    for node, answers in sent.items():
        better = {other: _better(answer, (measured[node].sent or {}).get(other)) for other, answer in answers.items()}
        measured[node] = replace(measured[node], sent={**(measured[node].sent or {}), **better})
    for node in sorted(slow):
        if clock() < until_s:
            measured[node] = _computed_again(prober, node, measured[node])
    return measured


def _better(answer: Mapping[str, Any], before: Mapping[str, Any] | None) -> Mapping[str, Any]:
    if before is None or answer.get("bytes_per_s", 0.0) > before.get("bytes_per_s", 0.0):
        return answer
    return before


def _computed_again(prober: Prober, node: str, measured: Measured) -> Measured:
    """With the faster of two measurements; a wrong product or lost memory stays one."""
    before = measured.compute or {}
    try:
        cpu = prober.ask(node, "compute", gpus=False)["cpu"]
    except NodeError:
        return measured
    known = before.get("cpu", {})
    if "gflops" not in cpu or cpu["gflops"] < known.get("gflops", float("inf")):
        return measured
    kept = {key: known[key] and cpu[key] for key in ("exact", "memory_kept")}
    return replace(measured, compute={**before, "cpu": {**cpu, **kept}})


def _nodes(count: int) -> str:
    return "1 node" if count == 1 else f"{count} nodes"


def _together(nodes: Sequence[str], do: Callable[[str], Measured]) -> dict[str, Measured]:
    """Of all nodes at once; why of those that cannot be asked."""

    def tried(node: str) -> Measured:
        try:
            return do(node)
        except NodeError as error:
            return Measured({}, error=str(error))

    with ThreadPoolExecutor(max(1, min(AT_ONCE, len(nodes)))) as pool:
        return dict(zip(nodes, pool.map(tried, nodes), strict=True))


def _facts(prober: Prober, node: str, wanted: Wanted) -> Measured:
    prober.ask(node, "ping")  # a first answer may take long, and the clock is read between two
    before = time.time()
    facts = prober.ask(node, "node_facts", packages=list(ALIKE), folders=list(wanted.folders))
    after = time.time()
    # nvidia-smi and dmesg come after the clock is read, so what the answer took beyond that is not known: the clock
    # is off by what lies outside of the whole question.
    ahead_s = max(0.0, facts["time"] - after) + min(0.0, facts["time"] - before)
    return Measured(facts, ahead_s)


def _computed(prober: Prober, node: str, measured: Measured, *, gpus: bool) -> Measured:
    return replace(measured, compute=prober.ask(node, "compute", gpus=gpus and bool(measured.facts["smi"])))


def _stored(prober: Prober, node: str, measured: Measured, wanted: Wanted) -> Measured:
    name = f".ftlaunch-doctor-{secrets.token_hex(8)}"
    found = prober.ask(node, "storage", url=wanted.storage, name=name, environ=dict(wanted.environ or {}))
    return replace(measured, storage=found)


def rounds(nodes: Sequence[str]) -> Iterator[list[tuple[str, str]]]:
    """Every pair once, in rounds in which no node is in two pairs (the circle method)."""
    ring: list[str | None] = [*nodes, *([None] if len(nodes) % 2 else [])]
    for _ in range(len(ring) - 1):
        pairs = zip(ring[: len(ring) // 2], reversed(ring[len(ring) // 2 :]), strict=True)
        yield [(a, b) for a, b in pairs if a is not None and b is not None]
        ring = [ring[0], ring[-1], *ring[1:-1]]


def _send(
    prober: Prober,
    nodes: Sequence[str],
    pairs_by_round: Iterable[Sequence[tuple[str, str]]],
    until_s: float,
    clock: Callable[[], float],
) -> dict[str, dict[str, Any]]:
    """Between the nodes of each pair, there and back: sender -> receiver -> what `send` answers."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        ports = dict(zip(nodes, pool.map(lambda node: prober.ask(node, "sink")["port"], nodes), strict=True))
        sent: dict[str, dict[str, Any]] = {node: {} for node in nodes}

        def try_one(pair: tuple[str, str]) -> Any:
            sender, receiver = pair
            try:
                return prober.ask(sender, "send", address=prober.addresses[receiver], port=ports[receiver])
            except NodeError as error:
                return {"error": str(error)}

        for pairs in pairs_by_round:
            for turn in (list(pairs), [(b, a) for a, b in pairs]):
                if clock() > until_s:
                    return sent
                for (sender, receiver), answer in zip(turn, pool.map(try_one, turn), strict=True):
                    sent[sender][receiver] = answer
    return sent
