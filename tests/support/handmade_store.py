"""A store made by hand, straight from the codecs: no archiver, no base backup, no catalog of ours has a part in it.

What reads such a store has followed SPEC.md and not merely its own writer.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tests.support.postgres import PostgresServer
from timeline.format import branch_state, keys, log, log_change
from timeline.format.chunk import ChunkHeader, encode_chunk
from timeline.format.extent import BLOCK_BYTES, GROUP_BLOCKS, GROUP_BYTES, ExtentRef, encode_extent
from timeline.format.file_listing import write_file_listing
from timeline.format.manifest import FileRow, ManifestRef, PageRow, WalFrame
from timeline.format.meta import StoreMeta, encode_meta
from timeline.format.pack import EXTENTS, NONCE_BYTES, WAL, PackBuilder
from timeline.format.page_manifest import write_page_manifest
from timeline.format.wal_frame import encode_wal_frame
from timeline.format.wal_index import EventKind, WalEvent, WalIndex
from timeline.format.wal_manifest import MergedManifest, open_wal_manifest, write_wal_manifest
from timeline.lsn import Lsn
from timeline.pg.wal import ScanResult, WalScanner

STORE_ID = "5704e1d0" * 4
MICROS = 1_700_000_000_000_000
INLINE_BYTES = 1024
LEFT_OUT = frozenset(
    {"backup_label", "backup_manifest", "postmaster.pid", "postmaster.opts", "tablespace_map"}
)


@dataclass(frozen=True, slots=True)
class WalRun:
    """WAL of one tli, without holes."""

    tli: int
    start: Lsn
    data: bytes

    @property
    def end(self) -> Lsn:
        """Just after it."""
        return Lsn(self.start + len(self.data))

    def cut(self, nbytes: int) -> Iterator[WalRun]:
        """The run in pieces."""
        for at in range(0, len(self.data), nbytes):
            yield WalRun(self.tli, Lsn(self.start + at), self.data[at : at + nbytes])


class HandmadeStore:
    """Files named by keys, and the state of branch main as the log has it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.state = branch_state.BranchState.empty("main")
        self._entries = 0
        self.put(keys.META, encode_meta(StoreMeta(STORE_ID, 1, (), (), None, MICROS)))

    def put(self, key: str, data: bytes) -> None:
        """Create an object; never replace one (P2) with other bytes."""
        path = self.root / key
        if path.exists() and path.read_bytes() != data:
            raise ValueError(f"{key} exists")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    @property
    def head(self) -> int:
        """Number of the newest entry: what a change that names objects made from now on says as ``began``
        [COL-2]."""
        return self._entries - 1

    def append(self, change: log_change.Change, *, with_state: bool = True) -> None:
        """Commit a change to branch main."""
        self.state = change.apply(self.state)
        number = self._entries
        entry = log.LogEntry(
            number,
            "main",
            "handmade",
            f"{number:04x}",
            0,
            MICROS + number,
            change,
            self.state if with_state or number % log.STATE_EVERY == 0 else None,
        )
        self.put(keys.log_entry("main", number), log.encode_entry(entry))
        self._entries += 1

    def put_manifest(self, built: tuple[bytes, ManifestRef]) -> ManifestRef:
        """Create a manifest; the reference to it."""
        data, ref = built
        self.put(keys.manifest(ref.digest), data)
        return ref

    def delete(self, key: str) -> None:
        """As a collection does."""
        (self.root / key).unlink()

    def get_manifest(self, ref: ManifestRef) -> bytes:
        """A manifest's bytes."""
        return (self.root / keys.manifest(ref.digest)).read_bytes()

    def put_pack(self, builder: PackBuilder) -> str:
        """Create a pack; its id."""
        pack_id, data = builder.finish()
        self.put(keys.pack(pack_id), data)
        return pack_id

    def add_files(self, directory: Path, snapshot: branch_state.Snapshot) -> branch_state.Snapshot:
        """The files of a data directory in one pack: the snapshot that lists them, not yet in the log.

        Blocks of zeros at the end of a group are left out, for a reader must know what that means [PAG-3].
        """
        rows, pages, stored = [], [], PackBuilder(STORE_ID, EXTENTS, nonce=nonce())
        total = 0
        for path in sorted(_walk(directory, "")):
            full = directory / path
            mode = full.stat().st_mode & 0o7777
            if full.is_dir():
                rows.append(FileRow(path, "d", 0, mode, None, None, Lsn(0)))
                continue
            content = full.read_bytes()
            total += len(content)
            inline = len(content) <= INLINE_BYTES or path == "global/pg_control"
            rows.append(FileRow(path, "f", len(content), mode, content if inline else None, None, Lsn(0)))
            if not inline:
                pages += [(path, *place) for place in _store_file(content, stored)]
        pack_id = self.put_pack(stored)
        named = [PageRow(path, group, replace(extent, pack=pack_id)) for path, group, extent in pages]
        return replace(
            snapshot,
            files=self.put_manifest(write_file_listing(rows, nonce=nonce())),
            pages=(self.put_manifest(write_page_manifest(sorted(named, key=order_of), nonce=nonce())),),
            bytes=total,
        )

    def add_chunks(self, run: WalRun, cut_bytes: int, index: Indexer, system_identifier: int) -> None:
        """The run as a chain of chunks."""
        for piece in run.cut(cut_bytes):
            header = ChunkHeader(
                STORE_ID,
                "main",
                system_identifier,
                run.tli,
                piece.start,
                piece.end,
                "handmade",
                0,
                MICROS,
                None,
                "",
            )
            key = keys.chunk("main", run.tli, piece.start)
            self.put(key, encode_chunk(header, piece.data, index.feed(piece.data)))

    def seal(self, run: WalRun, cut_bytes: int, index: Indexer) -> None:
        """The run in one pack and one WAL manifest, committed."""
        began = self.head
        builder = PackBuilder(STORE_ID, WAL, nonce=nonce())
        frames = []
        for piece in run.cut(cut_bytes):
            stored, digest = encode_wal_frame(piece.data)
            frames.append((piece, builder.add(stored), len(stored), digest, index.feed(piece.data)))
        pack_id = self.put_pack(builder)
        manifest = self.put_manifest(
            write_wal_manifest(
                [
                    WalFrame(
                        tli=run.tli,
                        start=piece.start,
                        end=piece.end,
                        pack=pack_id,
                        offset=offset,
                        stored_bytes=stored_bytes,
                        digest=digest,
                        last_record=found.last_record,
                        last_record_end=found.last_record_end,
                        pending=found.pending,
                        records=found.records,
                        commits=found.commits,
                        events=found.events,
                        touches=found.touches,
                    )
                    for piece, offset, stored_bytes, digest, found in frames
                ],
                nonce=nonce(),
            )
        )
        times = [int(time) for *_, found in frames for time in found.commits["time"]]
        events = [event.kind for *_, found in frames for event in found.events]
        sealed = branch_state.SealedRange(
            tli=run.tli,
            start=run.start,
            end=run.end,
            manifest=manifest,
            min_commit_time=min(times, default=None),
            max_commit_time=max(times, default=None),
            commits=len(times),
            restore_points=events.count(EventKind.RESTORE_POINT),
        )
        self.append(log_change.Seal(sealed, None, began))

    def merge(self, parts: Sequence[branch_state.SealedRange]) -> None:
        """Adjoining sealed ranges as one, committed; their own manifests stay, and nobody names them."""
        began = self.head
        manifest = MergedManifest()
        for part in parts:
            data = self.get_manifest(part.manifest)
            footer = open_wal_manifest(data, part.manifest)
            for group in footer.groups:
                stored = data[group.offset : group.offset + group.length]
                manifest.add(footer.table(group.number, stored))
        ref = self.put_manifest(manifest.finish(nonce()))
        self.append(log_change.MergeSealed(log_change.merge_ranges(parts, ref), began), with_state=False)


