"""restore/rescue.py on a store made by hand out of pg_basebackup and pg_receivewal files (P12).

Neither the archiver nor the base backup of ours has a part in it, nor anything that reads stores for
branches: when Postgres recovers what comes out, codecs, SPEC.md and rescue agree with Postgres itself.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.fix_postgres import MAJORS
from tests.support.handmade_store import HandmadeStore, Indexer, WalRun, promote_in_place
from tests.support.plain_backup import PlainBackup, take_backup
from tests.support.postgres import PostgresServer, scratch
from tests.support.rescued import RESCUE, recovered, rescue, value
from timeline.format import branch_state, keys, log, log_change
from timeline.lsn import Lsn
from timeline.pg.segment import parse_history, parse_segment_name

DIGEST = (
    "select (select count(*)::text || ':' || coalesce(sum(hashtext(t::text)), 0) from t t) || '/' ||"
    " (select count(*)::text || ':' || coalesce(sum(n), 0) from in_space) || '/' || (select n from in_early)"
)
_CHUNK_BYTES = 300_001
_FRAME_BYTES = 700_003


@dataclass(frozen=True, slots=True)
class Made:
    """A store, and what servers recovered from it must say."""

    server: PostgresServer
    directory: Path
    digest: str
    """Of the end of tli 2."""
    digest_before_fork: str
    tail: tuple[str, ...]
    """Keys of the chunks of tli 2, in order."""

    @property
    def store(self) -> Path:
        """The store's directory."""
        return self.directory / "store"


@pytest.fixture(scope="module")
def make_store(make_postgres_session: Callable[..., PostgresServer]) -> Iterator[Callable[[int], Made]]:
    """Factory of stores by major version; each is made once."""
    with contextlib.ExitStack() as stack:
        yield functools.cache(lambda major: stack.enter_context(_made(make_postgres_session, major)))


@pytest.fixture(params=MAJORS, ids=lambda major: f"pg{major}")
def each_made(request: pytest.FixtureRequest, make_store: Callable[[int], Made]) -> Made:
    """A store of every major version."""
    return make_store(request.param)


@pytest.fixture
def made(make_store: Callable[[int], Made]) -> Made:
    """A store, for what has nothing to do with Postgres."""
    return make_store(MAJORS[0])


@contextlib.contextmanager
def _made(make_postgres: Callable[..., PostgresServer], major: int) -> Iterator[Made]:
    """A base backup with a tablespace, another tablespace created after it, a new tli, an unsealed tail."""
    server = make_postgres(
        major, initdb=["--wal-segsize=1"], settings={"wal_keep_size": "'64MB'", "autovacuum": "off"}
    )
    directory = scratch("tl-rescue-")
    try:
        server.sql("select pg_create_physical_replication_slot('tail', true)")
        early, late = server.make_directory(directory / "early"), server.make_directory(directory / "late")
        server.sql(
            "create table t(a int primary key, b text)",
            "insert into t select i, repeat('x', 90) from generate_series(1, 9000) i",
            f"create tablespace early location '{early}'",
            "create table in_early tablespace early as select 7 as n",
        )
        mapping = f"--tablespace-mapping={early}={directory / 'early-copy'}"
        backup = take_backup(server, directory / "backup", mapping)
        server.sql(
            "update t set b = b || 'y' where a % 3 = 0",
            f"create tablespace late location '{late}'",
            "create table in_space(n int) tablespace late",
            "insert into in_space select generate_series(1, 500)",
            "update in_early set n = 8",
            "vacuum t",
        )
        digest_before_fork = server.value(DIGEST)
        promote_in_place(server)
        server.sql(
            "delete from t where a % 7 = 0",
            "insert into t select i, 'tli 2' || repeat('z', 200) from generate_series(10001, 14000) i",
            "update in_space set n = n + 1",
        )
        digest = server.value(DIGEST)
        end = server.position()
        received = server.make_directory(directory / "received")
        server.tool("pg_receivewal", *_to(server), "--slot=tail", "-D", str(received), "-E", end, "--no-loop")
        tail = _fill(HandmadeStore(directory / "store"), backup, received, Lsn.parse(end))
        yield Made(server, directory, digest, digest_before_fork, tail)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _to(server: PostgresServer) -> tuple[str, ...]:
    return ("-h", str(server.sockets), "-p", str(server.port), "-U", "postgres")


