"""What is read out of settings and error messages."""

from __future__ import annotations

import psycopg
import pytest

from timeline.archive.connect import (
    ConnectionRefused,
    ServerError,
    connection_error,
    describe_conninfo,
    parse_conninfo,
)
from timeline.archive.session import setting_seconds
from timeline.archive.slot import (
    SlotBusy,
    SlotMissing,
    SlotStatus,
    StreamAttempt,
    WalLost,
    WalStatus,
    behind,
    judge_stream_error,
    slot_name,
    slot_prefix,
)
from timeline.archive.source import check_major, is_synchronous, synchronous_names
from timeline.archive.stream import Overlap
from timeline.errors import SplitBrain, TimelineError, Unavailable, UsageError
from timeline.lsn import Lsn

HEALTHY = SlotStatus("tl_x", True, False, None, Lsn(0), WalStatus.RESERVED, None, None)
LOST = SlotStatus("tl_x", True, False, None, None, WalStatus.LOST, None, "wal_removed")


@pytest.mark.parametrize(
    ("setting", "names"),
    [
        ("", ()),
        ("a", ("a",)),
        ("a, b", ("a", "b")),
        ("2 (a, b ,c)", ("a", "b", "c")),
        ("FIRST 1 (tl, *)", ("tl", "*")),
        ('any 2 ("A B", c)', ("A B", "c")),
        ("first", ("first",)),
        ("ANY 1(tl)", ("tl",)),
        ('"say ""hi"""', ('say "hi"',)),
    ],
)
def test_names_of_synchronous_standbys(setting: str, names: tuple[str, ...]) -> None:
    """EDGE 6."""
    assert synchronous_names(setting) == names


def test_membership_ignores_case_and_knows_the_star() -> None:
    assert is_synchronous("FIRST 1 (TL)", "tl")
    assert is_synchronous("*", "anything")
    assert not is_synchronous("tlx", "tl")
    assert not is_synchronous("", "tl")


@pytest.mark.parametrize(
    ("text", "kind", "said"),
    [
        (
            'connection failed: FATAL:  no pg_hba.conf entry for replication connection from host "1.2.3.4", '
            'user "u", no encryption',
            ConnectionRefused,
            "pg_hba.conf",
        ),
        ("FATAL:  must be superuser or replication role to start walsender", ConnectionRefused, "stream WAL"),
        ("FATAL:  permission denied to start WAL sender", ConnectionRefused, "stream WAL"),
        ('FATAL:  password authentication failed for user "u"', ConnectionRefused, "password"),
        (
            "FATAL:  number of requested standby connections exceeds max_wal_senders",
            Unavailable,
            "WAL sender",
        ),
        ("FATAL:  the database system is starting up", Unavailable, "starting up"),
        ("connection failed: Connection refused Is the server running?", Unavailable, "Connection refused"),
    ],
)
def test_failed_connections_are_one_clear_line(text: str, kind: type[TimelineError], said: str) -> None:
    error = connection_error(psycopg.OperationalError(text))
    assert type(error) is kind
    assert said in error.message
    assert "\n" not in error.message
    assert error.hint


def test_passwords_are_never_repeated() -> None:
    with pytest.raises(UsageError) as raised:
        parse_conninfo("host=x password='hunter2")
    assert "hunter2" not in str(raised.value)
    assert raised.value.__cause__ is None
    error = connection_error(psycopg.OperationalError("something odd: password=hunter2 host=x"))
    assert "hunter2" not in error.message
    assert "hunter2" not in describe_conninfo("host=db port=5433 user=u password=hunter2")
    assert describe_conninfo("host=db port=5433 user=u password=hunter2") == "db:5433 as u"


def attempt(**changes: object) -> StreamAttempt:
    """A refused START_REPLICATION."""
    values: dict[str, object] = {
        "slot": "tl_x",
        "slot_status": HEALTHY,
        "tli": 1,
        "start": Lsn(100),
        "server_tli": 1,
        "server_end": Lsn(200),
        "in_recovery": False,
    }
    return StreamAttempt(**{**values, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("sqlstate", "kind"),
    [
        ("55006", SlotBusy),
        ("42704", SlotMissing),
        ("58P01", WalLost),
        ("55000", WalLost),
        ("57P01", Unavailable),
        ("53300", Unavailable),
        ("42501", UsageError),
        ("XX000", Unavailable),
    ],
)
def test_refusals_of_a_stream_are_told_apart_by_code(sqlstate: str, kind: type[TimelineError]) -> None:
    """EDGE 7."""
    judged = judge_stream_error(ServerError(sqlstate, "Meldung in fremder Sprache"), attempt())
    assert type(judged) is kind


def test_lost_wal_names_the_cure() -> None:
    """EDGE 8."""
    judged = judge_stream_error(ServerError("55000", "…"), attempt(slot_status=LOST))
    assert isinstance(judged, WalLost)
    assert "tl archive --allow-gap" in (judged.hint or "")
    assert "wal_removed" in judged.message


def test_a_logical_slot_of_that_name_is_no_lost_wal() -> None:
    logical = SlotStatus("tl_x", False, False, None, Lsn(0), WalStatus.RESERVED, None, None)
    judged = judge_stream_error(ServerError("55000", "…"), attempt(slot_status=logical))
    assert type(judged) is UsageError


def test_a_server_that_ends_before_the_store_was_set_back_or_lags() -> None:
    """EDGE 7: XX000, told by the positions."""
    ahead = attempt(server_end=Lsn(50))
    assert isinstance(judge_stream_error(ServerError("XX000", "…"), ahead), SplitBrain)
    assert isinstance(behind(attempt(server_end=Lsn(50), in_recovery=True)), Unavailable)


def test_slots_warn_before_they_are_lost() -> None:
    """EDGE 8, 10."""
    extended = SlotStatus("tl_x", True, True, 1, Lsn(0), WalStatus.EXTENDED, 300 << 20, None)
    assert HEALTHY.warning is None
    assert "300 MiB until it is lost" in (extended.warning or "")
    unreserved = SlotStatus("tl_x", True, True, 1, Lsn(0), WalStatus.UNRESERVED, 0, None)
    assert "next checkpoint" in (unreserved.warning or "")
    assert LOST.lost
    assert "wal_removed" in (LOST.warning or "")


def test_slot_names_are_legal_and_ours() -> None:
    name = slot_name("0123456789abcdef" * 2, "feature.x-1")
    assert name == "tl_0123456789ab_feature_x_1"
    assert name.startswith(slot_prefix("0123456789abcdef" * 2))
    assert len(slot_name("f" * 32, "b" * 63)) <= 63


def test_units_of_settings() -> None:
    assert [setting_seconds(text) for text in ("1min", "5s", "250ms", "0", "2h")] == [60, 5, 0.25, 0, 7200]


def test_majors_that_cannot_be_read_are_refused() -> None:
    check_major(15)
    for major in (13, 19):
        with pytest.raises(UsageError, match="14 to 18"):
            check_major(major)


def test_bytes_received_twice_must_match() -> None:
    """EDGE 14."""
    overlap = Overlap(1, Lsn(1000), b"abcdefgh")
    assert bytes(overlap.skip(memoryview(b"abc"))) == b""
    assert bytes(overlap.skip(memoryview(b"defghIJ"))) == b"IJ"
    assert bytes(overlap.skip(memoryview(b"KL"))) == b"KL"
    overlap = Overlap(1, Lsn(1000), b"abcdefgh")
    overlap.skip(memoryview(b"abc"))
    with pytest.raises(SplitBrain, match=str(Lsn(1005))):
        overlap.skip(memoryview(b"deXgh"))