class Indexer:
    """The WAL scan as the format's index."""

    def __init__(self, segment_bytes: int, tli: int, start: Lsn) -> None:
        self._scanner = WalScanner(segment_bytes, tli, start)

    def feed(self, data: bytes) -> WalIndex:
        """The index of the next bytes."""
        found: ScanResult = self._scanner.feed(data)
        return WalIndex(
            found.last_record,
            found.last_record_end,
            found.pending,
            found.records,
            found.commits,
            tuple(
                WalEvent(EventKind(e.kind), e.start, e.end, e.time, e.name, e.values) for e in found.events
            ),
            found.touches,
        )


def nonce() -> str:
    """For one pack or manifest [PAC-4]."""
    return secrets.token_hex(NONCE_BYTES)


def promote_in_place(server: PostgresServer) -> None:
    """Stop the server and let it begin a new tli, as a restored one does."""
    server.stop()
    server.configure({"restore_command": "'false'"})
    signal = server.data / "recovery.signal"
    signal.touch()
    os.chown(signal, server.user.pw_uid, server.user.pw_gid)
    server.start()
    deadline = time.monotonic() + 30
    while server.value("select pg_is_in_recovery()") != "False":
        if time.monotonic() > deadline:
            raise TimeoutError(server.log.read_text())
        time.sleep(0.05)


def _walk(root: Path, inside: str) -> Iterator[str]:
    for entry in os.scandir(root / inside):
        path = f"{inside}/{entry.name}" if inside else entry.name
        if path in LEFT_OUT:
            continue
        yield path
        # Tablespaces are symlinks here; their files are listed below pg_tblspc [FIL-4].
        if entry.is_dir() and path != "pg_wal":
            yield from _walk(root, path)


def _store_file(content: bytes, builder: PackBuilder) -> Iterator[tuple[int, ExtentRef]]:
    """(group, extent) of every run of blocks that are not all zeros; every second group in two extents."""
    for at in range(0, len(content), GROUP_BYTES):
        group = content[at : at + GROUP_BYTES]
        halves: Sequence[tuple[int, bytes]] = [(0, group)]
        if at // GROUP_BYTES % 2 and len(group) > GROUP_BYTES // 2:
            halves = [(0, group[: GROUP_BYTES // 2]), (GROUP_BLOCKS // 2, group[GROUP_BYTES // 2 :])]
        for first_block, raw in halves:
            while len(raw) >= BLOCK_BYTES and not any(raw[-BLOCK_BYTES:]) and len(raw) % BLOCK_BYTES == 0:
                raw = raw[:-BLOCK_BYTES]
            if raw:
                stored, digest = encode_extent(raw)
                yield (
                    at // GROUP_BYTES,
                    ExtentRef(first_block, len(raw), "", builder.add(stored), len(stored), digest),
                )


def order_of(row: PageRow) -> tuple[str, int, int]:
    """By which the rows of a page manifest are sorted [PAG-1]."""
    return row.path, row.group, row.extent.first_block
