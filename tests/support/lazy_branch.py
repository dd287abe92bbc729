"""A vanilla Postgres on a lazily mounted snapshot of a stopped cluster: mount, agent and overlay without WAL to replay."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from restore import agent, mount_table
from restore.mount_spec import MountSpec, MountStats, encode_spec, read_stats
from restore.overlay import Overlay
from tests.support.plain_snapshot import store_directory
from tests.support.postgres import PostgresServer, scratch
from timeline.clock import SystemClock
from timeline.format.branch_state import Snapshot
from timeline.store.open import open_store

SETTINGS = """
fsync = on
synchronous_commit = off
recovery_init_sync_method = syncfs
listen_addresses = ''
shared_buffers = 32MB
autovacuum = off
log_min_messages = warning
"""


@dataclass(frozen=True, slots=True)
class StoredCluster:
    """A stopped cluster, and its snapshot in a store."""

    server: PostgresServer
    store_url: str
    endpoint_url: str | None
    snapshot: Snapshot


def store_cluster(
    server: PostgresServer, store_url: str, *, endpoint_url: str | None = None, boot: tuple[str, ...] = ()
) -> StoredCluster:
    """Put a stopped cluster's data directory in a store."""

    async def put() -> Snapshot:
        store = await open_store(store_url, endpoint_url=endpoint_url)
        try:
            return await store_directory(store, server.data, SystemClock(), boot=boot)
        finally:
            await store.aclose()

    return StoredCluster(server, store_url, endpoint_url, asyncio.run(put()))


class LazyBranch:
    """One branch: overlay, mount from an agent of its own state directory, Postgres."""

    def __init__(self, cluster: StoredCluster, state: Path, cache: Path | None, **spec: Any) -> None:
        self.directory = scratch("tl-branch-")
        self.state = state
        self.server = PostgresServer(cluster.server.major, self.directory)
        user = self.server.user
        wal = self.directory / "wal"
        shutil.copytree(cluster.server.data / "pg_wal", wal)
        for path in (wal, *wal.rglob("*")):
            os.chown(path, user.pw_uid, user.pw_gid)
        self.server.data.mkdir()
        overlay = Overlay.create(self.directory / "overlay")
        overlay.symlink("pg_wal", str(wal))
        lines = (cluster.server.data / "postgresql.conf").read_text() + SETTINGS
        lines += f"port = {self.server.port}\nunix_socket_directories = '{self.server.sockets}'\n"
        overlay.put_file("postgresql.conf", lines.encode())
        self.spec = MountSpec(
            store_url=cluster.store_url,
            endpoint_url=cluster.endpoint_url,
            snapshot=cluster.snapshot,
            overlay=str(self.directory / "overlay"),
            mountpoint=str(self.server.data),
            uid=user.pw_uid,
            gid=user.pw_gid,
            durable=False,
            log=str(self.directory / "mount.log"),
            stats=str(self.directory / "stats.json"),
            cache=None if cache is None else str(cache),
        )
        self.spec = replace(self.spec, **spec)
        self.spec_path = self.directory / "mount.json"
        self.spec_path.write_bytes(encode_spec(self.spec))

    def mount(self) -> int:
        """Pid of the mount process."""
        return agent.mount(self.state, self.spec_path)

    def unmount(self) -> None:
        """Unmount in order."""
        agent.unmount(self.state, self.server.data)

    def kill_mount(self) -> None:
        """As the kernel's out-of-memory killer would."""
        [mount] = [m for m in agent.mounts(self.state) if m.mountpoint == self.spec.mountpoint]
        os.kill(mount.pid, signal.SIGKILL)
        wait_until(lambda: all(m.pid != mount.pid for m in agent.mounts(self.state)))

    def stats(self) -> MountStats:
        """Counters of the mount, not older than a second."""
        found = read_stats(self.spec.stats)
        assert found is not None
        return found

    def log(self) -> str:
        """What the mount logged."""
        return Path(self.spec.log).read_text()

    def close(self) -> None:
        """End everything, whatever state it is in."""
        self.server.kill9()
        with contextlib.suppress(Exception):
            self.unmount()
        mount_table.unmount(self.server.data, detach=True)
        shutil.rmtree(self.directory, ignore_errors=True)


@contextlib.contextmanager
def lazy_branch(cluster: StoredCluster, state: Path, cache: Path | None, **spec: Any) -> Iterator[LazyBranch]:
    """A branch, mounted, not started; ended at the end."""
    branch = LazyBranch(cluster, state, cache, **spec)
    try:
        branch.mount()
        yield branch
    finally:
        branch.close()


def wait_until(condition: Any, seconds: float = 10.0) -> None:
    """Poll until it holds; fails when it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


@contextlib.contextmanager
def agent_state() -> Iterator[Path]:
    """A state directory with an agent of its own, which is ended at the end."""
    state = scratch("tl-state-")
    try:
        yield state
    finally:
        pid = agent.ping(state)
        if pid is not None:
            os.kill(pid, signal.SIGTERM)
            wait_until(lambda: agent.ping(state) is None, 40.0)
        shutil.rmtree(state, ignore_errors=True)
