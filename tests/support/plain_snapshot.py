"""A snapshot in a store made from an ordinary directory, such as the data directory of a stopped Postgres."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

from timeline.clock import Clock
from timeline.format import keys
from timeline.format.branch_state import Snapshot
from timeline.format.extent import GROUP_BYTES, ExtentRef, encode_extent
from timeline.format.file_listing import write_file_listing
from timeline.format.manifest import FileRow, ManifestRef, PageRow
from timeline.format.pack import EXTENTS, PackBuilder
from timeline.format.page_manifest import write_page_manifest
from timeline.lsn import Lsn
from timeline.store.base import Store

_LEFT_OUT = frozenset(("postmaster.pid", "postmaster.opts", "postgresql.conf", "pg_wal"))
_INLINE_BYTES = 1024
STORE_ID = "0" * 32


async def store_directory(
    store: Store,
    directory: Path,
    clock: Clock,
    *,
    born: int = 0,
    boot: tuple[str, ...] = (),
    left_out: frozenset[str] = _LEFT_OUT,
) -> Snapshot:
    """Put the directory in the store; ``boot``: path prefixes that make the boot set."""
    packs = _Packs(store)
    files: list[FileRow] = []
    pages: list[PageRow] = []
    for path in sorted(_walk(directory, left_out)):
        real = directory / path
        info = real.lstat()
        if real.is_symlink():
            files.append(FileRow(path, "l", 0, 0o777, None, os.readlink(real), Lsn(born)))
        elif real.is_dir():
            files.append(FileRow(path, "d", 0, info.st_mode & 0o7777, None, None, Lsn(born)))
        else:
            data = real.read_bytes()
            inline = data if len(data) <= _INLINE_BYTES or path == "global/pg_control" else None
            files.append(FileRow(path, "f", len(data), info.st_mode & 0o7777, inline, None, Lsn(born)))
            if inline is None:
                pages += [row async for row in packs.add(path, data)]
    await packs.finish()
    pages = [packs.resolved(row) for row in pages]
    return Snapshot(
        id="plain",
        kind="base",
        tli=1,
        lsn=Lsn(born),
        checkpoint=Lsn(born),
        end=Lsn(born),
        time=clock.now(),
        files=await _create(store, write_file_listing(files)),
        pages=(await _create(store, write_page_manifest(pages)),),
        boot=await _create(store, write_page_manifest(r for r in pages if r.path.startswith(boot)))
        if boot
        else None,
        backup_label=None,
        tablespaces=(),
        settings=(),
        parent=None,
        bytes=sum(row.size for row in files),
    )


def _walk(directory: Path, left_out: frozenset[str]) -> list[str]:
    found = []
    for parent, names, files in os.walk(directory):
        at = os.path.relpath(parent, directory)
        prefix = "" if at == "." else f"{at}/"
        names[:] = [name for name in names if prefix + name not in left_out]
        found += [prefix + name for name in (*names, *files) if prefix + name not in left_out]
    return found


class _Packs:
    """Fills packs one after the other."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._builder = PackBuilder(STORE_ID, EXTENTS)
        self._number = 0
        self._ids: list[str] = []

    async def add(self, path: str, data: bytes) -> AsyncIterator[PageRow]:
        """The rows of one file; their pack is a number until ``resolved``."""
        for group in range(-(-len(data) // GROUP_BYTES)):
            raw = data[group * GROUP_BYTES : (group + 1) * GROUP_BYTES]
            if not raw.strip(b"\0"):
                continue
            if self._builder.full:
                await self.finish()
            stored, digest = encode_extent(raw)
            offset = self._builder.add(stored)
            yield PageRow(path, group, ExtentRef(0, len(raw), str(self._number), offset, len(stored), digest))

    async def finish(self) -> None:
        """Upload the present pack."""
        pack, content = self._builder.finish()
        await self._store.create(keys.pack(pack), content)
        self._ids.append(pack)
        self._number += 1
        self._builder = PackBuilder(STORE_ID, EXTENTS)

    def resolved(self, row: PageRow) -> PageRow:
        """The row with the id of its pack."""
        e = row.extent
        pack = self._ids[int(e.pack)]
        return PageRow(
            row.path,
            row.group,
            ExtentRef(e.first_block, e.raw_bytes, pack, e.offset, e.stored_bytes, e.digest),
        )


async def _create(store: Store, written: tuple[bytes, ManifestRef]) -> ManifestRef:
    data, ref = written
    await store.create(keys.manifest(ref.digest), data)
    return ref