def _received(directory: Path, tli: int, start: Lsn, end: Lsn, segment_bytes: int) -> WalRun:
    """What pg_receivewal wrote of a tli, from ``start`` (or where it begins, when 0) to ``end``."""
    found = {}
    for path in directory.iterdir():
        name = path.name.removesuffix(".partial")
        if len(name) == 24:
            number, at = parse_segment_name(name, segment_bytes)
            if number == tli:
                found[at] = path.read_bytes()
    first = min(found)
    assert sorted(found) == list(range(first, max(found) + 1, segment_bytes))
    data = b"".join(found[at] for at in sorted(found))
    begin = start or first
    return WalRun(tli, Lsn(begin), data[begin - first : end - first])


def _fill(store: HandmadeStore, backup: PlainBackup, received: Path, end: Lsn) -> tuple[str, ...]:
    segment_bytes = backup.incarnation.segment_bytes
    system = backup.incarnation.system_identifier
    history = (received / "00000002.history").read_text()
    (row,) = parse_history(history)
    old = _received(received, 1, Lsn(0), row.end, segment_bytes)
    new = _received(received, 2, row.end, end, segment_bytes)
    assert old.start <= backup.snapshot.lsn < backup.snapshot.end <= old.end == new.start
    store.append(
        log_change.Begin(backup.incarnation, branch_state.Tli(1, None, old.start, old.start, None, None))
    )
    snapshot = store.add_files(backup.directory, backup.snapshot)
    store.append(log_change.AddSnapshot(snapshot))
    half = len(old.data) // 2 + 12345
    index = Indexer(segment_bytes, 1, old.start)
    store.seal(WalRun(1, old.start, old.data[:half]), _FRAME_BYTES, index)
    store.add_chunks(WalRun(1, Lsn(old.start + half), old.data[half:]), _CHUNK_BYTES, index, system)
    opened = branch_state.Tli(2, 1, new.start, new.start, None, history)
    store.append(log_change.SwitchTli(1, row.end, opened), with_state=False)
    half = len(new.data) // 3
    index = Indexer(segment_bytes, 2, new.start)
    store.seal(WalRun(2, new.start, new.data[:half]), _FRAME_BYTES, index)
    tail = WalRun(2, Lsn(new.start + half), new.data[half:])
    store.add_chunks(tail, _CHUNK_BYTES, index, system)
    # Void by the chunk-name rule, so whatever is in them must not matter.
    store.put(keys.chunk("main", 2, new.start), b"below the sealed LSN")
    store.put(keys.chunk("main", 2, end + 5), b"off the chain")
    return tuple(keys.chunk("main", 2, piece.start) for piece in tail.cut(_CHUNK_BYTES))


@pytest.fixture
def target() -> Iterator[Path]:
    """Where a data directory is to be."""
    directory = scratch("tl-rescued-")
    yield directory / "data"
    shutil.rmtree(directory, ignore_errors=True)


@pytest.mark.parametrize("blake3", [True, False], ids=["blake3", "without-blake3"])
def test_stock_postgres_recovers_it(each_made: Made, target: Path, blake3: bool) -> None:
    """P12, EDGE 49: both tlis, sealed and unsealed WAL, and production's tablespaces stay untouched, though
    the server runs on production's host."""
    result = rescue(each_made.store, target, blake3=blake3)
    assert result.returncode == 0, result.stderr
    assert ("with BLAKE3" in result.stderr) == blake3
    assert f"in {each_made.directory / 'late'}" in result.stderr
    assert not any(path.is_symlink() for path in target.rglob("*"))
    with recovered(each_made.server, target) as connection:
        assert value(connection, DIGEST) == each_made.digest
        assert (
            value(
                connection,
                "select string_agg(pg_tablespace_location(oid), ',') from pg_tablespace"
                " where spcname in ('early', 'late')",
            ).count("pg_tblspc/")
            == 2
        )
        for statement in (
            "drop table in_space",
            "drop tablespace late",
            "drop table in_early",
            "drop tablespace early",
        ):
            connection.execute(statement)
    assert each_made.server.value(DIGEST) == each_made.digest


