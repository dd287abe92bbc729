"""Whether all WAL is there: sealed ranges by their manifests, the rest by the headers of the chunks.

A chain of chunks that breaks off with chunks beyond it may be an archiver at work, or one that was killed: it
uploads several chunks at once, and acknowledges none before all below it are there. So a break is damage only
where something proves that the chain once reached further: what the log says, or more chunks beyond the
break than an archiver has under way.
"""

from __future__ import annotations

import asyncio
import bisect
from collections.abc import Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

import numpy as np

from timeline.catalog.parallel import in_parallel
from timeline.catalog.tail import TailChunk
from timeline.errors import DamagedStore, NotFound
from timeline.format import keys
from timeline.format.branch_state import BUILT, BranchState, SealedRange, Tli
from timeline.format.chunk import HEADER_READ_BYTES, decode_layout
from timeline.format.needed_wal import needed_wal
from timeline.format.parquet_file import WAL
from timeline.format.wal_frame import WAL_FRAME_MAX_BYTES
from timeline.lsn import Lsn
from timeline.maintain.lost_ranges import Interval, merged, without
from timeline.maintain.manifest_scan import scan_manifest
from timeline.maintain.pack_set import Indexes, PackSet
from timeline.maintain.verify_report import Fault, LsnRange, Problem
from timeline.store.base import Listed, Store

FRAME_COLUMNS = ("tli", "start", "end", "pack", "offset", "stored_bytes")
UNDER_WAY = 16
"""An archiver has fewer chunks under way at once: four, unless somebody changes it."""
_READS = 32
"""Chunk headers read at once."""
_MANIFESTS = 4
"""WAL manifests read at once."""


@dataclass(frozen=True, slots=True)
class TliChunks:
    """The unsealed WAL of one tli."""

    chunks: tuple[TailChunk, ...]
    """Intact headers of what is on the chain, also behind holes."""
    problems: tuple[Problem, ...]
    doubts: tuple[str, ...]
    """Breaks that need not be damage."""


@dataclass(slots=True)
class SealedWal:
    """What the WAL manifests gave."""

    manifests: int = 0
    manifest_bytes: int = 0
    problems: list[Problem] = field(default_factory=list)
    packs_of: dict[str, Indexes] = field(default_factory=dict)
    """By manifest: the packs it names."""


async def check_sealed(store: Store, state: BranchState, packs: PackSet, sizes: dict[str, int]) -> SealedWal:
    """Every WAL manifest of the log: intact, its frames without holes, its packs noted in ``packs``.

    ``sizes``: of the manifests in the store, by digest. Raises Unavailable, UnknownFeature.
    """
    found = SealedWal()
    found.problems += _holes_between(state)

    async def check(sealed: SealedRange) -> None:
        hole = (LsnRange(sealed.tli, sealed.start, sealed.end),)
        key = keys.manifest(sealed.manifest.digest)
        try:
            check_size(key, sealed.manifest.size, sizes.get(sealed.manifest.digest))
            found.packs_of[sealed.manifest.digest] = await _check_frames(store, sealed, packs)
        except DamagedStore as error:
            found.problems.append(problem_of(error, holes=hole))
        except NotFound as error:
            found.problems.append(Problem(Fault.MISSING, error.key, 0, "object is missing", hole))
        else:
            found.manifests += 1
            found.manifest_bytes += sealed.manifest.size

    await in_parallel(state.sealed, check, limit=_MANIFESTS)
    return found


async def check_chunks(store: Store, state: BranchState, tli: Tli) -> TliChunks:
    """The chain of a tli; raises NotFound when a chunk vanished since it was listed."""
    start = state.after_gap(tli.tli, tli.sealed)
    listed = await store.list(
        keys.chunk_prefix(state.branch, tli.tli),
        after=keys.chunk(state.branch, tli.tli, start - 1) if start else "",
    )
    listed = [item for item in listed if keys.parse_chunk(item.key) is not None]
    systems = frozenset(incarnation.system_identifier for incarnation in state.incarnations)
    read = await in_parallel(listed, lambda item: _read_header(store, systems, item), limit=_READS)
    intact = {chunk.start: chunk for chunk in read if isinstance(chunk, TailChunk)}
    damaged = {
        named.start: error
        for item, error in zip(listed, read, strict=True)
        if isinstance(error, DamagedStore) and (named := keys.parse_chunk(item.key)) is not None
    }
    return _follow(state, tli, start, intact, damaged)


