"""What measures one node: its arithmetic, memory, disks, network, GPUs, and the way to the run's storage.

Its text is sent to hosts over SSH (`host_agent.probe`), and its functions are called by an actor on the nodes of a Ray
cluster. So it imports the standard library only; what needs more (numpy, fsspec, torch) runs in a process of its own,
which also takes a crash, a GPU's context and secrets away with it. Every function takes and returns plain data.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    Question = dict[str, Any]

TOOL_S = 10.0
"""For a program to answer."""


def ping(_question: Question) -> Question:
    """I am here."""
    return {}


# --- what is there ----------------------------------------------------------------------------------------------------


def node_facts(question: Question) -> Question:
    """`packages`: names to look up; `folders`: whose free bytes to tell, or of the nearest that is there."""
    from importlib.metadata import PackageNotFoundError, version

    def found(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    return {
        "host": socket.gethostname(),
        "time": time.time(),
        "cores": len(os.sched_getaffinity(0)),
        "versions": {"Python": platform.python_version(), **{name: found(name) for name in question["packages"]}},
        "free_bytes": {folder: _free_bytes(folder) for folder in question["folders"]},
        "smi": _said(["nvidia-smi", "-q", "-x"]),
        "kernel": _kernel_log(),
    }


def _free_bytes(folder: str) -> int | None:
    """None where nothing of the path is there."""
    place = folder or tempfile.gettempdir()
    while not os.path.exists(place):  # noqa: PTH110 - old Pythons, as in host_agent
        above = os.path.dirname(place)  # noqa: PTH120
        if above in (place, ""):
            return None
        place = above
    return shutil.disk_usage(place).free


def _said(command: list[str]) -> str | None:
    """What a program prints; None where it is not there or fails."""
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=TOOL_S, check=True)
        return done.stdout.decode(errors="replace")
    return None


def _kernel_log() -> str | None:
    """Its lines about GPUs; None where it may not be read."""
    for command in (["dmesg"], ["journalctl", "-k", "-b", "--no-pager", "-q"]):
        text = _said(command)
        if text is not None:
            return "\n".join(line for line in text.splitlines() if "NVRM" in line)
    return None


# --- arithmetic and memory --------------------------------------------------------------------------------------------

CPU = """
import json, os, sys, time
import numpy as np
rng = np.random.default_rng(0)
n = 512
a, b = (rng.integers(-8, 8, (n, n)) for _ in range(2))
exact = a @ b  # integers: no rounding, and no BLAS
x, y = a.astype(np.float32), b.astype(np.float32)
x @ y
best, alike, until = float("inf"), True, time.perf_counter() + 0.3
while time.perf_counter() < until:  # the best of many: other work on the node only ever makes it slower
    start = time.perf_counter()
    product = x @ y
    best = min(best, time.perf_counter() - start)
    alike = alike and bool((product == exact).all())  # sums of 512 products below 64 are exact in float32
