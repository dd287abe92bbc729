"""Write all files of a snapshot into a directory, in parallel.

Page manifests are applied oldest first, so that a newer extent overwrites an older one; each is read row
group by row group, and extents that lie together in a pack come in one ranged read. Every extent is
verified (P5).

Bounds: ``READS`` ranged reads of ``RUN_BYTES`` in flight, one row group of references, the file listing.
Crash behaviour: ``global/pg_control`` is written last, after everything else is on disk, so an
interrupted restore never starts (EDGE 31).
"""

from __future__ import annotations

import asyncio
import ctypes
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

from restore.host import Account
from timeline.catalog.parallel import in_order
from timeline.errors import DamagedStore, MissingObject, NotFound, TimelineError
from timeline.format import keys
from timeline.format.branch_state import Snapshot
from timeline.format.extent import GROUP_BYTES, decode_extent
from timeline.format.file_listing import FileListing, read_file_listing
from timeline.format.manifest import ManifestRef, PageRow
from timeline.format.page_manifest import Footer, open_footer
from timeline.pg.control import CONTROL_FILE
from timeline.store.base import Store

READS = 12
RUN_BYTES = 4 << 20
_GAP_BYTES = 64 << 10
"""Bytes nobody asked for that are read rather than making another request."""
_THREADS = 4
_TABLESPACES = "pg_tblspc"


@dataclass(frozen=True, slots=True)
class Progress:
    """How far an eager restore is."""

    done_bytes: int
    """Raw bytes of extents written."""
    total_bytes: int
    """Bytes of the snapshot's files; holes and empty blocks are never fetched, so this may not be reached."""


@dataclass(frozen=True, slots=True)
class _Run:
    """Extents close together in one pack."""

    pack: str
    start: int
    end: int
    rows: tuple[PageRow, ...]


async def read_listing(store: Store, snapshot: Snapshot) -> FileListing:
    """The snapshot's file listing; raises MissingObject, DamagedStore."""
    data = await _get(store, keys.manifest(snapshot.files.digest), 0, snapshot.files.size)
    return await asyncio.to_thread(read_file_listing, data, snapshot.files)


async def write_files(
    store: Store,
    snapshot: Snapshot,
    listing: FileListing,
    root: Path,
    owner: Account | None,
    *,
    report: Callable[[Progress], None] = lambda _: None,
) -> None:
    """Write the snapshot's files into the existing, empty directory ``root``, except ``global/pg_control``.

    ``owner``: to whom files are given; ``None``: they stay ours. Raises MissingObject, DamagedStore, OSError.
    """
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="restore") as pool:
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(pool, _make_tree, listing, root, owner)
        done = 0
        for ref in snapshot.pages:
            footer = await _read_footer(store, ref)
            async with aclosing(
                in_order(_entries(footer), lambda number: _rows(store, footer, number), limit=2)  # noqa: B023
            ) as groups:
                async for rows in groups:
                    wanted = _current(rows, listing, ref)
                    async with aclosing(
                        in_order(
                            _runs(wanted),
                            lambda run: _copy(store, run, listing, root, pool),
                            limit=READS,
                        )
                    ) as copies:
                        async for written in copies:
                            done += written
                            report(Progress(done, snapshot.bytes))


def write_control(listing: FileListing, root: Path, owner: Account | None) -> None:
    """Make everything written so far durable, then write ``global/pg_control``, durably."""
    row = listing.get(CONTROL_FILE)
    if row is None or row.content is None:
        raise TimelineError(f"the snapshot holds no {CONTROL_FILE}")
    sync_file_system(root)
    path = root / CONTROL_FILE
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(row.content)
        if owner is not None:
            os.fchown(file.fileno(), owner.uid, owner.gid)
        file.flush()
        os.fsync(file.fileno())
    _sync(path.parent)


def sync_file_system(root: Path) -> None:
    """Everything below ``root`` is on disk afterwards."""
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "syncfs"):
        descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            if libc.syncfs(descriptor) != 0:
                code = ctypes.get_errno()
                raise OSError(code, os.strerror(code), str(root))
        finally:
            os.close(descriptor)
        return
    for directory, _, names in os.walk(root):
        for name in names:
            _sync(Path(directory) / name)
        _sync(Path(directory))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _make_tree(listing: FileListing, root: Path, owner: Account | None) -> None:
    """Directories and files, at full size and with the content that the listing itself holds."""
    made: set[str] = set()
    for row in listing:
        path = root / row.path
        # A symlink of the source leads to a place of the source: here it is a directory (EDGE 49).
        if row.kind in ("d", "l"):
            _make_directory(root, row.path, made, owner)
            path.chmod(0o700 if row.kind == "l" else row.mode | 0o700)
            continue
        if row.path == CONTROL_FILE:
            continue
        _make_directory(root, os.path.dirname(row.path), made, owner)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            if row.content is not None:
                file.write(row.content)
                file.flush()
            os.ftruncate(file.fileno(), row.size)
            os.fchmod(file.fileno(), row.mode | 0o600)
            if owner is not None:
                os.fchown(file.fileno(), owner.uid, owner.gid)


