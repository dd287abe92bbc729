"""When a job is due: intervals and cron expressions. Pure; instants are micros, zones are the caller's.

A cron time that a change to summer time skips comes right after the gap; one that it repeats comes once. Expressions
whose hour is ``*`` follow the clock of the wall through the change.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path
from zoneinfo import ZoneInfo

from cli.quantities import parse_duration, write_duration
from timeline.clock import Micros

JITTER_SHARE = 0.1
"""An interval is put off by at most this part of itself, whatever the setting."""
_SECOND = 1_000_000
_SHORTEST_SECONDS = 1.0
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Every:
    """So long after the last run began."""

    seconds: float

    def __str__(self) -> str:
        return f"every {write_duration(self.seconds)}"


@dataclass(frozen=True, slots=True)
class Cron:
    """Five fields: minute, hour, day of month, month, day of week."""

    expression: str

    def __str__(self) -> str:
        return self.expression


Schedule = Every | Cron


def parse_schedule(text: str) -> Schedule | None:
    """``every 6h`` (or ``6h``), a cron expression, or ``off``: ``None``. Raises ValueError saying what is wrong."""
    stripped = " ".join(text.split())
    if stripped == "off":
        return None
    if len(stripped.split(" ")) != 5:
        try:
            seconds = parse_duration(stripped.removeprefix("every "))
        except ValueError:
            raise ValueError('a schedule is expected: "every 6h", "15 3 * * *" or "off"') from None
        if seconds < _SHORTEST_SECONDS:
            raise ValueError(f"an interval is at least {_SHORTEST_SECONDS:g}s")
        return Every(seconds)
    from cronsim import CronSimError

    schedule = Cron(stripped)
    try:
        next_after(schedule, 0, UTC)
    except CronSimError as error:
        raise ValueError(f"not a cron expression of five fields: {error}") from None
    except StopIteration:
        raise ValueError("this cron expression names no day that ever comes") from None
    return schedule


def next_after(schedule: Schedule, moment: Micros, zone: tzinfo) -> Micros:
    """The first time after ``moment``; ``zone`` is what a cron expression's hours are told in."""
    if isinstance(schedule, Every):
        return moment + round(schedule.seconds * _SECOND)
    from cronsim import CronSim

    # cronsim answers with the fields of the wall clock in the zone of what it was given.
    start = (_EPOCH + timedelta(microseconds=moment)).astimezone(zone)
    found = next(CronSim(schedule.expression, start))
    return (found.astimezone(UTC) - _EPOCH) // timedelta(microseconds=1)


def with_jitter(schedule: Schedule, due: Micros, jitter_seconds: float, chance: float) -> Micros:
    """``due``, put off by less than ``jitter_seconds``; ``chance`` is in [0, 1)."""
    bound = jitter_seconds
    if isinstance(schedule, Every):
        bound = min(bound, schedule.seconds * JITTER_SHARE)
    return due + int(bound * _SECOND * chance)


def host_zone(environ: Mapping[str, str], localtime: Path = Path("/etc/localtime")) -> tzinfo:
    """The zone of this host with its rules (an offset alone would be wrong after the next change): ``TZ``, then
    ``/etc/localtime``, else UTC."""
    named = environ.get("TZ", "").removeprefix(":")
    try:
        if named:
            return ZoneInfo(named)
        with localtime.open("rb") as file:
            return ZoneInfo.from_file(file, key=os.fspath(localtime))
    except (OSError, ValueError, KeyError):
        return UTC
