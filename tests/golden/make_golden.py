"""Make the golden store: ``python -m tests.golden.make_golden``; run once for each version of the format.

Its WAL is real: captured from a small Postgres 15 with 1 MiB segments, over a promotion. Its data directory
is not: a handful of synthetic files, because a real one would take 3 MB here and the format does not look
into files. So what rescue.py makes of it cannot be started; tests/integration does that with real ones.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np

from tests.golden.damage import CHANGES
from tests.golden.reading import GoldenReader
from tests.golden.store import DAMAGE, EXPECTED, STORE, choose, load, rescue_error
from tests.support.handmade_store import (
    MICROS,
    HandmadeStore,
    Indexer,
    WalRun,
    promote_in_place,
)
from tests.support.plain_backup import take_backup
from tests.support.postgres import PostgresServer, running_server, scratch
from timeline.errors import DamagedStore
from timeline.format import log
from timeline.format.manifest import PageRow
from timeline.format.page_manifest import read_page_rows, write_page_manifest
from timeline.format.wal_index import Coverage
from timeline.lsn import Lsn
from timeline.pg.segment import parse_history, segment_name, segment_start

_SEGMENT_BYTES = 1 << 20
_CUT_BYTES = 50_021


def make(root: Path) -> None:
    """The store, in an empty directory."""
    with running_server(
        15, initdb=["--wal-segsize=1"], settings={"wal_keep_size": "'64MB'", "autovacuum": "off"}
    ) as server:
        backup_directory = scratch("tl-golden-")
        try:
            _fill(HandmadeStore(root), server, backup_directory)
        finally:
            shutil.rmtree(backup_directory)


def _fill(store: HandmadeStore, server: PostgresServer, directory: Path) -> None:
    server.sql("select pg_switch_wal()", "checkpoint")
    backup = take_backup(server, directory / "backup")
    start = segment_start(backup.snapshot.lsn, _SEGMENT_BYTES)
    space = server.make_directory(directory / "space")
    server.sql(
        "create table t(a int)",
        "insert into t select generate_series(1, 2000)",
        "select pg_create_restore_point('before-release')",
        f"create tablespace late location '{space}'",
        "create table u(a int) tablespace late",
        "begin; insert into t values (0); rollback",
        "begin; insert into t values (0); prepare transaction 'p'",
        "commit prepared 'p'",
    )
    promote_in_place(server)
    server.sql("delete from t where a % 2 = 0", "select pg_create_restore_point('on tli 2')")
    end = Lsn.parse(server.value("select pg_current_wal_flush_lsn()"))
    history = (server.data / "pg_wal/00000002.history").read_text()
    (row,) = parse_history(history)
    old, new = _captured(server, 1, start, row.end), _captured(server, 2, row.end, end)
    system = backup.incarnation.system_identifier

    files = directory / "files"
    _make_files(files)
    incarnation = replace(backup.incarnation, libc_version="2.36", icu_version="72.1", from_lsn=start)
    store.append(log.Begin(incarnation, log.Tli(1, None, start, start, None, None)))
    store.append(log.ClaimEpoch(1))
    base = store.add_files(
        files, replace(backup.snapshot, settings=backup.snapshot.settings[:5], time=MICROS)
    )
    progress = log.BackupProgress("try-1", base.pages, base.bytes, MICROS)
    store.append(log.RecordProgress(progress), with_state=False)
    tablespaces = (log.Tablespace(16384, "/srv/space"),)
    store.append(log.AddSnapshot(replace(base, id="base-1", tablespaces=tablespaces)), with_state=False)
    index = Indexer(_SEGMENT_BYTES, 1, start)
    half = len(old.data) // 2
    store.seal(WalRun(1, start, old.data[:half]), _CUT_BYTES, index)
    store.seal(WalRun(1, Lsn(start + half), old.data[half:]), _CUT_BYTES, index)
    store.append(log.SwitchTli(1, row.end, log.Tli(2, 1, row.end, row.end, None, history)))
    index = Indexer(_SEGMENT_BYTES, 2, row.end)
    half = len(new.data) // 2
    store.seal(WalRun(2, row.end, new.data[:half]), _CUT_BYTES, index)
    store.add_chunks(WalRun(2, Lsn(row.end + half), new.data[half:]), _CUT_BYTES // 4, index, system)
    store.append(log.AddSnapshot(_built(store, base, files, row.end)))
    store.append(log.Cover(Coverage(2, end, MICROS + 60_000_000)), with_state=False)
    store.append(log.RecordGap(log.Gap(2, end, Lsn(end + _SEGMENT_BYTES), "slot lost")), with_state=False)


def _captured(server: PostgresServer, tli: int, start: Lsn, end: Lsn) -> WalRun:
    data = bytearray()
    while (at := start + len(data)) < end:
        content = (server.data / "pg_wal" / segment_name(tli, at, _SEGMENT_BYTES)).read_bytes()
        inside = at % _SEGMENT_BYTES
        data += content[inside : inside + end - at]
    return WalRun(tli, start, bytes(data))


def _make_files(directory: Path) -> None:
    """Files of all shapes: small, short last block, several groups, holes, empty, a tablespace."""
    pages = np.random.default_rng(15).integers(0, 4, 300_000, np.uint8).tobytes()
    contents = {
        "PG_VERSION": b"15\n",
        "global/pg_control": bytes(8192),
        "base/5/1259": pages[:24576],
        "base/5/16384": pages + bytes(131_072),
        "base/5/16385": bytes(200_000),
        "base/5/16386": b"",
        "base/5/odd": pages[:10_001],
        "pg_tblspc/16384/PG_15_202209061/5/16400": pages[:8192],
        "pg_xact/0000": bytes(8192),
    }
    for path, content in contents.items():
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).write_bytes(content)
        (directory / path).chmod(0o600)
    (directory / "pg_wal/archive_status").mkdir(parents=True)


def _built(store: HandmadeStore, base: log.Snapshot, files: Path, lsn: Lsn) -> log.Snapshot:
    """A later snapshot: some blocks of one file changed, another file was made anew under an old name."""
    relation = files / "base/5/16384"
    changed = bytearray(relation.read_bytes())
    changed[2 * 8192 : 3 * 8192] = b"x" * 8192
    changed[140_000:140_010] = b"y" * 10
    relation.write_bytes(changed)
    (files / "base/5/1259").write_bytes(b"z" * 9000)
    whole = store.add_files(files, base)
    data = (store.root / f"manifests/{whole.pages[0].digest}.parquet").read_bytes()
    rows = [
        row
        for row in read_page_rows(data, whole.pages[0])
        if (row.path, row.group) in (("base/5/16384", 0), ("base/5/16384", 1), ("base/5/1259", 0))
    ]
    delta = replace(store.put_manifest(write_page_manifest(rows)), lsn=lsn)
    boot = store.put_manifest(write_page_manifest([PageRow(r.path, r.group, r.extent) for r in rows[:1]]))
    listing = store.relist(whole.files, {"base/5/1259": lsn})
    (store.root / f"manifests/{whole.pages[0].digest}.parquet").unlink()
    (store.root / f"manifests/{whole.files.digest}.parquet").unlink()
    old = replace(base.pages[0], lsn=base.lsn)
    return replace(
        base,
        id="built-1",
        kind=log.BUILT,
        tli=2,
        lsn=lsn,
        checkpoint=lsn,
        end=lsn,
        files=listing,
        pages=(old, delta),
        boot=boot,
        backup_label=None,
        parent="base-1",
    )


def main() -> None:
    """Write store, expectation and damage expectations beside this file."""
    shutil.rmtree(STORE, ignore_errors=True)
    make(STORE)
    objects = load(STORE)
    EXPECTED.write_text(json.dumps(GoldenReader(objects).read(), indent=1) + "\n")
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
    DAMAGE.write_text(json.dumps(cases, indent=1) + "\n")
    total = sum(len(data) for data in objects.values())
    print(f"{len(objects)} objects, {total} bytes, {len(cases)} ways to damage them")


if __name__ == "__main__":
    main()
