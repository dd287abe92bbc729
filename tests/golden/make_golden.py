"""Make the newest golden store: ``python -m tests.golden.make_golden``; run once, when the format has gained something.

A store that is committed is never made again: delete it by hand first to work on one that is not. ``store-v1`` was
made by an earlier version of this program.

Its WAL is real: captured from a small Postgres 15 with 1 MiB segments, over a promotion. So are its pg_control
files and the redo points they name. Its other files are not: a handful of synthetic ones, because a real data
directory would take 3 MB here and the format does not look into files. So what rescue.py makes of it cannot be
started; tests/integration does that with real ones.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from restore.drill_files import evidence_files
from tests.golden.built import Changed, Step, add_built
from tests.golden.damage import CHANGES
from tests.golden.reading import GoldenReader
from tests.golden.store import V1B, choose, load, rescue_error
from tests.support.handmade_store import (
    MICROS,
    STORE_ID,
    HandmadeStore,
    Indexer,
    WalRun,
    nonce,
    promote_in_place,
)
from tests.support.plain_backup import PlainBackup, take_backup
from tests.support.postgres import PostgresServer, running_server, scratch
from timeline.errors import DamagedStore
from timeline.format import branch_state, evidence, keys, log_change
from timeline.format.extent import BLOCK_BYTES
from timeline.format.mark import Garbage, MarkObject, VoidChunks, VoidEntries, encode_mark
from timeline.format.page_manifest import read_page_rows, write_page_manifest
from timeline.format.pin import Pin, encode_pin
from timeline.format.wal_index import Coverage
from timeline.lsn import Lsn
from timeline.pg.redo_point import find_redo_point
from timeline.pg.segment import parse_history, segment_name, segment_start

STORE = V1B
_SEGMENT_BYTES = 1 << 20
_CUT_BYTES = 50_021
_SMALL_CUT_BYTES = 10_007
"""Frames so short that a merged manifest of them has two row groups."""
_BOOT = (("base/5/1259", 0), ("base/5/odd", 0), ("pg_xact/0000", 0))
_SECOND = 1_000_000
_DAY = 86_400 * _SECOND


@dataclass(frozen=True, slots=True)
class Source:
    """What a real server left."""

    backup: PlainBackup
    early: WalRun
    """WAL from before the backup's segment."""
    old: WalRun
    new: WalRun
    """Its tlis 1 and 2, from the backup's segment on."""
    middle: Lsn
    """Between two transactions on tli 1, behind the backup."""
    history: str
    tablespace: branch_state.Tablespace
    """Made on tli 1 behind ``middle``."""
    image: bytes
    """pg_control after it was promoted once more and shut down."""


def make(root: Path) -> None:
    """The store, in an empty directory."""
    with running_server(
        15, initdb=["--wal-segsize=1"], settings={"wal_keep_size": "'64MB'", "autovacuum": "off"}
    ) as server:
        directory = scratch("tl-golden-")
        try:
            source = _record(server, directory)
            _Maker(HandmadeStore(root), source, directory / "files").run()
        finally:
            shutil.rmtree(directory)


def _record(server: PostgresServer, directory: Path) -> Source:
    server.sql("select pg_switch_wal()", "checkpoint")
    begin = segment_start(Lsn.parse(server.position()), _SEGMENT_BYTES)
    server.sql("create table early as select 1 as a", "select pg_switch_wal()")
    backup = take_backup(server, directory / "backup")
    start = segment_start(backup.snapshot.lsn, _SEGMENT_BYTES)
    space = server.make_directory(directory / "space")
    server.sql(
        "create table t(a int)",
        "insert into t select generate_series(1, 2000)",
        "select pg_create_restore_point('before-release')",
    )
    middle = Lsn.parse(server.position())
    server.sql(
        f"create tablespace late location '{space}'",
        "create table u(a int) tablespace late",
        "begin; insert into t values (0); rollback",
        "begin; insert into t values (0); prepare transaction 'p'",
        "commit prepared 'p'",
    )
    oid = int(server.value("select oid from pg_tablespace where spcname = 'late'"))
    promote_in_place(server)
    server.sql("delete from t where a % 2 = 0", "select pg_create_restore_point('on tli 2')")
    end = Lsn.parse(server.position())
    history = (server.data / "pg_wal/00000002.history").read_text()
    (row,) = parse_history(history)
    early, old = _captured(server, 1, begin, start), _captured(server, 1, start, row.end)
    new = _captured(server, 2, row.end, end)
    promote_in_place(server)
    server.stop()
    image = (server.data / "global/pg_control").read_bytes()
    tablespace = branch_state.Tablespace(oid, str(space))
    return Source(backup, early, old, new, middle, history, tablespace, image)


