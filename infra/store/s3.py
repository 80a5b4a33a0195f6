"""The object store in an S3 bucket, over s3fs. Endpoint and credentials are the AWS_* variables.

s3fs is used as a client (its retries, sessions and credentials), not through its file objects:
those commit a partly written file when an exception leaves their block, and they cache listings.
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
from infra.store.chunks import in_order
from infra.store.manifest import CHUNK_BYTES

log = logging.getLogger(__name__)

Result = TypeVar("Result")

MAX_PARTS = 9_000  # S3 allows 10,000

# An outage must be reported within seconds; tasks retry in addition.
CONNECT_SECONDS = 3
READ_SECONDS = 20
ATTEMPTS = 3

CLIENT_SECONDS = 60.0
"""How long a client is used for new stores: another program may renew credentials in a file."""

_PASSING = {
    "BadDigest",
    "ConditionalRequestConflict",
    "IncompleteBody",
    "NoSuchUpload",  # ours completed but the response was lost, or its name was damaged
    "OperationAborted",
    "RequestTimeout",
    "SlowDown",
    "XAmzContentSHA256Mismatch",
}
_PARSERS = {"botocore.parsers", "aiobotocore.parsers"}
_MISSING = {"NoSuchBucket", "NoSuchKey"}
_BY_STATUS = {401, 403, 412, 416}
_CREDENTIALS = {"ExpiredToken", "InvalidToken", "TokenRefreshRequired"}


class Bucket:
    """Keys below one prefix of one bucket."""

    def __init__(self, bucket: str, prefix: str) -> None:
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        self.uri = f"s3://{bucket}/{prefix}".rstrip("/")

    def in_place(self, key: str) -> Path | None:
        """Return None: a bucket has no local folder."""
        return None

    def sizes(self, prefix: str) -> dict[str, int]:
        """Return every key that begins with ``prefix``, with its size in bytes."""
        found: dict[str, int] = {}
        more: dict[str, str] = {}
        while True:
            page = self._call("list_objects_v2", prefix, Prefix=self._prefix + prefix, **more)
            for entry in page.get("Contents", ()):
                if not entry["Key"].endswith("/"):  # some servers list folders as well
                    found[entry["Key"].removeprefix(self._prefix)] = entry["Size"]
            if not page.get("IsTruncated"):
                return found
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def size(self, key: str) -> int | None:
        """Return the size of a key in bytes; None if there is none."""
        return self.sizes(key).get(key)

    def read(self, key: str, start: int, stop: int) -> bytes:
        """Read bytes ``start`` to ``stop``; fewer if the object ends earlier."""
        from fsspec.asyn import sync

        def send() -> bytes:
            try:
                return bytes(sync(self._files.loop, self._ranged, key, start, stop))
            except _foreign() as fault:
                if _code_and_status(fault)[1] == 416:
                    return b""
                raise

        return self._with_retries(send, key, lambda fault: _broke_off(fault) or _is_strange(fault))

    def create(self, key: str, body: bytes) -> None:
        """Write a new key; ``AlreadyThere`` if it exists."""
        for attempt in range(ATTEMPTS):
            try:
                self._call("put_object", key, Key=self._prefix + key, Body=body, IfNoneMatch="*")
            except StoreOutage as fault:
                # S3 returns this during another create of the key; the client should retry.
                if fault.code != "create_conflict" or attempt + 1 == ATTEMPTS:
                    raise
                time.sleep(0.1 * 2**attempt)
            else:
                return

    def write(self, key: str, body: bytes) -> None:
        """Write a key, replacing its content."""
        self._call("put_object", key, Key=self._prefix + key, Body=body)

    def move(self, file: Path, key: str) -> bool:
        """Return False: a local file cannot be moved into a bucket."""
        return False

    def link(self, key: str, to: str) -> None:
        """Do nothing: no reader opens files of a bucket in place."""

    def upload(self, key: str, size: int, chunks: Iterable[bytes]) -> None:
        """Write a large object; if ``chunks`` raises, the key is unchanged."""
        if size <= CHUNK_BYTES:
            self.write(key, b"".join(chunks))
        else:
            self._upload_parts(key, size, chunks, {})

    def upload_new(self, key: str, size: int, chunks: Iterable[bytes]) -> None:
        """Write a new large object; ``AlreadyThere`` if its key exists."""
        if size <= CHUNK_BYTES:
            self.create(key, b"".join(chunks))
        else:
            self._upload_parts(key, size, chunks, {"IfNoneMatch": "*"})

    def _upload_parts(
        self, key: str, size: int, chunks: Iterable[bytes], condition: dict[str, str]
    ) -> None:
        per_part = max(1, -(-size // (CHUNK_BYTES * MAX_PARTS)))
        where: dict[str, Any] = {"Key": self._prefix + key}
        where["UploadId"] = self._call("create_multipart_upload", key, **where)["UploadId"]

        def send(part: tuple[int, bytes]) -> dict[str, Any]:
            number, body = part
            sent = self._call("upload_part", key, PartNumber=number, Body=body, **where)
            return {"PartNumber": number, "ETag": sent["ETag"]}

        try:
            parts = list(in_order(send, enumerate(_grouped(chunks, per_part), start=1)))
            whole = {"MultipartUpload": {"Parts": parts}, **where, **condition}
            self._call("complete_multipart_upload", key, **whole)
        except BaseException:
            # Parts of an open upload are invisible but are billed.
            try:
                self._call("abort_multipart_upload", key, **where)
            except (InfraError, Refused) as fault:
                log.warning("The unfinished upload of %s/%s remains: %s", self.uri, key, fault)
            raise

    @cached_property
    def _files(self) -> Any:
        environment = tuple(sorted(os.environ.items()))
        return _client(environment, os.getpid(), time.monotonic() // CLIENT_SECONDS)

    def _call(self, method: str, name: str, **request: Any) -> Any:
        def send() -> Any:
            return self._files.call_s3(method, Bucket=self._bucket, **request)

        return self._with_retries(send, name, _is_strange)

    def _with_retries(
        self, send: Callable[[], Result], name: str, is_retried: Callable[[BaseException], bool]
    ) -> Result:
        """Send a request, and retry it after faults that botocore does not retry."""
        tried = 0
        while True:
            tried += 1
            try:
                return send()
            except _foreign() as fault:
                if tried == ATTEMPTS or not is_retried(fault):
                    raise self._translate(fault, name) from None

    async def _ranged(self, key: str, start: int, stop: int) -> Any:
        answer = await self._files._call_s3(
            "get_object",
            Bucket=self._bucket,
            Key=self._prefix + key,
            Range=f"bytes={start}-{stop - 1}",
        )
        body = answer["Body"]
        try:
            return await body.read()
        finally:
            body.close()

    def _translate(self, fault: BaseException, name: str) -> Refused | InfraError:
        """Translate an error response or a missing one; the class shows whether a retry helps.

        The store's message is omitted: some servers quote the request in it, and a request contains
        an access key. For the same reason its exception is not the cause of ours.
        """
        code, status = _code_and_status(fault)
        at = f"{self.uri}/{name}"
        if status == 412 or isinstance(fault, FileExistsError):
            return AlreadyThere("key_exists", place=at)
        if code == "NoSuchBucket":
            return SettingRefused("bucket_missing", bucket=self._bucket)
        if code == "NoSuchKey":  # a 404 without a code is from a server that is not S3
            return ArtifactMissing("file_missing", path=at)
        if code == "ConditionalRequestConflict":
            return StoreOutage("create_conflict", place=at)
        if code in _PASSING or status >= 500:
            return StoreOutage("store_failed", place=at, problem=code or str(status))
        if code in _CREDENTIALS or status in {401, 403} or _lacks_credentials(fault):
            return SettingRefused(
                "store_credentials_refused",
                place=at,
                problem=code or "none found",
                bucket=self._bucket,
            )
        if _is_unreadable(fault) or (status == 404 and _is_from_s3(fault)):
            return StoreUnavailable("store_answer_unreadable", place=at)
        if 300 <= status < 500 or not _is_silence(fault):
            return SettingRefused("store_unusable", place=at, problem=code or type(fault).__name__)
        return StoreOutage("store_no_answer", place=at, problem=type(fault).__name__)


@lru_cache(maxsize=1)
def _client(environment: tuple[tuple[str, str], ...], process: int, period: float) -> Any:  # noqa: ARG001
    """Return the client of all stores of this process, for an unchanged environment.

    A new client takes tens of milliseconds and a new connection, and a flow opens its store
    hundreds of times.
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
    files.retries = 1  # botocore already retries; the product of both would be minutes
    return files


