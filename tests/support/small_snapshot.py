"""A snapshot of one small file, through the formats alone, for tests that care about which objects there are."""

from __future__ import annotations

from tests.support.archived_wal import FIRST, Archive
from timeline.format import keys
from timeline.format.branch_state import BUILT, Snapshot
from timeline.format.extent import ExtentRef, encode_extent
from timeline.format.file_listing import write_file_listing
from timeline.format.log_change import AddSnapshot
from timeline.format.manifest import FileRow, ManifestRef, PageRow
from timeline.format.pack import EXTENTS, PackBuilder
from timeline.format.page_manifest import write_page_manifest
from timeline.lsn import Lsn


async def put_snapshot(
    archive: Archive,
    name: str,
    *,
    after: Snapshot | None = None,
    began: int | None = None,
    commit: bool = True,
) -> Snapshot:
    """Pack, manifests and, where wanted, the log entry; ``after``: name the older snapshot's pages as well."""
    stored, digest = encode_extent(name.encode() * 100)
    builder = PackBuilder(archive.store_id, EXTENTS, nonce=archive.clock.token(16))
    offset = builder.add(stored)
    pack, data = builder.finish()
    assert await archive.store.create(keys.pack(pack), data)
    row = PageRow("f", 0, ExtentRef(0, 100 * len(name), pack, offset, len(stored), digest))
    pages = await _put(archive, write_page_manifest([row], nonce=archive.clock.token(16)))
    files = [FileRow("f", "f", row.extent.raw_bytes, 0o600, None, None, Lsn(0))]
    listing = await _put(archive, write_file_listing(files, nonce=archive.clock.token(16)))
    snapshot = Snapshot(
        id=name,
        kind=BUILT,
        tli=1,
        lsn=FIRST,
        checkpoint=FIRST,
        end=FIRST,
        time=archive.clock.now(),
        files=listing,
        pages=(*(after.pages if after is not None else ()), pages),
        boot=None,
        backup_label=None,
        tablespaces=(),
        settings=(),
        parent=None,
        bytes=row.extent.raw_bytes,
    )
    if commit:
        await archive.log.append(AddSnapshot(snapshot, began))
    return snapshot


async def _put(archive: Archive, written: tuple[bytes, ManifestRef]) -> ManifestRef:
    data, ref = written
    assert await archive.store.create(keys.manifest(ref.digest), data)
    return ref
