"""What answers on a host of an `ssh` cluster while the launcher is connected to it: a line of JSON for each question.

Its text is sent over the connection itself, before anything of ours is on the host. So it imports the standard library
only, and begins on Pythons that are too old for ftlaunch, in order to say so.
"""

from __future__ import annotations

import base64
import json
import os
import platform
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

MARK = "ftlaunch: "
"""Begins every answer: what a login shell prints of its own does not."""

JOB = "FTLAUNCH_JOB"
"""Variable by which every process of a job is told from all others, whoever started it."""

LONGEST_SCRATCH = 20
"""Bytes. Ray's sockets lie about 85 below it, and the path of a socket may have 107."""

SILENCE_S = 30.0
"""Without a word from the launcher, which says something every few seconds."""

KEPT_S = 7 * 24 * 3600.0
"""Logs of a job that is over stay so long."""

if TYPE_CHECKING:  # what stands here is evaluated on old Pythons too
    Question = dict[str, Any]


# --- facts ------------------------------------------------------------------------------------------------------------


def facts(question: Question) -> Question:
    """What the host is and has, left-overs of earlier jobs gone. `packages`: names to look up."""
    place = scratch()
    clean(place)
    usage = shutil.disk_usage(str(place.parent))
    return {
        "host": socket.gethostname(),
        "boot": _boot(),
        "python": platform.python_version(),
        "executable": sys.executable,
        "system": platform.system(),
        "time": time.time(),
        "cores": len(os.sched_getaffinity(0)),
        "gpus": _gpus(),
        "packages": {name: _version(name) for name in question["packages"]},
        "scratch": str(place),
        "free_bytes": usage.free,
        "addresses": _addresses(),
    }


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + socket.gethostname()


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _gpus() -> int:
    """GPUs that the driver lists."""
    with suppress(OSError, subprocess.SubprocessError):
        listed = subprocess.run(["nvidia-smi", "-L"], stdout=subprocess.PIPE, timeout=30, check=True).stdout
        return sum(line.startswith(b"GPU ") for line in listed.splitlines())
    with suppress(OSError):
        return len(os.listdir("/proc/driver/nvidia/gpus"))  # noqa: PTH208 - as everywhere here: old Pythons
    return 0


def _addresses() -> list[str]:
    """IPv4 addresses, the one that the launcher has come in by first."""
    import fcntl
    import struct

    connection = os.environ.get("SSH_CONNECTION", "").split()
    found = [connection[2]] if len(connection) == 4 and ":" not in connection[2] else []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            with suppress(OSError):
                siocgifaddr = 0x8915
                answer = fcntl.ioctl(asked.fileno(), siocgifaddr, struct.pack("256s", name.encode()[:15]))
                found.append(socket.inet_ntoa(answer[20:24]))
    return [address for address in dict.fromkeys(found) if not address.startswith("127.")]


_probes: dict[str, Any] = {}


def probe(question: Question) -> Any:
    """Call a function of the program that came with the first of these questions (`host_probe.py`)."""
    if "text" in question:
        exec(compile(question["text"], "host_probe", "exec"), _probes)  # noqa: S102 - ours, as this text is
    return _probes["PROBES"][question["call"]](question)


# --- files ------------------------------------------------------------------------------------------------------------


def scratch() -> Path:
    """Our folder on this host's own disk, below TMPDIR where that is short enough, closed to others."""
    parent = os.environ.get("TMPDIR", "")
    if not parent or len(parent) > LONGEST_SCRATCH or not os.access(parent, os.W_OK):
        parent = "/tmp"  # noqa: S108 - our folder in it is made for us alone, below
    place = Path(parent) / f"ft-{os.getuid()}"
    with suppress(FileExistsError):
        place.mkdir(mode=0o700)
    found = place.lstat()
    if found.st_uid != os.getuid() or place.is_symlink() or found.st_mode & 0o077:
        raise PermissionError(f"{place} belongs to somebody else, or is open to others; remove it")
    return place


