"""Metrics beside a real server: what they say is what the server says, and they say it whatever hangs."""

from __future__ import annotations

import asyncio
import http.client
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cli.config import read_clusters
from cli.gather import gather_source
from cli.metrics_feed import MetricsFeed, Paces, facts_command
from cli.metrics_server import Address
from cli.observed import ClusterState, DaemonState
from cli.status_result import slot_alarm
from tests.support.archiver import ArchiverProcess, flushed, make_store
from tests.support.observed_values import ARCHIVER
from tests.support.postgres import PostgresServer, scratch
from tests.support.tl_host import Host, make_host
from timeline.archive.slot import slot_name
from timeline.clock import SystemClock
from timeline.lsn import Lsn

CLOCK = SystemClock()
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]
_SECONDS = 60.0


def read_page(text: str) -> Samples:
    """Every sample, by name and labels."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


class Page:
    """Samples of one cluster."""

    def __init__(self, text: str, cluster: str) -> None:
        self.samples = read_page(text)
        self.cluster = cluster

    def get(self, name: str, **labels: str) -> float | None:
        """One value; ``None``: it is not told."""
        wanted = {"cluster": self.cluster, **labels}
        return self.samples.get((name, tuple(sorted(wanted.items()))))


@pytest.fixture(scope="module")
def host(make_postgres_session: Callable[..., PostgresServer]) -> Iterator[tuple[Host, PostgresServer]]:
    """A host with an archived store of a small server; nothing is archiving."""
    server = make_postgres_session(15, settings={"max_slot_wal_keep_size": "512MB"})
    place = scratch("tl-metrics-")
    host = make_host(place, f"file://{place}/store", source=server.conninfo)
    host.tl("init", host.store, "--source", server.conninfo)
    server.sql("create table t as select i, repeat('x', 100) from generate_series(1, 20000) i")
    host.tl("archive", "--once")
    yield host, server
    host.end_agent()
    host.tl("detach", "--yes")
    shutil.rmtree(place, ignore_errors=True)


def cluster_of(host: Host) -> ClusterState:
    """The one that ``tl init`` wrote into tl.toml."""
    (cluster,) = read_clusters(Path(host.environment["TL_CONFIG"]))
    return ClusterState(cluster.name, cluster.store or "", None, ())


def exposed(host: Host, *options: str) -> Page:
    """``tl status --prometheus``."""
    done = host.run("status", "--prometheus", *options)
    assert done.returncode == 0, done.stderr
    return Page(done.stdout, cluster_of(host).cluster)


def test_the_figures_are_the_servers_and_the_stores_own(host: tuple[Host, PostgresServer]) -> None:
    """EDGE 10."""
    tl, server = host
    durable = Lsn.parse(tl.tl("status")["durable"])
    server.sql("select pg_logical_emit_message(true, 'tl', repeat('x', 3000000))")
    # Now and then a server writes of its own accord: then its position was another one before than after.
    while True:
        end = Lsn.parse(server.position())
        began = time.time()
        page = exposed(tl, "--size")
        [(status, left)] = server.sql("select wal_status, safe_wal_size from pg_replication_slots")
        if Lsn.parse(server.position()) == end:
            break
    assert page.get("tl_lag_bytes") == end - durable > 3_000_000
    assert page.get("tl_durable_lsn_bytes") == durable
    assert page.get("tl_source_lsn_bytes") == end
    assert page.get("tl_slot_exists") == 1
    assert page.get("tl_slot_active") == 0
    assert page.get("tl_slot_wal_status", status=str(status)) == 1
    assert page.get("tl_slot_bytes_until_lost") == left
    assert page.get("tl_slot_limit_bytes") == 512 << 20
    assert page.get("tl_recoverable") == 1
    assert page.get("tl_snapshots", kind="base") == 1
    age = page.get("tl_base_backup_age_seconds")
    assert age is not None and 0 <= age < 600
    reachable = page.get("tl_reachable_end_timestamp_seconds")
    assert reachable is not None and began - 600 < reachable <= time.time()
    places = (("packs", "packs"), ("manifests", "manifests"), ("log", "branches"), ("chunks", "wal"))
    for kind, directory in places:
        root = Path(tl.store.removeprefix("file://")) / directory
        files = [path for path in root.rglob("*") if path.is_file()]
        assert page.get("tl_store_objects", kind=kind) == len(files) > 0
        assert page.get("tl_store_bytes", kind=kind) == sum(path.stat().st_size for path in files)
    ratio = page.get("tl_snapshot_stored_ratio")
    assert ratio is not None and 0 < ratio < 1
    distinct = page.get("tl_snapshot_distinct_ratio")
    assert distinct is not None and 0 < distinct <= 1
    assert page.get("tl_facts_failed", part="store") == 0


def test_status_shows_a_branch_with_what_it_fetched_and_wrote(host: tuple[Host, PostgresServer]) -> None:
    tl, _ = host
    tl.tl("branch", "seen", "--mode", "lazy")
    try:
        tl.run("psql", "seen", "--", "-c", "create table own as select generate_series(1, 100000)")
        (branch,) = tl.tl("status", "--size")["branches"]
        assert branch["name"] == "seen"
        # The mount's own; that of making the branch is counted elsewhere.
        assert 0 < branch["fetched_bytes"] < 10_000_000
        assert branch["own_bytes"] > 3_000_000
        assert branch["own_complete"]
        page = exposed(tl)
        fetched = page.get("tl_branch_fetched_bytes_total", branch="seen")
        assert fetched is not None and fetched >= branch["fetched_bytes"]
        assert page.get("tl_branches") == 1
        found = page.get("tl_branch_extents_total", branch="seen", found="store")
        assert found is not None and found > 0
        # A directory store is kept in no cache: it is on this host already.
        assert page.samples.get(("tl_cache_bytes", ()), 0) == 0
        shown = tl.run("status", "--size").stdout
        assert "branches   seen: " in shown
        assert "packs " in shown
    finally:
        tl.tl("delete", "seen", "--yes")


def test_a_source_that_is_gone_takes_nothing_but_its_own_facts(host: tuple[Host, PostgresServer]) -> None:
    tl, _ = host
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    page = exposed(tl, "--source", f"host=127.0.0.1 port={port} user=postgres dbname=postgres")
    assert page.get("tl_facts_failed", part="source") == 1
    assert page.get("tl_recoverable") == 1
    assert page.get("tl_lag_bytes") is None


def test_the_warning_precedes_the_loss(make_postgres: Callable[..., PostgresServer], tmp_path: Path) -> None:
    """EDGE 8, 10: nobody archives, the source writes on; what is told is what the server itself says."""
    url = make_store(tmp_path / "store")
    server = make_postgres(
        15,
        initdb=["--wal-segsize=1"],
        settings={"max_slot_wal_keep_size": "64MB", "min_wal_size": "2MB", "max_wal_size": "4MB"},
    )
    with ArchiverProcess(url, server.conninfo) as archiver:
        archiver.wait_until(lambda status: status["phase"] == "streaming")
        archiver.wait_durable(flushed(server))
        name = str(archiver.status["slot_name"])
        assert archiver.stop() == 0
    store_id = next(path for path in (tmp_path / "store").iterdir() if path.name == "tl.json").read_text()
    identity = store_id.split('"store_id":"')[1][:32]
    assert slot_name(identity) == name
    alarms: list[str | None] = []
    left: list[int] = []
    for _ in range(60):
        facts = asyncio.run(gather_source(server.conninfo, identity))
        [(status, safe)] = server.sql("select wal_status, safe_wal_size from pg_replication_slots")
        assert facts.slot is not None
        assert (facts.slot.wal_status, facts.slot.safe_bytes) == (status, safe)
        assert facts.keep_limit_bytes == 64 << 20
        alarms.append(slot_alarm(facts.slot, facts.keep_limit_bytes))
        if alarms[-1] == "lost":
            break
        left.append(int(str(safe)))
        server.sql(
            *["select pg_logical_emit_message(true, 'tl', repeat('x', 1000000))"] * 3,
            "select pg_switch_wal()",
            "checkpoint",
        )
    assert alarms[0] is None
    assert alarms[-1] == "lost"
    assert left == sorted(left, reverse=True)
    # The first alarm comes while there is room for WAL yet.
    assert alarms[len(alarms) - 1 - alarms[::-1].index(None) + 1] == "low"
    assert left[alarms.index("low")] > 3_000_000


def test_the_archiver_counts_its_uploads_and_knows_since_when_it_is_behind(
    postgres: PostgresServer, tmp_path: Path
) -> None:
    """EDGE 9."""
    url = make_store(tmp_path / "store")
    with ArchiverProcess(url, postgres.conninfo, faults=True) as archiver:
        archiver.wait_until(lambda status: status["phase"] == "streaming")
        archiver.wait_durable(flushed(postgres))
        archiver.wait_until(lambda status: status["behind_since"] is None and status["uploads"] > 0)
        archiver.command("fail")
        before = CLOCK.now()
        postgres.sql("create table t as select generate_series(1, 1000)")
        behind = archiver.wait_until(lambda status: status["upload_errors"] > 1 and status["behind_since"])
        assert before - 1_000_000 <= behind["behind_since"] <= CLOCK.now()
        # It stays since when, however long it takes.
        errors = behind["upload_errors"]
        later = archiver.wait_until(lambda status: status["upload_errors"] > errors)
        assert later["behind_since"] == behind["behind_since"]
        archiver.command("thaw")
        uploads = behind["uploads"]
        done = archiver.wait_until(
            lambda status: status["uploads"] > uploads and status["behind_since"] is None
        )
        assert done["upload_seconds"] > 0
        assert done["uploads"] == done["chunks"]


def ask(feed: MetricsFeed, path: str) -> tuple[int, str]:
    """(status, body)."""
    connection = http.client.HTTPConnection("127.0.0.1", feed.server.port, timeout=20)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


class Daemon:
    """What a daemon knows, as far as the metrics ask."""

    def __init__(self, cluster: ClusterState) -> None:
        self.state = DaemonState(os.getpid(), CLOCK.now(), CLOCK.now(), (cluster,))

    def __call__(self) -> DaemonState:
        return self.state


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Wait for it, at most ``_SECONDS``."""
    for _ in range(int(_SECONDS / 0.05)):
        if await condition():
            return
        await asyncio.sleep(0.05)
    raise AssertionError("it did not come to pass")


