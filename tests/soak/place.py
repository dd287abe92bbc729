"""Everything a soak runs on: two servers, an S3 server behind a proxy, and a host with a daemon's configuration."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.soak.ledger import TABLE, Line
from tests.soak.plan import SoakPlan
from tests.support.clones import Clones, clones, promote, signal_standby, wait_for
from tests.support.ports import free_ports
from tests.support.postgres import PostgresServer, running_server, scratch
from tests.support.s3_proxy import S3Proxy, running_proxy
from tests.support.seaweed import Seaweed, credentials, running_seaweed
from tests.support.tl_host import Host, make_host
from timeline.lsn import Lsn

BUCKET = "soak"
URL = f"s3://{BUCKET}/store"
CLUSTER = "soak"
SETTINGS = {
    "wal_keep_size": "512MB",
    "synchronous_standby_names": "'tl'",
    # The load does not wait for the archiver, the ledger does.
    "synchronous_commit": "local",
    "checkpoint_timeout": "60s",
    "max_wal_size": "256MB",
}


@dataclass(slots=True)
class Place:
    """Changed only by failovers."""

    directory: Path
    host: Host
    """The daemon's."""
    desk: Host
    """Of whoever makes branches."""
    seaweed: Seaweed
    proxy: S3Proxy
    primary: PostgresServer
    standby: PostgresServer
    metrics_port: int
    plan: SoakPlan
    line: Line = field(default_factory=Line)

    @property
    def config(self) -> Path:
        """tl.toml."""
        return self.host.directory / "tl.toml"

    @property
    def conninfo(self) -> str:
        """Of whichever of the two takes writes."""
        servers = sorted((self.primary, self.standby), key=lambda server: server.port)
        return (
            f"host={','.join(str(server.sockets) for server in servers)} "
            f"port={','.join(str(server.port) for server in servers)} "
            "user=postgres dbname=postgres target_session_attrs=read-write"
        )

    def configure(self, *, drill_seconds: int) -> None:
        """Write tl.toml, with everything often."""
        window = self.plan.window_seconds
        self.config.write_text(
            f"""
[daemon]
metrics = "127.0.0.1:{self.metrics_port}"
jitter = "0s"
expire = "every 30s"
concurrency = 2
[cluster.{CLUSTER}]
store = "{URL}"
endpoint_url = "{self.proxy.endpoint_url}"
source = {json.dumps(self.conninfo)}
[cluster.{CLUSTER}.archive]
fast_checkpoint = true
max_delay = "500ms"
[cluster.{CLUSTER}.snapshots]
every = "6MiB"
[cluster.{CLUSTER}.backup]
schedule = "every {int(window)}s"
fast_checkpoint = true
[cluster.{CLUSTER}.retention]
schedule = "every {int(window / 3)}s"
window = "{int(window)}s"
grace = "{int(max(20, window / 6))}s"
keep_all = "{int(window)}s"
hourly = "1h"
[cluster.{CLUSTER}.verify]
structure = "every {int(window)}s"
data = "every {int(1.5 * window)}s"
[cluster.{CLUSTER}.drill]
schedule = "every {drill_seconds}s"
sql = ["select count(*) >= 0 from {TABLE}"]
"""
        )

    def fail_over(self, wait_for_commits: Callable[[], None]) -> Lsn:
        """The standby lacks the primary's last commits, the primary is killed, the standby takes over; where its
        line began. ``wait_for_commits``: until the primary has acknowledged some more."""
        server, follower = self.primary, self.standby
        follower.configure({"primary_conninfo": "'host=/nowhere'"})
        follower.tool("pg_ctl", "-D", str(follower.data), "reload")
        wait_for(lambda: not follower.sql("select 1 from pg_stat_wal_receiver where status = 'streaming'"))
        wait_for_commits()
        server.kill9()
        promote(follower)
        self.primary, self.standby = follower, server
        tli = int(follower.value("select substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8)"), 16)
        history = (follower.data / "pg_wal" / f"{tli:08X}.history").read_text().strip().splitlines()[-1]
        left, fork = history.split("\t")[:2]
        self.line.left(int(left), Lsn.parse(fork))
        return Lsn.parse(fork)

    def renew_standby(self) -> None:
        """The killed server comes back as a standby of the new one, from a copy."""
        server = self.standby
        shutil.rmtree(server.data)
        self.primary.tool(
            "pg_basebackup", "-D", str(server.data), "-X", "stream", "-c", "fast",
            "-h", str(self.primary.sockets), "-p", str(self.primary.port), "-U", "postgres",
        )  # fmt: skip
        server.configure(
            {
                "port": str(server.port),
                "unix_socket_directories": f"'{server.sockets}'",
                "primary_conninfo": f"'host={self.primary.sockets} port={self.primary.port} user=postgres'",
            }
        )
        # Not pg_basebackup -R: what it writes to postgresql.auto.conf the next failover could not change.
        signal_standby(server)
        server.start()


@contextlib.contextmanager
def soak_place(plan: SoakPlan) -> Iterator[Place]:
    """Everything started, the store made and nothing archived yet; all of it gone afterwards."""
    with contextlib.ExitStack() as stack:
        directory = scratch("tl-soak-")
        stack.enter_context(credentials())
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        seaweed = stack.enter_context(running_seaweed())
        seaweed.make_bucket(BUCKET)
        proxy = stack.enter_context(running_proxy(seaweed.endpoint_url))
        primary = stack.enter_context(running_server(15, settings=SETTINGS))
        standby = _standby(stack.enter_context(clones()), primary)
        hosts = [
            make_host(directory / name, URL, endpoint_url=proxy.endpoint_url) for name in ("host", "desk")
        ]
        for host in hosts:
            stack.callback(host.end_agent)
            (host.directory / "tmp").mkdir(mode=0o1777)
            (host.directory / "tmp").chmod(0o1777)
            host.environment["TMPDIR"] = str(host.directory / "tmp")
        place = Place(
            directory=directory,
            host=hosts[0],
            desk=hosts[1],
            seaweed=seaweed,
            proxy=proxy,
            primary=primary,
            standby=standby,
            metrics_port=free_ports(1)[0],
            plan=plan,
        )
        primary.sql(f"create table {TABLE} (id bigint primary key)")
        primary.tool("pgbench", "-i", "-q", "-s", "1", "-h", str(primary.sockets), "-p", str(primary.port),
                     "-U", "postgres", "postgres")  # fmt: skip
        hosts[0].tl("init", URL, "--source", place.conninfo)
        yield place


def _standby(cloning: Clones, primary: PostgresServer) -> PostgresServer:
    primary.stop()
    standby = cloning.make(primary, standby=True)
    primary.start()
    standby.start()
    return standby
