"""A branch in a store, archived by hand: WAL made for the purpose, cut into chunks wherever a test likes."""

from __future__ import annotations

import struct

from tests.support.manual_clock import ManualClock
from tests.support.wal_builder import PAGE, Built, WalBuilder, commit
from timeline.catalog.branch_log import BranchLog
from timeline.catalog.history import History
from timeline.catalog.meta import create_store
from timeline.clock import POSTGRES_EPOCH_MICROS, Micros
from timeline.format import keys
from timeline.format.branch_state import BranchState, Gap, Incarnation, SealedRange, Snapshot, Tli
from timeline.format.chunk import ChunkHeader, encode_chunk
from timeline.format.log_change import AddSnapshot, Begin, RecordGap, SwitchTli
from timeline.format.manifest import ManifestRef
from timeline.format.wal_index import Coverage, EventKind, WalEvent, WalIndex
from timeline.lsn import Lsn
from timeline.maintain.seal import seal
from timeline.pg.segment import HistoryRow, format_history
from timeline.pg.wal import ScanResult, WalScanner
from timeline.store.base import Store
from timeline.store.memory import MemoryStore

SEGMENT_BYTES = 1 << 20
MAJOR = 15
SYSTEM = 0x6123456789ABCDEF
FIRST = Lsn(3 * SEGMENT_BYTES)
NOON = 1_768_910_400_000_000
"""2026-01-20 12:00:00 UTC."""
SECOND = 1_000_000

SNAPSHOT_MANIFEST_BYTES = 16
"""What stands for the manifest of a snapshot of nothing; all others are longer."""

_NO_MANIFEST = ManifestRef("0" * 64, 0, 0, 0, "0" * 64)


class Server:
    """What a server writes on one tli."""

    def __init__(self, tli: int, start: Lsn, previous: int = 0) -> None:
        self.builder = WalBuilder(start, SEGMENT_BYTES, MAJOR, tli, SYSTEM, previous)

    @property
    def tli(self) -> int:
        return self.builder.tli

    @property
    def end(self) -> Lsn:
        """Where its next record goes."""
        return Lsn(self.builder.lsn)

    @property
    def records(self) -> list[Built]:
        return self.builder.records

    def bytes(self, start: int, end: int) -> bytes:
        """The WAL it wrote there."""
        return bytes(self.builder.wal[start - self.builder.start : end - self.builder.start])

    def fill(self, length: int) -> Built:
        """A record of no interest."""
        return self.builder.append(21, 0, main=bytes(length))

    def commit(self, time: Micros, xid: int) -> Built:
        return self.builder.append(1, 0x00, xid=xid, main=commit(time - POSTGRES_EPOCH_MICROS))

    def abort(self, time: Micros, xid: int) -> Built:
        return self.builder.append(1, 0x20, xid=xid, main=commit(time - POSTGRES_EPOCH_MICROS))

    def restore_point(self, name: str, time: Micros) -> Built:
        main = struct.pack("<q64s", time - POSTGRES_EPOCH_MICROS, name.encode())
        return self.builder.append(0, 0x70, main=main)

    def create_tablespace(self, oid: int, path: str) -> Built:
        return self.builder.append(5, 0x00, main=struct.pack("<I", oid) + path.encode() + b"\0")

    def switch(self) -> Built:
        """pg_switch_wal: the rest of the segment is padding."""
        return self.builder.append(0, 0x40)

    def cut_back(self, lsn: int) -> Server:
        """What a standby had that stopped at a record boundary: the same WAL, up to there."""
        copy = Server(self.tli, Lsn(self.builder.start))
        copy.builder.wal = self.builder.wal[: lsn - self.builder.start]
        copy.builder.records = [record for record in self.records if record.end <= lsn]
        copy.builder.previous = copy.records[-1].start if copy.records else 0
        return copy

    def promote(self, tli: int) -> Server:
        """The server that goes on at our end, on another tli."""
        return Server(tli, self.end, self.builder.previous)