def children() -> set[str]:
    """Processes of ours that run ``tl status --facts``."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(stat[1]) == os.getpid() and stat[0] != "Z":
                found.add(entry.name)
    return found


def test_the_feed_shows_what_its_child_found_and_goes_on_showing_it(
    host: tuple[Host, PostgresServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then every child hangs: the page is served all the same, with facts that age."""
    tl, _ = host
    for name, text in tl.environment.items():
        monkeypatch.setenv(name, text)
    daemon = Daemon(cluster_of(tl))
    hanging = threading.Event()
    before = children()

    def command(cluster: ClusterState, *, size: bool, store_id: str | None) -> Sequence[str]:
        if hanging.is_set():
            return [sys.executable, "-c", "import time; time.sleep(1000)"]
        return facts_command(cluster, size=size, store_id=store_id)

    async def scenario() -> None:
        feed = MetricsFeed(
            Address("127.0.0.1", 0),
            daemon,
            CLOCK,
            paces=Paces(facts=0.2, size=3600, child=1.0, child_size=60),
            command=command,
        )
        feed.start()

        async def page() -> Page:
            status, text = await asyncio.to_thread(ask, feed, "/metrics")
            assert status == 200
            return Page(text, daemon.state.clusters[0].cluster)

        async def told() -> bool:
            return (await page()).get("tl_store_objects", kind="packs") is not None

        async def failed() -> bool:
            return (await page()).get("tl_facts_failed", part="store") == 1

        try:
            await until(told)
            first = await page()
            assert first.get("tl_recoverable") == 1
            assert first.get("tl_slot_limit_bytes") == 512 << 20
            hanging.set()
            await until(failed)
            last = await page()
            assert last.get("tl_recoverable") == 1
            assert last.get("tl_slot_bytes_until_lost") is not None
            age = last.get("tl_facts_age_seconds", part="store")

            async def older() -> bool:
                now = (await page()).get("tl_facts_age_seconds", part="store")
                return now is not None and age is not None and now > age + 1

            await until(older)
            assert (await asyncio.to_thread(ask, feed, "/healthz")) == (200, "ok\n")
        finally:
            await feed.aclose()

    asyncio.run(scenario())
    assert children() <= before


