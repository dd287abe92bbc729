"""An S3 bucket, or a prefix of one, as a store.

Consistency: ``create`` is one PutObject with ``If-None-Match: *``; the server decides. Whatever does not
answer with plain success or plain refusal (412) is *unknown* until the object was read back and compared.
Crash and cancellation: a request under way may take effect at the server later; since it is create-if-absent,
that is harmless or is found by the next create of the key.
Waiting is bounded: ``connect_seconds`` for a connection, ``read_seconds`` without a byte, and as a whole both
together plus the time that the bytes need at ``_SLOWEST_BYTES_PER_SECOND``. At most ``connections`` requests
run at once; others queue. Retries are not made here (retry.py).
"""

from __future__ import annotations

import asyncio
import base64
import builtins
import contextlib
import re
import zlib
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any

from timeline.errors import DamagedStore, NotFound, TimelineError, Unavailable, UsageError
from timeline.store._arguments import check_key, check_limit, check_range
from timeline.store.base import Listed, Refused

if TYPE_CHECKING:
    from timeline.store._s3_reads import PresignedReads

_SLOWEST_BYTES_PER_SECOND = 128 << 10
"""A slower connection counts as stalled. Eight uploads of 4 MiB that share 1 MB/s are not cut."""

_PAGE_KEYS = 1000
"""S3's own bound, for listings and for deletions."""

_PASSING_REFUSALS = ("InternalError", "SlowDown", "ServiceUnavailable", "OperationAborted", "RequestTimeout")
"""What DeleteObjects says of a key that may well be deleted at another try; anything else is a refusal."""

_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


