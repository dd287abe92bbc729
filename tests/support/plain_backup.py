"""A base backup as plain files and the server's own WAL: what a branch is made from, without any store."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from pathlib import Path

from restore.plan import BranchPlan, WalSpan, make_plan
from tests.support.postgres import PostgresServer
from timeline.format.branch_state import Incarnation, Setting, Snapshot, Tli
from timeline.format.manifest import ManifestRef
from timeline.format.wal_index import EventKind, WalEvent
from timeline.lsn import Lsn
from timeline.pg.backup_label import parse_backup_label
from timeline.pg.control import parse_control
from timeline.pg.segment import history_name, segment_name, segment_start
from timeline.pg.wal import WalScanner

_NO_MANIFEST = ManifestRef(digest="0" * 64, size=0, rows=0, footer_bytes=0, footer_digest="0" * 64)
_PIECE_BYTES = 3 << 20


@dataclass(frozen=True, slots=True)
class PlainBackup:
    """Files in ``directory``, as pg_basebackup wrote them, without WAL."""

    server: PostgresServer
    directory: Path
    snapshot: Snapshot
    incarnation: Incarnation

    async def read(self, spans: Sequence[WalSpan]) -> AsyncGenerator[tuple[Lsn, bytes], None]:
        """A WalReader over the server's pg_wal."""
        segment_bytes = self.incarnation.segment_bytes
        for span in spans:
            position = span.start
            while position < span.end:
                path = self.server.data / "pg_wal" / segment_name(span.tli, position, segment_bytes)
                boundary = segment_start(position, segment_bytes) + segment_bytes
                stop = min(span.end, boundary, position + _PIECE_BYTES)
                with path.open("rb") as file:
                    yield position, os.pread(file.fileno(), stop - position, position % segment_bytes)
                position = Lsn(stop)

    def plan(self, lsn: Lsn) -> BranchPlan:
        """The plan for that LSN on the server's present tli."""
        control = parse_control((self.server.data / "global/pg_control").read_bytes())
        scanned = self.scan(lsn)
        history = self.server.data / "pg_wal" / history_name(control.tli)
        return make_plan(
            snapshot=self.snapshot,
            incarnation=self.incarnation,
            tlis=(
                Tli(
                    tli=control.tli,
                    parent=control.tli - 1 or None,
                    start=Lsn(0),
                    sealed=Lsn(0),
                    end=None,
                    history=history.read_text() if history.exists() else None,
                ),
            ),
            tli=control.tli,
            lsn=lsn,
            last_record=scanned.last_record,
            events=scanned.events,
        )

    def scan(self, lsn: Lsn) -> Scanned:
        """The last record before that LSN and the events since the snapshot, on tli 1 or the present one."""
        control = parse_control((self.server.data / "global/pg_control").read_bytes())
        segment_bytes = self.incarnation.segment_bytes
        position = segment_start(self.snapshot.lsn, segment_bytes)
        scanner = WalScanner(segment_bytes, control.tli, position)
        last, events = Lsn(0), []
        while position < lsn:
            stop = Lsn(min(position + segment_bytes, lsn))
            for tli in range(control.tli, 0, -1):
                path = self.server.data / "pg_wal" / segment_name(tli, position, segment_bytes)
                if path.exists():
                    break
            result = scanner.feed(path.read_bytes()[: stop - position])
            last = result.last_record or last
            events += [
                WalEvent(EventKind(e.kind), e.start, e.end, e.time, e.name, e.values)
                for e in result.events
                if e.start >= self.snapshot.lsn
            ]
            position = stop
        return Scanned(last, tuple(events))


@dataclass(frozen=True, slots=True)
class Scanned:
    """What reading the WAL up to an LSN tells."""

    last_record: Lsn
    events: tuple[WalEvent, ...]


def take_backup(server: PostgresServer, directory: Path, *options: str) -> PlainBackup:
    """Back the server up with pg_basebackup (and further options of it); its WAL must not be recycled
    meanwhile (wal_keep_size)."""
    server.tool(
        "pg_basebackup",
        *("-D", str(directory), "-X", "none", "-c", "fast", "--no-manifest"),
        *("-h", str(server.sockets), "-p", str(server.port), "-U", "postgres"),
        *options,
    )
    end = Lsn.parse(server.position())
    label = (directory / "backup_label").read_text()
    parsed = parse_backup_label(label)
    control = parse_control((directory / "global/pg_control").read_bytes())
    settings = tuple(
        Setting(str(name), str(value))
        for name, value in server.sql("select name, setting from pg_settings where setting is not null")
    )
    incarnation = Incarnation(
        system_identifier=control.system_identifier,
        major=server.major,
        version_num=int(server.value("show server_version_num")),
        architecture="x86_64",
        block_bytes=control.block_bytes,
        segment_bytes=control.segment_bytes,
        relation_segment_bytes=control.relation_segment_blocks * control.block_bytes,
        catalog_version=control.catalog_version,
        control_version=control.control_version,
        libc_version=None,
        icu_version=None,
        superuser="postgres",
        data_checksums=control.data_checksums,
        from_lsn=Lsn(0),
        to_lsn=None,
    )
    snapshot = Snapshot(
        id="plain",
        kind="base",
        tli=parsed.tli,
        lsn=parsed.start,
        checkpoint=parsed.checkpoint,
        end=end,
        time=0,
        files=_NO_MANIFEST,
        pages=(_NO_MANIFEST,),
        boot=None,
        backup_label=label,
        tablespaces=(),
        settings=settings,
        parent=None,
        bytes=0,
    )
    return PlainBackup(server, directory, snapshot, incarnation)