def test_a_store_that_accepts_and_never_answers(
    aws_environment: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The child asks it for real, and is ended."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as silent:
        config = tmp_path / "tl.toml"
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        config.write_text(f'[cluster.stuck]\nstore = "s3://bucket/x"\nendpoint_url = "{endpoint}"\n')
        monkeypatch.setenv("TL_CONFIG", str(config))
        monkeypatch.setenv("TL_STATE", str(tmp_path / "state"))
        daemon = Daemon(
            ClusterState("stuck", "s3://bucket/x", replace(ARCHIVER, reported_at=CLOCK.now()), ())
        )

        async def scenario() -> None:
            feed = MetricsFeed(
                Address("127.0.0.1", 0), daemon, CLOCK, paces=Paces(facts=0.2, child=3.0, child_size=3.0)
            )
            feed.start()

            async def failed() -> bool:
                status, text = await asyncio.to_thread(ask, feed, "/metrics")
                assert status == 200
                page = Page(text, "stuck")
                # What the archiver says is there all the time.
                assert page.get("tl_lag_bytes") == 8192
                return page.get("tl_facts_failed", part="store") == 1

            try:
                await until(failed)
            finally:
                await feed.aclose()

        before = children()
        asyncio.run(scenario())
        assert children() <= before


def test_ready_is_who_streams_and_is_hardly_behind() -> None:
    now = CLOCK.now()
    good = replace(ARCHIVER, reported_at=now, behind_since=None)
    daemon = Daemon(ClusterState("prod", "file:///x", good, ()))
    feed = MetricsFeed(Address("127.0.0.1", 0), daemon, CLOCK)

    def judged(**changes: object) -> tuple[bool, tuple[str, ...]]:
        archiver = replace(good, **changes)  # type: ignore[arg-type]
        cluster = replace(daemon.state.clusters[0], archiver=archiver)
        daemon.state = replace(daemon.state, clusters=(cluster, ClusterState("kept", "file:///y", None, ())))
        verdict = feed.readiness()
        return verdict.good, verdict.lines

    assert judged() == (True, ("ok",))
    assert judged(behind_since=now - 100_000_000)[0] is False
    assert judged(phase="catching up") == (False, ("prod: the archiver is not streaming (catching up)",))
    assert judged(pid=None)[0] is False
    assert judged(reported_at=now - 100_000_000)[0] is False
    nobody = MetricsFeed(Address("127.0.0.1", 0), lambda: None, CLOCK)
    assert nobody.readiness().good is False


def test_healthy_is_an_event_loop_that_turns() -> None:
    class Later(SystemClock):
        ahead = 0.0

        def monotonic(self) -> float:
            return super().monotonic() + self.ahead

    clock = Later()

    async def scenario() -> None:
        feed = MetricsFeed(Address("127.0.0.1", 0), lambda: None, clock)
        feed.start()
        try:
            await asyncio.sleep(0)
            assert ask_health(feed) == 200
            clock.ahead = 3600.0
            # The loop is held here: nobody beats.
            assert ask_health(feed) == 503
        finally:
            await feed.aclose()

    def ask_health(feed: MetricsFeed) -> int:
        return ask(feed, "/healthz")[0]

    asyncio.run(scenario())