class S3Store:
    """Objects of ``s3://bucket/prefix``. The client is made at the first call."""

    def __init__(
        self,
        bucket: str,
        prefix: str = "",
        *,
        endpoint_url: str | None = None,
        region: str | None = None,
        connections: int = 32,
        connect_seconds: float = 5.0,
        read_seconds: float = 30.0,
    ) -> None:
        self._bucket = bucket
        self._prefix = prefix.strip("/") + "/" if prefix.strip("/") else ""
        self._endpoint_url = endpoint_url
        self._region = region
        self._connections = connections
        self._connect_seconds = connect_seconds
        self._read_seconds = read_seconds
        self._client: Any = None
        self._reads: PresignedReads | None = None
        self._opening = asyncio.Lock()
        self._slots = asyncio.Semaphore(connections)
        self._open = contextlib.AsyncExitStack()
        self._bucket_seen = False

    @property
    def url(self) -> str:
        return f"s3://{self._bucket}/{self._prefix}".rstrip("/")

    async def create(self, key: str, data: bytes | memoryview) -> bool:
        check_key(key)
        body = data if isinstance(data, bytes) else bytes(data)
        try:
            async with self._request("write", key, len(body)) as (client, _):
                await client.put_object(
                    Bucket=self._bucket,
                    Key=self._prefix + key,
                    Body=body,
                    IfNoneMatch="*",
                    # Buckets with Object Lock demand a checksum.
                    ChecksumCRC32=base64.b64encode(zlib.crc32(body).to_bytes(4, "big")).decode(),
                )
                return True
        except _Taken as taken:
            mine = await self._holds(key, body)
            if mine is None:
                raise Unavailable(f"{self.url}: {key} appears and vanishes") from taken
            return mine
        except Unavailable as unknown:
            try:
                mine = await self._holds(key, body)
            except Unavailable:
                mine = None
            if mine is None:
                raise unknown from unknown.__cause__
            return mine

    async def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        check_key(key)
        check_range(start, length)
        if length == 0:
            return await self._nothing(key, start)
        try:
            return await self._read(key, start, length)
        except _OutOfRange:
            return await self._nothing(key, max(start, 0) + (length or 0))

    async def list(self, prefix: str, *, after: str = "", limit: int | None = None) -> builtins.list[Listed]:
        check_limit(limit)
        # Servers that keep directories (SeaweedFS) order and resume by directory, not by key: inside one
        # directory that is the same, anything else is put right here.
        directory = prefix[: prefix.rfind("/") + 1]
        inside = after[: after.rfind("/") + 1] == directory
        if after and not inside:
            found = await self._pages(prefix, "", None)
        else:
            found = await self._pages(prefix, after, limit)
        return sorted((item for item in found if item.key > after), key=lambda item: item.key)[:limit]

    async def _pages(self, prefix: str, after: str, limit: int | None) -> builtins.list[Listed]:
        found: builtins.list[Listed] = []
        token: str | None = None
        while limit is None or len(found) < limit:
            wanted = _PAGE_KEYS if limit is None else min(_PAGE_KEYS, limit - len(found))
            asked: dict[str, object] = {
                "Bucket": self._bucket,
                "Prefix": self._prefix + prefix,
                "MaxKeys": wanted,
            }
            if token is not None:
                asked["ContinuationToken"] = token
            elif after:
                asked["StartAfter"] = self._prefix + after
            async with self._request("list", prefix, 0) as (client, _):
                page = await client.list_objects_v2(**asked)
            for item in page.get("Contents", ()):
                found.append(Listed(item["Key"][len(self._prefix) :], int(item["Size"])))
            token = page.get("NextContinuationToken")
            if not page.get("IsTruncated") or token is None:
                break
        return found

    async def delete(self, keys: Sequence[str]) -> Sequence[Refused]:
        for key in keys:
            check_key(key)
        refused: builtins.list[Refused] = []
        for at in range(0, len(keys), _PAGE_KEYS):
            batch = keys[at : at + _PAGE_KEYS]
            async with self._request("delete", batch[0], 0) as (client, _):
                answer = await client.delete_objects(
                    Bucket=self._bucket,
                    Delete={"Objects": [{"Key": self._prefix + key} for key in batch], "Quiet": True},
                )
            for failed in answer.get("Errors", ()):
                code, key = str(failed.get("Code", "")), str(failed.get("Key", ""))[len(self._prefix) :]
                if code in _PASSING_REFUSALS:
                    raise Unavailable(f"{self._where} cannot delete {key} just now: {code}")
                if code != "NoSuchKey":
                    refused.append(Refused(key, f"{code} {failed.get('Message', '')}".rstrip()))
        return refused

    async def aclose(self) -> None:
        async with self._opening:
            self._client = self._reads = None
            await self._open.aclose()

    async def _connected(self) -> Any:
        if self._client is None:
            async with self._opening:
                if self._client is None:
                    from timeline.store import _s3_client, _s3_reads

                    made = _s3_client.client_context(
                        endpoint_url=self._endpoint_url,
                        region=self._region,
                        connections=self._connections,
                        connect_seconds=self._connect_seconds,
                        read_seconds=self._read_seconds,
                    )
                    try:
                        client = await self._open.enter_async_context(made)
                    except ValueError as error:
                        raise UsageError(f"{self._where}: {error}") from error
                    _s3_client.tune(client)
                    self._client, self._reads = client, _s3_reads.PresignedReads(client, self._bucket)
        return self._client

    @contextlib.asynccontextmanager
    async def _request(self, verb: str, key: str, size: int) -> AsyncIterator[tuple[Any, asyncio.Timeout]]:
        """One request: takes a slot, bounds the time for ``size`` bytes, puts its failure in our words."""
        from timeline.store import _s3_client

        async with self._slots:
            try:
                async with asyncio.timeout(self._patience(size)) as patience:
                    yield await self._connected(), patience
            except _s3_client.FAILURES as error:
                code, status = _s3_client.code_of(error), _s3_client.status_of(error)
                if status == 416:
                    raise _OutOfRange(key) from error
                if status == 412 and verb == "write":
                    raise _Taken(key) from error
                failure = _s3_client.translate(error, verb, key, self._where)
                if isinstance(failure, NotFound) and not self._bucket_seen and code != "NoSuchBucket":
                    failure = await self._missing(key)
                raise failure from error
            self._bucket_seen = True

    def _patience(self, size: int) -> float:
        return self._connect_seconds + self._read_seconds + size / _SLOWEST_BYTES_PER_SECOND

    @property
    def _where(self) -> str:
        at = f" at {self._endpoint_url}" if self._endpoint_url else ""
        return f"s3://{self._bucket}{at}"

    async def _missing(self, key: str) -> TimelineError:
        """Whether the key or the whole bucket is missing (some servers say "no such key" to both)."""
        from timeline.store import _s3_client

        try:
            async with asyncio.timeout(self._patience(0)):
                await self._client.head_bucket(Bucket=self._bucket)
        except _s3_client.FAILURES as error:
            if _s3_client.status_of(error) == 404:
                return UsageError(
                    f"{self._where}: no such bucket",
                    hint="create the bucket, or correct the URL of the store",
                )
            if _s3_client.status_of(error) != 403:
                return _s3_client.translate(error, "read", key, self._where)
        self._bucket_seen = True
        return NotFound(key)

    async def _holds(self, key: str, data: bytes) -> bool | None:
        """Whether the object has these bytes; ``None`` when there is no object."""
        try:
            if await self._size(key) != len(data):
                return False
            return await self._read(key, 0, None) == data
        except NotFound:
            return None

    async def _size(self, key: str) -> int:
        async with self._request("read", key, 0) as (client, _):
            answer = await client.head_object(Bucket=self._bucket, Key=self._prefix + key)
        return int(answer["ContentLength"])

    async def _nothing(self, key: str, end: int) -> bytes:
        """The empty range before ``end``, which S3 has no words for."""
        size = await self._size(key)
        if end > size:
            raise DamagedStore(key, size, f"object ends here, {end} bytes expected")
        return b""

    async def _read(self, key: str, start: int, length: int | None) -> bytes:
        wanted = _range(start, length)
        async with self._request("read", key, length or 0) as (client, patience):
            if self._reads is not None:
                async with self._reads.open(self._prefix + key, wanted) as answer:
                    if answer is not None:
                        headers = answer.headers
                        data = await self._body(key, answer, headers.get("Content-Length"), patience)
                        return _cut(key, data, start, length, headers.get("Content-Range"))
            asked = {"Bucket": self._bucket, "Key": self._prefix + key}
            got = await client.get_object(**asked, **({"Range": wanted} if wanted else {}))
            async with got["Body"] as body:
                data = await self._body(key, body, got["ContentLength"], patience)
        return _cut(key, data, start, length, got.get("ContentRange"))

    async def _body(self, key: str, body: Any, length: str | int | None, patience: asyncio.Timeout) -> bytes:
        """All of it, in the time that its length allows."""
        coming = None if length is None else int(length)
        patience.reschedule(asyncio.get_running_loop().time() + self._patience(coming or 0))
        data: bytes = await body.read()
        if coming is not None and len(data) != coming:
            raise Unavailable(f"{self._where} broke off after {len(data)} of {coming} bytes (read {key})")
        return data


