"""Hosts of their own on this machine: network, process, mount and host-name namespaces, with a real sshd in each.

A host ends with its first process, whatever runs on it, as a machine does that loses power. Needs root, iproute2,
util-linux and openssh-server.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

SSHD = "/usr/sbin/sshd"
_groups = itertools.count()
"""Of this process: each has a switch and a subnet of its own."""

NEEDED = ("ip", "unshare", "ssh", "ssh-keygen", SSHD)
WAIT_S = 60.0

SSHD_CONFIG = """
ListenAddress {address}
HostKey {folder}/host_{name}
AuthorizedKeysFile {authorized}
AuthenticationMethods publickey
PermitRootLogin prohibit-password
StrictModes no
UsePAM no
PidFile none
MaxStartups 100
SetEnv TMPDIR={scratch}
"""

# The test's folders are to go away with it, so no file of the user's is read or written.
SSH_CONFIG = """
Host {names}
  IdentityFile {folder}/client
  IdentitiesOnly yes
  UserKnownHostsFile {folder}/known_hosts
  GlobalKnownHostsFile /dev/null
  StrictHostKeyChecking yes
  User root
"""

# A private /proc, a private temporary folder, a name; `go` comes when the network is there.
HOST = """
read go
set -e
hostname {name}
ip link set lo up
ip addr add {address}/24 dev {peer}
ip link set {peer} up
mount -t tmpfs none {scratch}
{extra}
exec {sshd} -D -e -f {folder}/sshd_{name}
"""


@dataclass
class Host:
    """One of them."""

    name: str
    address: str
    link: str
    """Its end of the cable in the switch."""
    process: subprocess.Popen[str]
    init: int = 0
    """Its first process, as this machine numbers it."""

    def processes(self, marker: str) -> list[str]:
        """Command lines on it that contain `marker`."""
        return [" ".join(process.cmdline()) for process in self.found(marker)]

    def end(self, marker: str) -> int:
        """SIGKILL to those processes; how many there were."""
        found = self.found(marker)
        for process in found:
            process.kill()
        return len(found)

    def end_program(self, name: str) -> None:
        """SIGKILL to the only process of a program."""
        [process] = [process for process in self.found("") if process.name() == name]
        process.kill()

    def found(self, marker: str) -> list[psutil.Process]:
        """Processes on it whose command lines contain `marker`."""
        try:
            here = os.readlink(f"/proc/{self.init}/ns/pid")
        except FileNotFoundError:  # it has lost its power
            return []
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                if os.readlink(f"/proc/{process.pid}/ns/pid") == here and marker in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def kill(self) -> None:
        """Power off."""
        with suppress(ProcessLookupError):
            os.kill(self.init, 9)
        self.process.kill()
        self.process.wait()

    def cut_off(self) -> None:
        """Pull the cable."""
        _ip("link", "set", self.link, "down")

    def plug_in(self) -> None:
        """Put it back."""
        _ip("link", "set", self.link, "up")


@dataclass
class Hosts:
    """Some hosts on one switch, and how `ssh` gets to them. `folder` is seen by all, under a short name."""

    folder: Path
    switch: str
    subnet: str
    members: dict[str, Host] = field(default_factory=dict)
    _added: int = 0

    @property
    def names(self) -> list[str]:
        return list(self.members)

    @property
    def ssh_config(self) -> Path:
        return self.folder / "ssh_config"

    @property
    def scratch(self) -> Path:
        """A folder that every host has to itself."""
        return self.folder / "s"

    def cluster(self, **changes: object) -> dict[str, object]:
        """The `cluster` section of a recipe that runs on them."""
        return {
            "type": "ssh", "hosts": self.names, "ssh_config": str(self.ssh_config), "python": sys.executable,
            "gpus_per_node": 0, "doctor": False, **changes,
        }  # fmt: skip

    def shell(self, name: str, command: str) -> str:
        """Run a command on a host."""
        done = subprocess.run(
            ["ssh", "-F", str(self.ssh_config), name, command], capture_output=True, text=True, timeout=WAIT_S,
            check=True,
        )  # fmt: skip
        return done.stdout

    def add(self, name: str, extra: str = "", address: str = "", authorized: Path | None = None) -> Host:
        """Start a host. `extra`: shell lines that it runs first; `authorized`: a file with the keys that log in."""
        number = self._added = self._added + 1
        address = address or f"{self.subnet}.{number}"
        link, peer = f"{self.switch}h{number}", f"{self.switch}p{number}"
        self.make_key(f"host_{name}")
        with (self.folder / "known_hosts").open("a") as known:
            known.write(f"{name},{address} {(self.folder / f'host_{name}.pub').read_text()}")
        values = {"name": name, "address": address, "folder": self.folder, "scratch": self.scratch}
        values["authorized"] = authorized or self.folder / "client.pub"
        (self.folder / f"sshd_{name}").write_text(SSHD_CONFIG.format(**values))
        _ip("link", "add", link, "type", "veth", "peer", "name", peer)
        _ip("link", "set", link, "master", self.switch, "up")
        script = HOST.format(**values, peer=peer, sshd=SSHD, extra=extra)
        with (self.folder / f"sshd_{name}.log").open("w") as log:
            process = subprocess.Popen(
                ["unshare", "--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--mount-proc",
                 "--kill-child=KILL", "sh", "-c", script],
                stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, text=True,
            )  # fmt: skip
        host = self.members[name] = Host(name, address, link, process)
        host.init = _child(process.pid)
        _ip("link", "set", peer, "netns", str(host.init))
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.close()
        self._write_ssh_config()
        return host

    def fill(self, name: str, seconds: float) -> None:
        """For a while a host's own disk has room for nothing more."""
        place, ballast = self.scratch, self.scratch / "ballast"
        _, used = self.shell(name, f"df --output=used -k {place}").split()
        # Not all of the memory that such a disk could take.
        self.shell(name, f"mount -o remount,size={int(used) + 1024}k {place}; cat /dev/zero > {ballast} || true")
        time.sleep(seconds)
        self.shell(name, f"rm {ballast}; mount -o remount,size=50% {place}")

    def make_key(self, name: str) -> None:
        """A pair of files in `folder`."""
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / name))

    def _write_ssh_config(self) -> None:
        lines = [SSH_CONFIG.format(names=" ".join(self.names), folder=self.folder)]
        lines += [f"Host {host.name}\n  HostName {host.address}\n" for host in self.members.values()]
        self.ssh_config.write_text("".join(lines))

    def wait(self) -> None:
        """Until every sshd answers."""
        deadline = time.monotonic() + WAIT_S
        for name, host in self.members.items():
            while subprocess.run(
                ["ssh", "-F", str(self.ssh_config), name, "true"], capture_output=True, check=False
            ).returncode:
                log = (self.folder / f"sshd_{name}.log").read_text()
                assert host.process.poll() is None, log
                assert time.monotonic() < deadline, log
                time.sleep(0.1)


