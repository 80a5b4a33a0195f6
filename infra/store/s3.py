"""The storage backend for an S3 bucket, through s3fs.

Endpoint and credentials are read from the ``AWS_*`` variables. Requests are sent with the client
of s3fs, which handles retries, sessions and credentials. Its file objects are not used: they store
a partly written file if an exception is raised in their ``with`` block, and they cache listings.
"""

import logging
import os
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, TypeVar

from infra.errors import (
    AlreadyThere,
    ArtifactMissing,
    InfraError,
    Refused,
    SettingRefused,
    StoreOutage,
    StoreUnavailable,
)
from infra.store.chunks import map_in_order
from infra.store.manifest import CHUNK_BYTES

log = logging.getLogger(__name__)

Result = TypeVar("Result")

MAX_PARTS = 9_000
"""Most parts of one multipart upload; S3 allows 10,000."""

# Limits of one request. They are small, because an outage must be reported within seconds; tasks
# retry in addition.
CONNECT_SECONDS = 3  # limit of opening a connection
READ_SECONDS = 20  # longest pause between two parts of a response
ATTEMPTS = 3  # sends of one request, the first included

CLIENT_SECONDS = 60.0
"""A ``Bucket`` created after this time uses a new client, which reads the credentials again.

Another program may renew the credentials. An existing ``Bucket`` keeps its client.
"""

_RETRYABLE_CODES = {
    "BadDigest",
    "ConditionalRequestConflict",
    "IncompleteBody",
    "NoSuchUpload",  # the upload completed but the response was lost, or its ID was damaged
    "OperationAborted",
    "RequestTimeout",
    "SlowDown",
    "XAmzContentSHA256Mismatch",
}
"""Error codes of S3 after which the same request may succeed."""

_PARSER_MODULES = {"botocore.parsers", "aiobotocore.parsers"}  # they parse responses
_MISSING_CODES = {"NoSuchBucket", "NoSuchKey"}
_CREDENTIAL_CODES = {"ExpiredToken", "InvalidToken", "TokenRefreshRequired"}
# HTTP statuses that are handled without an error code: wrong credentials (401, 403), the key exists
# (412), the object ends before the range (416).
_HANDLED_STATUSES = {401, 403, 412, 416}


