"""A mixed workload in small, quiesced steps, and the logical digest of a whole server.

Each step leaves no session behind, so that an LSN read after it has one exact logical state.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psycopg

from tests.support.postgres import PostgresServer


@dataclass(frozen=True, slots=True)
class Moment:
    """A quiesced moment of the source."""

    step: str
    lsn: str
    digest: dict[str, str]
    sequences: dict[str, int]
    """Last value of every sequence of database postgres. Recovery may leave a sequence up to 32 values ahead: that is how
    far Postgres logs it in advance (SEQ_LOG_VALS, src/backend/commands/sequence.c)."""


def server_digest(connect: Callable[[str], psycopg.Connection[tuple[object, ...]]]) -> dict[str, str]:
    """What a person could see of a server, hashed by part: rows of every table, sequences, catalog, large objects.

    ``connect(dbname)`` opens an autocommit connection.
    """
    digest: dict[str, str] = {}
    with connect("postgres") as conn:
        rows = conn.execute(
            "select datname, datallowconn from pg_database where not datistemplate order by 1"
        ).fetchall()
        digest["databases"] = repr(rows)
        databases = [str(name) for name, allowed in rows if allowed]
        for part, query in (
            ("roles", "select rolname, rolsuper, rolcanlogin from pg_roles order by 1"),
            ("tablespaces", "select spcname from pg_tablespace order by 1"),
            ("prepared", "select gid, database from pg_prepared_xacts order by 1"),
        ):
            digest[part] = repr(conn.execute(query).fetchall())
    for name in databases:
        with connect(name) as conn:
            for part, text in _database_parts(conn):
                digest[f"{name}/{part}"] = hashlib.sha256(text.encode()).hexdigest()[:24]
    return digest


_CATALOG = """
select c.oid::regclass::text, c.relkind, c.relpersistence, c.reloptions::text,
       (select string_agg(a.attname || ' ' || format_type(a.atttypid, a.atttypmod) || a.attnotnull, ',' order by attnum)
        from pg_attribute a where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped),
       case when c.relkind = 'i' then pg_get_indexdef(c.oid) end
