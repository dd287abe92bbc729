"""Branches of this host: make, start, stop, delete, list, expire.

One process works on a branch at a time (its lock); a second one is told to try again. A make that fails
or is cancelled leaves no process, mount, directory or name; one that is killed leaves debris, which the
next call of any of these removes. Postgres and the mount outlive the caller.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import sys
from collections.abc import AsyncGenerator, Mapping
from datetime import UTC, tzinfo
from pathlib import Path

from restore import agent, idle, mount_table
from restore.binaries import Binaries, find_binaries
from restore.branch_make import BranchMaker, ready_seconds
from restore.branch_request import (
    AUTO,
    DEFAULT_TTL_SECONDS,
    BranchRequest,
    BranchResult,
    BranchStatus,
    Listen,
    StoreAddress,
    dsn_of,
)
from restore.branch_scripts import Scripts, kept_scripts
from restore.branches import Branches
from restore.compute import Instance, Postmaster, find_postmaster, kill, launch, read_control, stop
from restore.host import Host, find_host, told_plainly
from restore.isolation import Endpoint
from restore.lazy_data import mount_stats, pin_note, remount_data, unmount_data
from restore.lazy_host import lazy_obstacle
from restore.local_branch import COPY, DELETING, LAZY, READY, LocalBranch, ScriptRun, Server
from restore.mount_damage import met_damage
from restore.process import is_alive
from restore.recovery import has_own_checkpoint
from restore.threads import to_the_end
from timeline.catalog.when import AtLsn, When
from timeline.clock import Clock
from timeline.errors import TimelineError, UsageError
from timeline.pg.control import ControlFile
from timeline.pg.errors import FormatError

FAILED = "failed"
"""Below the host's state directory: Postgres's logs of branches that could not be made …"""
FAILED_LOGS = 20
"""… and how many of them stay, the newest."""
_STOP_SECONDS = 60.0
_MODES = (AUTO, LAZY, COPY)
_IF_EXISTS = ("fail", "reuse", "reset")


class HostBranches:
    """The branches of one user on one host."""

    def __init__(self, host: Host, clock: Clock, environ: Mapping[str, str]) -> None:
        self.host = host
        self.registry = Branches(host, clock)
        self._clock = clock
        self._environ = environ

    @classmethod
    def of(cls, environ: Mapping[str, str], clock: Clock) -> HostBranches:
        """As the environment describes the host; raises UsageError."""
        return cls(find_host(environ), clock, environ)

    async def create(self, request: BranchRequest) -> BranchResult:
        """Make a branch and start it; raises what names the cause, and then leaves nothing behind.

        Where replay cannot begin at a built snapshot it begins at a base backup, and says so; an ``untouched`` branch raises
        FormatError instead, for its maker has to know where it began. A start that fails
        because the store is damaged raises DamagedStore, whatever Postgres made of it.
        """
        try:
            return await self._create(request)
        except FormatError as error:
            if request.stock or request.untouched:
                raise
            result = await self._create(dataclasses.replace(request, stock=True))
            return dataclasses.replace(
                result,
                warnings=(
                    *result.warnings,
                    f"replayed from a base backup instead of a snapshot: {error.message}",
                ),
            )

    async def _create(self, request: BranchRequest) -> BranchResult:
        began = self._clock.monotonic()
        _check(request)
        self.host.make()
        await self.sweep()
        existing = self.registry.find(request.name) if request.name is not None else None
        if existing is not None and request.if_exists == "reuse":
            _check_scripts(existing, request.scripts)
            return await self.start(existing.name)
        if existing is not None and request.if_exists == "reset":
            await self.delete(existing.name)
        mode = self._choose_mode(request)
        ttl = request.ttl_seconds
        if ttl is None and request.name is None:
            ttl = DEFAULT_TTL_SECONDS
        branch, lock = self.registry.reserve(
            request.name,
            mode=mode,
            expires=None if ttl is None else self._clock.now() + int(ttl * 1_000_000),
            # What is made for a short life is not worth waiting for the disk.
            durable=ttl is None or mode == COPY,
        )
        with lock:
            maker = BranchMaker(request, branch, self.registry, self._clock, self._environ)
            try:
                with told_plainly():
                    branch = dataclasses.replace(await maker.make(), phase=READY)
                    if request.stop_when_idle_seconds is not None:
                        begun = idle.begin(request.stop_when_idle_seconds, self._clock.now())
                        branch = dataclasses.replace(branch, idle=begun)
                    await self._register(branch)
                    self.registry.save(branch)
            except BaseException as error:
                damages = met_damage(self.registry.directory(branch.id) / "mount.log")
                if isinstance(error, TimelineError):
                    self._keep_log(branch, error)
                await asyncio.shield(self._remove(maker.branch))
                if damages and isinstance(error, TimelineError):
                    # Postgres saw no more than an I/O error.
                    raise damages[0] from error
                raise
        elapsed = self._clock.monotonic() - began
        requests, fetched = (maker.store.requests, maker.store.fetched_bytes) if maker.store else (0, 0)
        return self._result(branch, elapsed, requests, fetched)

    def _keep_log(self, branch: LocalBranch, error: TimelineError) -> None:
        """What the error refers to must outlive the branch."""
        log = self.registry.directory(branch.id) / "postgres.log"
        if error.hint is None or str(log) not in error.hint:
            return
        with contextlib.suppress(OSError):
            failed = self.host.state / FAILED
            failed.mkdir(exist_ok=True, mode=0o700)
            kept = failed / f"{branch.name}-{branch.id}.log"
            log.replace(kept)
            error.hint = error.hint.replace(str(log), str(kept))
            for old in sorted(failed.iterdir(), key=lambda path: path.stat().st_mtime)[:-FAILED_LOGS]:
                old.unlink(missing_ok=True)

    async def start(self, name: str) -> BranchResult:
        """Start a branch that is not running, after a stop, a crash or a reboot.

        Raises UsageError for one that a reboot made void.
        """
        began = self._clock.monotonic()
        branch = self.registry.get(name)
        with self.registry.lock(branch):
            branch = self.registry.reread(branch)
            if self._state(branch) != "running":
                with told_plainly():
                    branch = await self._start(branch)
                    if branch.idle is not None:
                        begun = idle.begin(branch.idle.after_seconds, self._clock.now())
                        branch = dataclasses.replace(branch, idle=begun)
                        self.registry.save(branch)
                        await self._register(branch)
        return self._result(branch, self._clock.monotonic() - began, 0, 0)

    async def stop(self, name: str) -> None:
        """Shut a branch down in an orderly way and unmount it; its data stays. No error when it is down."""
        branch = self.registry.get(name)
        with self.registry.lock(branch):
            branch = self.registry.reread(branch)
            branch = await self._shut_down(branch)
            if branch.idle is not None:
                await self._register(branch)

    @contextlib.asynccontextmanager
    async def taken_over(self, name: str) -> AsyncGenerator[LocalBranch, None]:
        """Shut down, and in nobody else's hands until it is deleted at the end."""
        branch = self.registry.get(name)
        with self.registry.lock(branch):
            branch = self.registry.reread(branch)
            try:
                branch = await self._shut_down(branch)
                yield branch
            finally:
                await asyncio.shield(self._remove(branch))

    async def _shut_down(self, branch: LocalBranch) -> LocalBranch:
        running = _postmaster(branch)
        if running is not None:
            await stop(running, self._clock, seconds=_STOP_SECONDS)
        await self._unmount(branch)
        return self._save_process(branch, None)

    async def delete(self, name: str) -> None:
        """Delete a branch with all its data; raises UsageError when it is protected."""
        branch = self.registry.get(name)
        with self.registry.lock(branch):
            branch = self.registry.reread(branch)
            if branch.protected:
                raise UsageError(
                    f"branch {name!r} is protected", hint=f"take that away first: tl protect --off {name}"
                )
            await self._remove(branch)

    async def reset(self, name: str, *, when: When | str | None = None, zone: tzinfo = UTC) -> BranchResult:
        """Delete a branch and make it again under its name, as of the same moment or another one.

        What it was made with is kept, and so is the rest of its time to live.
        """
        branch = self.registry.get(name)
        origin, server = branch.origin, _server(branch)
        if origin is None:
            raise TimelineError(f"branch {name!r} does not know where it comes from")
        left = None if branch.expires is None else max(1.0, (branch.expires - self._clock.now()) / 1e6)
        request = BranchRequest(
            store=StoreAddress(origin.store_url, origin.endpoint_url, origin.region),
            name=name,
            when=AtLsn(origin.lsn) if when is None else when,
            zone=zone,
            tli=origin.tli if when is None else None,
            parent=origin.parent,
            ttl_seconds=left,
            stop_when_idle_seconds=branch.idle.after_seconds if branch.idle else None,
            mode=branch.mode,
            listen=Listen(server.listen, server.port) if server.listen is not None else None,
            preload=branch.preload,
            scripts=kept_scripts(self.registry.directory(branch.id), branch.run),
        )
        await self.delete(name)
        return await self.create(request)

    def rename(self, name: str, new_name: str) -> None:
        """Give a branch another name; its connections are not disturbed."""
        branch = self.registry.get(name)
        with self.registry.lock(branch):
            self.registry.rename(self.registry.reread(branch), new_name)

    def protect(self, name: str, *, protected: bool) -> None:
        """Set or take away protection against deletion and expiry."""
        branch = self.registry.get(name)
        with self.registry.lock(branch):
            self.registry.save(dataclasses.replace(self.registry.reread(branch), protected=protected))

    def list(self) -> tuple[BranchStatus, ...]:
        """All branches with what they do right now."""
        return tuple(self._status(branch) for branch in self.registry.all())

    def status(self, name: str) -> BranchStatus:
        """One branch with what it does right now."""
        return self._status(self.registry.get(name))

    def log(self, name: str) -> Path:
        """Where a branch's server writes its log."""
        return self.registry.directory(self.registry.get(name).id) / "postgres.log"

    def describe(self, name: str) -> BranchResult:
        """A branch as ``create`` told it; what was fetched counts from the last start."""
        return self._result(self.registry.get(name), 0.0, 0, 0)

    async def expire(self) -> tuple[str, ...]:
        """Delete all branches whose time is over, but protected ones; their names."""
        await self.sweep()
        now = self._clock.now()
        expired = [each for each in self.registry.all() if each.has_expired(now) and not each.protected]
        for branch in expired:
            await self.delete(branch.name)
        return tuple(branch.name for branch in expired)

    async def stop_idle(self) -> tuple[str, ...]:
        """Stop the branches that nobody has been connected to for as long as they were told; their names.

        One that a client connects to in the moment between look and stop is stopped all the same. A branch that
        does not answer, or that another tl works on, is left for the next time.
        """
        stopped = []
        failure: TimelineError | None = None
        for branch in self.registry.all():
            if branch.idle is None or self._state(branch) != "running":
                continue
            if idle.next_look(branch.idle) > self._clock.now():
                continue
            try:
                if await self._is_idle(branch):
                    await self.stop(branch.name)
                    stopped.append(branch.name)
            except TimelineError as error:
                failure = error
        if failure is not None:
            raise failure
        return tuple(stopped)

    async def _is_idle(self, branch: LocalBranch) -> bool:
        """Look, and write down what was seen."""
        with self.registry.lock(branch):
            branch = self.registry.reread(branch)
            if branch.idle is None:
                return False
            server, now = _server(branch), self._clock.now()
            # Written first: what fails now is tried again at the next look, not at once.
            seen = dataclasses.replace(branch.idle, looked=now)
            try:
                endpoint = Endpoint(server.sockets, server.port, server.superuser)
                binaries = Binaries(server.major, Path(server.bin_directory))
                seen = idle.judge(branch.idle, await idle.look(endpoint, binaries), now)
            finally:
                branch = dataclasses.replace(branch, idle=seen)
                self.registry.save(branch)
                await self._register(branch)
            return idle.is_over(seen, now)

    async def sweep(self) -> tuple[str, ...]:
        """Remove what crashes of earlier calls left; the names they had."""
        names = []
        for branch, lock in self.registry.debris():
            with lock:
                await self._remove(branch)
            names.append(branch.name)
        return tuple(names)

    def _choose_mode(self, request: BranchRequest) -> str:
        if request.mode == COPY:
            return COPY
        obstacle = lazy_obstacle(self.host)
        if obstacle is None:
            return LAZY
        if request.mode == LAZY:
            raise UsageError(f"no lazy branch on this host: {obstacle}", hint="--mode copy works without")
        return COPY

    async def _start(self, branch: LocalBranch) -> LocalBranch:
        if branch.is_void(self.host.boot_id):
            raise UsageError(
                f"branch {branch.name!r} was made for a short life, and the host has been restarted since",
                hint="delete it and make it again",
            )
        server = _server(branch)
        directory = self.registry.directory(branch.id)
        left = _postmaster(branch)
        if left is not None:
            # Its mount died under it: it can neither serve nor shut down.
            await kill(left, self._clock)
        binaries = Binaries(server.major, Path(server.bin_directory))
        if not binaries.postgres.exists():
            binaries = find_binaries(server.major, self._environ)
        self.host.make()
        if not Path(server.sockets).is_dir():
            self.host.make_private(Path(server.sockets))
        if branch.mode == LAZY:
            await remount_data(directory, self.host)
        data = directory / "data"
        try:
            _check_resumable(branch, read_control(data))
        except UsageError:
            await self._unmount(branch)
            raise
        instance = Instance(self.host, binaries, data, directory / "postgres.log")
        starting = launch(instance)
        branch = self._save_process(branch, starting.postmaster)
        await starting.wait(self._clock, ready_seconds=ready_seconds(0))
        return branch

    async def _remove(self, branch: LocalBranch) -> None:
        """End its processes, unmount, delete everything. Whoever is interrupted here leaves debris."""
        directory = self.registry.directory(branch.id)
        self.registry.save(dataclasses.replace(branch, phase=DELETING))
        for running in (_postmaster(branch), find_postmaster(directory / "data")):
            if running is not None:
                await kill(running, self._clock)
        await self._unmount(branch)
        if branch.expires is not None or branch.idle is not None:
            await to_the_end(lambda: agent.unregister(self.host.state, branch.id))
        await to_the_end(lambda: self.registry.remove(branch))

    async def _unmount(self, branch: LocalBranch) -> None:
        if branch.mode == LAZY:
            await unmount_data(self.registry.directory(branch.id), self.host)

    def _save_process(self, branch: LocalBranch, postmaster: Postmaster | None) -> LocalBranch:
        server = dataclasses.replace(
            _server(branch),
            pid=postmaster.pid if postmaster else None,
            pid_started=postmaster.started if postmaster else None,
        )
        branch = dataclasses.replace(branch, server=server)
        self.registry.save(branch)
        return branch

    async def _register(self, branch: LocalBranch) -> None:
        """Have the agent run `tl expire` when the branch is next due for something."""
        due = [] if branch.expires is None else [branch.expires]
        if branch.idle is not None and branch.server is not None and branch.server.pid is not None:
            due.append(idle.next_look(branch.idle))
        if not due:
            if branch.idle is not None:
                await to_the_end(lambda: agent.unregister(self.host.state, branch.id))
            return
        root = os.fspath(Path(__file__).parent.parent)
        code = f"import sys; sys.path.insert(0, {root!r}); from cli.main import main; main()"
        command = [sys.executable, "-c", code, "expire"]
        place = {"TL_STATE": os.fspath(self.host.state), "TL_CACHE": os.fspath(self.host.cache)}
        await to_the_end(lambda: agent.register(self.host.state, branch.id, min(due), command, place))

    def _state(self, branch: LocalBranch) -> str:
        server = branch.server
        if server is None or server.pid is None:
            return "void" if branch.is_void(self.host.boot_id) else "stopped"
        alive = is_alive(server.pid, server.pid_started)
        data = self.registry.directory(branch.id) / "data"
        if alive and (branch.mode == COPY or _answers(data)):
            return "running"
        return "void" if branch.is_void(self.host.boot_id) else "broken"

    def _status(self, branch: LocalBranch) -> BranchStatus:
        pin = pin_note(self.registry.directory(branch.id)) if branch.mode == LAZY else None
        return BranchStatus(branch, self._state(branch), dsn_of(_server(branch)), pin)

    def _result(
        self, branch: LocalBranch, elapsed_seconds: float, requests: int, fetched_bytes: int
    ) -> BranchResult:
        origin, server = branch.origin, _server(branch)
        if origin is None:
            raise TimelineError(f"branch {branch.name!r} does not know where it comes from")
        directory = self.registry.directory(branch.id)
        stats = mount_stats(directory) if branch.mode == LAZY else None
        return BranchResult(
            name=branch.name,
            id=branch.id,
            parent=origin.parent,
            lsn=origin.lsn,
            time=origin.time,
            last_commit_time=origin.last_commit_time,
            next_commit_time=origin.next_commit_time,
            dsn=dsn_of(server),
            port=server.port,
            pid=server.pid,
            data_directory=str(directory / "data"),
            mode=branch.mode,
            expires=branch.expires,
            elapsed_seconds=elapsed_seconds,
            replayed_bytes=branch.replayed_bytes,
            fetched_bytes=fetched_bytes + (stats.fetched_bytes if stats else 0),
            requests=requests + (stats.requests if stats else 0),
            scripts=branch.run.scripts if branch.run else (),
            warnings=branch.warnings,
        )


