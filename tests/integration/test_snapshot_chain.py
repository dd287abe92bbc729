"""Long chains of snapshots, and what becomes of them when the source fails over (P6, P9; EDGE 15, 16, 18, 20, 28, 49, 52,
58)."""

from __future__ import annotations

import contextlib
import random
import shutil
from collections.abc import Callable, Iterator
from itertools import islice, pairwise
from pathlib import Path

import psycopg
import pytest

from restore import snapshot_build
from tests.fix_postgres import MAJORS
from tests.support.clones import Clones, clones, next_tli, promote, wait_for
from tests.support.postgres import PostgresServer, scratch
from tests.support.restored import recover_copy
from tests.support.snapshot_place import Place, state_of, unexpected_pages
from tests.support.workload import prepare, server_digest, steps
from timeline.format.branch_state import Snapshot

pytestmark = [pytest.mark.fuse, pytest.mark.slow, pytest.mark.majors]

SETTINGS = {
    "allow_in_place_tablespaces": "on",
    "autovacuum": "off",
    "checkpoint_timeout": "1h",
    "max_prepared_transactions": "20",
    "max_wal_size": "8GB",
    "track_commit_timestamp": "on",
    "wal_keep_size": "8GB",
}
LENGTH = 50
PROMOTED = 20
"""Before this snapshot a standby takes over."""
RESTARTED = 38
"""Before this one it takes one more tli, by itself."""
BACKUP = 46
"""Before this one somebody else takes a base backup."""


@pytest.fixture
def cloning() -> Iterator[Clones]:
    with clones() as made:
        yield made


@contextlib.contextmanager
def placed(server: PostgresServer, *successors: PostgresServer) -> Iterator[Place]:
    """A store of the server, which goes on with whichever of these servers can be written to."""
    servers = (server, *successors)
    hosts = ",".join(str(each.sockets) for each in servers)
    ports = ",".join(str(each.port) for each in servers)
    source = f"host={hosts} port={ports} user=postgres dbname=postgres target_session_attrs=read-write"
    root = scratch("tl-chain-")
    try:
        place = Place(server, root, source=source)
        try:
            yield place
        finally:
            place.close()
    finally:
        shutil.rmtree(root, ignore_errors=True)


class Unrest:
    """Small changes of every kind around the steps of the workload, on tables of their own."""

    def __init__(self, seed: int) -> None:
        self._chance = random.Random(seed)
        self._prepared: list[str] = []
        self._open: psycopg.Connection[tuple[object, ...]] | None = None

    def begin(self, server: PostgresServer) -> None:
        server.sql(
            "create table small (id int primary key, v text, n int)",
            "insert into small select i, md5(i::text), i % 97 from generate_series(1, 8000) i",
            "create table emptied (id int, v text)",
            "create table two_phase (id int primary key, v text)",
            "create table held (id int, v text)",
            "create table shrinking (id int primary key, v text)",
        )

    def go(self, server: PostgresServer, number: int) -> None:
        """What happens before the snapshot of that number."""
        self._writes(server, number)
        if number % 3 == 0:
            server.sql(
                "truncate emptied",
                f"insert into emptied select i, repeat('e', 100) from generate_series(1, {self._some(3000)}) i",
            )
        if number % 4 == 1:
            server.sql("drop index if exists small_n", "create index small_n on small (n, v)")
        if number % 5 == 2:
            server.sql("vacuum small")
        if number % 6 == 3:
            self._shrink(server)
        if number % 7 == 4:
            server.sql(
                f"create table passing_{number} as select i, md5(i::text) v from generate_series(1, 2000) i",
                f"drop table if exists passing_{max(0, number - 14)}",
            )
        if number % 9 == 5:
            server.sql("vacuum full small", "vacuum (analyze) two_phase")
        self._two_phases(server, number)
        self._hold(server, number)

    def settle(self, server: PostgresServer) -> None:
        """End the transaction that is open in a session; prepared ones stay."""
        if self._open is not None:
            self._open.execute("commit")
            self._open.close()
            self._open = None

    def _some(self, most: int) -> int:
        return self._chance.randrange(1, most)

    def _writes(self, server: PostgresServer, number: int) -> None:
        first, key = self._some(8000), 100_000 + number * 1000
        server.sql(
            f"insert into small select {key} + i, md5(i::text), {number} from generate_series(0, {self._some(300)}) i",
            f"update small set v = v || 'u', n = n + 1 where id between {first} and {first + self._some(100)}",
            f"delete from small where id % {50 + self._some(400)} = 0",
            f"update small set v = 'hot' where id = {self._some(8000)}",
        )

    def _shrink(self, server: PostgresServer) -> None:
        """A table that becomes shorter and grows again, by vacuum's truncation."""
        rows = 500 + self._some(4000)
        server.sql(
            f"insert into shrinking select i, repeat('s', 200) from generate_series(1, {rows}) i"
            " on conflict (id) do nothing",
            f"delete from shrinking where id > {self._some(500)}",
            "vacuum (truncate on) shrinking",
        )

    def _two_phases(self, server: PostgresServer, number: int) -> None:
        """Every third snapshot a transaction is prepared that is open for ten of them."""
        if number % 3 == 0:
            gid = f"open-{number}"
            with server.connect() as conn:
                conn.execute("begin")
                conn.execute(
                    f"insert into two_phase select {number} * 1000 + i, repeat('p', 50) from generate_series(1, 200) i"
                )
                conn.execute("savepoint a_part")
                conn.execute(f"insert into two_phase values ({number} * 1000 + 999, 'inner')")
                conn.execute(f"prepare transaction '{gid}'")
            self._prepared.append(gid)
        if len(self._prepared) > 3:
            verb = "commit" if number % 2 else "rollback"
            server.sql(f"{verb} prepared '{self._prepared.pop(0)}'")

    def _hold(self, server: PostgresServer, number: int) -> None:
        """A transaction of a session that is open for four snapshots."""
        if number % 8 == 1 and self._open is None:
            self._open = server.connect()
            self._open.execute("begin")
        if self._open is not None:
            self._open.execute(f"savepoint at_{number}")
            self._open.execute(
                f"insert into held select i, repeat('h', 100) from generate_series(1, {self._some(2000)}) i"
            )
        if number % 8 == 5:
            self.settle(server)


