"""Index of a run of WAL ↔ bytes (SPEC.md, [IDX-1] to [IDX-5]).

Layout, before compression: length of the head (u32 LE), head (JSON, UTF-8), then the commits and the touches
as packed little-endian records (COMMIT_DTYPE, TOUCH_DTYPE).
"""

from __future__ import annotations

import json
import struct

import numpy as np

from timeline.errors import DamagedStore, UnknownFeature
from timeline.format.wal_index import COMMIT_DTYPE, TOUCH_DTYPE, EventKind, WalEvent, WalIndex
from timeline.lsn import Lsn

_HEAD_LENGTH = struct.Struct("<I")


def encode_index(index: WalIndex) -> bytes:
    """The index, uncompressed."""
    head = json.dumps(
        {
            "last_record": int(index.last_record),
            "last_record_end": int(index.last_record_end),
            "pending": int(index.pending),
            "records": index.records,
            "commits": len(index.commits),
            "touches": len(index.touches),
            "events": [_event_to_json(event) for event in index.events],
        },
        separators=(",", ":"),
    ).encode()
    commits = index.commits.astype(COMMIT_DTYPE, copy=False).tobytes()
    touches = index.touches.astype(TOUCH_DTYPE, copy=False).tobytes()
    return b"".join((_HEAD_LENGTH.pack(len(head)), head, commits, touches))


def decode_index(raw: bytes, key: str, offset: int) -> WalIndex:
    """The index; raises DamagedStore(key, offset, …), ``offset`` being where its frame starts in the
    object."""
    try:
        (head_bytes,) = _HEAD_LENGTH.unpack_from(raw)
        arrays = _HEAD_LENGTH.size + head_bytes
        head = json.loads(raw[_HEAD_LENGTH.size : arrays])
        commits_end = arrays + head["commits"] * COMMIT_DTYPE.itemsize
        touches_end = commits_end + head["touches"] * TOUCH_DTYPE.itemsize
        if touches_end != len(raw):
            raise ValueError(f"{len(raw)} bytes where the head promises {touches_end}")
        return WalIndex(
            last_record=Lsn(head["last_record"]),
            last_record_end=Lsn(head["last_record_end"]),
            pending=Lsn(head["pending"]),
            records=int(head["records"]),
            commits=np.frombuffer(raw[arrays:commits_end], COMMIT_DTYPE),
            events=tuple(_event_from_json(event, key) for event in head["events"]),
            touches=np.frombuffer(raw[commits_end:touches_end], TOUCH_DTYPE),
        )
    except (struct.error, ValueError, KeyError, TypeError) as error:
        raise DamagedStore(key, offset, f"expected a WAL index: {error!r}") from error


def event_name(kind: EventKind) -> str:
    """Name of the kind in the format."""
    return kind.name.lower()


def event_kind(name: str, where: str) -> EventKind:
    """The kind of that name; raises UnknownFeature naming it."""
    try:
        return EventKind[name.upper()]
    except KeyError:
        raise UnknownFeature(where, f"event kind {name}") from None


def _event_to_json(event: WalEvent) -> dict[str, object]:
    return {
        "kind": event_name(event.kind),
        "start": int(event.start),
        "end": int(event.end),
        "time": event.time,
        "name": event.name,
        "values": [[name, value] for name, value in event.values],
    }


def _event_from_json(event: dict[str, object], key: str) -> WalEvent:
    values = event["values"]
    if not isinstance(values, list):
        raise ValueError("expected an array of values")
    time, name = event["time"], event["name"]
    return WalEvent(
        kind=event_kind(str(event["kind"]), key),
        start=Lsn(_integer(event["start"])),
        end=Lsn(_integer(event["end"])),
        time=None if time is None else _integer(time),
        name=None if name is None else str(name),
        values=tuple((str(name), _integer(value)) for name, value in values),
    )


def _integer(value: object) -> int:
    if type(value) is not int:
        raise ValueError(f"expected an integer, found {value!r}")
    return value