def _make_directory(root: Path, path: str, made: set[str], owner: Account | None) -> None:
    if not path or path in made:
        return
    _make_directory(root, os.path.dirname(path), made, owner)
    (root / path).mkdir(mode=0o700, exist_ok=True)
    if owner is not None:
        os.chown(root / path, owner.uid, owner.gid)
    made.add(path)


def _entries(footer: Footer) -> range:
    return range(len(footer.entries))


async def _read_footer(store: Store, ref: ManifestRef) -> Footer:
    key = keys.manifest(ref.digest)
    data = await _get(store, key, ref.size - ref.footer_bytes, ref.footer_bytes)
    return await asyncio.to_thread(open_footer, ref, data)


async def _rows(store: Store, footer: Footer, number: int) -> list[PageRow]:
    entry = footer.entries[number]
    data = await _get(store, keys.manifest(footer.ref.digest), entry.offset, entry.length)
    return await asyncio.to_thread(lambda: list(footer.decode(number, data).rows()))


def _current(rows: Iterable[PageRow], listing: FileListing, ref: ManifestRef) -> list[PageRow]:
    """The rows that belong to a file of the listing, and not to an earlier file of the same path."""
    current: list[PageRow] = []
    path, belongs = None, False
    for row in rows:
        if row.path != path:
            path = row.path
            file = listing.get(path)
            belongs = (
                file is not None
                and file.kind == "f"
                and file.content is None
                and (ref.lsn is None or ref.lsn >= file.born)
            )
        if belongs:
            current.append(row)
    return current


def _runs(rows: list[PageRow]) -> Iterator[_Run]:
    """The rows, cut where packs change, gaps are wide or a read would become too large."""
    pending: list[PageRow] = []
    start = end = 0
    for row in sorted(rows, key=lambda row: (row.extent.pack, row.extent.offset)):
        ref = row.extent
        joins = (
            pending
            and pending[0].extent.pack == ref.pack
            and ref.offset - end <= _GAP_BYTES
            and ref.offset + ref.stored_bytes - start <= RUN_BYTES
        )
        if pending and not joins:
            yield _Run(pending[0].extent.pack, start, end, tuple(pending))
            pending = []
        if not pending:
            start, end = ref.offset, ref.offset
        pending.append(row)
        end = max(end, ref.offset + ref.stored_bytes)
    if pending:
        yield _Run(pending[0].extent.pack, start, end, tuple(pending))


async def _copy(
    store: Store,
    run: _Run,
    listing: FileListing,
    root: Path,
    pool: ThreadPoolExecutor,
) -> int:
    key = keys.pack(run.pack)
    data = memoryview(await _get(store, key, run.start, run.end - run.start))
    return await asyncio.get_running_loop().run_in_executor(
        pool, lambda: _write_run(run, data, key, listing, root)
    )


def _write_run(run: _Run, data: memoryview, key: str, listing: FileListing, root: Path) -> int:
    written = 0
    path: str | None = None
    descriptor, size = -1, 0
    try:
        for row in run.rows:
            if row.path != path:
                if descriptor >= 0:
                    os.close(descriptor)
                path = row.path
                descriptor = os.open(root / path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
                size = os.fstat(descriptor).st_size
            at = row.extent.offset - run.start
            raw = decode_extent(data[at : at + row.extent.stored_bytes], row.extent, key)
            offset = row.group * GROUP_BYTES + row.extent.first_block * 8192
            # An older extent may reach beyond what the file was cut to since.
            _write_at(descriptor, memoryview(raw)[: max(0, size - offset)], offset)
            written += len(raw)
    finally:
        if descriptor >= 0:
            os.close(descriptor)
    return written


def _write_at(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(descriptor, data, offset)
        data, offset = data[count:], offset + count


async def _get(store: Store, key: str, start: int, length: int) -> bytes:
    try:
        data = await store.get(key, start, length)
    except NotFound as error:
        raise MissingObject(error.key) from error
    if len(data) != length:
        raise DamagedStore(key, start, f"expected {length} bytes, found {len(data)}")
    return data