def take_over(server: PostgresServer, standby: PostgresServer) -> None:
    """The server is gone at once; its standby, which has everything, is promoted."""
    end = server.position()
    wait_for_replay(server, end)
    server.kill9()
    promote(standby)


def wait_for_replay(server: PostgresServer, lsn: str) -> None:
    """By what its standby says of itself: nobody asks the standby, whose pages a question may change."""
    wait_for(
        lambda: bool(server.sql(f"select 1 from pg_stat_replication where replay_lsn >= '{lsn}'")), seconds=60
    )


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("major", MAJORS)
def test_fifty_snapshots_each_built_on_the_one_before(
    make_postgres: Callable[..., PostgresServer], cloning: Clones, major: int
) -> None:
    """P6, P9, EDGE 15, 20, 28, 49, 52: across two failovers, page for page what stock recovery gives from the
    first base backup, and from a later one that stock tools took of a standby nobody ever queried."""
    primary = make_postgres(major, settings=SETTINGS)
    prepare(primary)
    unrest = Unrest(seed=major)
    unrest.begin(primary)
    primary.stop()
    successor = cloning.make(primary, standby=True)
    silent = cloning.make(successor, standby=True)
    primary.start()
    successor.start()
    silent.start()
    late = PostgresServer(major, scratch("tl-late-"))
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, late.directory, ignore_errors=True)
        stack.callback(late.stop, "immediate")
        place = stack.enter_context(placed(primary, successor))
        place.archive()
        server = primary
        work = [*steps(primary, None)]
        after_promotion = [*steps(successor, None)]
        for number in range(LENGTH):
            if number in (PROMOTED, RESTARTED):
                unrest.settle(server)
            if number == PROMOTED:
                take_over(primary, successor)
                server, work = successor, after_promotion
            if number == RESTARTED:
                next_tli(server)
            if number == BACKUP:
                server.sql("checkpoint")
                wait_for_replay(server, server.position())
                back_up(silent, late)
            due = islice(work, number * len(work) // LENGTH, (number + 1) * len(work) // LENGTH)
            for _, step in due:
                step()
            unrest.go(server, number)
            place.archive()
            if number == PROMOTED:
                # From a snapshot of the old tli onto the new one.
                crossing = place.host.tl("branch", "crossing")
                assert place.built()[-1].tli == 1
                assert_same_content(server, crossing["dsn"])
            assert len(place.snapshot()) == 1, number
        unrest.settle(server)
        server.sql("insert into small values (-1, 'last', 0)")
        place.archive()
        built = place.built()
        assert len(built) == LENGTH
        assert {snapshot.tli for snapshot in built} == {1, 2, 3}
        assert all(two.parent == one.id for one, two in pairwise(state_of(place.host.store).snapshots))
        assert max(len(snapshot.pages) for snapshot in built) <= 8
        branch = place.host.tl("branch", "reader")
        assert branch["replayed_bytes"] < 1 << 20
        assert_same_content(server, branch["dsn"])
        hints = server.value("show data_checksums") == "on"
        for snapshot in (built[PROMOTED - 1], built[PROMOTED], built[RESTARTED + 2], built[-1]):
            assert_same_pages(place.recovered(snapshot), place, snapshot, hints=hints)
        last = built[-1]
        data = recover_copy(late, server.data / "pg_wal", last.lsn, last.tli)
        assert_same_pages(data, place, last, hints=hints)


def back_up(server: PostgresServer, to: PostgresServer) -> None:
    """Stock ``pg_basebackup``, to where another server has its data."""
    server.tool(
        "pg_basebackup",
        *("-D", str(to.data), "-X", "none", "-c", "fast", "--no-manifest"),
        *("-h", str(server.sockets), "-p", str(server.port), "-U", "postgres"),
    )


def assert_same_pages(expected: Path, place: Place, snapshot: Snapshot, *, hints: bool) -> None:
    """P6: the snapshot's files are those of a stopped server, page for page."""
    image = place.image(snapshot)
    try:
        unexpected, compared = unexpected_pages(expected, image, hints=hints)
    finally:
        shutil.rmtree(image)
    assert unexpected == [], snapshot
    assert compared > 5000


def assert_same_content(server: PostgresServer, dsn: str) -> None:
    """P6: what a person could see of the branch is what the source shows."""
    found = server_digest(lambda dbname: psycopg.connect(dsn, dbname=dbname, autocommit=True))
    assert found == server_digest(lambda dbname: server.connect(dbname))


@pytest.mark.parametrize("major", MAJORS)
def test_a_snapshot_the_source_never_came_back_to_is_not_built_upon(
    make_postgres: Callable[..., PostgresServer], cloning: Clones, major: int
) -> None:
    """P6, EDGE 16, 18: what was built of an orphan tail stays where it is; the chain goes on from below the fork."""
    first = make_postgres(major, settings=SETTINGS)
    prepare(first)
    unrest = Unrest(seed=1)
    unrest.begin(first)
    with placed(first) as place:
        place.archive()
        unrest.go(first, 0)
        first.sql("checkpoint")
        place.archive()
        place.snapshot()
        unrest.settle(first)
        first.stop()
        lagging = cloning.make(first)
        first.start()
        unrest.go(first, 3)
        place.archive()
        [orphan] = place.snapshot()
        first.stop()
        next_tli(lagging)
        place.follow(lagging)
        unrest.go(lagging, 3)
        place.archive()
        branch = place.host.tl("branch", "before")
        assert_same_content(lagging, branch["dsn"])
        for number in (4, 6):
            unrest.go(lagging, number)
            place.archive()
            assert len(place.snapshot()) == 1
        kept, left, *built = place.built()
        assert str(left.lsn) == orphan
        assert [(one.tli, one.parent) for one in built] == [(2, kept.id), (2, built[0].id)]
        hints = lagging.value("show data_checksums") == "on"
        for snapshot in (left, *built):
            assert_same_pages(place.recovered(snapshot), place, snapshot, hints=hints)
        assert_same_content(lagging, place.host.tl("branch", "after")["dsn"])


@pytest.mark.parametrize("major", MAJORS)
def test_steps_of_one_build_lead_over_a_fork(
    make_postgres: Callable[..., PostgresServer], monkeypatch: pytest.MonkeyPatch, major: int
) -> None:
    """P6, P9, EDGE 15, 26: a long way is taken in steps. Some end below forks that lie behind the source; the first
    ones end in the segment that the base backup switched, which is empty from there on, and build nothing."""
    monkeypatch.setattr(snapshot_build, "step_bytes", lambda *_: 1 << 20)
    server = make_postgres(major, settings=SETTINGS)
    prepare(server)
    unrest = Unrest(seed=2)
    unrest.begin(server)
    with placed(server) as place:
        place.archive()
        for number in range(12):
            unrest.go(server, number)
            if number in (4, 8):
                unrest.settle(server)
                next_tli(server)
        unrest.settle(server)
        place.archive()
        built = place.build()
        assert [snapshot.id for snapshot in place.built()] == [snapshot.id for snapshot in built]
        assert all(two.parent == one.id for one, two in pairwise(built))
        assert {snapshot.tli for snapshot in built} == {1, 2, 3}
        hints = server.value("show data_checksums") == "on"
        below = [one for one, two in pairwise(built) if one.tli < two.tli]
        for snapshot in (*below, built[-1]):
            assert_same_pages(place.recovered(snapshot), place, snapshot, hints=hints)
        branch = place.host.tl("branch", "x")
        assert branch["replayed_bytes"] < 1 << 20
        assert_same_content(server, branch["dsn"])
