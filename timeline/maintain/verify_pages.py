"""Whether snapshots are whole: listings and page manifests, and which blocks a damaged pack takes with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from timeline.catalog.line import incarnation_at
from timeline.errors import DamagedStore, NotFound
from timeline.format import keys
from timeline.format.branch_state import BASE, BranchState, Snapshot
from timeline.format.extent import BLOCK_BYTES, GROUP_BLOCKS
from timeline.format.manifest import ManifestRef
from timeline.format.parquet_file import FILES, PAGES
from timeline.maintain.manifest_rules import (
    FILE_COLUMNS,
    FILE_DICTIONARY,
    PAGE_COLUMNS,
    PAGE_DICTIONARY,
    ListingRules,
    check_page_rows,
)
from timeline.maintain.manifest_scan import scan_manifest
from timeline.maintain.pack_set import Indexes, PackSet
from timeline.maintain.verify_report import MAX_FILES, BlockRun, Fault, Problem
from timeline.maintain.verify_wal import check_size, problem_of
from timeline.store.base import Store

BadPacks = Mapping[str, int | frozenset[int]]
"""By pack: the size at which it ends, or the offsets of its damaged frames."""


@dataclass(frozen=True, slots=True)
class PageSource:
    """A page manifest, once, whoever names it."""

    ref: ManifestRef
    snapshots: tuple[str, ...]
    """Ids of the snapshots that name it; none: a backup under way."""
    needed: bool
    """Whether those snapshots are nothing without it; a boot set is only a hint [PAG-6]."""
    judged_below: int
    """Pages with an LSN below this must have a good checksum; 0: the source has no checksums."""
    relation_segment_bytes: int


@dataclass(slots=True)
class CheckedPages:
    """What the snapshots' manifests gave."""

    manifests: int = 0
    manifest_bytes: int = 0
    rows: int = 0
    problems: list[Problem] = field(default_factory=list)
    packs_of: dict[str, Indexes] = field(default_factory=dict)
    """By manifest: the packs it names."""


@dataclass(slots=True)
class Affected:
    """Who needs one damaged place in a pack."""

    snapshots: set[str] = field(default_factory=set)
    files: list[BlockRun] = field(default_factory=list)
    runs: int = 0


def page_sources(state: BranchState) -> tuple[PageSource, ...]:
    """The page manifests that a branch's log reaches, in the order of its snapshots.

    A page of a base backup whose LSN lies at or beyond the backup's start may be torn, for WAL mends it (EDGE 30).
    A built snapshot names base backups' pages beside its own, and its manifests do not tell which is which; so all
    its pages are judged as those of the oldest base backup would be.
    """
    bases = [snapshot.lsn for snapshot in state.snapshots if snapshot.kind == BASE]
    refs: dict[str, list[tuple[ManifestRef, str, bool, int, int]]] = {}
    for snapshot in state.snapshots:
        incarnation = incarnation_at(state, snapshot.lsn)
        limit = snapshot.lsn if snapshot.kind == BASE else min(bases, default=snapshot.lsn)
        for ref, needed in _refs(snapshot):
            refs.setdefault(ref.digest, []).append(
                (
                    ref,
                    snapshot.id,
                    needed,
                    int(limit) if incarnation.data_checksums else 0,
                    incarnation.relation_segment_bytes,
                )
            )
    for ref in state.progress.manifests if state.progress is not None else ():
        refs.setdefault(ref.digest, []).append((ref, "", False, 0, 1 << 30))
    return tuple(
        PageSource(
            ref=uses[0][0],
            snapshots=tuple(sorted({name for _, name, *_ in uses if name})),
            needed=any(needed for _, _, needed, *_ in uses),
            judged_below=min(limit for *_, limit, _ in uses),
            relation_segment_bytes=uses[0][4],
        )
        for uses in refs.values()
    )


async def check_pages(
    store: Store,
    sources: Sequence[PageSource],
    packs: PackSet,
    sizes: Mapping[str, int],
    report: Callable[[int], None],
) -> CheckedPages:
    """Every page manifest: intact and by the rules; its packs noted in ``packs``. ``report``: bytes as they are done.

    Raises Unavailable, UnknownFeature.
    """
    found = CheckedPages()
    for source in sources:
        key = keys.manifest(source.ref.digest)
        numbers: list[Indexes] = []
        try:
            check_size(key, source.ref.size, sizes.get(source.ref.digest))
            async with aclosing(
                scan_manifest(store, PAGES, source.ref, PAGE_COLUMNS, PAGE_DICTIONARY)
            ) as parts:
                async for part in parts:
                    check_page_rows(part.table, key, part.offset)
                    names, codes = _packs_of(part.table)
                    packs.add_rows(
                        names,
                        codes,
                        part.table.column("offset").to_numpy(),
                        part.table.column("stored_bytes").to_numpy(),
                    )
                    numbers.append(packs.find(names))
                    found.rows += part.table.num_rows
        except DamagedStore as error:
            found.problems.append(problem_of(error, snapshots=source.snapshots, unusable=source.needed))
        except NotFound as error:
            found.problems.append(_missing(error.key, source.snapshots, source.needed))
        else:
            found.manifests += 1
            found.manifest_bytes += source.ref.size
        if numbers:
            distinct = np.unique(np.concatenate(numbers))
            found.packs_of[source.ref.digest] = distinct[distinct >= 0]
        report(source.ref.size)
    return found


