"""Notices of clouds, from metadata servers that answer as theirs do."""

from __future__ import annotations

import http.server
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ftlaunch.launcher.spot import CLOUDS, Cloud, at_work, cloud_of, fetching, watch, watch_pod

AWS, GOOGLE, AZURE = CLOUDS
ACTION = json.dumps({"action": "terminate", "time": "2025-01-02T03:04:05Z"})


class Metadata:
    """One server for all three. `going`: whether the machine is about to be taken away."""

    def __init__(self) -> None:
        self.going, self.asked = False, 0

    def answer(self, method: str, path: str, headers: dict[str, str]) -> tuple[int, str]:
        self.asked += 1
        match method, path:
            case "PUT", "/latest/api/token":
                return (200, "secret") if headers.get("x-aws-ec2-metadata-token-ttl-seconds") else (400, "")
            case "GET", "/latest/meta-data/spot/instance-action":
                allowed = headers.get("x-aws-ec2-metadata-token") == "secret"
                return (200, ACTION) if allowed and self.going else (404 if allowed else 401, "")
            case "GET", "/computeMetadata/v1/instance/preempted":
                return (200, "TRUE" if self.going else "FALSE") if headers.get("metadata-flavor") else (403, "")
            case "GET", "/metadata/scheduledevents?api-version=2020-07-01":
                events = [{"EventType": "Freeze"}, *([{"EventType": "Preempt"}] if self.going else [])]
                return (200, json.dumps({"Events": events})) if headers.get("metadata") else (400, "")
        return 404, ""


@pytest.fixture
def metadata() -> Iterator[tuple[Metadata, str]]:
    server = Metadata()

    class Handler(http.server.BaseHTTPRequestHandler):
        def _do(self) -> None:
            headers = {name.lower(): value for name, value in self.headers.items()}
            code, text = server.answer(self.command, self.path, headers)
            self.send_response(code)
            self.end_headers()
            self.wfile.write(text.encode())

        do_GET = do_PUT = _do

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield server, f"http://127.0.0.1:{listening.server_port}"
        listening.shutdown()


@pytest.mark.parametrize("cloud", CLOUDS, ids=lambda cloud: cloud.vendor)
def test_a_notice_is_seen_and_nothing_else_is(cloud, metadata):
    server, base = metadata
    assert not cloud.ask(fetching(base))
    server.going = True
    assert cloud.ask(fetching(base))


@pytest.mark.parametrize("cloud", CLOUDS, ids=lambda cloud: cloud.vendor)
def test_a_server_that_is_not_there_says_nothing(cloud):
    assert not cloud.ask(fetching("http://127.0.0.1:9"))


def test_it_is_told_once(metadata):
    server, base = metadata
    told = threading.Event()
    watch(told.set, AWS, fetching(base), every_s=0.01)
    assert not told.wait(0.1)
    server.going = True
    assert told.wait(60)


def test_a_pod_gives_notice_and_knows_where_ranks_work(tmp_path):
    told = threading.Event()
    watch_pod(told.set, None, every_s=0.01)
    watch_pod(told.set, str(tmp_path), every_s=0.01)
    assert not told.wait(0.1)
    with at_work(None), at_work(str(tmp_path)):
        assert [path.name for path in (tmp_path / "ranks").iterdir()] == [str(os.getpid())]
        (tmp_path / "notice").touch()
        assert told.wait(60)
    assert list((tmp_path / "ranks").iterdir()) == []


@pytest.mark.parametrize(
    ("vendor", "cloud"),
    [("Amazon EC2\n", AWS), ("Google\n", GOOGLE), ("Microsoft Corporation\n", AZURE), ("QEMU", None)],
)
def test_machines_of_clouds(vendor: str, cloud: Cloud | None, tmp_path: Path):
    file = tmp_path / "sys_vendor"
    file.write_text(vendor)
    assert cloud_of(file) == cloud


def test_other_machines_are_not_asked(metadata, tmp_path):
    server, base = metadata
    assert cloud_of(tmp_path / "none") is None
    watch(lambda: None, None, fetching(base))
    assert server.asked == 0
