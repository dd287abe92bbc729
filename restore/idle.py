"""When is a branch idle: what Postgres counts, and what follows from it.

``pg_stat_database`` counts the sessions of clients as they begin, so that short ones between two looks are seen too. A look
is a session itself: of an idle branch the next one finds exactly one more. What is counted anew (statistics are lost
in a crash) looks like activity, which only puts the stop off.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from restore.binaries import Binaries
from restore.isolation import Endpoint, ask_in_any_database
from restore.local_branch import IdleStop
from timeline.clock import Micros

SHORTEST_SECONDS = 60
"""To be idle for less than this would be to wait for the next query."""
_LOOK_SECONDS = 30
"""Looks are at least so far apart, and a quarter of the time that is waited for."""

_ACTIVITY = """
select jsonb_build_array(
    (select count(*) from pg_catalog.pg_stat_activity
     where backend_type = 'client backend' and pid <> pg_catalog.pg_backend_pid()),
    (select sum(sessions)::bigint from pg_catalog.pg_stat_database));
"""


@dataclass(frozen=True, slots=True)
class Activity:
    """What one look finds."""

    connected: int
    """Clients, without the looker."""
    sessions: int
    """Begun since statistics were last made anew, without the looker's."""


async def look(endpoint: Endpoint, binaries: Binaries) -> Activity:
    """Ask the branch; raises TimelineError when it does not answer."""
    ((connected, sessions),) = await ask_in_any_database(endpoint, binaries, _ACTIVITY)
    return Activity(connected, sessions)


def judge(idle: IdleStop, activity: Activity, now: Micros) -> IdleStop:
    """What is known after a look."""
    quiet = activity.connected == 0 and idle.sessions is not None and activity.sessions == idle.sessions + 1
    # Whoever is connected now leaves at some moment before a later look, which counts as being there until then.
    known = activity.sessions if activity.connected == 0 else None
    return replace(idle, since=idle.since if quiet else now, looked=now, sessions=known)


def begin(after_seconds: int, now: Micros) -> IdleStop:
    """Of a branch that was made or started just now."""
    return IdleStop(after_seconds, since=now, looked=now, sessions=None)


def is_over(idle: IdleStop, now: Micros) -> bool:
    """Whether nobody has been there for long enough."""
    return now - idle.since >= idle.after_seconds * 1_000_000


def next_look(idle: IdleStop) -> Micros:
    """When it is worth the next look."""
    return idle.looked + max(_LOOK_SECONDS, idle.after_seconds // 4) * 1_000_000
