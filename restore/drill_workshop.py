"""A place of its own for one drill: nothing in it is shared with the user's branches, and all of it goes.

``<state>/drilling/<token>/``, where <state> is the user's own state directory::

    lock       held (flock) while the drill lives
    tl/        state directory of the drill's branch and its agent
    cache/     extent cache: empty at the start, so that what is read comes from the store
    copy/      the full copy, its server's socket and log

A drill that was killed leaves debris, whose lock is free; the next drill removes it. Until then its branch expires
by itself after LIFE_SECONDS.

Clearing up ends, in this order: the copy's server, branches with their mounts, the agent, and removes the
directory. Bounds: those of what it calls; AGENT_SECONDS for the agent.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import shutil
import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from restore import agent, mount_table
from restore.branch import HostBranches
from restore.compute import find_postmaster, kill
from restore.host import Host, find_host, told_plainly
from restore.process import is_alive, send, start_time
from timeline.clock import Clock
from timeline.errors import TimelineError

LIFE_SECONDS = 26 * 3600.0
"""Of the drill's branch: longer than any drill."""
AGENT_SECONDS = 40.0
_POLL_SECONDS = 0.02
_DIRECTORY = "drilling"


@dataclass(frozen=True, slots=True)
class Workshop:
    """Where one drill works."""

    directory: Path
    lock: int
    """Descriptor of the lock file."""
    host: Host
    """The user's host, with state and cache of the drill's own."""
    environ: Mapping[str, str]
    """Describes that host to whoever reads TL_STATE and TL_CACHE."""

    @property
    def copy(self) -> Path:
        """Where the full copy is made; not there at first."""
        return self.directory / "copy"


def open_workshop(host: Host, clock: Clock, environ: Mapping[str, str]) -> Workshop:
    """Make the place; raises TimelineError when the host's directories cannot be used."""
    with told_plainly():
        host.make()
        parent = host.state / _DIRECTORY
        # Whoever runs Postgres for root must be able to pass through.
        mode = 0o711 if host.switches_user else 0o700
        token = clock.token(4)
        place = parent / f".{token}"
        try:
            for directory in (parent, place):
                directory.mkdir(mode=mode, exist_ok=directory == parent)
                directory.chmod(mode)
            lock = _try_lock(place, os.O_RDWR | os.O_CREAT)
            if lock is None:
                raise TimelineError(f"{place} was locked by another process as it was made")
            # Only now can another drill see it, and finds it locked.
            place.rename(parent / token)
            return _workshop(parent / token, lock, environ)
        except BaseException:
            for left in (place, parent / token):
                shutil.rmtree(left, ignore_errors=True)
            raise


def debris(host: Host, environ: Mapping[str, str]) -> Iterator[Workshop]:
    """What drills that were killed left, locked for the caller to clear."""
    parent = host.state / _DIRECTORY
    if not parent.is_dir():
        return
    for place in sorted(parent.iterdir()):
        if not place.name.startswith(".") and (lock := _try_lock(place, os.O_RDWR)) is not None:
            yield _workshop(place, lock, environ)


async def clear(workshop: Workshop, clock: Clock) -> None:
    """End everything in it and remove it; raises TimelineError when a part cannot be ended.

    Not to be cancelled: whoever calls it sees to that.
    """
    try:
        server = find_postmaster(workshop.copy / "data")
        if server is not None:
            await kill(server, clock)
        branches = HostBranches(workshop.host, clock, workshop.environ)
        await branches.sweep()
        for left in branches.list():
            await branches.delete(left.branch.name)
        await _end_agent(workshop.host.state, clock)
        for mount in mount_table.mounted():
            if Path(mount.mountpoint).is_relative_to(workshop.directory.resolve()):
                mount_table.unmount(mount.mountpoint, detach=True)
        with told_plainly():
            _remove(workshop.directory)
        if not workshop.host.sockets.is_relative_to(workshop.directory):
            # The common place for sockets of long paths: it goes when nobody else uses it.
            with contextlib.suppress(OSError):
                workshop.host.sockets.rmdir()
    finally:
        os.close(workshop.lock)


async def _end_agent(state: Path, clock: Clock) -> None:
    if not state.is_dir():
        return
    pid = await asyncio.to_thread(agent.ping, state)
    if pid is None:
        return
    started = start_time(pid)
    send(pid, started, signal.SIGTERM)
    deadline = clock.monotonic() + AGENT_SECONDS
    while is_alive(pid, started):
        if clock.monotonic() >= deadline:
            raise TimelineError(
                f"the drill's mount agent, process {pid}, does not end", hint="end it by hand"
            )
        await clock.sleep(_POLL_SECONDS)


def _workshop(place: Path, lock: int, environ: Mapping[str, str]) -> Workshop:
    own = {**environ, "TL_STATE": os.fspath(place / "tl"), "TL_CACHE": os.fspath(place / "cache")}
    return Workshop(place, lock, find_host(own), own)


def _remove(place: Path) -> None:
    """The lock goes last: whatever is left has one, and a drill that finds it can go on."""
    for entry in place.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != "lock":
            entry.unlink()
    (place / "lock").unlink()
    place.rmdir()


def _try_lock(place: Path, flags: int) -> int | None:
    """The lock; ``None`` when another drill has it, or the place has gone."""
    try:
        descriptor = os.open(place / "lock", flags | os.O_CLOEXEC, 0o600)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    if os.fstat(descriptor).st_nlink == 0:
        # Its owner removed it between our opening and our locking it.
        os.close(descriptor)
        return None
    return descriptor
