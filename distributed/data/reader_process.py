"""A reader as a process of its own: it reads, decodes, tokenises, packs and collates, away from the loop's interpreter.

It imports no torch, so it is there in half a second. It ends with its rank, however that ends: the socket between them
closes. It hears no signal that asks to stop, because those are its rank's to answer, which saves first.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import socket
import threading
import traceback
from typing import Any

from ...recipes.errors import FtlaunchError
from . import wire
from .feed import AHEAD_STEPS, Room, nbytes_of
from .parts import PartReader


def main(descriptor: int) -> None:
    """Read for the rank at the other end of the socket, until it closes it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    channel = socket.socket(fileno=descriptor)
    try:
        _read(channel)
    except BaseException as error:
        with contextlib.suppress(OSError):  # the rank may be gone
            wire.send(channel, _portable(error))
    os._exit(0)  # nothing here is worth saving, and threads may wait for storage


def _read(channel: socket.socket) -> None:
    spec, ahead_bytes = wire.receive(channel)
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    room = Room(ahead_bytes, AHEAD_STEPS)
    threading.Thread(target=_listen, args=(channel, inbox, room), daemon=True).start()
    reader: PartReader = spec.open()
    (states,) = inbox.get()
    if states is not None:
        reader.restore(states)
    wire.send(channel, _packed(reader.states()))
    while True:
        part = reader.next_part()
        room.take(nbytes_of(part))
        wire.send(channel, part._replace(states=_packed(part.states), reader_idle_s=room.waited_s))


def _packed(states: Any) -> bytes:
    """States are looked at when a checkpoint is saved; until then the rank need not make objects of them."""
    return json.dumps(states).encode()


def _listen(channel: socket.socket, inbox: queue.SimpleQueue[Any], room: Room) -> None:
    """What the rank says: where to begin, then what it has taken. Its end is the end."""
    try:
        inbox.put(wire.receive(channel))
        while True:
            room.give_back(wire.receive_taken(channel))
    except BaseException:
        os._exit(0)


def _portable(error: BaseException) -> BaseException:
    """The error as it can be raised in another process; a bug's traceback comes along as text."""
    if isinstance(error, FtlaunchError):
        return type(error)(str(error))
    text = "".join(traceback.format_exception(error))
    return RuntimeError(f"a data reader failed:\n{text}")
