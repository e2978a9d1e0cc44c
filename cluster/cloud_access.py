"""How the machines of a run at a cloud are logged in to, and made ready over that: with a key that they were given when
they were made, and host keys that are kept from the first contact on."""

from __future__ import annotations

import contextlib
import os
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..recipes.schema_cloud import CloudCluster
from ..recipes.schema_cluster import SshCluster
from ..recipes.schema_nodes import NodeRange
from .cloud_boot import ARM, HOLD, RUN_SCRIPT, python_of, setup_script, watchdog
from .ssh_connection import CONNECT_S, HostError, explain, ssh_shell

OWN_KEY = Path(".config/ftlaunch/cloud_key")
"""Below the home folder."""

REACH_S = 600.0
"""For a machine that runs to let us in: it starts its system first."""

REFUSED_S = 180.0
"""For one that answers, and does not know our key: it is given it while its system starts."""

SETUP_S = 2400.0
"""For the lines of `setup`, and for what is installed."""

AGAIN_S = 3.0

SSH_CONFIG = """Host *
  UserKnownHostsFile "{known}"
  GlobalKnownHostsFile /dev/null
  HashKnownHosts no
  StrictHostKeyChecking {strict}
"""


# --- the key ----------------------------------------------------------------------------------------------------------


def key_file(config: CloudCluster) -> Path:
    """The private one."""
    return Path.home() / OWN_KEY if config.identity_file is None else Path(config.identity_file).expanduser()


def key_problems(config: CloudCluster) -> Iterator[str]:
    """What is wrong with a key file that the user has named."""
    path = key_file(config)
    if config.identity_file is None:
        return
    if not path.is_file():
        yield f"cluster.identity_file: {path} is not there"
        return
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        yield f"cluster.identity_file: others may read {path} (mode {mode:o}), and OpenSSH refuses it: chmod 600 {path}"
    elif public_key(path) is None:
        said = f"{path} is no private key that can be read here; put its public one into {path}.pub"
        yield f"cluster.identity_file: {said}"


def own_key() -> Path:
    """One of ours, made where there is none."""
    path = Path.home() / OWN_KEY
    if not path.exists():
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            new = Path(folder) / "key"
            # Azure takes RSA everywhere, and others not everywhere.
            command = ["ssh-keygen", "-q", "-t", "rsa", "-b", "3072", "-N", "", "-C", "ftlaunch", "-f", str(new)]
            subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
            with contextlib.suppress(FileExistsError):  # somebody else was as quick
                os.link(new, path)
    return path


def public_key(path: Path) -> str | None:
    """Of a private key's file; None where it cannot be told."""
    command = ["ssh-keygen", "-y", "-P", "", "-f", str(path)]
    with contextlib.suppress(FileNotFoundError):  # there is no OpenSSH, which `problems` says
        done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
        if done.returncode == 0:
            return done.stdout.strip()
    beside = path.with_name(f"{path.name}.pub")
    return beside.read_text().strip() if beside.is_file() else None


# --- the machines -----------------------------------------------------------------------------------------------------


