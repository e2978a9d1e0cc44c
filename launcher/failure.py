"""What a failure was, and what is done about it. Pure: a function from error texts to a verdict, by one table.

A mistake that the user can mend ends the run at once; so does a bug, which would only happen again. What a machine,
network or store did is tried again, elsewhere where that may help. A rank that merely saw the connection to another one
break tells nothing about the cause, so it is heard only where nobody else says more.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

Response = Literal["stop", "again", "elsewhere", "moved"]
"""End the run; start it again; again, without the node if there are others; again, at no cost to the budget, because
nothing failed: nodes come or go."""


class Resized(Exception):
    """More nodes are there: ranks have saved and left."""


class Preempted(Exception):
    """A node is about to be taken away: ranks have saved and left."""


class Hangs(Exception):
    """A rank that is stuck, or has others wait for ever."""


class NodeLost(Exception):
    """A node that does not answer any more."""


class NoRoom(Exception):
    """Too few nodes, for too long."""


@dataclass(frozen=True)
class Trouble:
    """What one rank, or the launcher, died of. `type`: the exception's class name; `text`: all it says."""

    type: str
    text: str


@dataclass(frozen=True)
class Failure:
    """A verdict. `says`: what happened, in words; `detail`: the error's own words; `node`: name of the one it happened
    on, `rank` of the rank, where they are known."""

    kind: str
    response: Response
    says: str
    detail: str = ""
    rank: int | None = None
    node: str | None = None
    exit_code: int = 2
    """Where the run ends with it."""

    @property
    def counts(self) -> bool:
        """Whether it draws on the budget."""
        return self.response in ("again", "elsewhere")

    @property
    def is_echo(self) -> bool:
        """Whether it only tells that another rank is gone."""
        return self.kind == ECHO

    def __str__(self) -> str:
        if self.response == "moved":
            return self.says
        place = [f"rank {self.rank}"] if self.rank is not None else []
        place += [f"on {self.node}"] if self.node else []
        return f"{' '.join(place)}: {self.says}" if place else self.says


ECHO = "peer"


@dataclass(frozen=True)
class Rule:
    """One line of the table; the first that fits counts. `type` and `text` are searched for in the trouble's."""

    kind: str
    response: Response
    says: str
    text: str = ""
    type: str = ""
    exit_code: int = 2

    def fits(self, trouble: Trouble) -> bool:
        """Whether a trouble is of this kind."""
        return bool(re.search(self.type, trouble.type)) and bool(re.search(self.text, trouble.text, re.IGNORECASE))


_ENDED = r"^(UserError|KeyedError|RankError|DamagedError|Superseded)$"
_CODE = (
    r"^(AssertionError|AttributeError|ImportError|ModuleNotFoundError|IndexError|KeyError|NameError|UnboundLocalError"
    r"|NotImplementedError|RecursionError|SyntaxError|TypeError|ValueError|ZeroDivisionError|UnicodeDecodeError)$"
)

