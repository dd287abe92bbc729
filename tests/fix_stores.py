"""Pytest plugin: stores of every kind, and the S3 servers behind them.

``seaweed`` and ``moto`` are real servers that live for the session (of each xdist worker); every test gets a
prefix of its own in one bucket (SeaweedFS gives each bucket several volumes, and has few). A test that names
neither starts neither.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager
from itertools import count
from pathlib import Path

import pytest

from tests.support.moto_server import MotoServer, running_moto
from tests.support.postgres import scratch
from tests.support.s3_proxy import S3Proxy, running_proxy
from tests.support.seaweed import ACCESS_KEY, SECRET_KEY, Seaweed, running_seaweed
from timeline.clock import SystemClock
from timeline.store.base import Store
from timeline.store.faulty import Faults, FaultyStore
from timeline.store.local import LocalStore
from timeline.store.memory import MemoryStore
from timeline.store.retry import RetryingStore, RetryPolicy
from timeline.store.s3 import S3Store

STORES = ("memory", "local", "seaweed", "moto", "retry", "faulty", "retry-faulty", "retry-seaweed")

StoreFactory = Callable[[], AbstractAsyncContextManager[Store]]
"""Opens the test's store, inside a running event loop; each call gives another client of the same store."""

BUCKET = "timeline"
"""Exists on every server of these fixtures."""

_numbers = count(1)


def fresh_prefix() -> str:
    """A prefix that no other test of this session has: an empty store in ``BUCKET``."""
    return f"test/{next(_numbers)}"


@pytest.fixture(scope="session")
def aws_environment() -> Iterator[None]:
    """The test credentials where the AWS chain looks first, and nothing of the user's own configuration."""
    kept = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    for name in kept:
        del os.environ[name]
    ours = {
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    os.environ.update(ours)
    yield
    for name in ours:
        os.environ.pop(name, None)
    os.environ.update(kept)


@pytest.fixture(scope="session")
def seaweed(aws_environment: None) -> Iterator[Seaweed]:
    """A real S3 server."""
    with running_seaweed() as server:
        server.make_bucket(BUCKET)
        yield server


@pytest.fixture(scope="session")
def moto(aws_environment: None) -> Iterator[MotoServer]:
    """Another implementation of S3."""
    with running_moto() as server:
        server.make_bucket(BUCKET)
        yield server


@pytest.fixture
def make_s3_proxy() -> Iterator[Callable[..., S3Proxy]]:
    """Factory of proxies that live until the test ends: ``make_s3_proxy(seaweed.endpoint_url, …)``."""
    with ExitStack() as stack:
        yield lambda upstream, **settings: stack.enter_context(running_proxy(upstream, **settings))


@pytest.fixture
def s3_proxy(seaweed: Seaweed, make_s3_proxy: Callable[..., S3Proxy]) -> S3Proxy:
    """A proxy before SeaweedFS, with no distance and no faults until they are set."""
    return make_s3_proxy(seaweed.endpoint_url)


@pytest.fixture
def store_directory() -> Iterator[Path]:
    """A directory for a store, which the server user of Postgres may enter too."""
    directory = scratch("tl-store-")
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(params=STORES)
def each_store(request: pytest.FixtureRequest) -> StoreFactory:
    """Every store and every wrapper: ``async with each_store() as store``."""
    return store_factory(request, request.param)


def store_factory(request: pytest.FixtureRequest, kind: str) -> StoreFactory:
    """A factory of one of ``STORES``; starts the server that it needs."""
    clock = SystemClock()
    build: Callable[[], Store]
    if kind == "memory":
        memory = MemoryStore()
        build = lambda: memory  # noqa: E731
    elif kind == "local":
        directory = request.getfixturevalue("store_directory")
        build = lambda: LocalStore(directory / "store")  # noqa: E731
    elif kind in ("seaweed", "moto", "retry-seaweed"):
        server: Seaweed | MotoServer = request.getfixturevalue(kind.removeprefix("retry-"))
        prefix = fresh_prefix()

        def plain() -> Store:
            return S3Store(BUCKET, prefix, endpoint_url=server.endpoint_url)

        build = plain if not kind.startswith("retry-") else lambda: RetryingStore(plain(), clock)
    elif kind == "retry":
        inner = MemoryStore()
        build = lambda: RetryingStore(inner, clock)  # noqa: E731
    elif kind == "faulty":
        inner = MemoryStore()
        build = lambda: FaultyStore(inner)  # noqa: E731
    else:
        inner = MemoryStore()
        patient = RetryPolicy(attempts=40, first_seconds=0.0001, longest_seconds=0.001)
        trouble = Faults(unavailable=0.2, lost_answer=0.3)
        build = lambda: RetryingStore(FaultyStore(inner, seed=7, faults=trouble), clock, patient)  # noqa: E731

    @asynccontextmanager
    async def opened() -> AsyncIterator[Store]:
        store = build()
        try:
            yield store
        finally:
            await store.aclose()

    return opened