class Access:
    """To the machines of one job. `host_keys`: lines of known hosts, where somebody has been there before; the first
    time, whoever answers at an address that the provider has named is believed, and remembered."""

    def __init__(self, config: CloudCluster, host_keys: str = "") -> None:
        self._config = config
        self._folder = tempfile.TemporaryDirectory(prefix="ftlaunch-ssh-")
        self._known = Path(self._folder.name) / "known_hosts"
        _write(self._known, host_keys)
        self._holds: list[subprocess.Popen[bytes]] = []
        self._talks: set[subprocess.Popen[str]] = set()
        self._over = threading.Event()
        theirs = Path(config.ssh_config).expanduser() if config.ssh_config else Path.home() / ".ssh" / "config"
        text = SSH_CONFIG.format(known=_percent(self._known), strict="yes" if host_keys else "accept-new")
        if theirs.is_file():
            text += f'\nInclude "{theirs}"\n'
        self.ssh_config = Path(self._folder.name) / "ssh_config"
        _write(self.ssh_config, text)

    @property
    def host_keys(self) -> str:
        """As they are known now."""
        return self._known.read_text()

    def write_public(self, key: str) -> Path:
        """The public key as a file: what Ray's provider for Azure takes."""
        path = Path(self._folder.name) / "key.pub"
        _write(path, f"{key}\n")
        return path

    def section(self, addresses: Sequence[str]) -> SshCluster:
        """The machines as hosts of an `ssh` cluster."""
        config = self._config
        nodes = config.nodes if isinstance(config.nodes, NodeRange) else None
        return SshCluster(
            hosts=tuple(addresses),
            nodes=NodeRange(min=nodes.min, max=len(addresses), grow_after_s=nodes.grow_after_s) if nodes else None,
            gpus_per_node=config.gpus_per_node,
            processes_per_node=config.processes_per_node,
            user=config.user,
            identity_file=str(key_file(config)),
            ssh_config=str(self.ssh_config),
            python=python_of(config),
            env=config.env,
            max_restarts=config.max_restarts,
            hang_timeout_s=config.hang_timeout_s,
        )

    def make_ready(self, address: str) -> None:
        """Wait for a machine, see to it that it will end by itself, and set it up. Raises HostError."""
        self._wait(address)
        self._run(address, ARM, watchdog(self._config, detached=True), "cannot be made to end by itself")
        command = ssh_shell(self.section([address]), address, HOLD)
        nothing = subprocess.DEVNULL
        hold = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=nothing, stderr=nothing, start_new_session=True
        )  # fmt: skip
        self._holds.append(hold)
        self._run(address, RUN_SCRIPT, setup_script(self._config), "setting it up failed")

    def _wait(self, address: str) -> None:
        began_s = time.monotonic()
        refused_s: float | None = None
        while (error := self._why_not(address)) is not None:
            now_s = time.monotonic()
            refused_s = (refused_s or now_s) if error.mendable else None
            if now_s - began_s > REACH_S or now_s - (refused_s or now_s) > REFUSED_S:
                said = f"host {address}: {error}, {now_s - began_s:.0f} s after it began to run"
                raise HostError(said, mendable=error.mendable)
            if self._over.wait(AGAIN_S):
                raise HostError(f"host {address}: it is not waited for any more")

    def _why_not(self, address: str) -> HostError | None:
        """Why it does not let us in; None: it does."""
        try:
            done = self._shell(address, "true", "", 4 * CONNECT_S)
        except subprocess.TimeoutExpired:
            return HostError("it does not answer")
        return explain(done.returncode, done.stderr) if done.returncode else None

    def _run(self, address: str, line: str, program: str, failed: str) -> None:
        try:
            done = self._shell(address, line, program, SETUP_S)
        except subprocess.TimeoutExpired:
            raise HostError(f"host {address}: {failed}: it takes more than {SETUP_S:g} s") from None
        if done.returncode:
            said = [each for each in (done.stderr + done.stdout).strip().splitlines() if each][-3:]
            code = f"exit code {done.returncode}"
            raise HostError(f"host {address}: {failed}: {' / '.join(said) or code}", mendable=True)

    def _shell(self, address: str, line: str, text: str, timeout_s: float) -> subprocess.CompletedProcess[str]:
        command, pipe = ssh_shell(self.section([address]), address, line), subprocess.PIPE
        with subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, start_new_session=True
        ) as talk:  # fmt: skip
            self._talks.add(talk)
            try:
                if self._over.is_set():  # since before it could be ended with the others
                    talk.kill()
                out, errors = talk.communicate(text, timeout=timeout_s)
            except BaseException:
                talk.kill()
                raise
            finally:
                self._talks.discard(talk)
        return subprocess.CompletedProcess(command, talk.returncode, out, errors)

    def give_up(self) -> None:
        """End what is going on between here and machines."""
        self._over.set()
        for talk in list(self._talks):
            talk.kill()

    def release(self) -> None:
        """The machines are not ours to hold any more: the run's own signs of life count."""
        for hold in self._holds:
            assert hold.stdin is not None
            with contextlib.suppress(OSError):
                hold.stdin.close()
            try:
                hold.wait(CONNECT_S)
            except subprocess.TimeoutExpired:
                hold.kill()
                hold.wait()
        self._holds = []

    def close(self) -> None:
        """Let go of everything."""
        self.release()
        self._folder.cleanup()


def _write(path: Path, text: str) -> None:
    """OpenSSH refuses files that others may write, whatever the umask is."""
    path.touch(mode=0o600)
    path.write_text(text)


def _percent(path: Path) -> str:
    """OpenSSH expands what follows a percent sign."""
    return str(path).replace("%", "%%")
