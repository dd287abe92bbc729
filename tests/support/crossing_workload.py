"""A workload in which almost every moment lies inside something unfinished (EDGE 52).

The steps of ``workload`` run one after another; around and between them transactions of every kind stay open
for long stretches, some of them until the end. WAL of every moment can then be asked what it is asked of a
redo point: is what has begun before it, and ends after it, done as it would have been?
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass

import psycopg

from tests.support.clones import next_tli
from tests.support.postgres import PostgresServer
from tests.support.workload import prepare, steps
from timeline.lsn import Lsn

SETTINGS = {
    "allow_in_place_tablespaces": "on",
    "autovacuum": "off",
    "checkpoint_timeout": "1h",
    "max_wal_size": "8GB",
    "track_commit_timestamp": "on",
    "wal_keep_size": "4GB",
    "wal_level": "logical",
}

THE_END = "the end"
"""Name of a restore point after everything, while much is still open."""

_SUBTRANSACTIONS = """
do $$ begin
  for i in 1..{count} loop
    begin {statement}; exception when division_by_zero then null; end;
  end loop;
end $$
"""

Connection = psycopg.Connection[tuple[object, ...]]


@dataclass(frozen=True, slots=True)
class OpenSpan:
    """WAL through which a transaction of some kind was open; to its end if it never ended."""

    kind: str
    begin: Lsn
    """It had written by then."""
    end: Lsn


OPEN_KINDS = ("subtransactions", "rolled back", "never ended", "DDL", "multixacts", "prepared")


def near_the_end_of_segments(server: PostgresServer) -> None:
    """Let a new and stopped cluster's transactions and multixacts go on just before their next segments."""
    page, pages = 8192, 32
    xid, multi = pages * page * 4 - 9000, pages * page // 4 - 1500
    server.tool("pg_resetwal", "-x", str(xid), "-m", f"{multi},1", "-D", str(server.data))
    for segment in ("pg_xact/0000", "pg_multixact/offsets/0000"):
        # Recovery reads the page of the next id, and what is not there it would have to invent.
        os.truncate(server.data / segment, pages * page)


def prepare_crossing(server: PostgresServer) -> None:
    """What must be there before the base backup."""
    prepare(server)
    server.sql(
        "create table crossing (id int, v text)",
        "create index on crossing (v)",
        "create table locked (id int primary key, v text)",
        "insert into locked select i, 'v' from generate_series(1, 7000) i",
        "create table split (id text primary key)",
        "create unlogged table lost (id int primary key)",
        "insert into lost select generate_series(1, 1000)",
        "create table shrunk as select i as id, repeat('s', 500) as v from generate_series(1, 5000) i",
        "select pg_replication_origin_create('elsewhere')",
    )


def run_crossing(server: PostgresServer) -> tuple[OpenSpan, ...]:
    """Everything; at the end some transactions are prepared, and some were still open when the server stopped.

    The server is restarted twice, for changes of parameters (EDGE 59), and stopped at once at the end.
    """
    _use_up_ids(server)
    server.stop()
    server.configure({"max_connections": "60", "track_commit_timestamp": "off"})
    server.start()
    server.sql("insert into crossing select i, 'without times' from generate_series(1, 100) i")
    server.stop()
    server.configure(
        {"track_commit_timestamp": "on", "full_page_writes": "on", "max_locks_per_transaction": "80"}
    )
    server.start()
    with contextlib.ExitStack() as stack:
        crossing = _Crossing(server, stack)
        for number, (_, step) in enumerate(steps(server, None)):
            crossing.go_on(number)
            step()
        crossing.end()
        stop_at_the_end(server)
        return tuple(crossing.spans)


def run_promotion(server: PostgresServer) -> tuple[OpenSpan, ...]:
    """Work on tli 1, with a transaction prepared; the server goes on as tli 2 in the middle of a page, and of it."""
    server.sql("insert into crossing select i, 'on tli 1' from generate_series(1, 3000) i")
    with server.connect() as conn:
        conn.execute("begin")
        conn.execute("insert into crossing values (1, 'prepared')")
        conn.execute("prepare transaction 'over the fork'")
    next_tli(server)
    server.sql(
        "insert into crossing select i, 'on tli 2' from generate_series(1, 3000) i",
        "commit prepared 'over the fork'",
        "insert into locked select i, 'on tli 2' from generate_series(8000, 9000) i",
    )
    stop_at_the_end(server)
    return ()


def stop_at_the_end(server: PostgresServer) -> None:
    """Leave what is open as it is."""
    # Recovery needs a record at its target, and the segment it is in to be complete.
    server.sql(f"select pg_create_restore_point('{THE_END}')", "select pg_switch_wal()", "checkpoint")
    server.stop("immediate")


