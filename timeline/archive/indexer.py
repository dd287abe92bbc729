"""The WAL scan, giving what chunks store."""

from __future__ import annotations

from timeline.format.wal_index import EventKind, WalEvent, WalIndex
from timeline.lsn import Lsn
from timeline.pg.wal import ScanResult, WalScanner


class WalIndexer:
    """Indexes one tli's WAL, run after run. ``position`` and ``major`` as for WalScanner."""

    def __init__(self, segment_bytes: int, tli: int, position: Lsn, *, major: int) -> None:
        self._scanner = WalScanner(segment_bytes, tli, position, major=major)

    @property
    def position(self) -> Lsn:
        """LSN of the next byte to feed."""
        return self._scanner.position

    def feed(self, wal: bytes | bytearray | memoryview) -> WalIndex:
        """The index of the next run; raises WalFormatError when it is not the WAL expected here."""
        return to_index(self._scanner.feed(wal))


def to_index(result: ScanResult) -> WalIndex:
    """The scan's own values as the format's (timeline.pg and timeline.format do not know each other)."""
    return WalIndex(
        last_record=result.last_record,
        last_record_end=result.last_record_end,
        pending=result.pending,
        records=result.records,
        commits=result.commits,
        events=tuple(
            WalEvent(
                kind=EventKind(event.kind.value),
                start=event.start,
                end=event.end,
                time=event.time,
                name=event.name,
                values=event.values,
            )
            for event in result.events
        ),
        touches=result.touches,
    )
