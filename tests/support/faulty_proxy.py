"""A proxy on loopback in front of an HTTP server that spoils answers on a seeded schedule, and counts what it did.

Faults: `delay` (the answer comes late), `reset` (the connection is reset before an answer), `cut` (reset in mid-body),
`truncate` (closed in mid-body), `short` (a whole answer with half of the range), `slow_down` (503 with S3's words),
`error` (500); and, only where a test asks for them, the definite refusals of `REFUSALS` by S3's code.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import re
import socket
import struct
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping

PASSING = ("delay", "reset", "cut", "truncate", "short", "slow_down", "error")
REFUSALS = {
    "AccessDenied": 403,
    "RequestTimeTooSkewed": 403,
    "ExpiredToken": 400,
    "InvalidAccessKeyId": 403,
    "SignatureDoesNotMatch": 403,
    "AuthorizationHeaderMalformed": 400,
    "NoSuchBucket": 404,
    "InvalidObjectState": 403,
}
SLICE_BYTES = 8192
ANSWERS = {**REFUSALS, "SlowDown": 503, "InternalError": 500}


class FaultyProxy:
    """`rates`: share of requests that suffer each kind of fault; `applies(method, path)`: which requests may. Both can
    be changed at any time. `counts`: requests by what became of them. `uplink_bytes_per_s`: what bodies of requests
    share; one that does not arrive whole, because its sender was killed, is no request, as with S3."""

    def __init__(
        self,
        host: str,
        port: int,
        *,
        seed: int = 0,
        delay_s: float = 0.01,
        uplink_bytes_per_s: float = math.inf,
        listen_on: int = 0,
    ) -> None:
        self.rates: Mapping[str, float] = {}
        self.applies: Callable[[str, str], bool] = lambda method, path: method == "GET"
        self.retry_after: str | None = None
        self.counts: Counter[str] = Counter()
        self.heads: deque[bytes] = deque(maxlen=1_000)
        """The last requests: first lines and headers."""
        self.sent: Counter[str] = Counter()
        self.received: Counter[str] = Counter()
        """Bytes of the bodies of answers to GET, and of requests, by path; the store's own, whatever became of them."""
        self.delay_s = delay_s
        self._uplink_bytes_per_s, self._uplink_free_at = uplink_bytes_per_s, 0.0
        self._upstream = (host, port)
        self._random = random.Random(seed)
        self._loop = asyncio.new_event_loop()
        self._server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", listen_on))
        self.port: int = self._server.sockets[0].getsockname()[1]
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """The address that clients are given."""
        return f"http://127.0.0.1:{self.port}"

    def calm(self) -> None:
        """No more faults, and the counts begin anew."""
        self.rates, self.retry_after, self.counts = {}, None, Counter()
        self.applies = lambda method, path: method == "GET"
        self.heads.clear()

    def stop(self) -> None:
        """Close the port."""
        self._loop.call_soon_threadsafe(self._server.close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _draw(self, method: str, path: str) -> str:
        if not self.applies(method, path):
            return "untouched"
        point = self._random.random()
        for kind, rate in self.rates.items():
            point -= rate
            if point < 0:
                return kind
        return "untouched"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            method, path, _ = head.decode("latin-1").split(" ", 2)
            length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
            if re.search(rb"(?i)\r\nexpect: *100-continue", head):
                writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            body = await self._body(reader, int(length[1])) if length else b""
            kind = self._draw(method, path)
            self.counts[kind] += 1
            self.heads.append(head)
            if kind in ("reset", "slow_down", "error") or kind in REFUSALS:
                await self._refuse(writer, kind, method)
            else:
                answer = await self._ask(head, body)
                self.received[path.partition("?")[0]] += len(body)
                if method == "GET":
                    self.sent[path.partition("?")[0]] += len(answer.partition(b"\r\n\r\n")[2])
                await self._spoil(writer, kind, answer)
        with contextlib.suppress(ConnectionError):
            writer.close()

    async def _body(self, reader: asyncio.StreamReader, length: int) -> bytes:
        """At the speed of the uplink, which all connections share."""
        pieces = []
        for start in range(0, length, SLICE_BYTES):
            pieces.append(await reader.readexactly(min(SLICE_BYTES, length - start)))
            self._uplink_free_at = max(self._uplink_free_at, time.monotonic())
            self._uplink_free_at += len(pieces[-1]) / self._uplink_bytes_per_s
            if (wait_s := self._uplink_free_at - time.monotonic()) > 0:
                await asyncio.sleep(wait_s)
        return b"".join(pieces)

    async def _ask(self, head: bytes, body: bytes) -> bytes:
        """The upstream's whole answer; it closes the connection behind it, and our client does too."""
        reader, writer = await asyncio.open_connection(*self._upstream)
        lines = [line for line in head.split(b"\r\n")[:-2] if not line.lower().startswith((b"connection:", b"expect:"))]
        writer.write(b"\r\n".join([*lines, b"Connection: close", b"", b""]) + body)
        answer = await reader.read(-1)
        writer.close()
        return answer

    async def _refuse(self, writer: asyncio.StreamWriter, kind: str, method: str) -> None:
        if kind == "reset":
            _reset(writer)
            return
        code = {"slow_down": "SlowDown", "error": "InternalError"}.get(kind, kind)
        text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{code} was planted</Message></Error>".encode()
        later = f"Retry-After: {self.retry_after}\r\n" if self.retry_after and kind == "slow_down" else ""
        head = f"HTTP/1.1 {ANSWERS[code]} Planted\r\nContent-Type: application/xml\r\n{later}Connection: close\r\n"
        head += f"Content-Length: {len(text)}\r\n\r\n"
        writer.write(head.encode() + (b"" if method == "HEAD" else text))
        await writer.drain()

    async def _spoil(self, writer: asyncio.StreamWriter, kind: str, answer: bytes) -> None:
        head, separator, body = answer.partition(b"\r\n\r\n")
        if kind == "delay":
            await asyncio.sleep(self.delay_s)
        if kind in ("cut", "truncate", "short"):
            body = body[: len(body) // 2]
        if kind == "short":
            head = re.sub(rb"(?i)(\r\ncontent-length: *)\d+", rb"\g<1>%d" % len(body), head)
        writer.write(head + separator + body)
        await writer.drain()
        if kind == "cut":
            _reset(writer)


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close with RST instead of FIN."""
    plain: socket.socket = writer.get_extra_info("socket")
    plain.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
