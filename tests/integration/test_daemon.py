"""``tl daemon`` beside real servers: it archives whatever else happens, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest

from tests.support.daemon_process import DaemonProcess, running_daemon
from tests.support.postgres import PostgresServer, scratch
from tests.support.tl_host import Host, make_host
from timeline.lsn import Lsn


@dataclass(frozen=True, slots=True)
class Place:
    """Two servers, each with a store, and the host that archives both."""

    directory: Path
    host: Host
    servers: dict[str, PostgresServer]
    config: Path

    def write(self, **more: str) -> None:
        """tl.toml: both clusters, with more tables."""
        text = '[daemon]\njitter = "0s"\nexpire = "off"\n'
        for name, server in self.servers.items():
            text += f'[cluster.{name}]\nstore = "file://{self.directory}/{name}"\nsource = {json.dumps(server.conninfo)}\n'
            text += f'[cluster.{name}.archive]\nfast_checkpoint = true\nmax_delay = "100ms"\n'
            text += f'[cluster.{name}.verify]\nstructure = "off"\ndata = "off"\n'
        self.config.write_text(text + "".join(more.values()))


@pytest.fixture
def place(make_postgres: Callable[..., PostgresServer]) -> Iterator[Place]:
    directory = scratch("tl-daemon-")
    servers = {"one": make_postgres(15), "two": make_postgres(15)}
    host = make_host(directory / "host", f"file://{directory}/unused", source="host=nowhere")
    for name, server in servers.items():
        host.tl("init", f"file://{directory}/{name}", "--source", server.conninfo)
        server.sql("create table t (i int)")
    yield Place(directory, host, servers, directory / "tl.toml")
    shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def notification_socket(path: Path) -> Iterator[tuple[socket.socket, list[str]]]:
    """A service manager's end: the socket, and the lines that have come so far."""
    heard: list[str] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(str(path))

        def listen() -> None:
            # The kernel holds ten datagrams for a socket that is not read.
            while text := notify.recv(4096):
                heard.extend(text.decode().split("\n"))

        listener = threading.Thread(target=listen, daemon=True)
        listener.start()
        try:
            yield notify, heard
        finally:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as closer:
                closer.sendto(b"", str(path))
            listener.join()


def stored(daemon: DaemonProcess, cluster: str, lsn: str) -> bool:
    archiver = daemon.archiver(cluster)
    return archiver is not None and archiver.durable is not None and archiver.durable >= Lsn.parse(lsn)


def insert(place: Place, name: str, count: int) -> str:
    place.servers[name].sql(f"insert into t select generate_series(1, {count})")
    return place.servers[name].position()


def rows_at_the_head(place: Place, name: str) -> int:
    made = place.host.tl(
        "branch", f"b-{name}", "--store", f"file://{place.directory}/{name}", "--mode", "copy"
    )
    with psycopg.connect(made["dsn"]) as connection:
        found = connection.execute("select count(*) from t").fetchone()
    place.host.tl("delete", f"b-{name}", "--yes")
    assert found is not None
    return int(found[0])


def test_two_clusters_a_failing_job_and_a_killed_archiver(place: Place) -> None:
    """What fails is said, told to the hook, and stops nobody; kill -9 loses nothing (P1, EDGE 3, EDGE 60)."""
    told = place.directory / "told"
    hook = f'["sh", "-c", "cat >> {told}", "x"]'
    broken = (
        f'[cluster.broken]\nstore = "file://{place.directory}/missing"\n[cluster.broken.archive]\nenabled = false\n'
        '[cluster.broken.verify]\nstructure = "off"\ndata = "off"\n'
        '[cluster.broken.snapshots]\nschedule = "every 1s"\n'
        f"[cluster.broken.hooks]\non_failure = {hook}\non_recovery = {hook}\n"
    )
    place.write(broken=broken, snapshots='[cluster.one.snapshots]\nevery = "1MiB"\n')
    with running_daemon(place.host, place.config) as daemon:
        for name in place.servers:
            lsn = insert(place, name, 1000)
            daemon.wait_for(f"WAL of {name}", lambda name=name, lsn=lsn: stored(daemon, name, lsn))  # type: ignore[misc]
        daemon.wait_for(
            "failure", lambda: (job := daemon.job("broken", "snapshot")) and job.failures_in_a_row
        )
        daemon.wait_for("hook", lambda: told.exists() and told.read_text().endswith("\n"))

        before = daemon.archiver("one")
        assert before is not None and before.pid is not None
        os.kill(before.pid, signal.SIGKILL)
        lsn = insert(place, "one", 500)
        daemon.wait_for(
            "restart",
            lambda: (now := daemon.archiver("one")) and now.restarts == 1 and stored(daemon, "one", lsn),
        )
        assert "killed by SIGKILL" in daemon.said()
        other = daemon.archiver("two")
        assert other is not None and other.restarts == 0

        # The store is there now; a job whose words were wrong waits for a reload.
        (place.directory / "missing").symlink_to(place.directory / "one")
        daemon.signal(signal.SIGHUP)
        daemon.wait_for("recovery", lambda: (job := daemon.job("broken", "snapshot")) and job.last_success)
        daemon.wait_for("second event", lambda: told.read_text().count("\n") == 2)
        events = [json.loads(line) for line in told.read_text().splitlines()]
        assert [(each["kind"], each["cluster"], each["job"]) for each in events] == [
            ("failure", "broken", "snapshot"),
            ("recovery", "broken", "snapshot"),
        ]
        assert "there is no store" in events[0]["message"]
        built = place.host.tl("status", "--store", f"file://{place.directory}/one")["snapshots"]
        kinds = [each["kind"] for each in built]
        assert kinds[0] == "base"
        assert "built" in kinds

        assert daemon.end() == 0
        assert daemon.relatives() == []
        assert "in flight is durable" in daemon.said()
    assert rows_at_the_head(place, "one") == 1500
    place.host.end_agent()


