"""Servers as processes of their own."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def moto_process(folder: Path) -> Iterator[int]:
    """The port of an S3 server on loopback. Servers within one process would share what they hold."""
    with _server(folder, lambda port: ["-m", "moto.server", "-p", str(port)]) as port:
        yield port


@contextmanager
def slow_link_process(folder: Path, to_port: int, bytes_per_s: float, delay_s: float) -> Iterator[int]:
    """The port of a slow way to an S3 server: what is sent to it shares an uplink, every answer comes late."""
    program = str(Path(__file__).with_name("slow_link.py"))
    with _server(folder, lambda port: [program, *map(str, (port, to_port, bytes_per_s, delay_s))]) as port:
        yield port


@contextmanager
def gcs_process(folder: Path, bucket: str) -> Iterator[int]:
    """The port of a Google Cloud Storage on loopback that has an empty bucket."""
    program = str(Path(__file__).with_name("gcs_server.py"))
    with _server(folder, lambda port: [program, str(port), bucket]) as port:
        yield port


@contextmanager
def ec2_process(folder: Path) -> Iterator[int]:
    """The port of an EC2 on loopback (see `ec2_server.py`)."""
    program = str(Path(__file__).with_name("ec2_server.py"))
    with _server(folder, lambda port: [program, str(port), str(folder)]) as port:
        yield port


@contextmanager
def _server(folder: Path, arguments: Callable[[int], list[str]]) -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    command = [sys.executable, *arguments(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=folder)
    try:
        while not _answers(port):
            assert server.poll() is None, "the server ended"
            time.sleep(0.05)
        yield port
    finally:
        server.kill()
        server.wait()


def _answers(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0
