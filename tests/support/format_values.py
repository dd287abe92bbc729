"""Hypothesis strategies for every value of the format, and small hand-made ones."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from timeline.format import branch_state, log, log_change
from timeline.format.extent import BLOCK_BYTES, GROUP_BLOCKS, ExtentRef
from timeline.format.manifest import FileRow, ManifestRef, PageRow, WalFrame
from timeline.format.mark import Garbage, MarkObject, VoidChunks, VoidEntries
from timeline.format.meta import StoreMeta
from timeline.format.pin import Pin
from timeline.format.wal_index import (
    COMMIT_DTYPE,
    TOUCH_DTYPE,
    CommitArray,
    Coverage,
    EventKind,
    TouchArray,
    WalEvent,
    WalIndex,
)
from timeline.lsn import Lsn

T = TypeVar("T")


def _some(items: st.SearchStrategy[T], max_size: int = 3) -> st.SearchStrategy[tuple[T, ...]]:
    return st.lists(items, max_size=max_size).map(tuple)


u32 = st.integers(0, (1 << 32) - 1)
lsns = st.integers(0, (1 << 64) - 1).map(Lsn)
micros = st.integers(-(1 << 63), (1 << 63) - 1)
counts = st.integers(0, 1 << 40)
tlis = st.integers(1, (1 << 31) - 1)
names = st.text(max_size=20)
hexes = st.binary(min_size=32, max_size=32).map(bytes.hex)
digests = st.binary(min_size=32, max_size=32)
branches = st.sampled_from(["main", "b-1"])

coverages = st.builds(Coverage, tli=tlis, lsn=lsns, time=micros)
manifest_refs = st.builds(
    ManifestRef,
    digest=hexes,
    size=counts,
    rows=counts,
    footer_bytes=counts,
    footer_digest=hexes,
    lsn=st.none() | lsns,
)
metas = st.builds(
    StoreMeta,
    store_id=hexes,
    format_version=st.just(1),
    read_features=st.just(()),
    write_features=_some(names),
    key_id=st.none(),
    created=micros,
    digest_kind=st.just("blake3"),
)

incarnations = st.builds(
    branch_state.Incarnation,
    system_identifier=st.integers(0, (1 << 64) - 1),
    major=counts,
    version_num=counts,
    architecture=names,
    block_bytes=counts,
    segment_bytes=counts,
    relation_segment_bytes=counts,
    catalog_version=counts,
    control_version=counts,
    libc_version=st.none() | names,
    icu_version=st.none() | names,
    superuser=names,
    data_checksums=st.booleans(),
    from_lsn=lsns,
    to_lsn=st.none() | lsns,
)
tli_values = st.builds(
    branch_state.Tli,
    tli=tlis,
    parent=st.none() | tlis,
    start=lsns,
    sealed=lsns,
    end=st.none() | lsns,
    history=st.none() | names,
)
sealed_ranges = st.builds(
    branch_state.SealedRange,
    tli=tlis,
    start=lsns,
    end=lsns,
    manifest=manifest_refs,
    min_commit_time=st.none() | micros,
    max_commit_time=st.none() | micros,
    commits=counts,
)
snapshots = st.builds(
    branch_state.Snapshot,
    id=names,
    kind=st.sampled_from([branch_state.BASE, branch_state.BUILT]),
    tli=tlis,
    lsn=lsns,
    checkpoint=lsns,
    end=lsns,
    time=micros,
    files=manifest_refs,
    pages=_some(manifest_refs),
    boot=st.none() | manifest_refs,
    backup_label=st.none() | names,
    tablespaces=_some(st.builds(branch_state.Tablespace, oid=u32, source_path=names)),
    settings=_some(st.builds(branch_state.Setting, name=names, value=names)),
    parent=st.none() | names,
    bytes=counts,
    checksum_failures=counts,
)
gaps = st.builds(branch_state.Gap, tli=tlis, start=lsns, end=lsns, reason=names)
progresses = st.builds(
    branch_state.BackupProgress, id=names, manifests=_some(manifest_refs), bytes=counts, at=micros
)

numbers = st.none() | counts
collections = st.builds(
    branch_state.Collection,
    mark=st.none() | st.builds(branch_state.OpenMark, id=names, head=counts, at=micros),
    collected=counts,
    last=st.none() | names,
)
pins = st.builds(
    Pin,
    id=st.binary(min_size=16, max_size=16).map(bytes.hex),
    branch=branches,
    snapshot=snapshots,
    until=micros,
    created=micros,
    host=names,
    sealed=_some(sealed_ranges),
)
marks = st.builds(
    MarkObject,
    id=st.binary(min_size=16, max_size=16).map(bytes.hex),
    branch=branches,
    head=counts,
    at=micros,
    garbage=st.lists(st.builds(Garbage, key=names, size=counts), max_size=3).map(tuple),
    chunks=_some(st.builds(VoidChunks, tli=tlis, below=lsns, objects=counts, bytes=counts)),
    entries=st.builds(VoidEntries, below=counts, objects=counts, bytes=counts),
)


def states(branch: str) -> st.SearchStrategy[branch_state.BranchState]:
    """States of that branch; not necessarily ones that changes could lead to."""
    return st.builds(
        branch_state.BranchState,
        branch=st.just(branch),
        epoch=counts,
        incarnations=_some(incarnations),
        tlis=_some(tli_values),
        current_tli=tlis,
        sealed=_some(sealed_ranges),
        snapshots=_some(snapshots, 2),
        gaps=_some(gaps),
        coverage=st.none() | coverages,
        progress=st.none() | progresses,
        collection=collections,
    )


changes: st.SearchStrategy[log_change.Change] = st.one_of(
    st.builds(log_change.ClaimEpoch, epoch=counts),
    st.builds(log_change.Begin, incarnation=incarnations, tli=tli_values),
    st.builds(log_change.SwitchTli, closed=tlis, end=lsns, opened=tli_values),
    st.builds(log_change.Seal, sealed=sealed_ranges, coverage=st.none() | coverages, began=numbers),
    st.builds(log_change.AddSnapshot, snapshot=snapshots, began=numbers),
    st.builds(log_change.RecordProgress, progress=st.none() | progresses, began=numbers),
    st.builds(log_change.Cover, coverage=coverages),
    st.builds(log_change.RecordGap, gap=gaps),
    st.builds(log_change.DropSnapshots, ids=_some(st.text(max_size=8), 2)),
    st.builds(
        log_change.ForgetWal, ranges=_some(st.builds(log_change.Forgotten, tli=tlis, below=lsns, start=lsns))
    ),
    st.builds(log_change.MergeSealed, merged=sealed_ranges, began=numbers),
    st.builds(log_change.Mark, id=names, head=counts, at=micros, after=st.none() | names),
    st.builds(log_change.Collect, id=names),
)


def entries(branch: str = "main") -> st.SearchStrategy[log.LogEntry]:
    """Entries with their state."""
    return st.builds(
        log.LogEntry,
        number=st.integers(0, 10**12),
        branch=st.just(branch),
        writer=names,
        nonce=names,
        epoch=counts,
        at=micros,
        change=changes,
        state=states(branch),
    )


def _records(dtype: np.dtype[np.void]) -> st.SearchStrategy[npt.NDArray[np.void]]:
    limits = {
        name: (np.iinfo(dtype[name].base).min, np.iinfo(dtype[name].base).max)
        for name in dtype.names or ()
        if name != "pad"
    }
    row = st.tuples(*(st.integers(int(low), int(high)) for low, high in limits.values()))

    def build(rows: list[tuple[int, ...]]) -> npt.NDArray[np.void]:
        array = np.zeros(len(rows), dtype)
        for number, name in enumerate(limits):
            array[name] = [row[number] for row in rows]
        return array

    return st.lists(row, max_size=4).map(build)


commit_arrays: st.SearchStrategy[CommitArray] = _records(COMMIT_DTYPE)
touch_arrays: st.SearchStrategy[TouchArray] = _records(TOUCH_DTYPE)
events = st.builds(
    WalEvent,
    kind=st.sampled_from(EventKind),
    start=lsns,
    end=lsns,
    time=st.none() | micros,
    name=st.none() | names,
    values=_some(st.tuples(names, micros)),
)
indexes = st.builds(
    WalIndex,
    last_record=lsns,
    last_record_end=lsns,
    pending=lsns,
    records=counts,
    commits=commit_arrays,
    events=_some(events),
    touches=touch_arrays,
)


def same_index(one: WalIndex, two: WalIndex) -> bool:
    """Equality, which dataclasses of arrays do not have."""
    return _fields(one) == _fields(two)


def same_frame(one: WalFrame, two: WalFrame) -> bool:
    """As ``same_index``."""
    return _fields(one) == _fields(two)


def _fields(value: Any) -> list[object]:
    fields = [getattr(value, name) for name in type(value).__slots__]
    return [item.tobytes() if isinstance(item, np.ndarray) else item for item in fields]


@st.composite
def wal_frames(draw: st.DrawFn) -> tuple[WalFrame, ...]:
    """Frames of one tli that follow one another."""
    tli = draw(tlis)
    cuts = sorted(draw(st.lists(st.integers(0, (1 << 64) - 1), min_size=1, max_size=5, unique=True)))
    return tuple(
        WalFrame(
            tli=tli,
            start=Lsn(start),
            end=Lsn(end),
            pack=draw(hexes),
            offset=draw(u32),
            stored_bytes=draw(u32),
            digest=draw(digests),
            last_record=index.last_record,
            last_record_end=index.last_record_end,
            pending=index.pending,
            records=index.records,
            commits=index.commits,
            events=index.events,
            touches=index.touches,
        )
        for start, end in pairwise(cuts)
        for index in [draw(indexes)]
    )


_segments = st.text(st.characters(codec="utf-8", exclude_characters="/"), min_size=1, max_size=6).filter(
    lambda text: text not in (".", "..")
)
paths = st.lists(_segments, min_size=1, max_size=3).map("/".join)


@st.composite
def page_rows(draw: st.DrawFn, max_size: int = 20) -> list[PageRow]:
    """Rows in order, without overlaps."""
    keys = draw(st.sets(st.tuples(paths, st.integers(0, (1 << 32) - 1)), max_size=max_size))
    rows = []
    for path, group in sorted(keys):
        block = 0
        while block < GROUP_BLOCKS:
            first = draw(st.integers(block, GROUP_BLOCKS - 1))
            blocks = draw(st.integers(1, GROUP_BLOCKS - first))
            short = draw(st.integers(0, BLOCK_BYTES - 1))
            extent = ExtentRef(
                first_block=first,
                raw_bytes=blocks * BLOCK_BYTES - short,
                pack=draw(st.sampled_from(["aa" * 32, "bb" * 32])),
                offset=draw(u32),
                stored_bytes=draw(u32),
                digest=draw(digests),
            )
            rows.append(PageRow(path, group, extent))
            block = first + blocks + draw(st.integers(0, 8))
    return rows


@st.composite
def file_rows(draw: st.DrawFn) -> list[FileRow]:
    """Rows of different paths, in no order."""
    return [
        FileRow(
            path=path,
            kind=draw(st.sampled_from("fdl")),
            size=draw(counts),
            mode=draw(st.integers(0, 0o7777)),
            content=draw(st.none() | st.binary(max_size=30)),
            target=draw(st.none() | names),
            born=draw(lsns),
        )
        for path in draw(st.lists(paths, unique=True, max_size=12))
    ]