async def check_listings(
    store: Store, state: BranchState, sizes: Mapping[str, int], report: Callable[[int], None]
) -> CheckedPages:
    """Every file listing; as ``check_pages``."""
    found = CheckedPages()
    users: dict[ManifestRef, list[str]] = {}
    for snapshot in state.snapshots:
        users.setdefault(snapshot.files, []).append(snapshot.id)
    for ref, names in users.items():
        key = keys.manifest(ref.digest)
        rules = ListingRules(key)
        try:
            check_size(key, ref.size, sizes.get(ref.digest))
            async with aclosing(scan_manifest(store, FILES, ref, FILE_COLUMNS, FILE_DICTIONARY)) as parts:
                async for part in parts:
                    rules.feed(part.table, part.offset)
            rules.end()
        except DamagedStore as error:
            found.problems.append(problem_of(error, snapshots=tuple(names), unusable=True))
        except NotFound as error:
            found.problems.append(_missing(error.key, tuple(names), True))
        else:
            found.manifests += 1
            found.manifest_bytes += ref.size
        report(ref.size)
    return found


async def affected_blocks(
    store: Store, sources: Iterable[PageSource], bad: BadPacks
) -> dict[tuple[str, int], Affected]:
    """Who names what is damaged, by pack and place in it; what a newer manifest of the snapshot overrides is told
    too. Manifests that cannot be read are passed over; they have been reported."""
    found: dict[tuple[str, int], Affected] = {}
    for source in sources:
        try:
            async with aclosing(
                scan_manifest(store, PAGES, source.ref, PAGE_COLUMNS, PAGE_DICTIONARY)
            ) as parts:
                async for part in parts:
                    for place, rows in _bad_rows(part.table, bad):
                        _add(found.setdefault(place, Affected()), source, part.table, rows)
        except (DamagedStore, NotFound):
            continue
    return found


def _refs(snapshot: Snapshot) -> Iterable[tuple[ManifestRef, bool]]:
    yield from ((ref, True) for ref in snapshot.pages)
    if snapshot.boot is not None:
        yield snapshot.boot, False


def _missing(key: str, snapshots: tuple[str, ...], needed: bool) -> Problem:
    return Problem(Fault.MISSING, key, 0, "object is missing", snapshots=snapshots, snapshots_unusable=needed)


def _packs_of(table: Any) -> tuple[list[str], npt.NDArray[np.int64]]:
    column = table.column("pack").combine_chunks()
    return column.dictionary.to_pylist(), column.indices.to_numpy().astype(np.int64)


def _bad_rows(table: Any, bad: BadPacks) -> Iterable[tuple[tuple[str, int], npt.NDArray[np.int64]]]:
    """(place, rows) of a row group, for each damaged place that it names."""
    names, codes = _packs_of(table)
    for code, name in enumerate(names):
        what = bad.get(name)
        if what is None:
            continue
        rows = np.flatnonzero(codes == code)
        offsets = table.column("offset").to_numpy()[rows].astype(np.int64)
        if isinstance(what, int):
            ends = offsets + table.column("stored_bytes").to_numpy()[rows]
            rows = rows[ends > what]
            if len(rows):
                yield (name, what), rows
            continue
        for offset in sorted(what):
            hit = rows[offsets == offset]
            if len(hit):
                yield (name, offset), hit


def _add(affected: Affected, source: PageSource, table: Any, rows: npt.NDArray[np.int64]) -> None:
    affected.snapshots.update(source.snapshots)
    affected.runs += len(rows)
    for row in rows[: max(0, MAX_FILES - len(affected.files))].tolist():
        group = int(table.column("group")[row].as_py())
        raw = int(table.column("raw_bytes")[row].as_py())
        run = BlockRun(
            str(table.column("path")[row].as_py()),
            group * GROUP_BLOCKS + int(table.column("first_block")[row].as_py()),
            -(-raw // BLOCK_BYTES),
        )
        if run not in affected.files:
            affected.files.append(run)
        else:
            affected.runs -= 1