from pg_class c join pg_namespace n on n.oid = c.relnamespace
where n.nspname not in ('pg_catalog', 'information_schema', 'pg_toast') order by 1
"""


def _database_parts(conn: psycopg.Connection[tuple[object, ...]]) -> Iterator[tuple[str, str]]:
    yield "catalog", repr(conn.execute(_CATALOG).fetchall())
    yield (
        "largeobjects",
        repr(conn.execute("select loid, pageno, md5(data) from pg_largeobject order by 1, 2").fetchall()),
    )
    relations = conn.execute(
        "select c.oid::regclass::text, c.relkind from pg_class c join pg_namespace n on n.oid = c.relnamespace"
        " where n.nspname not in ('pg_catalog', 'information_schema', 'pg_toast')"
        " and c.relkind in ('r', 'm') and c.relpersistence = 'p' order by 1"
    ).fetchall()
    for name, _ in relations:
        query = f"select count(*), md5(coalesce(string_agg(t::text, '|' order by t::text), '')) from {name} t"
        yield f"relation/{name}", repr(conn.execute(query).fetchall())


def sequence_values(conn: psycopg.Connection[tuple[object, ...]]) -> dict[str, int]:
    """Last value of every sequence of a database."""
    rows = conn.execute(
        "select schemaname || '.' || sequencename, coalesce(last_value, 0) from pg_sequences"
    ).fetchall()
    return {str(name): int(str(value)) for name, value in rows}


def prepare(server: PostgresServer) -> None:
    """Tables and indexes of every access method, before the base backup."""
    server.sql(
        "create table account (id int primary key, owner text, balance numeric, note text)",
        "insert into account select i, 'owner ' || i, i * 10, repeat('x', i % 200) from generate_series(1, 20000) i",
        "create table untouched (id int primary key, payload text)",
        "insert into untouched select i, md5(i::text) from generate_series(1, 50000) i",
        "create table doc (id serial primary key, words tsvector, place point, span int4range, tags int[], at timestamptz)",
        "insert into doc (words, place, span, tags, at) select to_tsvector('simple', 'word' || i || ' common'),"
        " point(i, i % 100), int4range(i, i + 10), array[i % 10, i % 7],"
        " timestamptz '2026-01-01 00:00:00+00' + i * interval '1 min' from generate_series(1, 3000) i",
        "create index doc_gin on doc using gin (words)",
        "create index doc_tags on doc using gin (tags)",
        "create index doc_gist on doc using gist (span)",
        "create index doc_spgist on doc using spgist (place)",
        "create index doc_brin on doc using brin (at)",
        "create index doc_hash on doc using hash (id)",
        "create table pending as select generate_series(1, 10) as id",
        "create sequence ticket",
        "create unlogged table scratchpad (id int)",
        "insert into scratchpad select generate_series(1, 100)",
        "create database second",
        "vacuum analyze",
    )
    server.sql("create table here (id int primary key, v text)", dbname="second")


def steps(server: PostgresServer, tablespace: Path | None) -> Iterator[tuple[str, Callable[[], None]]]:
    """Named steps; each is run to its end before the next.

    ``tablespace``: an empty directory the server owns; without one the tablespace is made in place, which the
    server must allow.
    """

    def run(*statements: str, dbname: str = "postgres") -> Callable[[], None]:
        return lambda: (server.sql(*statements, dbname=dbname), None)[1]

    def transaction(*statements: str) -> Callable[[], None]:
        def go() -> None:
            with psycopg.connect(server.conninfo) as conn:
                for statement in statements:
                    conn.execute(statement)

        return go

    yield "insert", run("insert into account select i, 'new', 1, 'n' from generate_series(20001, 21000) i")
    yield "update", run("update account set balance = balance + 1 where id % 7 = 0")
    yield "delete", run("delete from account where id % 11 = 0")
    yield (
        "subtransactions",
        transaction(
            "insert into account values (30001, 's', 0, '')",
            "savepoint a",
            "insert into account values (30002, 's', 0, '')",
            "rollback to a",
            "savepoint b",
            "insert into account values (30003, 's', 0, '')",
        ),
    )
    yield "prepare", transaction_prepared(server, "gid-one", "insert into account values (30010, 'p', 0, '')")
    yield "prepare again", transaction_prepared(server, "gid-two", "delete from pending where id = 5")
    yield "commit prepared", run("commit prepared 'gid-one'")
    yield (
        "documents",
        run(
            "insert into doc (words, place, span, tags, at) select to_tsvector('simple', 'late' || i), point(-i, i),"
            " int4range(i, i + 3), array[i], now() from generate_series(1, 1000) i",
            "delete from doc where id % 5 = 0",
        ),
    )
    yield "sequence", run("select nextval('ticket') from generate_series(1, 50)")
    yield "large object", run("select lo_from_bytea(0, decode(repeat('ab', 30000), 'hex'))")
    yield "ddl", run("alter table account add column extra int default 7", "create index on account (owner)")
    yield (
        "truncate",
        run("create table gone as select * from account", "truncate gone", "insert into gone values (1)"),
    )
    yield "vacuum full", run("vacuum full account")
    yield "reindex", run("reindex table doc")
    yield "drop", run("drop table gone")
    place = tablespace or ""
    yield (
        "tablespace",
        run(
            f"create tablespace elsewhere location '{place}'",
            "create table apart (id int primary key, v text) tablespace elsewhere",
            "insert into apart select i, md5(i::text) from generate_series(1, 2000) i",
        ),
    )
    yield (
        "move",
        run(
            "alter table untouched set tablespace elsewhere",
            "alter table untouched set tablespace pg_default",
        ),
    )
    strategies = ("wal_log", "file_copy") if server.major >= 15 else ("",)
    first_copy = f"db_{strategies[0] or 'plain'}"
    for strategy in strategies:
        clause = f"strategy {strategy}" if strategy else ""
        yield (
            f"create database {strategy}",
            run(f"create database db_{strategy or 'plain'} template second {clause}"),
        )
    yield (
        "in the new database",
        run("insert into here select i, 'v' from generate_series(1, 500) i", dbname=first_copy),
    )
    yield "rollback prepared", run("rollback prepared 'gid-two'")
    yield "matview", run("create materialized view v as select owner, count(*) from account group by 1")
    yield "switch", run("select pg_switch_wal()", "insert into account values (40001, 'after switch', 0, '')")
    yield "vacuum", run("vacuum (analyze, freeze)", "vacuum (index_cleanup on, truncate on) doc")
    yield "checkpoint", run("checkpoint", "update account set note = 'after checkpoint' where id < 200")
    yield "drop database", run("drop database second")
    yield "shared lock", shared_locks(server)
    yield (
        "restore point",
        run("select pg_create_restore_point('before-release')", "insert into account values (50000)"),
    )


def transaction_prepared(server: PostgresServer, gid: str, statement: str) -> Callable[[], None]:
    """A step that leaves a prepared transaction open."""

    def go() -> None:
        with server.connect() as conn:
            conn.execute("begin")
            conn.execute(statement)
            conn.execute(f"prepare transaction '{gid}'")

    return go


def shared_locks(server: PostgresServer) -> Callable[[], None]:
    """A step that makes multixacts: two transactions share row locks and one updates."""

    def go() -> None:
        with server.connect() as one, server.connect() as two:
            for conn in (one, two):
                conn.execute("begin")
                conn.execute("select * from doc where id between 100 and 140 for key share")
            one.execute("update doc set tags = '{1}' where id between 100 and 140")
            one.execute("commit")
            two.execute("commit")

    return go


def record_moments(server: PostgresServer, tablespace: Path) -> list[Moment]:
    """Run every step and note, after each, where the WAL stands and what the server shows."""
    moments = []
    for name, step in steps(server, tablespace):
        step()
        lsn = server.value("select pg_current_wal_insert_lsn()")
        digest = server_digest(lambda dbname: server.connect(dbname))
        with server.connect() as conn:
            moments.append(Moment(name, lsn, digest, sequence_values(conn)))
    server.sql("insert into account values (60000)", "checkpoint")
    return moments