def _grouped(chunks: Iterable[bytes], count: int) -> Iterator[bytes]:
    group: list[bytes] = []
    for chunk in chunks:
        group.append(chunk)
        if len(group) == count:
            yield group[0] if count == 1 else b"".join(group)
            group = []
    if group:
        yield b"".join(group)


def _foreign() -> tuple[type[Exception], ...]:
    """Return the exception classes of s3fs and its libraries; any other is a fault of ours."""
    from aiohttp import ClientError as HttpError
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.parsers import ResponseParserError

    known = (BotoCoreError, ClientError, HttpError, OSError, ValueError, TimeoutError)
    return (*known, ResponseParserError)


def _is_silence(fault: BaseException) -> bool:
    """Return whether a request received no complete response; False for an invalid request."""
    from aiohttp import ClientError as HttpError
    from botocore.exceptions import ConnectionError as Unconnected
    from botocore.exceptions import HTTPClientError

    return isinstance(fault, Unconnected | HTTPClientError | HttpError | OSError)


def _is_unreadable(fault: BaseException) -> bool:
    """Return whether a response could not be parsed, as opposed to an invalid address."""
    frames = traceback.walk_tb(fault.__traceback__)
    return any(frame.f_globals.get("__name__") in _PARSERS for frame, _ in frames)