size = int(sys.argv[1])
pattern = np.arange(1 << 17, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
memory = np.empty(size // 8 // len(pattern) * len(pattern), np.uint64).reshape(-1, len(pattern))
kept = True
for turn in (pattern, ~pattern):
    memory[:] = turn
    kept = kept and bool((memory == turn).all())
print(json.dumps({"exact": alike, "gflops": 2 * n**3 / best / 1e9, "memory_kept": kept, "memory_bytes": memory.nbytes}))
"""

GPU = """
import json, time
import torch
found = []
for index in range(torch.cuda.device_count()):
    device = torch.device("cuda", index)
    generator = torch.Generator().manual_seed(index)
    a, b = (torch.randint(-8, 8, (512, 512), generator=generator) for _ in range(2))
    torch.backends.cuda.matmul.allow_tf32 = False
    product = (a.to(device, torch.float32) @ b.to(device, torch.float32)).cpu().to(torch.int64)
    exact = bool((product == a @ b).all())
    free, _ = torch.cuda.mem_get_info(device)
    memory = torch.empty(free // 4 // 8, dtype=torch.int64, device=device)
    kept = True
    for pattern in (0x5555555555555555, -0x5555555555555556):
        memory.fill_(pattern)
        kept = kept and bool((memory == pattern).all())
    size = memory.numel() * 8
    del memory
    x, y = (torch.randn(4096, 4096, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(4):
            x @ y
        torch.cuda.synchronize(device)
        best = min(best, (time.perf_counter() - start) / 4)
    found.append({"index": index, "exact": exact, "tflops": 2 * 4096**3 / best / 1e12, "memory_kept": kept,
                  "memory_bytes": size})
    torch.cuda.empty_cache()
print(json.dumps(found))
"""

MEMORY_BYTES = 256 << 20
MEMORY_SHARE = 8
"""At most so many bytes, and such a part of what is free, are written and read back."""

COMPUTE_S = 40.0


def compute(question: Question) -> Question:
    """Products that are known exactly, how fast they are, and whether memory keeps what is written to it. `gpus`:
    whether there are any to try."""
    size = min(MEMORY_BYTES, _available_bytes() // MEMORY_SHARE)
    answer = {"cpu": _program(CPU, [str(size)], COMPUTE_S, {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"})}
    if question["gpus"]:
        answer["gpu"] = _program(GPU, [], COMPUTE_S, {})
    return answer


def _available_bytes() -> int:
    with suppress(OSError, ValueError), open("/proc/meminfo") as lines:  # noqa: PTH123
        for line in lines:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    return MEMORY_BYTES


def _program(text: str, arguments: list[str], limit_s: float, environ: dict[str, str]) -> Any:
    """What a program prints as JSON, or {"error": its last word}."""
    # Ray hides GPUs from actors that hold none.
    shown = {name: value for name, value in os.environ.items() if (name, value) != ("CUDA_VISIBLE_DEVICES", "")}
    try:
        done = subprocess.run(
            [sys.executable, "-c", text, *arguments],
            capture_output=True,
            stdin=subprocess.DEVNULL,
            timeout=limit_s,
            check=False,
            env={**shown, **environ},
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {limit_s:g} s"}
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        return {"error": said[-1] if said else f"exit code {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


# --- storage ----------------------------------------------------------------------------------------------------------

STORAGE = """
import json, os, secrets, sys, time
import fsspec
url, name, size = sys.argv[1], sys.argv[2], int(sys.argv[3])
fs, root = fsspec.core.url_to_fs(url)
path, data = root.rstrip("/") + "/" + name, os.urandom(size)
start = time.perf_counter()
fs.makedirs(root, exist_ok=True)
fs.pipe_file(path, data)
written = time.perf_counter()
try:
    same = fs.cat_file(path) == data
    read = time.perf_counter()
finally:
    fs.rm_file(path)
print(json.dumps({"same": same, "write_s": written - start, "read_s": read - written, "bytes": size}))
"""

STORAGE_BYTES = 4 << 20
STORAGE_S = 25.0


def storage(question: Question) -> Any:
    """Write a small file below `url`, read it, remove it. `name`: its name; `environ`: variables that a run gets."""
    arguments = [question["url"], question["name"], str(STORAGE_BYTES)]
    return _program(STORAGE, arguments, STORAGE_S, question["environ"])


# --- network ----------------------------------------------------------------------------------------------------------

CHUNK = bytes(1 << 18)
SEND_S = 0.5
SEND_BYTES = 256 << 20
IN_FLIGHT = 1 << 18
"""Bytes that may wait in this end's buffer: what waits there is not yet sent."""

NETWORK_S = 15.0
_listeners: list[socket.socket] = []


def sink(_question: Question) -> Question:
    """Open a port that takes whatever is sent there, and answers how much it was."""
    listener = socket.socket()
    listener.bind(("", 0))
    listener.listen(64)
    _listeners.append(listener)
    threading.Thread(target=_take_all, args=(listener,), daemon=True).start()
    return {"port": listener.getsockname()[1]}


def _take_all(listener: socket.socket) -> None:
    with suppress(OSError):
        while True:
            threading.Thread(target=_take, args=(listener.accept()[0],), daemon=True).start()


def _take(connection: socket.socket) -> None:
    total = 0
    with suppress(OSError), connection:
        connection.settimeout(NETWORK_S)
        while data := connection.recv(1 << 18):
            total += len(data)
        connection.sendall(total.to_bytes(8, "big"))


def send(question: Question) -> Question:
    """Send to a sink at `address` and `port` for half a second: bytes a second, and a round trip's seconds."""
    try:
        started = time.perf_counter()
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, IN_FLIGHT)
            connection.settimeout(NETWORK_S)
            connection.connect((question["address"], question["port"]))
            begun = time.perf_counter()
            sent = 0
            while sent < SEND_BYTES and time.perf_counter() - begun < SEND_S:
                sent += connection.send(CHUNK)
            connection.shutdown(socket.SHUT_WR)
            taken = int.from_bytes(connection.recv(8), "big")
        return {"bytes_per_s": taken / (time.perf_counter() - begun), "round_trip_s": begun - started}
    except OSError as error:
        return {"error": str(error)}


PROBES = {each.__name__: each for each in (ping, node_facts, compute, storage, sink, send)}