def test_an_older_tli(made: Made, target: Path) -> None:
    """[LOG-6]: the end of tli 1 is a state of its own."""
    result = rescue(made.store, target, "--tli", "1")
    assert result.returncode == 0, result.stderr
    assert not (target / "pg_wal" / "00000002.history").exists()
    with recovered(made.server, target) as connection:
        assert value(connection, DIGEST) == made.digest_before_fork


def test_a_missing_chunk_ends_the_chain(made: Made, target: Path, tmp_path: Path) -> None:
    """[NAM-2], EDGE 63: what lies beyond is not used."""
    store = shutil.copytree(made.store, tmp_path / "store")
    (store / made.tail[1]).unlink()
    result = rescue(store, target)
    assert result.returncode == 0, result.stderr
    missing = keys.parse_chunk(made.tail[1])
    assert missing is not None
    assert f"to {missing.start} in" in result.stderr
    with recovered(made.server, target) as connection:
        assert value(connection, "select count(*) from in_space") == "500"


@pytest.mark.parametrize("kind", ["chunk", "log", "listing", "pages", "extents", "meta"])
@pytest.mark.parametrize("blake3", [True, False], ids=["blake3", "without-blake3"])
def test_damage_is_found(made: Made, target: Path, tmp_path: Path, kind: str, blake3: bool) -> None:
    """P5: with and without BLAKE3. Damaged WAL ends the WAL and is said; all else stops."""
    store = shutil.copytree(made.store, tmp_path / "store")
    entry = sorted((store / "branches/main/log").iterdir())[0]
    newest = log.decode_entry(entry.read_bytes(), f"branches/main/log/{entry.name}").state
    assert newest is not None
    (snapshot,) = newest.snapshots
    path = {
        "chunk": store / made.tail[-1],
        "log": entry,
        "listing": store / keys.manifest(snapshot.files.digest),
        "pages": store / keys.manifest(snapshot.pages[0].digest),
        "extents": max(
            (store / "packs").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0
        ),
        "meta": store / "tl.json",
    }[kind]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x40
    path.write_bytes(data)
    result = rescue(store, target, blake3=blake3)
    assert result.returncode == 4, result.stderr
    assert "Traceback" not in result.stderr
    if kind == "chunk":
        assert "DAMAGED: the WAL ends early" in result.stderr
        assert made.tail[-1] in result.stderr
    assert (target / "global" / "pg_control").exists() == (kind == "chunk")


def test_it_says_what_cannot_be_done(made: Made, target: Path, tmp_path: Path) -> None:
    target.mkdir()
    (target / "here").touch()
    for options, expected in (
        ((), "not empty"),
        (("--branch", "other"), "no log of a branch 'other' here; branches: main"),
    ):
        result = rescue(made.store, target if not options else tmp_path / "new", *options)
        assert result.returncode == 1
        assert expected in result.stderr
    for options, expected in (
        (("--tli", "9"), "has no tli 9"),
        (("--snapshot", "x"), "snapshots: plain (base, tli 1)"),
    ):
        result = rescue(made.store, tmp_path / "new", *options)
        assert result.returncode == 1
        assert expected in result.stderr


def test_rescue_needs_nothing_of_ours() -> None:
    """P12: the standard library, pyarrow and zstandard; blake3 only where it happens to be."""
    imported = set()
    for node in ast.walk(ast.parse(RESCUE.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").split(".")[0])
    assert imported - sys.stdlib_module_names == {"pyarrow", "zstandard", "blake3"}
