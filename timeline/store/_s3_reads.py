"""Ranges of objects by presigned URLs: one signature for all ranges of a key.

A GetObject through botocore costs the caller's processor 1.2 ms, a presigned one over the same connections 0.2 ms, and a
lazy mount makes thousands of them. SigV4 does not sign ``Range`` when it is not told to, so a signature serves a key until
it is ``SIGNED_SECONDS`` old. A server that is busy is not asked again; any other refusal is told by an ordinary request,
which knows all of them; and a server or policy that takes no presigned requests is asked no further ones.

Bound: MAX_SIGNATURES signatures kept. Nothing here is logged or shown: a URL is a right to read.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import yarl

from timeline.errors import Unavailable

SIGNED_SECONDS = 300.0
"""Used for so long; servers allow for clocks that differ by 15 minutes at most."""
_VALID_SECONDS = 900
MAX_SIGNATURES = 1024
_SUCCESS = (200, 206)
_NO_FAULT_OF_THE_URL = (404, 416)
_BUSY = (429, 500, 502, 503, 504)


class PresignedReads:
    """Reads objects of one bucket with an aiobotocore client's credentials and connections."""

    def __init__(self, client: Any, bucket: str) -> None:
        self._client: Any = client
        self._bucket = bucket
        self._signed: dict[str, tuple[yarl.URL, float]] = {}
        # aiobotocore keeps its connections to itself. A release that keeps them elsewhere is read from in the ordinary way,
        # and so is a proxy, which may want to be told who asks.
        self._connections: Any = getattr(getattr(client, "_endpoint", None), "http_session", None)
        proxies = getattr(getattr(self._connections, "_proxy_config", None), "_proxies", None)
        self._useful = hasattr(self._connections, "_get_session") and proxies is not None and not proxies

    @contextlib.asynccontextmanager
    async def open(self, key: str, byte_range: str) -> AsyncIterator[Any | None]:
        """The answer (an ``aiohttp.ClientResponse`` of status 200 or 206) to a GET of the range (a header's value, empty: of
        all), or ``None``: ask in the ordinary way. Raises Unavailable, and what aiohttp and botocore raise."""
        if not self._useful:
            yield None
            return
        url, fresh = await self._url(key)
        session = await self._connections._get_session(None)
        headers = {"User-Agent": self._client.meta.config.user_agent, "Accept-Encoding": "identity"}
        if byte_range:
            headers["Range"] = byte_range
        try:
            async with session.get(url, headers=headers, allow_redirects=False) as answer:
                if answer.status in _SUCCESS:
                    yield answer
                    return
                status = answer.status
        except aiohttp.ClientResponseError as error:
            # Its text names the URL.
            raise Unavailable(
                f"s3://{self._bucket} answers what is not HTTP (read {key})"
            ) from error.__cause__
        if status in _BUSY:
            raise Unavailable(f"s3://{self._bucket} cannot read {key} just now: {status}")
        if status not in _NO_FAULT_OF_THE_URL:
            # Credentials that have been renewed meanwhile; or presigned requests are not taken here at all.
            self._useful = self._useful and not fresh
            self._signed.clear()
        yield None

    async def _url(self, key: str) -> tuple[yarl.URL, bool]:
        """A URL with a signature, and whether it was made for this very request."""
        now = asyncio.get_running_loop().time()
        known = self._signed.get(key)
        if known is not None and now - known[1] < SIGNED_SECONDS:
            return known[0], False
        if len(self._signed) >= MAX_SIGNATURES:
            self._signed.clear()
        text = await self._client.generate_presigned_url(
            "get_object", Params={"Bucket": self._bucket, "Key": key}, ExpiresIn=_VALID_SECONDS
        )
        url = yarl.URL(text, encoded=True)
        self._signed[key] = (url, now)
        return url, True
