"""A conversation with one host through the user's own OpenSSH: one connection for everything that is asked of it.

`ssh` gets a list of arguments, and the host's shell one line made by `shlex.join` from words that never hold a value
of the recipe's but the path of Python. Everything else goes over standard input, where nothing is a command.
"""

from __future__ import annotations

import contextlib
import json
import queue
import shlex
import subprocess
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..recipes.schema_cluster import SshCluster
from .host_agent import MARK

ANSWER_S = 120.0
"""For an answer; most take milliseconds, starting a Python on a slow file system seconds."""

CONNECT_S = 15
PING_S = 5.0

AGENT = Path(__file__).with_name("host_agent.py")
BOOTSTRAP = (
    "import sys; exec(compile(sys.stdin.buffer.read(int(sys.stdin.buffer.readline())), 'agent', 'exec'), "
    "{'__name__': '__main__'})"
)


class HostError(Exception):
    """A host could not be asked, or could not do what it was asked. `mendable`: by the user, on host or here."""

    def __init__(self, message: str, *, mendable: bool = False) -> None:
        super().__init__(message)
        self.mendable = mendable


@dataclass(frozen=True)
class Reason:
    """What OpenSSH's own words mean. `says` is a part of them."""

    says: str
    means: str
    mendable: bool


REFUSED = (
    Reason("Could not resolve hostname", "no such host: the name is not known here", True),
    Reason(
        "REMOTE HOST IDENTIFICATION HAS CHANGED",
        "its host key is not the one that known_hosts has; find out why before you remove the old one (ssh-keygen -R)",
        True,
    ),
    Reason(
        "Host key verification failed",
        "its host key is not known here; connect once by hand (`ssh HOST`) and compare the fingerprint",
        True,
    ),
    Reason(
        "Permission denied",
        "it does not let us in: set cluster.user and cluster.identity_file, or load the key into ssh-agent; no "
        "password is asked for",
        True,
    ),
    Reason("Too many authentication failures", "it does not let us in: set cluster.identity_file", True),
    Reason("Bad owner or permissions", "OpenSSH refuses a file of its configuration", True),
    Reason("Can't open user config file", "cluster.ssh_config cannot be read", True),
    Reason("Connection refused", "nothing listens on its SSH port", False),
    Reason("timed out", "it does not answer", False),
    Reason("No route to host", "there is no way to it from here", False),
    Reason("Network is unreachable", "there is no way to it from here", False),
)
"""Of `ssh` itself."""

PYTHON_FAILED = (
    Reason("not found", "cluster.python is not there", True),
    Reason("No such file or directory", "cluster.python is not there", True),
    Reason("Permission denied", "cluster.python cannot be run", True),
    Reason("SyntaxError", "cluster.python is too old: ftlaunch needs 3.11 or newer", True),
)

SSH_FAILED = 255
"""Exit code of `ssh` itself; any other is that of what ran on the host."""


def explain(exit_code: int | None, said: str) -> HostError:
    """What went wrong when `ssh` ended without an answer; pure."""
    lines = [line for line in said.strip().splitlines() if not line.startswith("@")]
    last = lines[-1].strip() if lines else f"ssh ended with {exit_code}"
    for reason in REFUSED if exit_code == SSH_FAILED else PYTHON_FAILED:
        if reason.says in said:
            return HostError(f"{reason.means} ({last})", mendable=reason.mendable)
    return HostError(last)


def ssh_command(config: SshCluster, host: str, python: str) -> list[str]:
    """The command that connects to a host and begins the conversation."""
    return ssh_shell(config, host, shlex.join([python, "-c", BOOTSTRAP]))


def ssh_shell(config: SshCluster, host: str, line: str) -> list[str]:
    """The command that gives a line to a host's shell. Host keys are checked as the user's own configuration says;
    nobody is asked for anything."""
    options = [
        *("-o", "BatchMode=yes"),
        *("-o", f"ConnectTimeout={CONNECT_S}"),
        *("-o", "ServerAliveInterval=5"),
        *("-o", "ServerAliveCountMax=6"),
    ]
    if config.ssh_config is not None:
        options += ["-F", config.ssh_config]
    if config.port is not None:
        options += ["-p", str(config.port)]
    if config.user is not None:
        options += ["-l", config.user]
    if config.identity_file is not None:
        options += ["-i", config.identity_file, "-o", "IdentitiesOnly=yes"]
    return ["ssh", "-T", *options, "--", host, line]


class Connection:
    """To one host; open until `close`. Meanwhile the host hears from us every few seconds."""

    def __init__(self, host: str, command: list[str]) -> None:
        """Raises HostError."""
        self.host = host
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed in `close`
        self._answers: queue.Queue[bytes | None] = queue.Queue()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._ssh = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, start_new_session=True
        )
        threading.Thread(target=self._listen, daemon=True).start()
        try:
            text = AGENT.read_bytes()
            self._answer_to(f"{len(text)}\n".encode() + text)
        except HostError:
            self.close()
            raise
        threading.Thread(target=self._ping, daemon=True).start()

    def ask(self, question: str, **details: Any) -> Any:
        """What the host answers: see `host_agent.ANSWERS`. Raises HostError."""
        answer = self._answer_to(json.dumps({"ask": question, **details}).encode() + b"\n")
        if "error" in answer:
            raise HostError(answer["error"], mendable=True)
        return answer["answer"]

    def _answer_to(self, data: bytes) -> dict[str, Any]:
        with self._lock:
            try:
                assert self._ssh.stdin is not None
                self._ssh.stdin.write(data)
                self._ssh.stdin.flush()
                line = self._answers.get(timeout=ANSWER_S)
            except queue.Empty:
                raise HostError(f"no answer within {ANSWER_S:g} s") from None
            except (OSError, ValueError):  # the other end has gone, or we have let go
                line = None
            if line is None:
                raise self._why_gone()
            return dict(json.loads(line))

    def _why_gone(self) -> HostError:
        try:
            code = self._ssh.wait(CONNECT_S)
        except subprocess.TimeoutExpired:
            code = None
        self._errors.seek(0)
        return explain(code, self._errors.read().decode(errors="replace"))

    def _listen(self) -> None:
        assert self._ssh.stdout is not None
        for line in self._ssh.stdout:
            if line.startswith(MARK.encode()):
                self._answers.put(line.removeprefix(MARK.encode()))
        self._answers.put(None)

    def _ping(self) -> None:
        while not self._closed.wait(PING_S):
            try:
                self.ask("ping")
            except HostError:
                return  # whoever asks next is told

    def close(self) -> None:
        """Let go. What was started there and not released ends."""
        self._closed.set()
        assert self._ssh.stdin is not None
        with contextlib.suppress(OSError):
            self._ssh.stdin.close()
        try:
            self._ssh.wait(CONNECT_S)
        except subprocess.TimeoutExpired:
            self._ssh.kill()
            self._ssh.wait()
