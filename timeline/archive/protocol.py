"""The streaming replication protocol without I/O: messages, replies, and what a stream must look like.

Source: doc/src/sgml/protocol.sgml ("Streaming Replication Protocol"), src/backend/replication/walsender.c.
All integers are big-endian; times on the wire count micros from Postgres's epoch and are micros of ours here.

A keepalive carries the position the server has *sent*, which proves nothing about what it has *written*
when its output was blocked. Only an XLogData message whose last byte is the server's own end of WAL proves
that the stream was complete at that moment (``StreamState.caught_up_at``).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from timeline.clock import POSTGRES_EPOCH_MICROS, Micros
from timeline.errors import TimelineError
from timeline.lsn import Lsn

MAX_STATUS_INTERVAL_SECONDS = 10.0
"""A status update goes out at least this often, whatever happens elsewhere."""

_XLOG_DATA = struct.Struct("!QQq")
_KEEPALIVE = struct.Struct("!QqB")
_STATUS = struct.Struct("!cQQQqB")
_XLOG_DATA_BYTE = ord("w")
_KEEPALIVE_BYTE = ord("k")


class ProtocolError(TimelineError):
    """The source, or something between it and us, does not speak the replication protocol as it should."""


@dataclass(frozen=True, slots=True)
class XLogData:
    """A run of WAL."""

    start: Lsn
    wal_end: Lsn
    """Where the server's flushed WAL of this tli ended when it made the message."""
    sent_at: Micros
    """Server's clock."""
    data: memoryview
    """The WAL; may be any length, aligned to nothing."""

    @property
    def end(self) -> Lsn:
        """Just after the last byte."""
        return Lsn(self.start + len(self.data))


@dataclass(frozen=True, slots=True)
class Keepalive:
    """A sign of life."""

    sent_to: Lsn
    """The server has sent everything before this."""
    sent_at: Micros
    """Server's clock."""
    reply_requested: bool
    """Without a prompt answer the server ends the connection (wal_sender_timeout)."""


def parse_message(message: bytes | memoryview) -> XLogData | Keepalive:
    """One CopyData message of a physical stream; raises ProtocolError."""
    view = memoryview(message)
    kind = view[0] if len(view) else -1
    if kind == _XLOG_DATA_BYTE and len(view) > _XLOG_DATA.size:
        start, wal_end, sent_at = _XLOG_DATA.unpack_from(view, 1)
        return XLogData(
            Lsn(start), Lsn(wal_end), sent_at + POSTGRES_EPOCH_MICROS, view[1 + _XLOG_DATA.size :]
        )
    if kind == _KEEPALIVE_BYTE and len(view) == 1 + _KEEPALIVE.size:
        sent_to, sent_at, reply = _KEEPALIVE.unpack_from(view, 1)
        return Keepalive(Lsn(sent_to), sent_at + POSTGRES_EPOCH_MICROS, reply != 0)
    raise ProtocolError(
        f"unexpected message in the WAL stream: {bytes(view[:16])!r}, {len(view)} bytes",
        hint="is something between us and the source changing the traffic?",
    )


def encode_status(durable: int, now: Micros, *, reply_requested: bool = False) -> bytes:
    """A standby status update: written = flushed = ``durable``, nothing applied (P1)."""
    return _STATUS.pack(b"r", durable, durable, 0, now - POSTGRES_EPOCH_MICROS, reply_requested)


def status_interval(wal_sender_timeout_seconds: float) -> float:
    """Seconds between unasked status updates, given the server's ``wal_sender_timeout`` (0: none)."""
    if wal_sender_timeout_seconds <= 0:
        return MAX_STATUS_INTERVAL_SECONDS
    return min(MAX_STATUS_INTERVAL_SECONDS, wal_sender_timeout_seconds / 4)


@dataclass(frozen=True, slots=True)
class CaughtUp:
    """The server had no WAL beyond ``lsn`` at ``time`` on its clock."""

    lsn: Lsn
    time: Micros


class StreamState:
    """One run of START_REPLICATION: checks that WAL arrives without holes and says when a reply is due.

    ``position``: where the stream was asked to start. ``silent_until``: nothing is acknowledged before the
    stream has reached this LSN (bytes received twice are compared up to it).
    """

    def __init__(self, position: Lsn, *, silent_until: Lsn, interval_seconds: float) -> None:
        self.position = position
        self.caught_up: CaughtUp | None = None
        self.wal_end = position
        self._silent_until = silent_until
        self._interval = interval_seconds
        self._durable = Lsn(0)
        self._reported = Lsn(0)
        self._asked = True
        self._last_reply = 0.0

    def receive(self, message: bytes | memoryview) -> XLogData | Keepalive:
        """Take one message; raises ProtocolError when WAL does not continue where it should."""
        parsed = parse_message(message)
        if isinstance(parsed, Keepalive):
            self._asked |= parsed.reply_requested
            return parsed
        if parsed.start != self.position:
            raise ProtocolError(
                f"the source sent WAL from {parsed.start} where {self.position} should follow"
            )
        self.position = parsed.end
        self.wal_end = max(self.wal_end, parsed.wal_end)
        self.caught_up = CaughtUp(parsed.end, parsed.sent_at) if parsed.end >= parsed.wal_end else None
        return parsed

    def advance(self, durable: Lsn) -> None:
        """Everything before ``durable`` is in the store."""
        self._durable = max(self._durable, durable)

    @property
    def reportable(self) -> Lsn:
        """What may be acknowledged: 0, which acknowledges nothing, until the overlap has been compared."""
        return self._durable if self.position >= self._silent_until else Lsn(0)

    def due_in(self, now: float) -> float:
        """Seconds until a status update is due; 0 or less: now. ``now``: monotonic."""
        if self._asked or self.reportable > self._reported:
            return 0.0
        return self._last_reply + self._interval - now

    def status(self, now: float, wall: Micros) -> bytes:
        """The status update to send now."""
        self._asked = False
        self._last_reply = now
        self._reported = self.reportable
        return encode_status(self._reported, wall)
