"""From the URL of a store to the store."""

from __future__ import annotations

import os
from urllib.parse import unquote, urlsplit

from timeline.clock import Clock, SystemClock
from timeline.errors import UsageError
from timeline.store.base import Store
from timeline.store.local import LocalStore

_KINDS = "file:///path, s3://bucket/prefix, or the path of a directory"


async def open_store(
    url: str,
    *,
    endpoint_url: str | None = None,
    region: str | None = None,
    clock: Clock | None = None,
    connections: int = 32,
) -> Store:
    """The store of that URL (or path). Creates nothing and asks nothing yet: a missing bucket, wrong
    credentials or an unwritable directory come up, in one line, with the first call that meets them.

    An S3 store retries what may pass, within ``RetryPolicy``. Raises UsageError for what is no store's URL.
    """
    clock = clock or SystemClock()
    if url.startswith("s3://"):
        return _open_s3(url, endpoint_url, region, clock, connections)
    if endpoint_url is not None:
        raise UsageError(f"an end point belongs to an s3:// store, not to {url}")
    return LocalStore(_directory(url), clock=clock)


def _directory(url: str) -> str:
    if url.startswith("file:"):
        parts = urlsplit(url)
        path = unquote(parts.path)
        if parts.netloc not in ("", "localhost") or not path.startswith("/") or parts.query or parts.fragment:
            raise UsageError(f"not the URL of a directory: {url}", hint="write file:///absolute/path")
    elif "://" in url or not url:
        raise UsageError(f"no kind of store: {url!r}", hint=f"stores are {_KINDS}")
    else:
        path = os.path.expanduser(url)
    if os.path.exists(path) and not os.path.isdir(path):
        raise UsageError(f"{path} is not a directory", hint=f"stores are {_KINDS}")
    return path


def _open_s3(url: str, endpoint_url: str | None, region: str | None, clock: Clock, connections: int) -> Store:
    parts = urlsplit(url)
    if not parts.netloc or "@" in parts.netloc or ":" in parts.netloc or parts.query or parts.fragment:
        raise UsageError(f"not the URL of a bucket: {url}", hint="write s3://bucket/prefix")
    if endpoint_url is not None and not endpoint_url.startswith(("http://", "https://")):
        raise UsageError(f"not the URL of an end point: {endpoint_url}", hint="write https://host:port")
    from timeline.store.retry import RetryingStore
    from timeline.store.s3 import S3Store

    store = S3Store(
        parts.netloc, parts.path, endpoint_url=endpoint_url, region=region, connections=connections
    )
    return RetryingStore(store, clock)
