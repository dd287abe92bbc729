"""WAL manifests: where sealed WAL is and what it holds (SPEC.md, [WMA-1] to [WMA-2]).

One row per frame, with native nested columns for commits, events and touched relations, so that any Parquet
tool can query the history without us.

A sealed range as sealing makes it has few frames and one row group, read whole. The manifest of a merged range
has row groups of at most GROUP_ROWS rows that say which WAL they tell of: a reader of one LSN takes the footer and
the group it needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from timeline.clock import Micros
from timeline.errors import DamagedStore
from timeline.format import keys
from timeline.format.digest import DIGEST_BYTES
from timeline.format.manifest import ManifestRef, WalFrame
from timeline.format.parquet_file import WAL, ParquetBuilder, ParquetFooter, read_whole, verify_manifest
from timeline.format.wal_index import COMMIT_DTYPE, TOUCH_DTYPE, EventKind, WalEvent
from timeline.format.wal_index_codec import event_kind, event_name
from timeline.lsn import Lsn

_TIME = pa.timestamp("us", tz="UTC")
_COMMIT = pa.struct(
    [
        pa.field("start", pa.uint64(), nullable=False),
        pa.field("end", pa.uint64(), nullable=False),
        pa.field("time", _TIME, nullable=False),
        pa.field("xid", pa.uint32(), nullable=False),
        pa.field("kind", pa.uint8(), nullable=False),
    ]
)
_VALUE = pa.struct(
    [pa.field("name", pa.string(), nullable=False), pa.field("value", pa.int64(), nullable=False)]
)
_EVENT = pa.struct(
    [
        pa.field("kind", pa.string(), nullable=False),
        pa.field("start", pa.uint64(), nullable=False),
        pa.field("end", pa.uint64(), nullable=False),
        pa.field("time", _TIME),
        pa.field("name", pa.string()),
        pa.field("values", pa.list_(pa.field("element", _VALUE, nullable=False)), nullable=False),
    ]
)
_TOUCH = pa.struct(
    [
        pa.field(name, pa.uint64() if name in ("first", "last") else pa.uint32(), nullable=False)
        for name in TOUCH_DTYPE.names or ()
    ]
)


def _list_of(item: Any) -> Any:
    return pa.list_(pa.field("element", item, nullable=False))


_SCHEMA = pa.schema(
    [
        pa.field("tli", pa.uint32(), nullable=False),
        pa.field("start", pa.uint64(), nullable=False),
        pa.field("end", pa.uint64(), nullable=False),
        pa.field("pack", pa.string(), nullable=False),
        pa.field("offset", pa.uint32(), nullable=False),
        pa.field("stored_bytes", pa.uint32(), nullable=False),
        pa.field("digest", pa.binary(DIGEST_BYTES), nullable=False),
        pa.field("last_record", pa.uint64(), nullable=False),
        pa.field("last_record_end", pa.uint64(), nullable=False),
        pa.field("pending", pa.uint64(), nullable=False),
        pa.field("records", pa.uint64(), nullable=False),
        pa.field("min_commit_time", _TIME),
        pa.field("max_commit_time", _TIME),
        pa.field("commits", _list_of(_COMMIT), nullable=False),
        pa.field("events", _list_of(_EVENT), nullable=False),
        pa.field("touches", _list_of(_TOUCH), nullable=False),
    ]
)


GROUP_ROWS = 64
"""Rows of a row group of a merged range: 256 MiB of WAL on a busy server."""


@dataclass(frozen=True, slots=True)
class WalGroup:
    """One row group, and what its rows hold, as far as the manifest says."""

    number: int
    offset: int
    """In the object."""
    length: int
    start: Lsn | None
    """``None`` in manifests that were not merged: nothing is known, and there is one group."""
    end: Lsn | None
    min_commit_time: Micros | None
    max_commit_time: Micros | None
    commits: int
    restore_points: int


class WalManifestFooter:
    """The verified footer of a WAL manifest: decodes row groups out of their bytes alone."""

    def __init__(self, ref: ManifestRef, footer: bytes | memoryview) -> None:
        """``footer``: the last ``ref.footer_bytes`` bytes. Raises DamagedStore, UnknownFeature."""
        self._footer = ParquetFooter(WAL, ref, footer)
        self._key = keys.manifest(ref.digest)
        self.groups = tuple(_group(number, entry) for number, entry in enumerate(self._footer.entries))

    def frames(self, number: int, data: bytes | memoryview) -> tuple[WalFrame, ...]:
        """The frames of one row group, in order, from its verified bytes; raises DamagedStore."""
        try:
            return _frames(self._footer.read(number, data), self._key)
        except ValueError as error:
            raise DamagedStore(self._key, 0, f"expected frames of WAL: {error}") from error

    def table(self, number: int, data: bytes | memoryview) -> Any:
        """The same as an Arrow table."""
        return self._footer.read(number, data)


class MergedManifest:
    """One WAL manifest of the rows of several, built group by group; holds its bytes and one group."""

    def __init__(self) -> None:
        self._builder = ParquetBuilder(
            WAL,
            _SCHEMA,
            dictionary=["pack"],
            compression={name: "none" if name == "digest" else "zstd" for name in _leaves(_SCHEMA)},
            encoding={},
            # They would be a quarter of the footer, which every reader takes, and we never read them.
            statistics=False,
        )
        self._waiting: list[Any] = []
        self._rows = 0

    def add(self, table: Any) -> None:
        """Rows of a row group of the next manifest, in WAL order."""
        while table.num_rows:
            taken = min(table.num_rows, GROUP_ROWS - self._rows)
            self._waiting.append(table.slice(0, taken))
            self._rows += taken
            table = table.slice(taken)
            if self._rows == GROUP_ROWS:
                self._write()

    def finish(self, nonce: str) -> tuple[bytes, ManifestRef]:
        """The object and the reference to it; ``nonce``: random hex [PAC-4]. Raises ValueError when it is longer
        than an object may be."""
        self._write()
        return self._builder.finish(nonce)

    def _write(self) -> None:
        if not self._waiting:
            return
        rows = pa.concat_tables(self._waiting).combine_chunks().cast(_SCHEMA)
        self._builder.write_row_group(rows, _bounds(rows))
        self._waiting = []
        self._rows = 0


def open_wal_manifest(data: bytes | memoryview, ref: ManifestRef) -> WalManifestFooter:
    """The footer of a whole manifest whose bytes are what the reference says; DamagedStore,
    UnknownFeature."""
    verify_manifest(WAL, ref, data)
    return WalManifestFooter(ref, memoryview(data)[ref.size - ref.footer_bytes :])


def _bounds(rows: Any) -> tuple[int | None, ...]:
    """As ``WalGroup``, from ``start`` on."""
    # Late: its import takes a tenth of a second, and who reads does without.
    import pyarrow.compute as pc

    # Not as datetimes: they would lose what lies outside the years 1 to 9999.
    earliest = pc.min(rows.column("min_commit_time").cast(pa.int64())).as_py()
    latest = pc.max(rows.column("max_commit_time").cast(pa.int64())).as_py()
    kinds = pc.list_flatten(rows.column("events")).combine_chunks().field("kind")
    points = pc.sum(pc.equal(kinds, event_name(EventKind.RESTORE_POINT))).as_py() or 0
    commits = pc.sum(pc.list_value_length(rows.column("commits"))).as_py() or 0
    return (
        rows.column("start")[0].as_py(),
        rows.column("end")[-1].as_py(),
        earliest,
        latest,
        int(commits),
        int(points),
    )


def _group(number: int, entry: Any) -> WalGroup:
    if len(entry.bounds) < 6:
        return WalGroup(number, entry.offset, entry.length, None, None, None, None, 0, 0)
    start, end, earliest, latest, commits, points = entry.bounds[:6]
    return WalGroup(
        number, entry.offset, entry.length, Lsn(start), Lsn(end), earliest, latest, commits, points
    )


def write_wal_manifest(frames: Sequence[WalFrame], *, nonce: str | None = None) -> tuple[bytes, ManifestRef]:
    """The manifest of the frames; raises ValueError unless they follow one another by (tli, start)."""
    for one, two in pairwise(frames):
        if (one.tli, one.end) > (two.tli, two.start):
            raise ValueError(f"frames out of order at {two.start}")
    builder = ParquetBuilder(
        WAL,
        _SCHEMA,
        dictionary=["pack"],
        compression={name: "none" if name == "digest" else "zstd" for name in _leaves(_SCHEMA)},
        encoding={},
    )
    if frames:
        builder.write_row_group(_table(frames))
    return builder.finish(nonce)


def read_wal_manifest(data: bytes | memoryview, ref: ManifestRef) -> tuple[WalFrame, ...]:
    """All frames in order, verified; raises DamagedStore, UnknownFeature."""
    table = read_whole(WAL, ref, data, _SCHEMA)
    key = keys.manifest(ref.digest)
    try:
        return _frames(table, key)
    except ValueError as error:
        raise DamagedStore(key, 0, f"expected frames of WAL: {error}") from error


def _table(frames: Sequence[WalFrame]) -> Any:
    numbers = {
        name: pa.array([int(getattr(frame, name)) for frame in frames], _SCHEMA.field(name).type)
        for name in (
            "tli",
            "start",
            "end",
            "offset",
            "stored_bytes",
            "last_record",
            "last_record_end",
            "pending",
            "records",
        )
    }
    times = [frame.commits["time"] for frame in frames]
    events = [[_event_to_plain(event) for event in frame.events] for frame in frames]
    columns = {
        **numbers,
        "pack": pa.array([frame.pack for frame in frames], pa.string()),
        "digest": pa.array([frame.digest for frame in frames], pa.binary(DIGEST_BYTES)),
        "min_commit_time": pa.array([int(time.min()) if len(time) else None for time in times], _TIME),
        "max_commit_time": pa.array([int(time.max()) if len(time) else None for time in times], _TIME),
        "commits": _array_column([frame.commits for frame in frames], COMMIT_DTYPE, _COMMIT),
        "events": pa.array(events, _list_of(_EVENT)),
        "touches": _array_column([frame.touches for frame in frames], TOUCH_DTYPE, _TOUCH),
    }
    return pa.table([columns[name] for name in _SCHEMA.names], schema=_SCHEMA)


def _array_column(parts: list[npt.NDArray[np.void]], dtype: np.dtype[np.void], struct: Any) -> Any:
    """One list of structs per frame, without a Python object per element."""
    whole = np.concatenate(parts).astype(dtype, copy=False)
    offsets = np.concatenate(([0], np.cumsum([len(part) for part in parts]))).astype(np.int32)
    fields = [struct.field(number) for number in range(struct.num_fields)]
    arrays = [pa.array(np.ascontiguousarray(whole[field.name])).view(field.type) for field in fields]
    return pa.ListArray.from_arrays(
        pa.array(offsets), pa.StructArray.from_arrays(arrays, fields=fields), type=_list_of(struct)
    )


def _frames(table: Any, key: str) -> tuple[WalFrame, ...]:
    commits = _split_arrays(table.column("commits"), COMMIT_DTYPE)
    touches = _split_arrays(table.column("touches"), TOUCH_DTYPE)
    events = _split_events(table.column("events"), key)
    plain = table.select(
        [
            "tli",
            "start",
            "end",
            "pack",
            "offset",
            "stored_bytes",
            "digest",
            "last_record",
            "last_record_end",
            "pending",
            "records",
        ]
    ).to_pylist()
    return tuple(
        WalFrame(
            tli=row["tli"],
            start=Lsn(row["start"]),
            end=Lsn(row["end"]),
            pack=row["pack"],
            offset=row["offset"],
            stored_bytes=row["stored_bytes"],
            digest=row["digest"],
            last_record=Lsn(row["last_record"]),
            last_record_end=Lsn(row["last_record_end"]),
            pending=Lsn(row["pending"]),
            records=row["records"],
            commits=commits[number],
            events=events[number],
            touches=touches[number],
        )
        for number, row in enumerate(plain)
    )


def _split_arrays(column: Any, dtype: np.dtype[np.void]) -> list[npt.NDArray[np.void]]:
    lists = column.combine_chunks()
    offsets = lists.offsets.to_numpy()
    structs = lists.values
    whole = np.zeros(len(structs), dtype)
    for name in dtype.names or ():
        if name != "pad":
            field = structs.field(name)
            whole[name] = field.view(pa.int64()) if pa.types.is_timestamp(field.type) else field
    whole.flags.writeable = False
    return [whole[offsets[n] : offsets[n + 1]] for n in range(len(lists))]


def _event_to_plain(event: WalEvent) -> dict[str, object]:
    return {
        "kind": event_name(event.kind),
        "start": int(event.start),
        "end": int(event.end),
        "time": event.time,
        "name": event.name,
        "values": [{"name": name, "value": value} for name, value in event.values],
    }


def _split_events(column: Any, key: str) -> list[tuple[WalEvent, ...]]:
    lists = column.combine_chunks()
    offsets = lists.offsets.to_pylist()
    structs = lists.values
    fields = {name: structs.field(name) for name in ("kind", "start", "end", "time", "name", "values")}
    # Python's datetime would lose what lies outside the years 1 to 9999.
    fields["time"] = fields["time"].view(pa.int64())
    rows = zip(*(field.to_pylist() for field in fields.values()), strict=True)
    events = [
        WalEvent(
            kind=event_kind(kind, key),
            start=Lsn(start),
            end=Lsn(end),
            time=time,
            name=name,
            values=tuple((value["name"], value["value"]) for value in values),
        )
        for kind, start, end, time, name, values in rows
    ]
    return [tuple(events[offsets[n] : offsets[n + 1]]) for n in range(len(lists))]


def _leaves(schema: Any) -> list[str]:
    """Column paths as Parquet names them."""
    leaves: list[str] = []

    def visit(prefix: str, kind: Any) -> None:
        if pa.types.is_list(kind):
            visit(f"{prefix}.list.element", kind.value_type)
        elif pa.types.is_struct(kind):
            for number in range(kind.num_fields):
                visit(f"{prefix}.{kind.field(number).name}", kind.field(number).type)
        else:
            leaves.append(prefix)

    for field in schema:
        visit(field.name, field.type)
    return leaves
