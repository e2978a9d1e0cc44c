"""An object store that can go away and come back with all that it holds: moto, and a door before it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import boto3
import psutil
from faulty_proxy import FaultyProxy
from servers import moto_process

BUCKET = "chaos"
KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


class Store:
    """One bucket. Runs go through the door; what looks at them in tests does not."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._door = FaultyProxy("127.0.0.1", port)
        self.variables = {**KEYS, "AWS_ENDPOINT_URL": self._door.url}
        """Of who uses it."""
        self._client = boto3.client(
            "s3", endpoint_url=f"http://127.0.0.1:{port}", region_name=KEYS["AWS_DEFAULT_REGION"],
            aws_access_key_id="test", aws_secret_access_key="test",
        )  # fmt: skip
        self._client.create_bucket(Bucket=BUCKET)

    def put(self, path: Path) -> str:
        """Store a file once; its URL."""
        if not self.keys(f"data/{path.name}"):
            self._client.put_object(Bucket=BUCKET, Key=f"data/{path.name}", Body=path.read_bytes())
        return f"s3://{BUCKET}/data/{path.name}"

    def keys(self, prefix: str) -> list[str]:
        """Names of objects."""
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        return [found["Key"] for page in pages for found in page.get("Contents", ())]

    def texts(self, prefix: str) -> list[str]:
        """What the objects hold."""
        return [self._read(key).decode() for key in self.keys(prefix)]

    def _read(self, key: str) -> bytes:
        data: bytes = self._client.get_object(Bucket=BUCKET, Key=key)["Body"].read()
        return data

    def copy(self, prefix: str, folder: Path) -> Path:
        """Bring all objects of a prefix into a folder."""
        for key in self.keys(f"{prefix}/"):
            path = folder / key.removeprefix(f"{prefix}/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self._read(key))
        return folder

    def refuse(self, seconds: float) -> None:
        """Nobody listens; connections that are open are never answered."""
        port = self._door.port
        self._door.stop()
        time.sleep(seconds)
        self._door = FaultyProxy("127.0.0.1", self._port, listen_on=port)

    def keep_silent(self, seconds: float) -> None:
        """Connections are taken, and nothing is answered."""
        server = next(one for one in psutil.Process().children() if "moto.server" in one.cmdline())
        server.suspend()
        time.sleep(seconds)
        server.resume()

    def close(self) -> None:
        """Shut the door for good."""
        self._door.stop()


@contextmanager
def store_with_a_door(folder: Path) -> Iterator[Store]:
    """An empty one."""
    with moto_process(folder) as port:
        store = Store(port)
        try:
            yield store
        finally:
            store.close()