class _Crossing:
    """Transactions that are begun, go on, and end between the steps."""

    def __init__(self, server: PostgresServer, stack: contextlib.ExitStack) -> None:
        self._server = server

        def session() -> Connection:
            connection = psycopg.connect(server.conninfo)
            stack.callback(connection.close)
            return connection

        self._writer, self._aborter, self._ddl, self._endless = (session() for _ in range(4))
        self._lockers = (session(), session())
        self._prepared = 0
        self.spans: list[OpenSpan] = []
        self._since: dict[str, Lsn] = {}

    def go_on(self, number: int) -> None:
        """Between two steps."""
        write = f"insert into crossing select i, md5(i::text) from generate_series(1, 40) i where i > {number % 3}"
        for connection in (self._writer, self._aborter, self._endless):
            connection.execute("savepoint s")
            connection.execute(write)
            connection.execute("release s" if number % 2 else "rollback to s")
        self._ddl.execute(f"create table made{number} (id serial primary key, words tsvector)")
        self._ddl.execute(f"create index on made{number} using gin (words)")
        self._ddl.execute(
            f"insert into made{number} (words) select to_tsvector('w' || i) from generate_series(1, 50) i"
        )
        one, two = self._lockers
        span = f"id between {100 * (number % 30) + 1} and {100 * (number % 30) + 60}"
        one.execute(f"select 1 from locked where {span} for key share")
        two.execute(f"select 1 from locked where {span} for key share")
        one.execute(f"update locked set v = v || 'x' where {span}")
        with self._server.connect() as other:
            other.execute(
                f"insert into split select md5((i * {number + 1})::text) || {number} from generate_series(1, 400) i"
            )
            other.execute("insert into lost values (%s)", (2000 + number,))
            other.execute("select nextval('ticket')")
        self._are_open(*OPEN_KINDS[:5])
        if number % 4 == 1:
            self._prepare()
        if number % 4 == 3:
            self._end_now("subtransactions", "rolled back", "DDL", "multixacts")
            for connection in (self._writer, two, *((self._ddl, one) if number % 8 == 3 else ())):
                connection.commit()
            for connection in (self._aborter, self._ddl, one):
                connection.rollback()
        if number == 13:
            self._shrink()
        if number == 17:
            self._origin()

    def end(self) -> None:
        """Half of what is prepared is ended; the sessions stay as they are."""
        self._end_now(*(kind for kind in self._since if kind.startswith("prepared")))
        self._end_now(*self._since)
        for gid in range(0, self._prepared, 2):
            self._server.sql(f"{'commit' if gid % 4 else 'rollback'} prepared 'crossing-{gid}'")

    def _prepare(self) -> None:
        with self._server.connect() as conn:
            conn.execute("begin")
            conn.execute(f"create table prepared{self._prepared} (id int primary key)")
            for _ in range(5):
                conn.execute("savepoint s")
                conn.execute(
                    f"insert into prepared{self._prepared} select coalesce(max(id), 0) + 1 from prepared{self._prepared}"
                )
            conn.execute(
                f"select 1 from locked where id between {3501 + self._prepared} and 3520 for key share"
            )
            conn.execute(f"prepare transaction 'crossing-{self._prepared}'")
        self._are_open(f"prepared {self._prepared}")
        self._prepared += 1

    def _are_open(self, *kinds: str) -> None:
        here = self._position()
        for kind in kinds:
            self._since.setdefault(kind, here)

    def _end_now(self, *kinds: str) -> None:
        here = self._position()
        self.spans += [
            OpenSpan(kind.split(" ")[0] if kind.startswith("prepared") else kind, self._since.pop(kind), here)
            for kind in kinds
        ]

    def _position(self) -> Lsn:
        return Lsn.parse(self._server.value("select pg_current_wal_insert_lsn()"))

    def _shrink(self) -> None:
        self._server.sql(
            "delete from shrunk where id > 500",
            "vacuum (truncate on) shrunk",
            "vacuum (truncate on) crossing",
        )

    def _origin(self) -> None:
        self._server.sql(
            "select pg_replication_origin_session_setup('elsewhere')",
            "select pg_replication_origin_xact_setup('0/7777', '2026-01-01 00:00:00+00')",
            "insert into pending values (777)",
        )


def _use_up_ids(server: PostgresServer) -> None:
    """Transactions and multixacts over the end of a segment each, then a freeze that drops what came before."""
    for _ in range(2):
        server.sql(_SUBTRANSACTIONS.format(count=10_000, statement="insert into crossing values (i, null)"))
    with psycopg.connect(server.conninfo) as one, psycopg.connect(server.conninfo) as two:
        one.execute("select 1 from locked where id > 4000 for key share")
        statement = "perform 1 from locked where id = 4000 + i for key share"
        two.execute(_SUBTRANSACTIONS.format(count=3000, statement=statement))
    server.sql("truncate crossing", "alter database template0 allow_connections true")
    for (name,) in server.sql("select datname from pg_database"):
        freeze = ("set vacuum_freeze_min_age = 0", "set vacuum_multixact_freeze_min_age = 0", "vacuum freeze")
        server.sql(*freeze, dbname=str(name))
    server.sql("alter database template0 allow_connections false", "checkpoint")
