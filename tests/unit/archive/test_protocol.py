"""The replication protocol without a server: messages, replies, holes."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from timeline.archive.protocol import (
    CaughtUp,
    Keepalive,
    ProtocolError,
    StreamState,
    XLogData,
    encode_status,
    parse_message,
    status_interval,
)
from timeline.clock import POSTGRES_EPOCH_MICROS
from timeline.lsn import Lsn

START = Lsn(0x1000000)


def wal_message(start: int, data: bytes, *, wal_end: int | None = None, sent_at: int = 0) -> bytes:
    """An XLogData message as a server would make it."""
    end = start + len(data) if wal_end is None else wal_end
    return b"w" + struct.pack("!QQq", start, end, sent_at) + data


def keepalive(sent_to: int, *, reply: bool, sent_at: int = 0) -> bytes:
    """A keepalive message."""
    return b"k" + struct.pack("!QqB", sent_to, sent_at, reply)


def stream(*, silent_until: Lsn = START, interval: float = 10.0) -> StreamState:
    """A stream that has sent its first status."""
    state = StreamState(START, silent_until=silent_until, interval_seconds=interval)
    state.status(0.0, 0)
    return state


@given(st.integers(0, 2**63), st.binary(min_size=1, max_size=300), st.integers(-(2**60), 2**60))
def test_wal_messages_are_read_as_written(start: int, data: bytes, sent_at: int) -> None:
    parsed = parse_message(wal_message(start, data, wal_end=start + 5000, sent_at=sent_at))
    assert isinstance(parsed, XLogData)
    assert (parsed.start, bytes(parsed.data), parsed.wal_end) == (start, data, start + 5000)
    assert parsed.sent_at == sent_at + POSTGRES_EPOCH_MICROS
    assert parsed.end == start + len(data)


def test_keepalives_are_read_as_written() -> None:
    parsed = parse_message(memoryview(keepalive(77, reply=True, sent_at=5)))
    assert parsed == Keepalive(Lsn(77), 5 + POSTGRES_EPOCH_MICROS, True)


@pytest.mark.parametrize("message", [b"", b"x", b"w" + b"\0" * 23, b"k" + b"\0" * 16, b"d" + b"\0" * 40])
def test_other_messages_are_refused(message: bytes) -> None:
    with pytest.raises(ProtocolError, match="unexpected message"):
        parse_message(message)


def test_a_status_reports_one_position_as_written_and_flushed_and_nothing_applied() -> None:
    kind, written, flushed, applied, at, reply = struct.unpack(
        "!cQQQqB", encode_status(9, POSTGRES_EPOCH_MICROS + 3)
    )
    assert (kind, written, flushed, applied, at, reply) == (b"r", 9, 9, 0, 3, 0)


def test_wal_that_does_not_continue_is_refused() -> None:
    state = stream()
    state.receive(wal_message(START, b"abc"))
    with pytest.raises(ProtocolError, match="should follow"):
        state.receive(wal_message(START + 4, b"d"))


def test_a_requested_reply_is_due_at_once() -> None:
    """EDGE 4."""
    state = stream()
    assert state.due_in(1.0) == pytest.approx(9.0)
    state.receive(keepalive(START, reply=False))
    assert state.due_in(1.0) > 0
    state.receive(keepalive(START, reply=True))
    assert state.due_in(1.0) == 0
    state.status(1.0, 0)
    assert state.due_in(1.0) == pytest.approx(10.0)


def test_a_durable_step_is_reported_at_once_and_once() -> None:
    """EDGE 5: a COMMIT may be waiting for it."""
    state = stream()
    state.receive(wal_message(START, b"abcdef"))
    state.advance(Lsn(START + 3))
    assert state.due_in(0.1) == 0
    assert struct.unpack_from("!QQ", state.status(0.1, 0), 1) == (START + 3, START + 3)
    state.advance(Lsn(START + 3))
    assert state.due_in(0.1) > 0


def test_nothing_is_acknowledged_before_the_overlap_was_compared() -> None:
    """EDGE 14: the bytes received twice come first."""
    state = stream(silent_until=Lsn(START + 6))
    state.advance(Lsn(START + 6))
    assert state.due_in(0.1) > 0
    assert struct.unpack_from("!Q", state.status(0.1, 0), 1) == (0,)
    state.receive(wal_message(START, b"abcdef"))
    assert state.due_in(0.2) == 0
    assert struct.unpack_from("!Q", state.status(0.2, 0), 1) == (START + 6,)


def test_only_wal_up_to_the_servers_own_end_shows_that_we_are_caught_up() -> None:
    state = stream()
    state.receive(wal_message(START, b"abc", wal_end=START + 10))
    assert state.caught_up is None
    state.receive(keepalive(START + 3, reply=False))
    assert state.caught_up is None
    later = stream()
    later.receive(wal_message(START, b"abc", wal_end=START + 10))
    later.receive(wal_message(START + 3, b"defghij", sent_at=8))
    assert later.caught_up == CaughtUp(Lsn(START + 10), POSTGRES_EPOCH_MICROS + 8)


def test_unasked_replies_come_often_enough_for_the_servers_timeout() -> None:
    assert status_interval(60) == 10
    assert status_interval(5) == 1.25
    assert status_interval(0) == 10
