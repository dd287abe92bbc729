"""The instrument itself: distance, bandwidth and counters are what they claim to be."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable

import pytest

from tests.fix_stores import BUCKET, fresh_prefix
from tests.support.s3_proxy import S3Proxy
from tests.support.seaweed import Seaweed
from timeline.store import user_agent
from timeline.store.s3 import S3Store


def test_latency_is_added_once_and_in_parallel(
    seaweed: Seaweed, make_s3_proxy: Callable[..., S3Proxy]
) -> None:
    proxy = make_s3_proxy(seaweed.endpoint_url, latency_ms=50)

    async def run() -> None:
        store = S3Store(BUCKET, fresh_prefix(), endpoint_url=proxy.endpoint_url)
        await store.create("key", b"x" * 1000)
        began = time.monotonic()
        for _ in range(5):
            await store.get("key")
        serial = (time.monotonic() - began) / 5
        began = time.monotonic()
        await asyncio.gather(*(store.get("key") for _ in range(32)))
        parallel = time.monotonic() - began
        await store.aclose()
        assert 0.050 <= serial < 0.5
        assert parallel < 10 * serial, "32 requests at once"

    asyncio.run(run())


def test_bandwidth_is_of_each_connection(seaweed: Seaweed, make_s3_proxy: Callable[..., S3Proxy]) -> None:
    proxy = make_s3_proxy(seaweed.endpoint_url, bandwidth_mb=10)
    data = os.urandom(4_000_000)

    async def run() -> None:
        store = S3Store(BUCKET, fresh_prefix(), endpoint_url=proxy.endpoint_url)
        began = time.monotonic()
        await store.create("key", data)
        up = time.monotonic() - began
        began = time.monotonic()
        assert await store.get("key") == data
        down = time.monotonic() - began
        began = time.monotonic()
        await asyncio.gather(*(store.get("key", n * 1_000_000, 1_000_000) for n in range(4)))
        in_parts = time.monotonic() - began
        await store.aclose()
        # The sockets' own buffers (a few MB on loopback) swallow the end of an upload.
        assert up > 0.05
        assert 0.3 < down < 3.0
        assert in_parts < 0.8 * down

    asyncio.run(run())


def test_counters(seaweed: Seaweed, make_s3_proxy: Callable[..., S3Proxy]) -> None:
    proxy = make_s3_proxy(seaweed.endpoint_url)

    async def run() -> None:
        store = S3Store(BUCKET, fresh_prefix(), endpoint_url=proxy.endpoint_url)
        await store.create("key", b"x" * 1000)
        await store.get("key", 0, 300)
        await store.get("key", 0, 0)
        await store.list("")
        await store.delete(["key"])
        await store.aclose()

    asyncio.run(run())
    stats = proxy.stats()
    assert stats.requests == {"PUT": 1, "GET": 1, "HEAD": 1, "LIST": 1, "POST": 1}
    assert stats.statuses == {"200": 4, "206": 1}
    assert stats.bytes_up > 1000
    assert stats.bytes_down > 300
    proxy.reset()
    assert proxy.stats().requests == {}


def test_requests_are_told_apart_by_command(s3_proxy: S3Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients name the command of ``tl`` that they belong to; the place is the first part of a store's key."""
    monkeypatch.setattr(user_agent, "_command", "")
    user_agent.name_command("gc")

    async def run() -> None:
        store = S3Store(BUCKET, fresh_prefix(), endpoint_url=s3_proxy.endpoint_url)
        await store.create("wal/main/1/0", b"x")
        await store.list("packs/")
        await store.delete(["wal/main/1/0"])
        await store.aclose()

    asyncio.run(run())
    assert s3_proxy.stats().by_agent == {"timeline/gc": {"PUT wal": 1, "LIST packs": 1, "DELETE -": 1}}