def put_token(question: Question) -> Question:
    """Write a file into a folder that every host is to see, made where it is not there."""
    path = Path(question["path"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(question["token"])
    return {}


def get_token(question: Question) -> Question:
    """The file's content; None where it is not there."""
    with suppress(OSError):
        return {"token": Path(question["path"]).read_text()}
    return {"token": None}


def remove_token(question: Question) -> Question:
    """Remove the file."""
    with suppress(OSError):
        Path(question["path"]).unlink()
    return {}


def missing(question: Question) -> Question:
    """Those of some paths that are not there."""
    return {"missing": [path for path in question["paths"] if not os.path.exists(path)]}  # noqa: PTH110


# --- network ----------------------------------------------------------------------------------------------------------

REACH_S = 5.0
_listeners: list[socket.socket] = []


def listen(_question: Question) -> Question:
    """Open a port that others can try."""
    listener = socket.socket()
    listener.bind(("", 0))
    listener.listen(512)
    _listeners.append(listener)
    return {"port": listener.getsockname()[1]}


def reach(question: Question) -> Question:
    """For each of some [address, port]: this host's own address on the way there; None where nothing answers."""
    return {"own": [_own_address(address, port) for address, port in question["targets"]]}


def _own_address(address: str, port: int) -> str | None:
    with suppress(OSError), socket.create_connection((address, port), timeout=REACH_S) as there:
        own: str = there.getsockname()[0]
        return own
    return None


def free_port(_question: Question) -> Question:
    """A port that nothing listens on now."""
    with socket.socket() as asked:
        asked.bind(("", 0))
        return {"port": asked.getsockname()[1]}


# --- jobs -------------------------------------------------------------------------------------------------------------

_held: list[Path] = []
"""Jobs that this connection has started and not let go of: they end when it does."""


def start(question: Question) -> Question:
    """Lay a job's files out, and start what looks after it. Files are for this user's eyes only: there are secrets."""
    folder = scratch() / question["job"]
    folder.mkdir(mode=0o700)
    for name, content in question["files"].items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        path.write_bytes(base64.b64decode(content))
    (folder / "lease").touch()
    log = (folder / "keeper.log").open("wb")
    subprocess.Popen(
        [sys.executable, "-m", "ftlaunch.cluster.host_keeper", str(folder)],
        cwd=str(folder), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        env={**os.environ, JOB: question["job"], "PYTHONPATH": str(folder / "package"), "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    _held.append(folder)
    return {"folder": str(folder)}


def state(question: Question) -> Question:
    """How a job stands here: `up`, `exit` (of its driver), `ended` (why the keeper took it down); None: not yet."""
    folder = scratch() / question["job"]
    return {name: _text(folder / name) for name in ("up", "exit", "ended")} | {
        "processes": len(processes_of(question["job"])),
        "keeper_log": (_text(folder / "keeper.log") or "")[-2000:],
        "ray_log": (_text(folder / "ray.log") or "")[-2000:],
    }


def release(question: Question) -> Question:
    """The job goes on without the launcher."""
    (scratch() / question["job"] / "released").touch()
    _held.clear()
    return {}


def read(question: Question) -> Question:
    """The driver's output from an offset on (at most 64 KiB), and its exit code once it has one."""
    folder = scratch() / question["job"]
    code = _text(folder / "exit")  # first: what is read afterwards is then whole
    ended = _text(folder / "ended")
    with suppress(OSError), (folder / "driver.log").open("rb") as log:
        log.seek(question["offset"])
        return {"exit": code, "ended": ended, "data": base64.b64encode(log.read(1 << 16)).decode()}
    return {"exit": code, "ended": ended, "data": "", "gone": not folder.exists()}


def stop(question: Question) -> Question:
    """`save`: after the step at hand; `now`: at once. Where nobody looks after the job any more, it is ended here."""
    folder = scratch() / question["job"]
    if folder.exists() and _keeper_lives(folder):
        put(folder / "stop", question["how"])
        return {"keeper": True}
    return {"keeper": False, "ended": end_processes(question["job"])}


def _keeper_lives(folder: Path) -> bool:
    with suppress(OSError, ValueError):
        pid = int((folder / "keeper.pid").read_text())
        return pid in processes_of(folder.name)
    return False


def clean(place: Path) -> None:
    """End what is left of jobs whose keeper was killed, and forget old ones."""
    for folder in place.iterdir():
        if folder.is_dir() and (folder / "keeper.pid").exists() and not _keeper_lives(folder):
            end_processes(folder.name)
            forget(folder, whole=time.time() - folder.stat().st_mtime > KEPT_S)


def forget(folder: Path, *, whole: bool) -> None:
    """Remove what a job that is over leaves: its secrets, its code and Ray's files but the logs; or everything."""
    with suppress(OSError):
        (folder / "r" / "session_latest" / "logs").resolve().rename(folder / "ray-logs")
    for name in ("token", "keeper.json", "driver.json"):
        with suppress(OSError):
            (folder / name).unlink()
    for path in (folder,) if whole else (folder / "package", folder / "r"):
        shutil.rmtree(str(path), ignore_errors=True)


def processes_of(job: str) -> list[int]:
    """All processes with the job's mark, but for this one."""
    mark = f"{JOB}={job}".encode()
    found = []
    for name in os.listdir("/proc"):  # noqa: PTH208
        if name.isdigit() and int(name) != os.getpid():
            with suppress(OSError):
                if mark in Path("/proc", name, "environ").read_bytes().split(b"\0"):
                    found.append(int(name))
    return found


def end_processes(job: str) -> int:
    """SIGKILL to them, until no new ones come; returns how many there were."""
    ended = set()
    for _ in range(50):
        pids = processes_of(job)
        if not pids:
            break
        for pid in pids:
            ended.add(pid)
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)
    return len(ended)


def put(path: Path, text: str) -> None:
    """Write a file at one go: whoever reads it sees all of it or none."""
    new = path.with_name(path.name + ".new")
    new.write_text(text)
    new.rename(path)


def _text(path: Path) -> str | None:
    with suppress(OSError):
        return path.read_text(errors="replace")
    return None


# --- the conversation -------------------------------------------------------------------------------------------------


def ping(_question: Question) -> Question:
    """I am here."""
    return {}


ANSWERS = {
    answer.__name__: answer
    for answer in (
        facts, probe, put_token, get_token, remove_token, missing, listen, reach, free_port, start, state, release,
        read, stop, ping,
    )
}  # fmt: skip


def main() -> None:
    """Answer until the launcher has gone. What it has started and not released then ends."""
    _say({"answer": {}})  # everything sent until now was this text
    while (line := _next_line()) is not None:
        for folder in _held:
            (folder / "lease").touch()
        question = json.loads(line)
        try:
            answer: Question = {"answer": ANSWERS[question["ask"]](question)}
        except Exception as error:  # told to the launcher, which knows what was asked
            answer = {"error": f"{type(error).__name__}: {error}"}
        _say(answer)
    for folder in _held:
        stop({"job": folder.name, "how": "now"})


def _say(answer: Question) -> None:
    sys.stdout.write(MARK + json.dumps(answer) + "\n")
    sys.stdout.flush()


def _next_line() -> bytes | None:
    """None after the end, or a silence as of a machine that is gone."""
    # The lines are short and read whole, and the launcher waits for each answer: none can be waiting in the buffer.
    ready, _, _ = select.select([sys.stdin], [], [], SILENCE_S)
    return (sys.stdin.buffer.readline() or None) if ready else None


if __name__ == "__main__":
    main()