def _response(fault: BaseException | None) -> Mapping[str, Any]:
    """Return the store's response as botocore parsed it; empty if there was none."""
    from botocore.exceptions import ClientError

    while fault is not None:
        if isinstance(fault, ClientError):
            response: Mapping[str, Any] = fault.response
            return response
        fault = fault.__cause__
    return {}


def _code_and_status(fault: BaseException) -> tuple[str, int]:
    """Return error code and HTTP status of the response; ``("", 0)`` if there was none."""
    found = _response(fault)
    status = found.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return str(found.get("Error", {}).get("Code", "")), int(status)


def _is_from_s3(fault: BaseException) -> bool:
    """Return whether the response is from a server that numbers its responses as S3 does.

    Its 404 has one of few codes; with any other code the text was damaged in transit.
    """
    headers = _response(fault).get("ResponseMetadata", {}).get("HTTPHeaders", {})
    return "x-amz-request-id" in headers


def _is_strange(fault: BaseException) -> bool:
    """Return whether an error has an unknown code, so it may have been damaged in transit.

    botocore does not retry such a request. A server that is not S3 repeats its response.
    """
    code, status = _code_and_status(fault)
    known = code in _PASSING | _MISSING | _CREDENTIALS or status in _BY_STATUS
    return 400 <= status < 500 and not known


def _broke_off(fault: BaseException) -> bool:
    """Return whether the response body ended early, which botocore does not retry."""
    from aiohttp import ClientPayloadError
    from botocore.exceptions import IncompleteReadError, ResponseStreamingError

    return isinstance(fault, ClientPayloadError | IncompleteReadError | ResponseStreamingError)


def _lacks_credentials(fault: BaseException) -> bool:
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
