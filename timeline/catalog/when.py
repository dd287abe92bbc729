"""WHEN: what people write for a moment of the past, read into values (DESIGN of the command line: WHEN).

Pure, and deaf to this machine's clock: ``… ago`` counts back from the *source's* clock, the newest one that
the store knows (EDGE 55). While the archiver runs that is seconds old; while it does not, ``5 minutes ago``
means five minutes before the known history ends.

Decided here, so that no two readings of one text exist:

- a time without offset or zone is in the zone given; one that happens twice there is refused with both
  readings, one that is skipped there is refused as well (EDGE 38);
- a date without a time of day is refused: it could mean either end of the day;
- at most six digits of fraction, for Postgres keeps microseconds;
- a day is 24 hours and a week seven of them; months and years have no length and are refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone, tzinfo
from zoneinfo import ZoneInfo

from timeline.clock import Micros
from timeline.errors import UsageError
from timeline.lsn import Lsn

_FORMS = (
    "use an ISO time such as '2026-01-20 10:00', '5 minutes ago', an LSN, 'xid:N', 'name:RESTORE_POINT', "
    "'latest' or 'now'"
)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_EARLIEST = 31_536_000_000_000
_LATEST = 253_370_764_800_000_000
_FIRST_NORMAL_XID = 3
_RESTORE_POINT_BYTES = 63

_TIME = re.compile(
    r"(?P<date>\d{4}-\d{2}-\d{2})"
    r"(?:[Tt ]\s*(?P<hour>\d{1,2}):(?P<minute>\d{2})(?::(?P<second>\d{2})(?:\.(?P<fraction>\d+))?)?)?"
    r"\s*(?P<zone>[Zz]|[+-]\d{2}(?::?\d{2}(?::?\d{2})?)?|[A-Za-z][A-Za-z0-9_+/-]*)?"
)
_OFFSET = re.compile(r"([+-])(\d{2})(?::?(\d{2})(?::?(\d{2}))?)?")
_AMOUNT = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]+)[\s,]*", re.IGNORECASE)
_UNITS = {
    **dict.fromkeys(("s", "sec", "secs", "second", "seconds"), 1),
    **dict.fromkeys(("m", "min", "mins", "minute", "minutes"), 60),
    **dict.fromkeys(("h", "hr", "hrs", "hour", "hours"), 3600),
    **dict.fromkeys(("d", "day", "days"), 86_400),
    **dict.fromkeys(("w", "week", "weeks"), 604_800),
}


@dataclass(frozen=True, slots=True)
class AtTime:
    """Just before the first commit or abort, in WAL order, that is later than ``time``."""

    time: Micros


@dataclass(frozen=True, slots=True)
class AtLsn:
    """Exactly the records that start before ``lsn``."""

    lsn: Lsn


@dataclass(frozen=True, slots=True)
class BeforeXid:
    """Just before transaction ``xid`` ended; a 64-bit id (``pg_current_xact_id``) is taken modulo 2³²."""

    xid: int


@dataclass(frozen=True, slots=True)
class BeforeRestorePoint:
    """At the first restore point of that name."""

    name: str


@dataclass(frozen=True, slots=True)
class Latest:
    """The end of what the store holds."""


@dataclass(frozen=True, slots=True)
class Now:
    """The source's present position; the caller waits until the store holds it and then asks for that LSN."""


When = AtTime | AtLsn | BeforeXid | BeforeRestorePoint | Latest | Now


def parse_when(text: str, zone: tzinfo, source_now: Micros | None) -> When:
    """The moment a text means.

    ``zone``: for times that name none. ``source_now``: the source's clock as the store knows it, ``None``
    when it knows nothing yet. Raises UsageError for texts of no form, and for local times with two meanings
    or none.
    """
    words = text.strip()
    lower = words.lower()
    if lower == "latest":
        return Latest()
    if lower == "now":
        return Now()
    if Lsn.is_text(words):
        return AtLsn(Lsn.parse(words))
    if lower.startswith("xid:"):
        return BeforeXid(_parse_xid(words[4:].strip()))
    if lower.startswith("name:"):
        return BeforeRestorePoint(_parse_name(words[5:]))
    if lower.endswith("ago"):
        return AtTime(_sane(text, _parse_ago(text, words[:-3].strip(), source_now)))
    match = _TIME.fullmatch(words)
    if match is None:
        raise UsageError(f"cannot tell when {text!r} is", hint=_FORMS)
    return AtTime(_sane(text, _parse_time(words, match, zone)))


def zone_named(name: str) -> ZoneInfo:
    """The time zone of that IANA name; raises UsageError for unknown ones."""
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError):
        raise UsageError(
            f"unknown time zone {name!r}", hint="name it as 'Europe/Berlin', or give an offset such as +01:00"
        ) from None


def describe_time(time: Micros, zone: tzinfo = UTC) -> str:
    """The time for people, in that zone: ``2026-01-20 10:00:00.5+00:00`` with as many digits as it has."""
    return (_EPOCH + timedelta(microseconds=time)).astimezone(zone).isoformat(sep=" ")