@contextmanager
def ssh_hosts(*names: str, extra: dict[str, str] | None = None) -> Iterator[Hosts]:
    """Hosts of these names. Skips where they cannot be made."""
    if missing := [program for program in NEEDED if shutil.which(program) is None]:
        pytest.skip(f"hosts with sshd need {', '.join(missing)} (Debian: openssh-server iproute2 util-linux)")
    if os.geteuid() != 0:
        pytest.skip("hosts with sshd are namespaces, which only root makes")
    group, pid = next(_groups), os.getpid()
    switch = f"ft{pid}{'abcdefgh'[group]}"
    folder = Path(tempfile.mkdtemp(prefix="fth"))
    hosts = Hosts(folder, switch, f"10.{128 + (31 * group + (pid >> 8)) % 120}.{pid % 256}")
    Path("/run/sshd").mkdir(exist_ok=True)
    hosts.scratch.mkdir()
    try:
        _ip("link", "add", switch, "type", "bridge")
        _ip("addr", "add", f"{hosts.subnet}.254/24", "dev", switch)
        _ip("link", "set", switch, "up")
        hosts.make_key("client")
        for name in names:
            hosts.add(name, (extra or {}).get(name, ""))
        hosts.wait()
        yield hosts
    finally:
        for host in hosts.members.values():
            host.kill()
        with suppress(subprocess.CalledProcessError):
            _ip("link", "del", switch)
        shutil.rmtree(folder, ignore_errors=True)


def _child(pid: int) -> int:
    """The only child of a process, once it is there."""
    deadline = time.monotonic() + WAIT_S
    children = Path(f"/proc/{pid}/task/{pid}/children")
    while not (found := children.read_text().split()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return int(found[0])


def _ip(*arguments: str) -> None:
    _run("ip", *arguments)


def _run(*command: str) -> Sequence[str]:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (command, done.stderr)
    return done.stdout.splitlines()