def problem_of(
    error: DamagedStore,
    *,
    holes: tuple[LsnRange, ...] = (),
    snapshots: tuple[str, ...] = (),
    unusable: bool = False,
) -> Problem:
    """A codec's complaint as a problem."""
    return Problem(
        Fault.CORRUPT,
        error.key,
        error.offset,
        error.expectation,
        holes=holes,
        snapshots=snapshots,
        snapshots_unusable=unusable,
    )


def check_size(key: str, expected: int, found: int | None) -> None:
    """Raises NotFound for an object that was not listed, DamagedStore for one of another size."""
    if found is None:
        raise NotFound(key)
    if found != expected:
        raise DamagedStore(
            key, min(found, expected), f"expected an object of {expected} bytes, found {found}"
        )


def wal_intervals(state: BranchState, chunks: Iterable[TailChunk], tli: int) -> list[Interval]:
    """The WAL of a tli that the log and its chunks account for."""
    parts = [(int(part.start), int(part.end)) for part in state.sealed if part.tli == tli]
    return merged([*parts, *((int(chunk.start), int(chunk.end)) for chunk in chunks)])


async def frame_holes(
    store: Store, state: BranchState, packs: dict[str, int | frozenset[int]]
) -> dict[tuple[str, int], tuple[LsnRange, ...]]:
    """The WAL in damaged packs, by pack and offset of the damage.

    ``packs``: for each damaged pack the offsets of its damaged frames, or the size at which it ends. WAL manifests
    that cannot be read are passed over; they have been reported.
    """
    found: dict[tuple[str, int], list[LsnRange]] = {}
    for sealed in state.sealed:
        try:
            async with aclosing(scan_manifest(store, WAL, sealed.manifest, FRAME_COLUMNS)) as parts:
                async for rows in parts:
                    table = rows.table
                    names = table.column("pack").to_pylist()
                    ends = (
                        table.column("offset").to_numpy().astype(np.int64)
                        + table.column("stored_bytes").to_numpy()
                    )
                    for number, name in enumerate(names):
                        bad = packs.get(name)
                        if bad is None:
                            continue
                        offset = int(table.column("offset")[number].as_py())
                        if isinstance(bad, int):
                            if ends[number] <= bad:
                                continue
                            place = (name, bad)
                        elif offset in bad:
                            place = (name, offset)
                        else:
                            continue
                        hole = LsnRange(
                            sealed.tli,
                            Lsn(table.column("start")[number].as_py()),
                            Lsn(table.column("end")[number].as_py()),
                        )
                        found.setdefault(place, []).append(hole)
        except (DamagedStore, NotFound):
            continue
    return {place: joined(holes) for place, holes in found.items()}


def joined(holes: Sequence[LsnRange]) -> tuple[LsnRange, ...]:
    """Adjoining holes of a tli as one."""
    return tuple(
        LsnRange(tli, Lsn(start), Lsn(end))
        for tli in sorted({hole.tli for hole in holes})
        for start, end in merged((hole.start, hole.end) for hole in holes if hole.tli == tli)
    )


async def _check_frames(store: Store, sealed: SealedRange, packs: PackSet) -> Indexes:
    key = keys.manifest(sealed.manifest.digest)
    position = int(sealed.start)
    numbers: list[Indexes] = []
    async with aclosing(scan_manifest(store, WAL, sealed.manifest, FRAME_COLUMNS)) as parts:
        async for rows in parts:
            table = rows.table
            start = table.column("start").to_numpy()
            end = table.column("end").to_numpy()
            follows = np.concatenate((np.array([position], np.uint64), end[:-1])) == start
            wrong = np.flatnonzero(~follows | (end <= start) | (table.column("tli").to_numpy() != sealed.tli))
            if len(wrong):
                at = Lsn(int(start[wrong[0]]))
                raise DamagedStore(
                    key, rows.offset, f"expected frames of tli {sealed.tli} without holes, not one at {at}"
                )
            if (end - start > WAL_FRAME_MAX_BYTES).any():
                raise DamagedStore(
                    key, rows.offset, f"expected frames of at most {WAL_FRAME_MAX_BYTES} bytes"
                )
            column = table.column("pack").combine_chunks().dictionary_encode()
            names = column.dictionary.to_pylist()
            numbers.append(packs.find(names))
            packs.add_rows(
                names,
                column.indices.to_numpy(),
                table.column("offset").to_numpy(),
                table.column("stored_bytes").to_numpy(),
            )
            position = int(end[-1]) if len(end) else position
    if position != sealed.end:
        raise DamagedStore(key, 0, f"expected frames up to {sealed.end}, found them up to {Lsn(position)}")
    distinct = np.unique(np.concatenate(numbers)) if numbers else np.empty(0, np.int64)
    return distinct[distinct >= 0]


