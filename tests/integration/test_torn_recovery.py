"""A host that dies inside the first recovery from a redo point: nothing torn is ever used (EDGE 57)."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from tests.fix_postgres import MAJORS
from tests.support.postgres import PostgresServer, scratch
from tests.support.snapshot_place import Place
from tests.support.tl_host import TL

PAGE = 8192
ROWS = 60_000
QUERY = "select count(*) || ' ' || sum(v) || ' ' || sum(length(pad)) from t"


SETTINGS = {
    "checkpoint_timeout": "1h",
    "max_wal_size": "8GB",
    "max_slot_wal_keep_size": "8GB",
    "autovacuum": "off",
}


@pytest.fixture(params=MAJORS, ids=lambda major: f"pg{major}")
def place(request: pytest.FixtureRequest, make_postgres: Callable[..., PostgresServer]) -> Iterator[Place]:
    found = Place(make_postgres(request.param, settings=SETTINGS), scratch("tl-torn-"))
    yield found
    found.close()


def written_pages(overlay: Path) -> list[tuple[Path, int]]:
    """Places of relation pages that are in the overlay's files."""
    found = []
    for path in overlay.glob("**/base/*/*"):
        if not path.name[0].isdigit():
            continue
        with contextlib.suppress(OSError), path.open("rb") as file:
            at = 0
            while True:
                try:
                    at = os.lseek(file.fileno(), at, os.SEEK_DATA)
                except OSError:
                    break
                found.append((path, at - at % PAGE))
                at += PAGE - at % PAGE
    return found


def tear(pages: list[tuple[Path, int]]) -> int:
    """Leave of every other page only its first half as replay wrote it; how many were torn."""
    torn = pages[::2]
    for path, at in torn:
        with path.open("r+b") as file:
            file.seek(at + PAGE // 2)
            file.write(b"\xee" * (PAGE // 2))
    return len(torn)


@pytest.mark.fuse
@pytest.mark.majors
@pytest.mark.parametrize("moment", [pytest.param("recovering", marks=pytest.mark.slow), "writing"])
def test_what_was_torn_in_the_first_recovery_is_made_again(place: Place, moment: str) -> None:
    """Pages torn by ``kill -9`` of maker, server and mount have no full-page image in WAL that could mend them:
    the record of the first touch since the source's checkpoint lies before the redo point."""
    server = place.server
    server.sql(
        "create table t (id int primary key, v int, pad text) with (fillfactor = 50)",
        f"insert into t select g, 0, repeat('x', 100) from generate_series(1, {ROWS}) g",
    )
    place.archive()
    # The first touch since the base backup's checkpoint: full-page images, all of them before the redo point.
    server.sql("update t set v = 1")
    place.archive()
    assert len(place.snapshot()) == 1
    server.sql("update t set v = v + id", "update t set v = v + 1 where id % 3 = 0")
    expected = server.value(QUERY)
    place.archive()

    state = Path(place.host.environment["TL_STATE"])
    maker = subprocess.Popen(
        [TL, "branch", "torn", "--json"],
        env=place.host.environment,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    pages: list[tuple[Path, int]] = []
    while True:
        assert maker.poll() is None and time.monotonic() < deadline, (
            "the branch was there before it could be killed"
        )
        pids = [path.read_text().split("\n")[0] for path in state.glob("branches/*/data/postmaster.pid")]
        if pids and pids[0].isdigit():
            [directory] = state.glob("branches/*")
            pages = written_pages(directory / "overlay")
            if moment == "recovering" or pages:
                break
        time.sleep(0.002)
    os.kill(int(pids[0]), signal.SIGSTOP)
    mount = place.host.mount_pid(str(directory / "data"))
    assert mount is not None
    for victim in (maker.pid, int(pids[0]), mount):
        os.kill(victim, signal.SIGKILL)
    maker.communicate(timeout=60)
    kill_orphans(directory)
    torn = tear(written_pages(directory / "overlay"))
    assert torn > 0 or moment == "recovering"

    again = place.host.tl("branch", "torn")
    assert not directory.exists(), "debris"
    assert again["replayed_bytes"] > 1 << 20
    with psycopg.connect(again["dsn"]) as conn:
        conn.execute("create extension amcheck")
        conn.execute("select bt_index_check('t_pkey', true), verify_heapam('t')").fetchall()
        found = conn.execute("select count(*) from verify_heapam('t')").fetchone()
    assert found == (0,)
    assert place.value(again["dsn"], QUERY) == expected


def kill_orphans(directory: Path) -> None:
    """The server's children, whose postmaster is dead, end by themselves; one that is stopped does not."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if os.readlink(entry / "cwd") == str(directory / "data"):
                    os.kill(int(entry.name), signal.SIGKILL)