# Ray's word for any worker that vanished names the OOM killer, SIGKILL and SIGSEGV as possible causes, all three; so
# none of those may be searched for without the words that only the real one has.
RULES = (
    Rule("mistake", "stop", "a mistake that you can mend", type=_ENDED, exit_code=1),
    Rule("resize", "moved", "nodes came: it goes on with more of them", type="^Resized$"),
    Rule("preempted", "moved", "the node is taken away", type="^(Preempted|PreemptionError)$"),
    Rule("preempted", "moved", "the node is taken away", r"preempted|spot (instance )?interruption|AUTOSCALER_DRAIN"),
    Rule("hang", "elsewhere", "it hangs", type="^Hangs$"),
    Rule("room", "stop", "there are too few nodes", type="^NoRoom$"),
    Rule("node", "again", "the node is gone", type="^NodeLost$"),
    Rule(
        "gpu memory", "stop", "a GPU's memory does not suffice: lower train.micro_batch_size, or shard more",
        r"CUDA out of memory|CUBLAS_STATUS_ALLOC_FAILED|torch\.OutOfMemoryError|CUDA error: out of memory", exit_code=1,
    ),
    Rule(
        "driver", "stop", "the GPU's driver is too old for this torch",
        r"driver version is insufficient|NVIDIA driver on your system is too old", exit_code=1,
    ),
    Rule("assertion", "stop", "an index is out of range on the GPU", r"device-side assert"),
    Rule(
        "gpu", "elsewhere", "a GPU is broken",
        r"\bXid\b|uncorrectable|fallen off the bus|ECC error|CUDA-capable device\(s\) is/are busy"
        r"|all CUDA-capable devices are busy|no CUDA-capable device is detected|No CUDA GPUs are available"
        r"|hardware stack|illegal instruction was encountered|unspecified launch failure"
        r"|illegal memory access|NVML_ERROR|GPU is lost|CUDA driver error|CUDA error: unknown error",
        r"",
    ),
    Rule(
        "host memory", "elsewhere", "the node's memory did not suffice",
        r"running low on memory|NODE_OUT_OF_MEMORY|oom-kill|Memory cgroup out of memory|Out of memory: Killed process"
        r"|can't allocate memory|Cannot allocate memory|std::bad_alloc|MemoryError",
    ),
    Rule(
        "node", "again", "the node is gone",
        r"its node has died|node was terminated|too many heartbeats|health check failed due to missing|node is dead"
        r"|local raylet died|raylet.{0,20}(dead|died)|lost contact with",
    ),
    Rule(
        "killed", "again", "the process was killed",
        r"worker process has died|worker unexpectedly exits|actor died unexpectedly|worker died unexpectedly"
        r"|actor is dead|is unavailable|actor was killed",
        r"Actor(Died|Unavailable)Error|RayActorError|WorkerCrashedError|WorkerHealthCheckFailedError|^$",
    ),
    Rule("disk", "elsewhere", "a disk of the node is full", r"no space left on device|disk quota exceeded"),
    Rule(
        "disk", "elsewhere", "a disk of the node fails",
        r"input/output error|stale file handle|read-only file system|transport endpoint is not connected",
    ),
    Rule(
        "collective", "again", "a collective did not end in time",
        r"watchdog caught collective operation timeout|collective operation timeout|ran for \d+ milliseconds before"
        r"|timed out waiting for (clients|\d+ms for)|NCCL.*timed? ?out",
    ),
    Rule(
        ECHO, "again", "the connection to another rank broke",
        r"connection closed by peer|connection reset by peer|connection to another rank broke|socket closed|broken pipe"
        r"|ncclRemoteError|remote process exited|connection was likely closed|NCCL communicator (was|has been) aborted"
        r"|recvValue failed|sendBytes failed|connectFullMesh failed|wait timeout after \d+ms|gloo.*(timed out|timeout)",
    ),
    Rule("network", "again", "NCCL failed", r"ncclSystemError|ncclUnhandledCudaError|ncclInternalError|NCCL error"),
    Rule("killed", "again", "the process does not answer", type="WorkerHealthCheckTimeoutError"),
    Rule("start", "again", "ranks could not be started", type="WorkerGroupStartupFailedError"),
    Rule(
        "storage", "again", "storage failed",
        r"cannot (read|write|list|create|delete|open|copy|look|store|fetch|stat|upload) \S+://|EndpointConnectionError"
        r"|SlowDown|503 Service|ServiceUnavailable|InternalError|RequestTimeout|tried \d+ times",
    ),
    Rule("bug", "stop", "a bug in ftlaunch", type=_CODE),
)  # fmt: skip

UNKNOWN = Rule("unknown", "again", "it failed for a reason that is not known")

_SILENT = re.compile(r"^(Worker info|\s|\)|ActorMetadata|Worker\(|.*(class_name|actor_id|namespace|pid|ip):)")
"""Lines of Ray's that tell a person nothing."""


def classify(trouble: Trouble, rank: int | None = None, node: str | None = None) -> Failure:
    """What a trouble is."""
    rule = next((rule for rule in RULES if rule.fits(trouble)), UNKNOWN)
    failure = Failure(rule.kind, rule.response, rule.says, trouble.text.strip(), rank, node, rule.exit_code)
    if rule.kind == "bug":
        return replace(failure, says=f"a bug in ftlaunch; please report it: {trouble.type}: {trouble.text.strip()}")
    if trouble.type in _PLAIN:
        return replace(failure, says=trouble.text.strip())
    return replace(failure, says=f"{rule.says} ({line})") if (line := _line(rule, trouble)) else failure


_PLAIN = {"UserError", "KeyedError", "RankError", "DamagedError", "Superseded"} | {
    error.__name__ for error in (Resized, Preempted, Hangs, NodeLost, NoRoom)
}
"""Their texts are for people already."""


def _line(rule: Rule, trouble: Trouble) -> str:
    """The line by which a trouble was recognised, for people; empty where the rule's words say it all."""
    if rule.kind in ("killed", "node", "preempted"):
        return ""
    lines = [line.strip() for line in trouble.text.splitlines() if line.strip() and not _SILENT.match(line)]
    fitting = [line for line in lines if rule.text and re.search(rule.text, line, re.IGNORECASE)]
    return next(iter([*fitting, *lines[-1:]]), "")[:300]


_ORDER = ("stop", "moved", "elsewhere", "again")


def cause(failures: Mapping[int, Failure]) -> Failure:
    """Of what several ranks died of, that from which the rest follows: a mistake before anything else, an echo last,
    and of equals the lowest rank's."""
    return min(failures.values(), key=lambda one: (one.is_echo, _ORDER.index(one.response), one.rank or 0))
