"""``tl gc`` on real stores with a real history: what goes, what stays, what still works (EDGE 42, 43; P2, P10)."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest

from tests.fix_stores import BUCKET, fresh_prefix
from tests.support.moto_server import MotoServer
from tests.support.postgres import PostgresServer, scratch
from tests.support.seaweed import Seaweed
from tests.support.tl_host import Host, make_host
from timeline.catalog.branch_log import BranchLog
from timeline.clock import SystemClock
from timeline.format import keys
from timeline.format.branch_state import Snapshot
from timeline.format.log_change import DropSnapshots
from timeline.format.pack import decode_pack_header
from timeline.store.open import open_store
from timeline.store.s3 import S3Store

CLOCK = SystemClock()
SETTINGS = {"autovacuum": "off", "max_slot_wal_keep_size": "8GB"}
NO_GRACE = ("--grace", "0.01s")


@pytest.fixture(params=["directory", "seaweed"])
def host(
    request: pytest.FixtureRequest, make_postgres: Callable[..., PostgresServer]
) -> Iterator[tuple[Host, PostgresServer]]:
    """A host, a source, and a store of each kind."""
    server = make_postgres(15, settings=SETTINGS)
    root = scratch("tl-gc-")
    endpoint_url = None
    url = f"file://{root}/store"
    if request.param == "seaweed":
        seaweed: Seaweed = request.getfixturevalue("seaweed")
        endpoint_url, url = seaweed.endpoint_url, f"s3://{BUCKET}/{fresh_prefix()}"
    made = make_host(root / "host", url, source=server.conninfo, endpoint_url=endpoint_url)
    yield made, server
    for branch in made.branches():
        made.tl("delete", branch["name"], "--yes")
    made.end_agent()
    shutil.rmtree(root, ignore_errors=True)


async def stored(host: Host) -> dict[str, int]:
    """Every key of the store, with its length."""
    store = await open_store(host.store, endpoint_url=host.environment.get("TL_ENDPOINT_URL"))
    try:
        return {one.key: one.size for one in await store.list("")}
    finally:
        await store.aclose()


async def drop_oldest(host: Host) -> Snapshot:
    store = await open_store(host.store, endpoint_url=host.environment.get("TL_ENDPOINT_URL"))
    try:
        log = BranchLog(store, "main", CLOCK, "test")
        head = await log.load()
        assert head is not None
        oldest = head.state.snapshots[0]
        await log.append(DropSnapshots((oldest.id,)))
        return oldest
    finally:
        await store.aclose()


async def nonces(host: Host) -> list[str | None]:
    """Of all packs and page manifests."""
    store = await open_store(host.store, endpoint_url=host.environment.get("TL_ENDPOINT_URL"))
    try:
        found: list[str | None] = []
        for one in await store.list(keys.PACKS):
            found.append(decode_pack_header(await store.get(one.key), one.key)[0].nonce)
        for one in await store.list(keys.MANIFESTS):
            data = await store.get(one.key)
            envelope = data[data.index(b'{"format"') :]
            found.append(
                json.JSONDecoder().raw_decode(envelope[:300].decode(errors="replace"))[0].get("nonce")
            )
        return found
    finally:
        await store.aclose()


def value(dsn: str, query: str) -> str:
    with psycopg.connect(dsn) as conn:
        row = conn.execute(query.encode()).fetchone()
    assert row is not None
    return str(row[0])


def test_garbage_goes_and_branches_work(host: tuple[Host, PostgresServer]) -> None:
    tl, server = host
    server.sql("create table t as select i, repeat(md5(i::text), 20) v from generate_series(1, 20000) i")
    tl.tl("init", tl.store, "--source", server.conninfo)
    tl.tl("archive", "--once")
    server.sql("update t set v = repeat(md5(v), 20)", "vacuum full t", "checkpoint")
    tl.tl("archive", "--once")
    tl.tl("backup")
    server.sql("insert into t values (0, 'last')")
    tl.tl("archive", "--once")
    given = asyncio.run(nonces(tl))
    assert None not in given
    assert len(set(given)) > len(given) // 2

    asyncio.run(drop_oldest(tl))
    before = asyncio.run(stored(tl))
    look = tl.tl("gc")
    assert look["dry_run"] is True
    assert look["garbage"]["objects"] > 3
    assert look["garbage"]["bytes"] > 200_000
    assert look["mark"] is None
    assert asyncio.run(stored(tl)) == before

    # Two runs: the first marks, the second deletes; the grace period is over by then.
    first = tl.tl("gc", "--yes", *NO_GRACE)
    assert first["deleted"] is None
    assert first["mark"]["objects"] == first["garbage"]["objects"] == look["garbage"]["objects"]
    second = tl.tl("gc", "--yes", *NO_GRACE)
    assert second["deleted"]["bytes"] == look["garbage"]["bytes"]
    assert (second["kept"], second["refused"], second["finished"]) == (0, [], True)
    after = asyncio.run(stored(tl))
    shrunk = sum(before.values()) - sum(after.values())
    assert look["garbage"]["bytes"] - 100_000 < shrunk <= look["garbage"]["bytes"]
    assert {key for key in after if not key.startswith("branches/")} < set(before)
    assert tl.tl("gc")["garbage"]["objects"] == 0

    tl.forget_cache()
    branch = tl.tl("branch", "after")
    assert value(branch["dsn"], "select count(*) || ' ' || min(i) from t") == "20001 0"
    server.sql("insert into t values (-1, 'later')")
    tl.tl("archive", "--once")
    tl.tl("backup")
    later = tl.tl("branch", "later")
    assert value(later["dsn"], "select min(i) from t") == "-1"


def test_words(host: tuple[Host, PostgresServer]) -> None:
    """It states its effect before it has one, and is refused with a reason."""
    tl, server = host
    tl.tl("init", tl.store, "--source", server.conninfo)
    tl.tl("archive", "--once")
    nothing = tl.run("gc")
    assert (nothing.returncode, "nothing to collect" in nothing.stdout) == (0, True), nothing
    tl.tl("backup")
    asyncio.run(drop_oldest(tl))
    look = tl.run("gc")
    assert "would mark this now, and delete" in look.stdout
    assert "--yes does it" in look.stdout
    done = tl.run("gc", "--yes")
    assert "marked" in done.stdout
    assert "will delete" in done.stdout
    assert "run it again" in done.stdout
    again = tl.run("gc")
    assert "would delete" in again.stdout
    # Not due for a day: nothing is deleted, however often it runs.
    kept = asyncio.run(stored(tl))
    waiting = tl.tl("gc", "--yes")
    assert waiting["deleted"] is None
    assert waiting["mark"]["due_now"] is False
    assert asyncio.run(stored(tl)) == kept
    short = tl.run("gc", *NO_GRACE)
    assert "may lose" in short.stderr
    assert "now" in short.stdout
    wrong = tl.run("gc", "--store", f"file://{tl.directory}/nowhere")
    assert wrong.returncode == 2


def test_a_policy_that_denies_deletes_is_told_key_by_key(moto: MotoServer) -> None:
    """EDGE 43: a real server's answer to DeleteObjects under a bucket policy."""
    bucket = "worm"
    client: Any = moto.client()
    client.create_bucket(Bucket=bucket)
    client.put_bucket_policy(
        Bucket=bucket,
        Policy=json.dumps(
            {
                "Version": "2012-10-17",
                "Statement": [
                    {
                        "Effect": "Deny",
                        "Principal": "*",
                        "Action": "s3:DeleteObject",
                        "Resource": f"arn:aws:s3:::{bucket}/locked/*",
                    }
                ],
            }
        ),
    )

    async def run() -> None:
        store = S3Store(bucket, endpoint_url=moto.endpoint_url)
        try:
            for key in ("locked/a", "free/a", "free/b"):
                await store.create(key, b"x")
            refused = await store.delete(["free/a", "locked/a", "free/b", "never"])
            assert [one.key for one in refused] == ["locked/a"]
            assert "AccessDenied" in refused[0].reason
            assert [one.key for one in await store.list("")] == ["locked/a"]
        finally:
            await store.aclose()

    asyncio.run(run())