def test_reload_and_what_the_service_manager_hears(place: Place) -> None:
    """A bad file changes nothing, a good one only what differs; READY, WATCHDOG, RELOADING, STOPPING."""
    place.write()
    with (
        notification_socket(place.directory / "notify") as (notify, heard),
        running_daemon(place.host, place.config, notify) as daemon,
    ):
        daemon.wait_for("READY", lambda: "READY=1" in heard)
        daemon.wait_for("WATCHDOG", lambda: heard.count("WATCHDOG=1") > 2)
        lsn = insert(place, "two", 10)
        daemon.wait_for("WAL", lambda: stored(daemon, "two", lsn) and daemon.archiver("one"))
        first = {name: daemon.archiver(name) for name in place.servers}

        good = place.config.read_text()
        place.config.write_text(good.replace("max_delay", "max_dealy"))
        daemon.signal(signal.SIGHUP)
        daemon.wait_for("complaint", lambda: "not reloaded" in daemon.said())
        assert "did you mean 'max_delay'?" in daemon.said()
        daemon.wait_for("READY again", lambda: heard.count("READY=1") == 2)
        assert heard.index("RELOADING=1") < len(heard) - 1 - heard[::-1].index("READY=1")
        # Children started meanwhile work by the last good file.
        kept = Path(place.host.environment["TL_STATE"]) / "daemon" / "tl.toml"
        assert kept.read_text() == good

        place.config.write_text(good + '[cluster.two.snapshots]\nevery = "0"\n')
        daemon.signal(signal.SIGHUP)

        def replaced() -> bool:
            now, then = daemon.archiver("two"), first["two"]
            return now is not None and now.pid is not None and then is not None and now.pid != then.pid

        daemon.wait_for("another archiver of two", replaced)
        lsn = insert(place, "two", 10)
        daemon.wait_for("WAL after the reload", lambda: stored(daemon, "two", lsn))
        same, then = daemon.archiver("one"), first["one"]
        assert same is not None and then is not None and same.pid == then.pid
        assert daemon.end() == 0
        assert "STOPPING=1" in heard
        assert daemon.relatives() == []


def test_a_killed_daemon_leaves_no_archiver_that_stands_in_the_way(place: Place) -> None:
    """The orphan ends by itself, and the next daemon goes on where it was (P4: nobody is fenced)."""
    place.write()
    with running_daemon(place.host, place.config) as daemon:
        lsn = insert(place, "one", 10)
        daemon.wait_for("WAL", lambda: stored(daemon, "one", lsn))
        second = place.host.run("daemon", "--config", str(place.config))
        assert second.returncode == 2
        assert "another daemon" in second.stderr
        daemon.signal(signal.SIGKILL)
        daemon.process.wait()
        orphans = set(daemon.relatives())
        lsn = insert(place, "one", 10)
        with running_daemon(place.host, place.config) as successor:
            successor.wait_for("WAL of the successor", lambda: stored(successor, "one", lsn))
            archiver = successor.archiver("one")
            assert archiver is not None and archiver.restarts == 0
            memory = Path(f"/proc/{successor.process.pid}/status").read_text()
            resident = int(next(line for line in memory.splitlines() if line.startswith("VmRSS")).split()[1])
            assert resident < 60_000, "the daemon itself imports nothing heavy"
            maps = Path(f"/proc/{successor.process.pid}/maps").read_text()
            assert not any(name in maps for name in ("arrow", "libpq", "numpy"))
            # Each when it next tells its state, whether or not it stood in anybody's way.
            successor.wait_for(
                "the orphans' end", lambda: orphans.isdisjoint(successor.relatives()), seconds=30
            )
            assert successor.end() == 0
            assert successor.relatives() == []
