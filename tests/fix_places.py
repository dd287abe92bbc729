"""Places that a test builds snapshots in."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.support.postgres import PostgresServer, scratch
from tests.support.snapshot_place import Place

SETTINGS = {
    "max_prepared_transactions": "10",
    "track_commit_timestamp": "on",
    "autovacuum": "off",
    "checkpoint_timeout": "1h",
    "max_wal_size": "4GB",
    "max_slot_wal_keep_size": "8GB",
}


@pytest.fixture
def make_place(make_postgres: Callable[..., PostgresServer]) -> Iterator[Callable[[int], Place]]:
    places: list[Place] = []

    def make(major: int) -> Place:
        place = Place(make_postgres(major, settings=SETTINGS), scratch("tl-sn-"))
        places.append(place)
        return place

    yield make
    for place in places:
        place.close()