def _holes_between(state: BranchState) -> list[Problem]:
    """What no writer leaves between the sealed ranges of the log itself: overlaps, and holes in WAL that a snapshot
    needs. Other holes are WAL that was forgotten [LOG-8], [LOG-9]."""
    found = []
    needed = needed_wal(state)
    for tli in state.tlis:
        position = tli.start
        gaps = [(int(gap.start), int(gap.end)) for gap in state.gaps if gap.tli == tli.tli]
        ranges = sorted((part for part in state.sealed if part.tli == tli.tli), key=lambda part: part.start)
        for part in ranges:
            position = state.after_gap(tli.tli, position)
            key = keys.manifest(part.manifest.digest)
            if part.start < position:
                expected = f"expected a sealed range of tli {tli.tli} at {position}, the next one starts at {part.start}"
                found.append(Problem(Fault.CONTRADICTION, key, 0, expected))
            spans = [
                (max(span.start, position), part.start if span.end is None else min(span.end, part.start))
                for span in needed
                if span.tli == tli.tli
            ]
            for start, end in without(spans, gaps):
                hole = LsnRange(tli.tli, Lsn(start), Lsn(end))
                expected = (
                    f"expected a sealed range of tli {tli.tli} with {hole.start}, which a snapshot needs"
                )
                found.append(Problem(Fault.CONTRADICTION, key, 0, expected, (hole,)))
            position = part.end
    return found


async def _read_header(store: Store, systems: frozenset[int], listed: Listed) -> TailChunk | DamagedStore:
    key = listed.key
    try:
        data = await store.get(key, 0, min(listed.size, HEADER_READ_BYTES))
        layout = await asyncio.to_thread(decode_layout, data, key)
        if layout.size != listed.size:
            end = min(layout.size, listed.size)
            raise DamagedStore(key, end, f"expected an object of {layout.size} bytes, found {listed.size}")
        if layout.header.system_identifier not in systems:
            raise DamagedStore(
                key, 0, f"expected WAL of this cluster, found {layout.header.system_identifier}"
            )
    except DamagedStore as error:
        return error
    return TailChunk(layout, key, None)


def _follow(
    state: BranchState, tli: Tli, start: Lsn, intact: dict[Lsn, TailChunk], damaged: dict[Lsn, DamagedStore]
) -> TliChunks:
    chain: list[TailChunk] = []
    problems: list[Problem] = []
    doubts: list[str] = []
    position = start
    starts = sorted({*intact, *damaged})
    reached = _proven_end(state, tli)
    while True:
        if position in intact:
            chain.append(intact[position])
            position = state.after_gap(tli.tli, intact[position].end)
            continue
        beyond = starts[bisect.bisect_right(starts, position) :]
        if position in damaged:
            # Its end is in its header; the next chunk tells as well.
            end = beyond[0] if beyond else max(reached, Lsn(position + 1))
            problems.append(problem_of(damaged[position], holes=(LsnRange(tli.tli, position, end),)))
        elif reached > position or len(beyond) >= UNDER_WAY:
            end = beyond[0] if beyond else reached
            problems.append(
                Problem(
                    Fault.MISSING,
                    keys.chunk(state.branch, tli.tli, position),
                    0,
                    f"object is missing: the WAL of tli {tli.tli} goes on at {position}, which once was in the store",
                    (LsnRange(tli.tli, position, end),),
                )
            )
        else:
            if beyond:
                doubts.append(
                    f"tli {tli.tli}: no chunk starts at {position}, where the known WAL ends, but {len(beyond)} do "
                    f"beyond, from {beyond[0]} on: uploads under way or broken off, which the archiver makes good"
                )
            return TliChunks(tuple(chain), tuple(problems), tuple(doubts))
        if not beyond:
            return TliChunks(tuple(chain), tuple(problems), tuple(doubts))
        position = beyond[0]


def _proven_end(state: BranchState, tli: Tli) -> Lsn:
    """Up to where the log proves that the WAL of a tli was in the store."""
    proven = [tli.sealed]
    if tli.end is not None and state.after_gap(tli.tli, tli.sealed) < tli.end:
        proven.append(tli.end)
    if state.coverage is not None and state.coverage.tli == tli.tli:
        proven.append(state.coverage.lsn)
    proven += [gap.start for gap in state.gaps if gap.tli == tli.tli]
    proven += [one.end for one in state.snapshots if one.kind == BUILT and one.tli == tli.tli]
    return max(proven)