def _range(start: int, length: int | None) -> str:
    """Value of the Range header; empty: the whole object."""
    if start < 0:
        return f"bytes={start}"
    if length is not None:
        return f"bytes={start}-{start + length - 1}"
    return f"bytes={start}-" if start else ""


class _Taken(TimelineError):
    """412: an object has the key."""


class _OutOfRange(TimelineError):
    """416: the range begins at or after the end of the object, or the object is empty."""


def _cut(key: str, data: bytes, start: int, length: int | None, content_range: str | None) -> bytes:
    """The bytes asked for, out of what came; a server may answer a range with the whole object."""
    if content_range is None:
        if start < 0:
            return data[start:]
        first, size = 0, len(data)
    else:
        match = _CONTENT_RANGE.fullmatch(content_range)
        if match is None or match[3] == "*":
            raise TimelineError(f"{key}: the server's Content-Range {content_range!r} cannot be read")
        first, size = int(match[1]), int(match[3])
        if int(match[2]) - first + 1 != len(data):
            raise Unavailable(f"{key}: {len(data)} bytes came as {content_range!r}")
    wanted_first = max(0, size + start) if start < 0 else start
    wanted_end = size if length is None else wanted_first + length
    if wanted_first > size or wanted_end > size:
        raise DamagedStore(key, size, f"object ends here, {max(wanted_first, wanted_end)} bytes expected")
    if first > wanted_first or first + len(data) < wanted_end:
        raise Unavailable(f"{key}: {content_range!r} came, not bytes {wanted_first} to {wanted_end}")
    return data[wanted_first - first : wanted_end - first]
