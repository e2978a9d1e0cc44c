"""Objects between a rank and its readers: a short header over a Unix socket, everything else in shared memory.

Arrays are not copied by the one who receives them: they lie in an anonymous file that both sides map, and that is
gone when the last of them lets go of it, however it ends. Pickle is safe here: the socket is a pair that only a rank
and the process it started hold.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import pickle
import socket
import struct
import sys
import tempfile
from typing import Any

import numpy as np

HEADER = struct.Struct("<QQQ")
"""Bytes in the file, bytes of pickle, number of arrays."""

ALIGNMENT = 64


class ClosedError(Exception):
    """The other side is gone."""


def send(channel: socket.socket, content: Any) -> None:
    """Send an object. Raises OSError when there is no memory left, or when the other side is gone."""
    buffers: list[pickle.PickleBuffer] = []
    pickled = pickle.dumps(content, protocol=5, buffer_callback=buffers.append)
    raw = [buffer.raw() for buffer in buffers]
    lengths = np.array([len(one) for one in raw], np.int64).tobytes()
    places, total = _places(len(lengths) + len(pickled), [len(one) for one in raw])
    descriptor = _anonymous_file(total)
    try:
        with mmap.mmap(descriptor, total) as memory:
            memory[: len(lengths)] = lengths
            memory[len(lengths) : len(lengths) + len(pickled)] = pickled
            for place, one in zip(places, raw, strict=True):
                memory[place : place + len(one)] = one
        socket.send_fds(channel, [HEADER.pack(total, len(pickled), len(raw))], [descriptor])
    finally:
        os.close(descriptor)


def receive(channel: socket.socket) -> Any:
    """The next object. Raises ClosedError when the other side is gone."""
    header, descriptors = _receive_header(channel)
    total, pickled, count = HEADER.unpack(header)
    try:
        memory = memoryview(_map(descriptors[0], total))
    finally:
        os.close(descriptors[0])
    start = 8 * count
    lengths = np.frombuffer(memory[:start], np.int64).tolist()
    places, _ = _places(start + pickled, lengths)
    arrays = [memory[place : place + length] for place, length in zip(places, lengths, strict=True)]
    return pickle.loads(memory[start : start + pickled], buffers=arrays)  # noqa: S301 - see the module's words


def send_taken(channel: socket.socket, nbytes: int) -> None:
    """Say that an object with so many bytes of arrays was taken. That the other side is gone, `receive` will say."""
    with contextlib.suppress(OSError):
        channel.sendall(HEADER.pack(nbytes, 0, 0))


def receive_taken(channel: socket.socket) -> int:
    """What `send_taken` said. Raises ClosedError when the other side is gone."""
    header, _ = _receive_header(channel)
    return int(HEADER.unpack(header)[0])


def _receive_header(channel: socket.socket) -> tuple[bytes, list[int]]:
    header, descriptors = b"", []
    while len(header) < HEADER.size:
        try:
            data, received, _, _ = socket.recv_fds(channel, HEADER.size - len(header), 1)
        except ConnectionError as error:
            raise ClosedError from error
        if not data:
            raise ClosedError
        header += data
        descriptors += received
    return header, descriptors


def _places(start: int, lengths: list[int]) -> tuple[list[int], int]:
    """Where arrays lie behind `start` bytes, and the bytes of everything."""
    places = []
    for length in lengths:
        start = -(-start // ALIGNMENT) * ALIGNMENT
        places.append(start)
        start += length
    return places, max(1, start)


def _anonymous_file(nbytes: int) -> int:
    """A file without a name, in memory where the system can (Linux)."""
    if sys.platform == "linux":
        descriptor = os.memfd_create("ftlaunch-reader", os.MFD_CLOEXEC)
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    try:
        os.truncate(descriptor, nbytes)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _map(descriptor: int, nbytes: int) -> mmap.mmap:
    """All pages at once: a fault for each would cost more."""
    flags = mmap.MAP_SHARED | (mmap.MAP_POPULATE if sys.platform == "linux" else 0)
    return mmap.mmap(descriptor, nbytes, flags=flags)