def _sane(text: str, time: Micros) -> Micros:
    if not _EARLIEST < time < _LATEST:
        raise UsageError(f"{text!r} is not in the years 1971 to 9998")
    return time


def _parse_xid(digits: str) -> int:
    if not digits.isascii() or not digits.isdigit() or not 0 < int(digits) < 1 << 64:
        raise UsageError(f"not a transaction id: {digits!r}", hint="write xid:N, N from pg_current_xact_id()")
    xid = int(digits)
    if xid & 0xFFFFFFFF < _FIRST_NORMAL_XID:
        raise UsageError(f"no transaction ever has the id {xid}", hint="ids below 3 are reserved by Postgres")
    return xid


def _parse_name(name: str) -> str:
    if not name or len(name.encode()) > _RESTORE_POINT_BYTES or "\0" in name:
        raise UsageError(
            f"not the name of a restore point: {name!r}",
            hint=f"pg_create_restore_point() takes 1 to {_RESTORE_POINT_BYTES} bytes",
        )
    return name


def _parse_ago(text: str, amounts: str, source_now: Micros | None) -> Micros:
    at = 0
    micros = 0.0
    while at < len(amounts):
        match = _AMOUNT.match(amounts, at)
        unit = _UNITS.get(match[2].lower()) if match else None
        if match is None or unit is None:
            raise UsageError(
                f"cannot tell how long ago {text!r} is",
                hint="units are seconds, minutes, hours, days and weeks: '90 minutes ago', '1h 30m ago'",
            )
        micros += float(match[1]) * unit * 1_000_000
        at = match.end()
    if at == 0:
        raise UsageError(f"cannot tell how long ago {text!r} is", hint="say how much: '5 minutes ago'")
    if source_now is None:
        raise UsageError(
            f"{text!r} counts from the source's clock, and the store does not know it yet",
            hint="wait until the archiver has caught up once, or give a time with its date",
        )
    return source_now - round(micros)


def _parse_time(text: str, match: re.Match[str], zone: tzinfo) -> Micros:
    if match["hour"] is None:
        raise UsageError(
            f"{text!r} names a day and no time of day", hint=f"say which end of it: '{match['date']} 00:00'"
        )
    if match["fraction"] is not None and len(match["fraction"]) > 6:
        raise UsageError(f"{text!r} is finer than a microsecond", hint="at most six digits of fraction")
    try:
        wall = datetime.fromisoformat(match["date"]).replace(
            hour=int(match["hour"]),
            minute=int(match["minute"]),
            second=int(match["second"] or 0),
            microsecond=int((match["fraction"] or "").ljust(6, "0")),
        )
    except ValueError as error:
        raise UsageError(f"no such time: {text!r} ({error})", hint=_FORMS) from None
    named = match["zone"]
    if named is None:
        return _in_zone(text, wall, zone)
    if named in ("Z", "z"):
        return _micros(wall.replace(tzinfo=UTC))
    if named[0] in "+-":
        return _micros(wall.replace(tzinfo=_parse_offset(text, named)))
    if "/" not in named and named.upper() not in ("UTC", "GMT"):
        raise UsageError(
            f"{named!r} in {text!r} could be several zones",
            hint="write '+01:00' or 'Europe/Berlin'",
        )
    return _in_zone(text, wall, zone_named(named if "/" in named else named.upper()))


def _parse_offset(text: str, offset: str) -> timezone:
    match = _OFFSET.fullmatch(offset)
    if match is None:
        raise UsageError(f"cannot read the offset of {text!r}", hint="write it as +01:00")
    seconds = int(match[2]) * 3600 + int(match[3] or 0) * 60 + int(match[4] or 0)
    if seconds >= 86_400 or int(match[3] or 0) > 59 or int(match[4] or 0) > 59:
        raise UsageError(f"no zone has the offset of {text!r}", hint="write it as +01:00")
    return timezone(timedelta(seconds=seconds if match[1] == "+" else -seconds))


def _in_zone(text: str, wall: datetime, zone: tzinfo) -> Micros:
    first, second = wall.replace(tzinfo=zone, fold=0), wall.replace(tzinfo=zone, fold=1)
    if first.utcoffset() == second.utcoffset():
        return _micros(first)
    readings = [_micros(first), _micros(second)]
    told = [describe_time(reading, zone) for reading in readings]
    if _wall(readings[0], zone) == wall:
        raise UsageError(
            f"{text!r} happened twice in {zone}: clocks were set back",
            hint=f"say which: '{told[0]}' or '{told[1]}'",
        )
    raise UsageError(
        f"{text!r} never happened in {zone}: clocks were set forward",
        hint=f"perhaps '{told[1]}' or '{told[0]}' was meant",
    )


def _wall(time: Micros, zone: tzinfo) -> datetime:
    return (_EPOCH + timedelta(microseconds=time)).astimezone(zone).replace(tzinfo=None, fold=0)


def _micros(moment: datetime) -> Micros:
    return (moment - _EPOCH) // timedelta(microseconds=1)
