"""WAL manifests: where sealed WAL is and what it holds (SPEC.md, [WMA-1] to [WMA-2]).

One row per frame, with native nested columns for commits, events and touched relations, so that any Parquet
tool can query the history without us.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from timeline.errors import DamagedStore
from timeline.format import keys
from timeline.format.digest import DIGEST_BYTES
from timeline.format.manifest import ManifestRef, WalFrame
from timeline.format.parquet_file import WAL, ParquetBuilder, read_whole
from timeline.format.wal_index import COMMIT_DTYPE, TOUCH_DTYPE, WalEvent
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
