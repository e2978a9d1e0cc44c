"""Google Cloud Storage on loopback: the emulator, and the precondition of uploads that it leaves out.

`python gcs_server.py PORT BUCKET`, until it is killed.
"""

from __future__ import annotations

import io
import json
import re
import sys
import threading
from urllib.parse import parse_qs, unquote, urlsplit

from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.server import RequestHandler, create_server

NAME = re.compile(rb'"name":\s*("[^"]+")')


class Handler(RequestHandler):
    """`ifGenerationMatch=0`: 412 where the object is there ("Request preconditions" in the store's documentation)."""

    def do_POST(self) -> None:
        parts = urlsplit(self.path)
        query = parse_qs(parts.query)
        if query.get("ifGenerationMatch") == ["0"]:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self._is_there(unquote(parts.path.split("/b/")[1].split("/")[0]), query, body):
                self.send_response(412)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.rfile = io.BytesIO(body)
        super().do_POST()

    def _is_there(self, bucket: str, query: dict[str, list[str]], body: bytes) -> bool:
        """A simple upload is named in the query, one of several parts in its first part."""
        found = NAME.search(body)
        name = query["name"][0] if "name" in query else found and json.loads(found[1])
        try:
            self.storage.get_file_obj(bucket, name)
        except NotFound:
            return False
        return True


def main() -> None:
    import gcp_storage_emulator.server as emulator

    emulator.RequestHandler = Handler
    create_server("127.0.0.1", int(sys.argv[1]), in_memory=True, default_bucket=sys.argv[2]).start()
    threading.Event().wait()


if __name__ == "__main__":
    main()
