"""A table of many segments out of a small one (benchmarks/any_size.py): what is measured there is true (P5, P6)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from tests.support.enlarged_store import EnlargedTable, enlarge
from tests.support.postgres import PostgresServer, scratch
from tests.support.snapshot_files import read_manifest
from tests.support.snapshot_place import Place
from timeline.catalog.branch_log import BranchLog
from timeline.clock import SystemClock
from timeline.format import keys
from timeline.format.extent import decode_extent
from timeline.store.open import open_store

SEGMENTS = 8


async def enlarge_and_verify(url: str, table: str) -> tuple[EnlargedTable, int]:
    """The table, and how many extents its manifests name; every one of them is read and verified."""
    clock = SystemClock()
    store = await open_store(url)
    try:
        done = await enlarge(store, BranchLog(store, "main", clock, "test"), clock, table, SEGMENTS)
        rows = [row for ref in done.snapshot.pages for row in await read_manifest(store, ref)]
        for extent in {row.extent for row in rows}:
            key = keys.pack(extent.pack)
            stored = await store.get(key, extent.offset, extent.stored_bytes)
            assert len(decode_extent(stored, extent, key)) == extent.raw_bytes
    finally:
        await store.aclose()
    return done, sum(row.path.startswith(table) and "_" not in row.path for row in rows)


@pytest.mark.fuse
def test_eight_gigabytes_out_of_four_megabytes(make_postgres: Callable[..., PostgresServer]) -> None:
    """P5, P6: started and queried in every segment, and it has the size it is said to have."""
    server = make_postgres(15)
    server.sql(
        "create table filler as select i, md5(i::text) v from generate_series(1, 60000) i",
        "vacuum freeze filler",
    )
    table = server.value("select pg_relation_filepath('filler')")
    place = Place(server, scratch("tl-size-"))
    try:
        place.archive()
        enlarged, extents = asyncio.run(enlarge_and_verify(place.host.store, table))
        assert extents >= SEGMENTS * 8192
        dsn = place.host.tl("branch", "large")["dsn"]
        assert int(place.value(dsn, "select pg_relation_size('filler')")) == SEGMENTS << 30
        for segment in range(SEGMENTS):
            block = segment * 131072 + 77_777
            row = "select i || ' ' || v from filler where ctid = '({},3)'"
            assert place.value(dsn, row.format(block)) == server.value(
                row.format(enlarged.real_block(block))
            ), segment
        assert place.value(dsn, "select count(*) from filler where ctid = '(1048576,1)'") == "0"
    finally:
        place.close()
