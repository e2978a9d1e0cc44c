"""Files that several processes upload together, each some of the parts: S3's multipart uploads.

The requests go through botocore, on which s3fs is built too, with the options and credentials of s3fs's own: its
client sends from an event loop, which takes half as much processor time again and holds the training's thread up.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from ..recipes.errors import FtlaunchError, UserError
from .storage_errors import protocol
from .storage_list import info
from .storage_place import SAME_AS, filesystem
from .storage_retry import RETRY, RetryPolicy, retrying

PART_BYTES = 6 * 2**20
"""S3 takes no smaller part than 5 MiB; a rank has parts of eight files at hand at once, and two on their way."""

MOST_PARTS = 10_000
"""Of one upload (Amazon S3 user guide, "multipart upload limits")."""


def takes_parts(url: str) -> bool:
    """Whether the store lets several processes send one file."""
    return SAME_AS.get(protocol(url), protocol(url)) == "s3"


def part_bytes(size: int) -> int:
    """Bytes of each part but the last of a file of `size`: a multiple of 8, and equal, as some stores want them."""
    return max(PART_BYTES, -(-size // (8 * MOST_PARTS)) * 8)


class PartMark(NamedTuple):
    """What a store says of a part that it has, and what was said to it: both are wanted when the upload is finished."""

    etag: str
    checksum: str


class PartUploads:
    """Uploads to the store of `url`; threads may share it. Everything is tried again after passing trouble, and raises
    UserError or InfrastructureError."""

    def __init__(self, url: str, retry: RetryPolicy = RETRY) -> None:
        self._fs, _ = filesystem(url)
        self._client = _client(self._fs)
        self._retry = retry
        # Stores that know no checksums are used with AWS_REQUEST_CHECKSUM_CALCULATION=when_required.
        self._checks = self._client.meta.config.request_checksum_calculation != "when_required"

    def begin(self, url: str) -> str:
        """Name of a new upload, which takes parts from any process. What it becomes is not seen before `finish`."""
        kind = {"ChecksumAlgorithm": "CRC32"} if self._checks else {}
        name: str = self._of_file("create_multipart_upload", url, **kind)["UploadId"]
        return name

    def send(self, url: str, upload: str, number: int, data: bytes | bytearray, crc32: int) -> PartMark:
        """Part `number`, from 1. The store holds it against its checksum (zlib's)."""
        checksum = base64.b64encode(crc32.to_bytes(4, "big")).decode()
        part = {"UploadId": upload, "PartNumber": number, "Body": data, **self._checked(checksum)}
        return PartMark(self._of_file("upload_part", url, **part)["ETag"], checksum)

    def finish(self, url: str, upload: str, marks: Sequence[PartMark], size: int) -> None:
        """Make the file of its parts, in their order. One that is there already had its answer lost on the way."""
        parts = [
            {"PartNumber": number, "ETag": mark.etag, **self._checked(mark.checksum)}
            for number, mark in enumerate(marks, 1)
        ]
        try:
            self._of_file("complete_multipart_upload", url, UploadId=upload, MultipartUpload={"Parts": parts})
        except UserError:
            with suppress(FtlaunchError):
                if info(url).size == size:
                    return
            raise

    def unfinished(self, folder: str) -> Iterator[tuple[str, str]]:
        """URL and name of the uploads below a folder that nobody has finished yet."""
        below = folder.rstrip("/") + "/"
        bucket, prefix, _ = self._fs.split_path(below)
        page: Mapping[str, Any] = {"IsTruncated": True}
        while page.get("IsTruncated"):
            after = {name: page[f"Next{name}"] for name in ("KeyMarker", "UploadIdMarker") if page.get(f"Next{name}")}
            page = self._call("list_multipart_uploads", below, Bucket=bucket, Prefix=prefix, **after)
            for one in page.get("Uploads", ()):
                yield below + one["Key"].removeprefix(prefix), one["UploadId"]

    def _checked(self, checksum: str) -> dict[str, str]:
        return {"ChecksumCRC32": checksum} if self._checks else {}

    def abort(self, url: str, upload: str) -> None:
        """Parts that become nothing are paid for."""
        with suppress(FtlaunchError):
            self._of_file("abort_multipart_upload", url, UploadId=upload)

    def _of_file(self, operation: str, url: str, **request: Any) -> Mapping[str, Any]:
        bucket, key, _ = self._fs.split_path(url)
        return self._call(operation, url, **request, Bucket=bucket, Key=key)

    def _call(self, operation: str, url: str, **request: Any) -> Mapping[str, Any]:
        from botocore.exceptions import ClientError
        from s3fs.errors import translate_boto_error

        request = {**self._always(operation), **request}

        def call() -> Mapping[str, Any]:
            try:
                answer: Mapping[str, Any] = getattr(self._client, operation)(**request)
            except ClientError as error:
                raise translate_boto_error(error) from error
            return answer

        return retrying("write", url, call, self._retry)

    def _always(self, operation: str) -> dict[str, Any]:
        """What the configuration of s3fs adds to every request that knows it, such as the key to encrypt with."""
        model = self._client.meta.service_model.operation_model(self._client.meta.method_to_api_mapping[operation])
        return {
            name: value for name, value in self._fs.s3_additional_kwargs.items() if name in model.input_shape.members
        }


def _client(fs: Any) -> Any:
    """botocore's client, as s3fs's file system would make its own."""
    import botocore.session
    from botocore import UNSIGNED
    from botocore.config import Config

    unsigned = {"signature_version": UNSIGNED} if fs.anon else {}
    own = {
        "aws_access_key_id": fs.key,
        "aws_secret_access_key": fs.secret,
        "aws_session_token": fs.token,
        "endpoint_url": fs.endpoint_url,
    }
    given = {name: value for name, value in own.items() if value is not None}
    session = botocore.session.Session(**fs.kwargs)
    config = Config(**fs.config_kwargs, **unsigned)
    return session.create_client("s3", config=config, use_ssl=fs.use_ssl, **{**given, **fs.client_kwargs})