class Bucket:
    """Stores keys as objects below one prefix of a bucket; implements ``backend.Backend``.

    Args:
        bucket: the name of the bucket.
        prefix: prefix of all keys, without slashes at its ends; may be empty.
    """

    def __init__(self, bucket: str, prefix: str) -> None:
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        self.uri = f"s3://{bucket}/{prefix}".rstrip("/")

    def local_path(self, key: str) -> Path | None:
        """Return None, because objects are not local files."""
        return None

    def sizes(self, prefix: str) -> dict[str, int]:
        """Return every key that begins with ``prefix``, with its size in bytes."""
        sizes: dict[str, int] = {}
        continuation: dict[str, str] = {}
        while True:
            page = self._call(
                "list_objects_v2", prefix, Prefix=self._prefix + prefix, **continuation
            )
            for entry in page.get("Contents", ()):
                if not entry["Key"].endswith("/"):  # some servers list folders as keys too
                    sizes[entry["Key"].removeprefix(self._prefix)] = entry["Size"]
            if not page.get("IsTruncated"):
                return sizes
            continuation = {"ContinuationToken": page["NextContinuationToken"]}

    def size(self, key: str) -> int | None:
        """Return the size of a key in bytes; None if it does not exist."""
        return self.sizes(key).get(key)

    def read(self, key: str, start: int, stop: int) -> bytes:
        """Read bytes [start, stop) of a key, or fewer if the object ends earlier."""
        from fsspec.asyn import sync

        def send() -> bytes:
            try:
                return bytes(sync(self._files.loop, self._read_range, key, start, stop))
            except _list_client_errors() as fault:
                if _find_code_and_status(fault)[1] == 416:  # the object ends before ``start``
                    return b""
                raise

        return self._send_with_retries(
            send, key, lambda fault: _is_truncated(fault) or _is_unknown_code(fault)
        )

    def create(self, key: str, body: bytes) -> None:
        """Write a new key; raises ``AlreadyThere`` if it exists."""
        for attempt in range(ATTEMPTS):
            try:
                self._call("put_object", key, Key=self._prefix + key, Body=body, IfNoneMatch="*")
            except StoreOutage as fault:
                # S3 returns this while another client creates the key: wait 0.1 s, then 0.2 s.
                if fault.code != "create_conflict" or attempt + 1 == ATTEMPTS:
                    raise
                time.sleep(0.1 * 2**attempt)
            else:
                return

    def write(self, key: str, body: bytes) -> None:
        """Write a key; an existing value is replaced."""
        self._call("put_object", key, Key=self._prefix + key, Body=body)

    def move(self, file: Path, key: str) -> bool:
        """Return False, because a local file cannot be moved into a bucket."""
        return False

    def link(self, key: str, to: str) -> None:
        """Do nothing, because a bucket has no hard links and no reader needs them."""

    def upload(self, key: str, size: int, chunks: Iterable[bytes]) -> None:
        """Write or replace a key of ``size`` bytes; if ``chunks`` raises, the key is unchanged."""
        if size <= CHUNK_BYTES:
            self.write(key, b"".join(chunks))
        else:
            self._upload_parts(key, size, chunks, {})

    def upload_new(self, key: str, size: int, chunks: Iterable[bytes]) -> None:
        """Write a new key of ``size`` bytes; raises ``AlreadyThere`` if it exists."""
        if size <= CHUNK_BYTES:
            self.create(key, b"".join(chunks))
        else:
            self._upload_parts(key, size, chunks, {"IfNoneMatch": "*"})

    def _upload_parts(
        self, key: str, size: int, chunks: Iterable[bytes], condition: dict[str, str]
    ) -> None:
        """Write a key in a multipart upload; if that fails, abort the upload and raise.

        Args:
            key: the key.
            size: total size of the chunks in bytes.
            chunks: the content, in order.
            condition: parameters of the completing request, such as ``IfNoneMatch``.
        """
        # Rounded up, so that there are at most MAX_PARTS parts.
        chunks_per_part = max(1, -(-size // (CHUNK_BYTES * MAX_PARTS)))
        upload: dict[str, Any] = {"Key": self._prefix + key}
        upload["UploadId"] = self._call("create_multipart_upload", key, **upload)["UploadId"]

        def send(part: tuple[int, bytes]) -> dict[str, Any]:
            number, body = part
            response = self._call("upload_part", key, PartNumber=number, Body=body, **upload)
            return {"PartNumber": number, "ETag": response["ETag"]}

        try:
            parts = list(
                map_in_order(send, enumerate(_join_chunks(chunks, chunks_per_part), start=1))
            )
            completion = {"MultipartUpload": {"Parts": parts}, **upload, **condition}
            self._call("complete_multipart_upload", key, **completion)
        except BaseException:
            # Parts of an open upload are invisible but cost money.
            try:
                self._call("abort_multipart_upload", key, **upload)
            except (InfraError, Refused) as fault:
                log.warning("The unfinished upload of %s/%s remains: %s", self.uri, key, fault)
            raise

    @cached_property
    def _files(self) -> Any:
        """The s3fs client."""
        environment = tuple(sorted(os.environ.items()))
        return _get_client(environment, os.getpid(), time.monotonic() // CLIENT_SECONDS)

    def _call(self, method: str, name: str, **request: Any) -> Any:
        """Send a request to the bucket; ``name`` is the key for error messages."""

        def send() -> Any:
            return self._files.call_s3(method, Bucket=self._bucket, **request)

        return self._send_with_retries(send, name, _is_unknown_code)

    def _send_with_retries(
        self, send: Callable[[], Result], name: str, is_retried: Callable[[BaseException], bool]
    ) -> Result:
        """Send a request and retry it after errors that botocore does not retry.

        Args:
            send: sends the request.
            name: the key, for error messages.
            is_retried: whether to retry after an exception.
        """
        attempts = 0
        while True:
            attempts += 1
            try:
                return send()
            except _list_client_errors() as fault:
                if attempts == ATTEMPTS or not is_retried(fault):
                    raise self._translate(fault, name) from None

    async def _read_range(self, key: str, start: int, stop: int) -> Any:
        """Request bytes [start, stop) of a key and return them."""
        response = await self._files._call_s3(
            "get_object",
            Bucket=self._bucket,
            Key=self._prefix + key,
            Range=f"bytes={start}-{stop - 1}",
        )
        body = response["Body"]
        try:
            return await body.read()
        finally:
            body.close()

    def _translate(self, fault: BaseException, name: str) -> Refused | InfraError:
        """Return the project's error to raise for an error response or a missing response.

        The server's message is omitted, because some servers quote the request in it and a request
        contains an access key. For the same reason ``fault`` must not become the ``__cause__``.
        """
        code, status = _find_code_and_status(fault)
        place = f"{self.uri}/{name}"
        if status == 412 or isinstance(fault, FileExistsError):
            return AlreadyThere("key_exists", place=place)
        if code == "NoSuchBucket":
            return SettingRefused("bucket_missing", bucket=self._bucket)
        if code == "NoSuchKey":  # a 404 without a code is from a server that is not S3
            return ArtifactMissing("file_missing", path=place)
        if code == "ConditionalRequestConflict":
            return StoreOutage("create_conflict", place=place)
        if code in _RETRYABLE_CODES or status >= 500:
            return StoreOutage("store_failed", place=place, problem=code or str(status))
        if code in _CREDENTIAL_CODES or status in {401, 403} or _lacks_credentials(fault):
            return SettingRefused(
                "store_credentials_refused",
                place=place,
                problem=code or "none found",
                bucket=self._bucket,
            )
        if _is_unreadable(fault) or (status == 404 and _is_from_s3(fault)):
            return StoreUnavailable("store_answer_unreadable", place=place)
        if 300 <= status < 500 or not _is_connection_error(fault):
            problem = code or type(fault).__name__
            return SettingRefused("store_unusable", place=place, problem=problem)
        return StoreOutage("store_no_answer", place=place, problem=type(fault).__name__)


@lru_cache(maxsize=1)
def _get_client(environment: tuple[tuple[str, str], ...], process: int, period: float) -> Any:  # noqa: ARG001
    """Return the client that all stores of this process share.

    A new client takes tens of milliseconds and opens a new connection, and a flow opens its store
    hundreds of times. The arguments are only a cache key: a change of any of them creates a client.

    Args:
        environment: all environment variables, because some contain the credentials.
        process: the PID, because a client cannot be used after a fork.
        period: number of the current period of ``CLIENT_SECONDS`` seconds.
    """
    import s3fs

    files = s3fs.S3FileSystem(
        anon=False,
        skip_instance_cache=True,  # the cache key of s3fs does not contain the AWS_* variables
        use_listings_cache=False,
        config_kwargs={
            "connect_timeout": CONNECT_SECONDS,
            "read_timeout": READ_SECONDS,
            "retries": {"mode": "standard", "total_max_attempts": ATTEMPTS},
        },
    )
    files.retries = 1  # botocore retries too; both together would take minutes
    return files


def _join_chunks(chunks: Iterable[bytes], count: int) -> Iterator[bytes]:
    """Join each ``count`` consecutive chunks into one; the last one may have fewer."""
    group: list[bytes] = []
    for chunk in chunks:
        group.append(chunk)
        if len(group) == count:
            yield group[0] if count == 1 else b"".join(group)
            group = []
    if group:
        yield b"".join(group)


def _list_client_errors() -> tuple[type[Exception], ...]:
    """Return the exception classes with which s3fs and its libraries report a failed request.

    An exception of any other class is a programming error and is not caught.
    """
    from aiohttp import ClientError as HttpError
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.parsers import ResponseParserError

    known = (BotoCoreError, ClientError, HttpError, OSError, ValueError, TimeoutError)
    return (*known, ResponseParserError)


def _is_connection_error(fault: BaseException) -> bool:
    """Return whether the request received no complete response, so that a retry may help."""
    from aiohttp import ClientError as HttpError
    from botocore.exceptions import ConnectionError as Unconnected
    from botocore.exceptions import HTTPClientError

    return isinstance(fault, Unconnected | HTTPClientError | HttpError | OSError)


def _is_unreadable(fault: BaseException) -> bool:
    """Return whether the exception is from botocore's parser of responses.

    botocore raises the same classes for an invalid address, so the traceback decides.
    """
    frames = traceback.walk_tb(fault.__traceback__)
    return any(frame.f_globals.get("__name__") in _PARSER_MODULES for frame, _ in frames)


def _find_response(fault: BaseException | None) -> Mapping[str, Any]:
    """Return the error response that botocore parsed; empty if there was no response."""
    from botocore.exceptions import ClientError

    while fault is not None:
        if isinstance(fault, ClientError):
            response: Mapping[str, Any] = fault.response
            return response
        fault = fault.__cause__
    return {}


def _find_code_and_status(fault: BaseException) -> tuple[str, int]:
    """Return error code and HTTP status of the response; ``("", 0)`` if there was none."""
    response = _find_response(fault)
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return str(response.get("Error", {}).get("Code", "")), int(status)


def _is_from_s3(fault: BaseException) -> bool:
    """Return whether the response has the request ID that S3 servers send.

    Such a server sends 404 only with a few known codes. With any other code, the text of the
    response was damaged in transit.
    """
    headers = _find_response(fault).get("ResponseMetadata", {}).get("HTTPHeaders", {})
    return "x-amz-request-id" in headers


def _is_unknown_code(fault: BaseException) -> bool:
    """Return whether an error response has an unknown code, perhaps damaged in transit.

    botocore does not retry such a request. A server other than S3 sends the same code again.
    """
    code, status = _find_code_and_status(fault)
    known = (
        code in _RETRYABLE_CODES | _MISSING_CODES | _CREDENTIAL_CODES or status in _HANDLED_STATUSES
    )
    return 400 <= status < 500 and not known


def _is_truncated(fault: BaseException) -> bool:
    """Return whether the response body ended early, which botocore does not retry."""
    from aiohttp import ClientPayloadError
    from botocore.exceptions import IncompleteReadError, ResponseStreamingError

    return isinstance(fault, ClientPayloadError | IncompleteReadError | ResponseStreamingError)


def _lacks_credentials(fault: BaseException) -> bool:
    """Return whether no usable credentials were found."""
    from botocore.exceptions import (
        CredentialRetrievalError,
        NoCredentialsError,
        PartialCredentialsError,
        ProfileNotFound,
    )

    return isinstance(
        fault,
        NoCredentialsError | PartialCredentialsError | CredentialRetrievalError | ProfileNotFound,
    )
