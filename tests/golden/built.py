"""Built snapshots as the builder writes them, made from the codecs alone.

A listing of its own, a delta manifest with the snapshot's LSN, the boot set stored together once more, a pg_control
that names the checkpoint to be planted ([REC-8]); and a few deltas folded into one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from tests.support.handmade_store import INLINE_BYTES, STORE_ID, HandmadeStore, nonce, order_of
from timeline.format import branch_state, log_change
from timeline.format.extent import BLOCK_BYTES, GROUP_BLOCKS, GROUP_BYTES, ExtentRef, encode_extent
from timeline.format.file_listing import read_file_listing, write_file_listing
from timeline.format.manifest import FileRow, ManifestRef, PageRow
from timeline.format.pack import EXTENTS, PackBuilder
from timeline.format.page_manifest import read_page_rows, write_page_manifest
from timeline.lsn import Lsn
from timeline.pg.control import CONTROL_FILE, parse_control
from timeline.pg.redo_point import checkpoint_place, redo_point_control

Place = tuple[str, int]
"""(path, group)."""


@dataclass(frozen=True, slots=True)
class Changed:
    """A file that is not what it was in the parent."""

    path: str
    content: bytes
    """All of it."""
    runs: tuple[tuple[int, int], ...] | None
    """(first block, blocks) of what changed, none over the end of a group; ``None``: the file was made anew."""


@dataclass(frozen=True, slots=True)
class Step:
    """What the WAL between a snapshot and its parent did."""

    id: str
    tli: int
    lsn: Lsn
    changed: tuple[Changed, ...]
    removed: tuple[str, ...] = ()
    directories: tuple[str, ...] = ()
    """New ones."""
    tablespaces: tuple[branch_state.Tablespace, ...] = ()
    """New ones."""
    folded: bool = False
    """Its deltas are put together."""


def add_built(
    store: HandmadeStore,
    parent: branch_state.Snapshot,
    step: Step,
    contents: Mapping[str, bytes],
    boot: Sequence[Place],
    image: bytes,
) -> branch_state.Snapshot:
    """The snapshot, committed. ``contents``: of all files that are stored in extents; ``image``: pg_control of a
    server that was promoted behind the snapshot and shut down."""
    began = store.head
    rows = _listing(store, parent, step, image)
    files = store.put_manifest(
        write_file_listing(sorted(rows.values(), key=lambda row: row.path), nonce=nonce())
    )
    places = [place for place in boot if place[0] in rows]
    stored = [
        (changed.path, first // GROUP_BLOCKS, first % GROUP_BLOCKS, count)
        for changed in step.changed
        if rows[changed.path].content is None
        for first, count in _runs(changed)
        if (changed.path, first // GROUP_BLOCKS) not in places
    ]
    boot_rows = _store(store, [(path, group, 0, GROUP_BLOCKS) for path, group in places], contents)
    delta = sorted([*_store(store, stored, contents), *boot_rows], key=order_of)
    pages = (*parent.pages, _manifest(store, delta, step.lsn))
    if step.folded:
        pages = (pages[0], _fold(store, pages[1:], rows))
    spaces = {space.oid: space for space in (*parent.tablespaces, *step.tablespaces)}
    snapshot = branch_state.Snapshot(
        id=step.id,
        kind=branch_state.BUILT,
        tli=step.tli,
        lsn=step.lsn,
        checkpoint=checkpoint_place(step.lsn),
        end=step.lsn,
        time=parent.time + 1_000_000,
        files=files,
        pages=pages,
        boot=_manifest(store, boot_rows, None),
        backup_label=None,
        tablespaces=tuple(spaces[oid] for oid in sorted(spaces)),
        settings=parent.settings,
        parent=parent.id,
        bytes=sum(row.size for row in rows.values() if row.kind == "f"),
    )
    store.append(log_change.AddSnapshot(snapshot, began))
    return snapshot


def _listing(
    store: HandmadeStore, parent: branch_state.Snapshot, step: Step, image: bytes
) -> dict[str, FileRow]:
    listing = read_file_listing(store.get_manifest(parent.files), parent.files)
    rows = {row.path: row for row in listing if row.path not in step.removed}
    for path in step.directories:
        rows[path] = FileRow(path, "d", 0, 0o700, None, None, step.lsn)
    for changed in step.changed:
        inline = len(changed.content) <= INLINE_BYTES
        rows[changed.path] = FileRow(
            path=changed.path,
            kind="f",
            size=len(changed.content),
            mode=0o600,
            content=changed.content if inline else None,
            target=None,
            born=step.lsn if changed.runs is None or inline else rows[changed.path].born,
        )
    known = rows[CONTROL_FILE]
    assert known.content is not None
    before = parse_control(known.content)
    control = redo_point_control(
        image,
        step.lsn,
        tli=step.tli,
        parameters=before.parameters,
        full_page_writes=before.checkpoint.full_page_writes,
    )
    rows[CONTROL_FILE] = replace(known, content=control, born=step.lsn)
    return rows


def _runs(changed: Changed) -> Sequence[tuple[int, int]]:
    if changed.runs is not None:
        return changed.runs
    blocks = -(-len(changed.content) // BLOCK_BYTES)
    return [(first, min(GROUP_BLOCKS, blocks - first)) for first in range(0, blocks, GROUP_BLOCKS)]


def _store(
    store: HandmadeStore, runs: Sequence[tuple[str, int, int, int]], contents: Mapping[str, bytes]
) -> list[PageRow]:
    """(path, group, first block inside it, blocks) as extents of one pack."""
    if not runs:
        return []
    builder = PackBuilder(STORE_ID, EXTENTS, nonce=nonce())
    rows = []
    for path, group, first, count in runs:
        at = group * GROUP_BYTES + first * BLOCK_BYTES
        raw = contents[path][at : at + count * BLOCK_BYTES]
        stored, digest = encode_extent(raw)
        extent = ExtentRef(first, len(raw), "", builder.add(stored), len(stored), digest)
        rows.append(PageRow(path, group, extent))
    pack = store.put_pack(builder)
    return [replace(row, extent=replace(row.extent, pack=pack)) for row in rows]


def _manifest(store: HandmadeStore, rows: Sequence[PageRow], lsn: Lsn | None) -> ManifestRef:
    return replace(store.put_manifest(write_page_manifest(rows, nonce=nonce())), lsn=lsn)


def _fold(store: HandmadeStore, deltas: Sequence[ManifestRef], files: Mapping[str, FileRow]) -> ManifestRef:
    """One manifest in place of several; extents that a later one hides, and what is of another file, stay out."""
    kept: dict[Place, list[PageRow]] = {}
    for ref in deltas:
        assert ref.lsn is not None
        for row in read_page_rows(store.get_manifest(ref), ref):
            found = files.get(row.path)
            if found is None or ref.lsn < found.born:
                continue
            others = kept.get((row.path, row.group), [])
            over = [other for other in others if _blocks(other) & _blocks(row)]
            if any(_blocks(other) - _blocks(row) for other in over):
                raise ValueError(f"{row.path}: an extent is hidden in part and would have to be stored anew")
            kept[row.path, row.group] = [other for other in others if other not in over] + [row]
    rows = sorted((row for group in kept.values() for row in group), key=order_of)
    return _manifest(store, rows, deltas[-1].lsn)


def _blocks(row: PageRow) -> set[int]:
    return set(range(row.extent.first_block, row.extent.first_block + row.extent.blocks))
