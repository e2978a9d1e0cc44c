"""Amazon's EC2 on loopback: moto, with regions that have no room.

`python ec2_server.py PORT FOLDER`, until it is killed. FOLDER/full says which regions refuse machines: a line each,
REGION CODE MESSAGE. FOLDER/room: machines that are given at once at most.
What is asked to be done, not to be told, is noted in FOLDER/asked: REGION ACTION.
"""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode

REGION = re.compile(r"Credential=[^/]+/\d+/([^/]+)/")
REFUSAL = (
    "<Response><Errors><Error><Code>{code}</Code><Message>{message}</Message></Error></Errors>"
    "<RequestID>0</RequestID></Response>"
)
STATUS = {"InsufficientInstanceCapacity": "500 Internal Server Error"}
"""As EC2 answers; others are the client's mistakes."""


class Crowded:
    """A WSGI application around moto's."""

    def __init__(self, application: Any, folder: Path) -> None:
        self._application, self._folder = application, folder

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        environ["wsgi.input"] = io.BytesIO(body)
        region = REGION.search(environ.get("HTTP_AUTHORIZATION", ""))
        action = parse_qs(body.decode(errors="replace")).get("Action", [""])[0]
        if region and action and not action.startswith("Describe"):
            with (self._folder / "asked").open("a") as asked:
                asked.write(f"{region[1]} {action}\n")
            if action == "RunInstances" and (refusal := self._refusal(region[1])):
                code, _, message = refusal.partition(" ")
                start(STATUS.get(code, "400 Bad Request"), [("Content-Type", "text/xml")])
                return [REFUSAL.format(code=code, message=message).encode()]
            if action == "RunInstances":
                body = self._as_many_as_there_is_room_for(body)
                environ |= {"wsgi.input": io.BytesIO(body), "CONTENT_LENGTH": str(len(body))}
        return self._application(environ, start)

    def _as_many_as_there_is_room_for(self, body: bytes) -> bytes:
        """Up to MaxCount; moto gives MinCount."""
        values = parse_qs(body.decode(), keep_blank_values=True)
        room = self._folder / "room"
        most = min(int(values["MaxCount"][0]), int(room.read_text()) if room.exists() else 1 << 30)
        return urlencode({**values, "MinCount": most}, doseq=True).encode()

    def _refusal(self, region: str) -> str | None:
        full = self._folder / "full"
        lines = full.read_text().splitlines() if full.exists() else []
        return next((line.partition(" ")[2] for line in lines if line.split()[0] == region), None)


def main() -> None:
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import run_simple

    application = Crowded(DomainDispatcherApplication(create_backend_app), Path(sys.argv[2]))
    run_simple("127.0.0.1", int(sys.argv[1]), application, threaded=True)


if __name__ == "__main__":
    main()