def _captured(server: PostgresServer, tli: int, start: Lsn, end: Lsn) -> WalRun:
    data = bytearray()
    while (at := start + len(data)) < end:
        content = (server.data / "pg_wal" / segment_name(tli, at, _SEGMENT_BYTES)).read_bytes()
        inside = at % _SEGMENT_BYTES
        data += content[inside : inside + end - at]
    return WalRun(tli, start, bytes(data))


class _Maker:
    """One history: archived, backed up, built upon, merged, forgotten, collected, promoted, and all of it again."""

    def __init__(self, store: HandmadeStore, source: Source, files: Path) -> None:
        self._store = store
        self._source = source
        self._contents = _make_files(files, source.backup)
        self._files = files

    def run(self) -> None:
        store, source = self._store, self._source
        start = source.early.start
        incarnation = replace(
            source.backup.incarnation, libc_version="2.36", icu_version="72.1", from_lsn=start
        )
        store.append(log_change.Begin(incarnation, branch_state.Tli(1, None, start, start, None, None)))
        store.append(log_change.ClaimEpoch(1))
        index = Indexer(_SEGMENT_BYTES, 1, start)
        self._seal_halves(source.early, 5 * _CUT_BYTES, index)
        base = self._add_base()
        self._seal_halves(source.old, _SMALL_CUT_BYTES, index)
        first = self._build_first(base)
        second = self._build_second(first)
        store.merge([sealed for sealed in store.state.sealed if sealed.start >= source.old.start])
        store.append(log_change.ForgetWal((log_change.Forgotten(1, source.old.start),)))
        store.append(log_change.DropSnapshots((first.id,)), with_state=False)
        self._mark(nonce())
        self._collect()

        fork = source.new.start
        store.append(log_change.SwitchTli(1, fork, branch_state.Tli(2, 1, fork, fork, None, source.history)))
        index = Indexer(_SEGMENT_BYTES, 2, fork)
        half = len(source.new.data) // 2
        sealed, tail = (
            WalRun(2, fork, source.new.data[:half]),
            WalRun(2, Lsn(fork + half), source.new.data[half:]),
        )
        system = incarnation.system_identifier
        # Sealed later on: void from then on, and not collected yet.
        store.add_chunks(sealed, _CUT_BYTES, Indexer(_SEGMENT_BYTES, 2, fork), system)
        self._seal_halves(sealed, _CUT_BYTES // 2, index)
        store.add_chunks(tail, _CUT_BYTES // 2, index, system)
        store.merge([one for one in store.state.sealed if one.tli == 2])
        self._build_third(second)
        store.append(log_change.Cover(Coverage(2, source.new.end, MICROS + 60 * _SECOND)), with_state=False)
        gap = branch_state.Gap(2, source.new.end, Lsn(source.new.end + _SEGMENT_BYTES), "slot lost")
        store.append(log_change.RecordGap(gap))
        pin = Pin(
            id=nonce(),
            branch="main",
            snapshot=second,
            until=MICROS + 7 * _DAY,
            created=MICROS + _DAY,
            host="branch fix on db-tools-3",
            sealed=tuple(one for one in store.state.sealed if one.tli == 1),
        )
        store.put(keys.pin(pin.id), encode_pin(pin))
        store.append(log_change.DropSnapshots((second.id,)), with_state=False)
        self._add_drill()
        self._mark(nonce())

    def _seal_halves(self, run: WalRun, cut_bytes: int, index: Indexer) -> None:
        half = len(run.data) // 2
        self._store.seal(WalRun(run.tli, run.start, run.data[:half]), cut_bytes, index)
        self._store.seal(WalRun(run.tli, Lsn(run.start + half), run.data[half:]), cut_bytes, index)

    def _add_base(self) -> branch_state.Snapshot:
        """In two tries: what the first one had stored, its progress kept alive."""
        store, backup = self._store, self._source.backup
        began = store.head
        base = store.add_files(
            self._files, replace(backup.snapshot, settings=backup.snapshot.settings[:5], time=MICROS)
        )
        progress = branch_state.BackupProgress("try-1", base.pages, base.bytes, MICROS)
        store.append(log_change.RecordProgress(progress, began), with_state=False)
        rows = list(read_page_rows(store.get_manifest(base.pages[0]), base.pages[0]))
        boot = [row for row in rows if (row.path, row.group) in _BOOT]
        base = replace(
            base,
            id="base-1",
            pages=(replace(base.pages[0], lsn=base.lsn),),
            boot=store.put_manifest(write_page_manifest(boot, nonce=nonce())),
            tablespaces=(branch_state.Tablespace(16384, "/srv/space"),),
        )
        store.append(log_change.AddSnapshot(base, began), with_state=False)
        return base

    def _build_first(self, base: branch_state.Snapshot) -> branch_state.Snapshot:
        """Single blocks of a relation, and of a file that is in the boot set."""
        lsn = self._redo_point(self._source.old, self._source.middle)
        relation = self._overwrite("base/5/16384", 2, b"x" * BLOCK_BYTES)
        relation = self._overwrite("base/5/16384", 17, b"y" * 10)
        status = self._overwrite("pg_xact/0000", 0, b"\x55" * 100)
        changed = (
            Changed("base/5/16384", relation, ((2, 1), (17, 1))),
            Changed("pg_xact/0000", status, ((0, 1),)),
        )
        return self._add_built(base, Step("built-1", 1, lsn, changed))

    def _build_second(self, first: branch_state.Snapshot) -> branch_state.Snapshot:
        """A file made anew under an old name, one that grew, one that is gone, new ones, a new tablespace."""
        lsn = self._redo_point(self._source.old, Lsn(self._source.old.end - 1))
        anew, grown = b"z" * 9000, b"g" * (2 * BLOCK_BYTES)
        self._contents |= {"base/5/1259": anew, "base/5/16386": grown}
        del self._contents["base/5/odd"]
        space = self._source.tablespace
        changed = (
            Changed("base/5/1259", anew, None),
            Changed("base/5/16386", grown, ((0, 2),)),
            Changed("base/16500/PG_VERSION", b"15\n", None),
        )
        step = Step(
            "built-2",
            1,
            lsn,
            changed,
            removed=("base/5/odd",),
            directories=("base/16500", f"pg_tblspc/{space.oid}"),
            tablespaces=(space,),
        )
        return self._add_built(first, step)

    def _build_third(self, second: branch_state.Snapshot) -> None:
        """On the next tli, with its deltas folded into one; a file was cut short."""
        lsn = self._redo_point(self._source.new, Lsn(self._source.new.end - 1))
        relation = self._overwrite("base/5/16384", 17, b"w" * BLOCK_BYTES)
        short = self._contents["base/5/16385"][:100_000]
        self._contents["base/5/16385"] = short
        changed = (
            Changed("base/5/16384", relation, ((17, 1),)),
            Changed("base/5/16385", short, ((12, 1),)),
        )
        self._add_built(second, Step("built-3", 2, lsn, changed, folded=True))

    def _add_built(self, parent: branch_state.Snapshot, step: Step) -> branch_state.Snapshot:
        return add_built(self._store, parent, step, self._contents, _BOOT, self._source.image)

    def _redo_point(self, run: WalRun, latest: Lsn) -> Lsn:
        tli = self._store.state.find_tli(run.tli)
        assert tli is not None
        lsn = find_redo_point(
            run.data,
            run.start,
            latest,
            tli=run.tli,
            tli_start=tli.start,
            segment_bytes=_SEGMENT_BYTES,
            major=15,
        )
        if lsn is None or lsn <= self._source.backup.snapshot.end:
            raise ValueError(f"no redo point up to {latest}")
        return lsn

    def _overwrite(self, path: str, block: int, data: bytes) -> bytes:
        at = block * BLOCK_BYTES
        content = self._contents[path]
        self._contents[path] = content[:at] + data + content[at + len(data) :]
        return self._contents[path]

    def _mark(self, mark_id: str) -> None:
        """What a marking run publishes [COL-5]."""
        store = self._store
        objects = load(store.root)
        kept = GoldenReader(objects).reachable()
        named = [key for key in sorted(objects) if key.startswith((keys.PACKS, keys.MANIFESTS))]
        chunks = []
        for tli in store.state.tlis:
            void = [len(objects[key]) for key in objects if _is_void(key, tli)]
            if void:
                chunks.append(VoidChunks(tli.tli, tli.sealed, len(void), sum(void)))
        mark = MarkObject(
            id=mark_id,
            branch="main",
            head=store.head,
            at=MICROS + store.head * _SECOND,
            garbage=tuple(Garbage(key, len(objects[key])) for key in named if key not in kept),
            chunks=tuple(chunks),
            entries=VoidEntries(0, 0, 0),
        )
        store.put(keys.mark(mark_id), encode_mark(mark))
        change = log_change.Mark(mark_id, mark.head, mark.at, store.state.collection.last)
        store.append(change, with_state=False)

    def _collect(self) -> None:
        """What a collecting run does [COL-6]; nothing was named since the mark."""
        store = self._store
        opened = store.state.collection.mark
        assert opened is not None
        objects = load(store.root)
        garbage = set(objects) - GoldenReader(objects).reachable()
        store.append(log_change.Collect(opened.id))
        for key in sorted(garbage):
            if key.startswith((keys.PACKS, keys.MANIFESTS)):
                store.delete(key)
        store.delete(keys.mark(opened.id))

    def _add_drill(self) -> None:
        """Evidence of a drill that failed."""
        source, lsn = self._source, self._store.state.snapshots[-1].lsn
        started = MICROS + _DAY
        found = evidence.Evidence(
            id=evidence.drill_id(started, "0123abcd"),
            store_id=STORE_ID,
            store_url="s3://bucket/prefix",
            version="tl 0.1.0",
            host="db-tools-3",
            account="postgres",
            started=started,
            finished=started + 90 * _SECOND,
            seed=(1 << 56) - 1,
            asked="random",
            target=evidence.DrillTarget("random", 2, lsn, started, None, "built-3", lsn, 0),
            server_version="15.10",
            result=evidence.FAILED,
            exit_code=1,
            message="1 of 3 checks failed",
            recovery_time=evidence.RecoveryTime(1_200_000, "lazy", None, 60 * _SECOND, None),
            recovery_point=evidence.RecoveryPoint(
                head=source.new.end,
                head_time=started,
                head_commit_time=None,
                source_reachable=True,
                source_lsn=Lsn(source.new.end + 4096),
                source_commit_time=started,
                rpo_bytes=4096,
                rpo_micros=250_000,
                method="asked the source",
                objective_micros=_SECOND,
            ),
            steps=(evidence.Step("branch", 0, 1_200_000, 35, 1_200_000, evidence.PASSED),),
            checks=(
                evidence.Check("catalog", "tables", "postgres", evidence.PASSED, "", 1000),
                evidence.Check(
                    "amcheck", "t", "postgres", evidence.FAILED, "1 finding", 2000, ("page 3",), 1
                ),
                evidence.Check("full", "restore", None, evidence.SKIPPED, "not asked for", 0),
            ),
            damages=(evidence.Damage("packs/ab/cd", 5, 10, "expected a frame", ("block 3 of t",)),),
            warnings=("free space is low",),
        )
        for file in evidence_files(found, ()):
            self._store.put(keys.drill_evidence(found.id, file.form), file.data)


def _is_void(key: str, tli: branch_state.Tli) -> bool:
    chunk = keys.parse_chunk(key)
    return chunk is not None and chunk.tli == tli.tli and chunk.start < tli.sealed


def _make_files(directory: Path, backup: PlainBackup) -> dict[str, bytes]:
    """Files of all shapes: small, short last block, several groups, holes, empty, a tablespace; their contents."""
    pages = np.random.default_rng(15).integers(0, 4, 300_000, np.uint8).tobytes()
    contents = {
        "PG_VERSION": b"15\n",
        "global/pg_control": (backup.directory / "global/pg_control").read_bytes(),
        "base/5/1259": pages[:24576],
        "base/5/16384": pages + bytes(131_072),
        "base/5/16385": bytes(200_000),
        "base/5/16386": b"",
        "base/5/odd": pages[:10_001],
        "pg_tblspc/16384/PG_15_202209061/5/16400": pages[:8192],
        "pg_xact/0000": b"\x40" * 8192,
    }
    for path, content in contents.items():
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).write_bytes(content)
        (directory / path).chmod(0o600)
    (directory / "pg_wal/archive_status").mkdir(parents=True)
    return contents


def main() -> None:
    """Write store, expectation and damage expectations beside this file."""
    if STORE.directory.exists():
        sys.exit(f"{STORE.directory} exists: a golden store is made once")
    make(STORE.directory)
    objects = load(STORE.directory)
    STORE.expectation.write_text(json.dumps(GoldenReader(objects).read(), indent=1) + "\n")
    cases = {}
    for kind, key in choose(objects).items():
        for name, change in CHANGES.items():
            damage = change(key, objects[key])
            errors: dict[str, object] = {
                "key": key,
                "codecs": None,
                "rescue": rescue_error(damage.apply(objects)),
            }
            try:
                GoldenReader(damage.apply(objects)).read()
            except DamagedStore as error:
                errors["codecs"] = f"{type(error).__name__}: {error}"
            cases[f"{kind}/{name}"] = errors
    STORE.damage.write_text(json.dumps(cases, indent=1) + "\n")
    total = sum(len(data) for data in objects.values())
    print(f"{len(objects)} objects, {total} bytes, {len(cases)} ways to damage them")


if __name__ == "__main__":
    main()