def _check(request: BranchRequest) -> None:
    if request.mode not in _MODES:
        raise UsageError(f"no mode {request.mode!r}", hint=f"modes are {', '.join(_MODES)}")
    if request.if_exists not in _IF_EXISTS:
        raise UsageError(f"not a choice: {request.if_exists!r}", hint=f"choices are {', '.join(_IF_EXISTS)}")
    if request.ttl_seconds is not None and request.ttl_seconds <= 0:
        raise UsageError("a time to live must be positive")
    shortest = idle.SHORTEST_SECONDS
    if request.stop_when_idle_seconds is not None and request.stop_when_idle_seconds < shortest:
        raise UsageError(f"a branch is idle after {shortest} s without clients at the soonest")


def _check_scripts(existing: LocalBranch, scripts: Scripts) -> None:
    """Raise UsageError when a branch that would be used again was not made with the scripts asked for."""
    if scripts.scripts and (existing.run is None or _what_ran(existing.run) != _what_ran(scripts.run)):
        raise UsageError(
            f"branch {existing.name!r} was not made with these scripts",
            hint="--if-exists reset makes it anew with them",
        )


def _what_ran(run: ScriptRun | None) -> tuple[object, ...]:
    """Contents and place; where the files lie and how long they may take is no difference."""
    return () if run is None else (run.database, tuple(record.digest for record in run.scripts))