class Archive:
    """One branch, its log and its chunks."""

    def __init__(self, store: Store | None = None, *, clock: ManualClock | None = None) -> None:
        self.clock = clock or ManualClock(now=NOON)
        self.store: Store = store if store is not None else MemoryStore()
        self.log = BranchLog(self.store, "main", self.clock, "archive-test")
        self.store_id = ""
        self.durable: dict[int, Lsn] = {}
        self._scanners: dict[int, WalScanner] = {}

    async def begin(self, server: Server) -> None:
        """A new store and its first tli."""
        self.store_id = (await create_store(self.store, self.clock)).store_id
        start = Lsn(server.builder.start)
        await self.log.append(Begin(incarnation(start), Tli(server.tli, None, start, start, None, None)))
        self._resume(server, start)

    async def switch(self, old: Server, end: Lsn, new: Server) -> None:
        """The source went from one tli to another at ``end``."""
        state = await self.state()
        known = state.find_tli(old.tli)
        assert known is not None
        rows = f"{known.history or ''}" + format_history([HistoryRow(old.tli, end, "no recovery target")])
        opened = Tli(new.tli, old.tli, end, end, None, rows)
        await self.log.append(SwitchTli(old.tli, end, opened))
        self._resume(new, end)

    async def lose(self, server: Server, until: Lsn) -> None:
        """A gap from where the archive is; it resumes at ``until``."""
        gap = Gap(server.tli, self.durable[server.tli], until, "the slot was lost")
        await self.log.append(RecordGap(gap))
        self._resume(server, until)

    async def archive(
        self, server: Server, upto: int | None = None, *, covered: Micros | None = None, epoch: int = 0
    ) -> None:
        """One chunk: from what is durable to ``upto`` (the server's end)."""
        start = self.durable[server.tli]
        end = server.end if upto is None else Lsn(upto)
        if end <= start:
            return
        wal = server.bytes(start, end)
        index = index_of(self._scanners[server.tli].feed(wal))
        coverage = Coverage(server.tli, end, covered) if covered is not None else None
        await self.put(server.tli, start, wal, index, coverage=coverage, epoch=epoch)
        self.durable[server.tli] = end

    async def put(
        self,
        tli: int,
        start: Lsn,
        wal: bytes,
        index: WalIndex,
        *,
        coverage: Coverage | None = None,
        epoch: int = 0,
    ) -> str:
        """A chunk as it is; its key."""
        header = ChunkHeader(
            store_id=self.store_id,
            branch="main",
            system_identifier=SYSTEM,
            tli=tli,
            start=start,
            end=Lsn(start + len(wal)),
            writer="archive-test",
            epoch=epoch,
            created=self.clock.now(),
            coverage=coverage,
            digest="",
        )
        key = keys.chunk("main", tli, start)
        assert await self.store.create(key, encode_chunk(header, wal, index))
        return key

    async def seal(self, tli: int | None = None) -> SealedRange | None:
        return await seal(self.store, self.log, self.clock, tli=tli, force=True)

    async def snapshot(
        self, name: str, tli: int, lsn: int, end: int | None = None, *, time: Micros = NOON
    ) -> Snapshot:
        """A snapshot of nothing: ``base`` when it has an end beyond its redo point."""
        base = end is not None
        snapshot = Snapshot(
            id=name,
            kind="base" if base else "built",
            tli=tli,
            lsn=Lsn(lsn),
            checkpoint=Lsn(lsn),
            end=Lsn(lsn if end is None else end),
            time=time,
            files=_NO_MANIFEST,
            pages=(_NO_MANIFEST,),
            boot=None,
            backup_label="label" if base else None,
            tablespaces=(),
            settings=(),
            parent=None,
            bytes=0,
        )
        await self.store.create(keys.manifest(_NO_MANIFEST.digest), bytes(SNAPSHOT_MANIFEST_BYTES))
        await self.log.append(AddSnapshot(snapshot))
        return snapshot

    async def state(self) -> BranchState:
        head = await self.log.load()
        assert head is not None
        return head.state

    async def history(self) -> History:
        return await History.load(self.store)

    def _resume(self, server: Server, at: Lsn) -> None:
        self.durable[server.tli] = at
        self._scanners[server.tli] = WalScanner(SEGMENT_BYTES, server.tli, at, major=MAJOR)


def incarnation(start: Lsn) -> Incarnation:
    """The one server all this WAL is from."""
    return Incarnation(
        system_identifier=SYSTEM,
        major=MAJOR,
        version_num=150018,
        architecture="x86_64",
        block_bytes=8192,
        segment_bytes=SEGMENT_BYTES,
        relation_segment_bytes=1 << 30,
        catalog_version=202209061,
        control_version=1300,
        libc_version=None,
        icu_version=None,
        superuser="postgres",
        data_checksums=True,
        from_lsn=start,
        to_lsn=None,
    )


def index_of(scanned: ScanResult) -> WalIndex:
    """The stored form of what a scan tells."""
    return WalIndex(
        last_record=scanned.last_record,
        last_record_end=scanned.last_record_end,
        pending=scanned.pending,
        records=scanned.records,
        commits=scanned.commits,
        events=tuple(
            WalEvent(EventKind(event.kind), event.start, event.end, event.time, event.name, event.values)
            for event in scanned.events
        ),
        touches=scanned.touches,
    )


def canonical(lsn: int) -> int:
    """The end of one record and the start of the next are one moment, though a page header may lie
    between."""
    header = 40 if (lsn - lsn % PAGE) % SEGMENT_BYTES == 0 else 24
    return lsn - lsn % PAGE if lsn % PAGE <= header else lsn
