"""A workload that makes a server write every kind of WAL it can be made to write in a few seconds."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import psycopg

from tests.support.postgres import PostgresServer

SETTINGS = {
    "wal_level": "logical",  # for top-level xids and combo cids in the WAL
    "wal_keep_size": "4GB",
    "max_wal_size": "8GB",
    "track_commit_timestamp": "on",
    "autovacuum": "off",
}


def write_every_kind_of_wal(server: PostgresServer) -> None:
    """Run it; the server is restarted once, for a parameter change."""
    with server.connect() as conn:
        _relations(conn)
        _transactions(server, conn)
        _databases(server, conn)
        _messages(conn)
    server.stop()
    server.configure({"max_connections": "60", "full_page_writes": "off"})
    server.start()
    with server.connect() as conn:
        _settings(server, conn)
        conn.execute("select pg_switch_wal()")
        conn.execute("insert into plain select g, 'after the switch' from generate_series(1, 500) g")


def _relations(conn: psycopg.Connection[tuple[object, ...]]) -> None:
    for statement in (
        "create table plain(a int primary key generated always as identity, b text)",
        "alter table plain alter a drop identity, drop constraint plain_pkey",
        "create table shapes(a int, b text, c int[], d point, e tsvector)",
        "insert into shapes select g, md5(g::text), array[g, g % 7], point(g % 91, g % 53), to_tsvector(md5(g::text))"
        "  from generate_series(1, 3000) g",
        "create index on shapes using btree (a)",
        "create index on shapes using hash (b)",
        "create index on shapes using gin (c)",
        "create index on shapes using gist (d)",
        "create index on shapes using spgist (d)",
        "create index on shapes using brin (a) with (pages_per_range = 2)",
        "insert into shapes select g, md5(g::text), array[g, g % 9], point(g % 97, g % 59), to_tsvector(md5(g::text))"
        "  from generate_series(3001, 5000) g",
        "checkpoint",
        "update shapes set b = b || 'x', d = point(a % 13, a % 17) where a % 3 = 0",
        "delete from shapes where a % 5 = 0",
        "vacuum shapes",
        "set wal_compression = on",
        "checkpoint",
        "update shapes set a = a + 1 where a % 2 = 0",
        "reset wal_compression",
        "set wal_consistency_checking = 'all'",
        "update shapes set a = a + 1 where a % 11 = 0",
        "insert into shapes select g, md5(g::text), array[g], point(g, g) from generate_series(1, 50) g",
        "reset wal_consistency_checking",
        "vacuum full shapes",
        "vacuum full pg_class",
        "truncate shapes",
        "cluster shapes using shapes_a_idx",
        "create sequence counter cache 5",
        "select nextval('counter') from generate_series(1, 200)",
        "create unlogged table volatile(a int primary key)",
        "insert into volatile select generate_series(1, 500)",
        "create table toasted(a text)",
        "alter table toasted alter a set storage external",
        "insert into toasted select repeat(md5(g::text), 3000) from generate_series(1, 20) g",
        "select lo_import('/etc/passwd')",
        "select lo_from_bytea(0, decode(repeat('ab', 100000), 'hex'))",
        "select pg_replication_origin_create('elsewhere')",
        "select pg_replication_origin_advance('elsewhere', '1/23')",
    ):
        conn.execute(statement)
    if conn.execute("select 1 from pg_available_extensions where name = 'bloom'").fetchone():
        conn.execute("create extension bloom")
        conn.execute("create index on plain using bloom (a)")
        conn.execute("insert into plain select g, 'bloom' from generate_series(1, 500) g")
    conn.execute("select pg_replication_origin_session_setup('elsewhere')")
    conn.execute("insert into plain select g, 'from elsewhere' from generate_series(1, 50) g")
    conn.execute("select pg_replication_origin_session_reset()")
    conn.execute("select pg_replication_origin_drop('elsewhere')")


def _transactions(server: PostgresServer, conn: psycopg.Connection[tuple[object, ...]]) -> None:
    for number, end in enumerate(("commit", "rollback", "commit", "rollback")):
        conn.execute("begin")
        conn.execute(f"create table prepared{number}(a int)")
        conn.execute(f"create table doomed{number}(a int)")
        conn.execute(f"insert into prepared{number} values (1)")
        for _ in range(70 if number < 2 else 2):
            conn.execute("savepoint s")
            conn.execute(f"insert into prepared{number} values (2)")
        conn.execute("rollback to s")
        conn.execute(f"drop table doomed{number}")
        conn.execute(f"prepare transaction 'gid {number}'")
        conn.execute(f"{end} prepared 'gid {number}'")
    for _ in range(100):
        conn.execute("begin")
        conn.execute("insert into plain values (1, 'undone')")
        conn.execute("rollback")
    with server.connect() as first, server.connect() as second:
        for locks in (20, 20):
            first.execute("begin")
            second.execute("begin")
            first.execute("select 1 from plain where a <= %s for key share", (locks,))
            second.execute("select 1 from plain where a <= %s for no key update", (locks,))
            first.execute("commit")
            second.execute("commit")


def _databases(server: PostgresServer, conn: psycopg.Connection[tuple[object, ...]]) -> None:
    strategies = ["strategy file_copy", "strategy wal_log"] if server.major >= 15 else [""]
    for number, strategy in enumerate(strategies):
        conn.execute(f"create database copy{number} {strategy}")
    # A long path makes a long record; moved on through the page, one of them crosses its end.
    place = server.make_directory(server.directory / "tablespaces")
    for number in range(20):
        deep = place / ("x" * 200) / ("y" * 200) / f"{number}"
        for path in reversed([deep, *deep.parents[:2]]):
            server.make_directory(path)
        _advance_to(conn, 420 * number)
        conn.execute(f"create tablespace space{number} location '{deep}'")
        if number % 4:
            conn.execute(f"drop tablespace space{number}")
    conn.execute("create table far(a int) tablespace space0")
    conn.execute("insert into far select generate_series(1, 1000)")
    conn.execute("create database copy9 tablespace space4")
    conn.execute("alter database copy0 set tablespace space0")
    conn.execute("drop database copy9")


def _advance_to(conn: psycopg.Connection[tuple[object, ...]], offset: int) -> None:
    """Write a message of such a length that WAL goes on at about this offset of some page."""
    row = conn.execute("select (pg_current_wal_insert_lsn() - '0/0')::bigint").fetchone()
    position = int(str(row[0])) if row else 0
    length = (offset - position - 80) % 8192
    conn.execute("select pg_logical_emit_message(false, 'pad', repeat('p', %s))", (length,))


def _messages(conn: psycopg.Connection[tuple[object, ...]]) -> None:
    for length in (0, 1, 255, 256, 8192, 131072, 200_000, 20 << 20):
        conn.execute("select pg_logical_emit_message(true, 'note', repeat('m', %s))", (length,))
    for length in range(1, 600, 7):
        conn.execute("select pg_logical_emit_message(false, 'note', repeat('m', %s))", (length,))
    conn.execute("select pg_create_restore_point('before release')")
    conn.execute("select pg_create_restore_point(%s)", ("n" * 63,))
    conn.execute("select pg_switch_wal()")


def _settings(server: PostgresServer, conn: psycopg.Connection[tuple[object, ...]]) -> None:
    conn.execute("alter system set full_page_writes = on")
    conn.execute("select pg_reload_conf()")
    conn.execute("checkpoint")
    start, stop = (
        ("pg_backup_start", "pg_backup_stop") if server.major >= 15 else ("pg_start_backup", "pg_stop_backup")
    )
    exclusive = "" if server.major >= 15 else ", false"
    conn.execute(f"select {start}('label', true{exclusive})")
    conn.execute(f"select {stop}({'false' if server.major >= 15 else 'false, false'})")


def read_wal(directory: Path, start: int, end: int, segment_bytes: int, *, tli: int = 1) -> bytes:
    """The bytes [start, end) of the segment files in a ``pg_wal`` directory; ``start`` is a segment's."""
    from timeline.pg.segment import segment_name

    pieces = [
        (directory / segment_name(tli, lsn, segment_bytes)).read_bytes()
        for lsn in range(start, end, segment_bytes)
    ]
    return b"".join(pieces)[: end - start]


def first_segment(directory: Path, segment_bytes: int, *, tli: int = 1) -> int:
    """Start of the oldest segment of that tli in a ``pg_wal`` directory."""
    from timeline.pg.segment import is_segment_name, parse_segment_name

    names = [path.name for path in directory.iterdir() if is_segment_name(path.name)]
    return min(
        int(lsn) for of, lsn in (parse_segment_name(name, segment_bytes) for name in names) if of == tli
    )


def copy_server(source: PostgresServer, name: str) -> PostgresServer:
    """A stopped server's files under a new directory beside it, on a port of its own."""
    directory = source.make_directory(source.directory / name)
    copy = PostgresServer(source.major, directory)
    shutil.copytree(source.data, copy.data, symlinks=True)
    hand_over(source, copy.data)
    copy.configure({"port": str(copy.port), "unix_socket_directories": f"'{copy.sockets}'"})
    return copy


def hand_over(server: PostgresServer, directory: Path) -> None:
    """Make the server's user the owner of a tree."""
    if os.geteuid() == 0:
        for path in [directory, *directory.rglob("*")]:
            os.chown(path, server.user.pw_uid, server.user.pw_gid, follow_symlinks=False)