def _check_resumable(branch: LocalBranch, control: ControlFile) -> None:
    """Raise UsageError for a branch that ended before its first checkpoint (EDGE 57): after a built snapshot there are no
    full-page images to mend a page that was half written."""
    if branch.origin is not None and not has_own_checkpoint(control, branch.origin.tli):
        raise UsageError(
            f"branch {branch.name!r} ended before its first checkpoint was complete, and cannot be resumed",
            hint=f"make it again: tl reset {branch.name}",
        )


def _server(branch: LocalBranch) -> Server:
    if branch.server is None:
        raise TimelineError(f"branch {branch.name!r} was never planned")
    return branch.server


def _postmaster(branch: LocalBranch) -> Postmaster | None:
    """Its server, if that very process is alive."""
    server = branch.server
    if server is None or server.pid is None or not is_alive(server.pid, server.pid_started):
        return None
    return Postmaster(server.pid, server.pid_started or "")


def _answers(mountpoint: Path) -> bool:
    """Whether the mount there is alive; a dead one fails at once, with ENOTCONN.

    Asked for what the kernel keeps no copy of: names and attributes outlive the mount in its cache.
    """
    if mount_table.find(mountpoint) is None:
        return False
    with contextlib.suppress(OSError):
        os.statvfs(mountpoint)
        return True
    return False
