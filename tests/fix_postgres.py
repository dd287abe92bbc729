"""Pytest plugin: throw-away Postgres servers."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

import pytest

from tests.support.postgres import PostgresServer, bin_dir, running_server

MAJORS = [int(major) for major in os.environ.get("TL_TEST_MAJORS", "15 18").split()]
"""Versions that tests of one version each run on; ``make test-majors`` names all that we support. A test of one that this
machine has not fails."""

for _major in MAJORS:
    # Programs under test find them from here on.
    bin_dir(_major)


@pytest.fixture(scope="session")
def make_postgres_session() -> Iterator[Callable[..., PostgresServer]]:
    """Factory of servers that live until the session ends."""
    with contextlib.ExitStack() as stack:
        yield lambda major=15, **kwargs: stack.enter_context(running_server(major, **kwargs))


@pytest.fixture
def make_postgres() -> Iterator[Callable[..., PostgresServer]]:
    """Factory of servers that live until the test ends: ``make_postgres(15, initdb=[…], settings={…})``."""
    with contextlib.ExitStack() as stack:
        yield lambda major=15, **kwargs: stack.enter_context(running_server(major, **kwargs))


@pytest.fixture
def postgres(make_postgres: Callable[..., PostgresServer]) -> PostgresServer:
    """A fresh Postgres 15."""
    return make_postgres(15)


@pytest.fixture(params=MAJORS, ids=lambda major: f"pg{major}")
def each_postgres(
    request: pytest.FixtureRequest, make_postgres: Callable[..., PostgresServer]
) -> PostgresServer:
    """A fresh server of every major version that `make test` covers."""
    return make_postgres(request.param)
