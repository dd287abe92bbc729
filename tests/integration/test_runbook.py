"""RUNBOOK.md, word for word, against incidents that have really happened.

Each section's shell blocks run in order (tests/support/runbook.py says how); what they are said to print they must print, and
what came of them is looked at from outside.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
import pytest
import yaml

from tests.fix_stores import BUCKET, fresh_prefix
from tests.support.postgres import PostgresServer, bin_dir, free_port, scratch
from tests.support.runbook import RUNBOOK, Block, Incident, anchor, end_service, make_stand_ins, read_blocks
from tests.support.seaweed import Seaweed
from tests.support.tl_host import TL, Host, make_host
from timeline.catalog.branch_log import BranchLog, read_head
from timeline.clock import SystemClock
from timeline.format import keys
from timeline.lsn import Lsn
from timeline.maintain.seal import seal
from timeline.store.local import LocalStore

ROOT = Path(__file__).parents[2]
TEXT = RUNBOOK.read_text()
BLOCKS = read_blocks(TEXT)
MakePostgres = Callable[..., PostgresServer]
_SECONDS = 90.0
_PARTS = ("**You notice.**", "**Now", "**It worked when**", "**Lost.**", "**Afterwards.**")
_OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
_CONFIG = """
[daemon]
jitter = "0s"
expire = "off"
[cluster.prod]
store = "{store}"
source = {source}
[cluster.prod.archive]
fast_checkpoint = true
max_delay = "100ms"
[cluster.prod.snapshots]
every = "0"
[cluster.prod.verify]
structure = "off"
data = "off"
"""


# The page itself.


def sections() -> dict[str, str]:
    """Text of each section by the name that links have."""
    parts = re.split(r"^## (.+)$", TEXT, flags=re.MULTILINE)
    return {anchor(title): text for title, text in zip(parts[1::2], parts[2::2], strict=True)}


INCIDENTS = [name for name in sections() if name != "which-page"]


@pytest.mark.parametrize("name", INCIDENTS)
def test_every_page_has_its_five_parts_in_order(name: str) -> None:
    text = sections()[name]
    places = [text.find(part) for part in _PARTS]
    assert -1 not in places and places == sorted(places), dict(zip(_PARTS, places, strict=True))


def test_links_lead_somewhere() -> None:
    linked = set(re.findall(r"\]\(#([\w-]+)\)", TEXT))
    assert linked and linked <= set(sections())
    assert set(INCIDENTS) - {"postgresql-gets-a-new-major-version", "tl-gets-a-new-version"} - linked == {
        "leaving-tl-for-good"
    }, "every incident is in the table"


def test_every_alert_has_a_page() -> None:
    rules = yaml.safe_load((ROOT / "cli/alerts.yml").read_text())["groups"][0]["rules"]
    assert {rule["alert"] for rule in rules} == set(re.findall(r"`(Tl[A-Z]\w+)`", TEXT))


def test_every_exit_code_has_a_page() -> None:
    table = sections()["which-page"]
    assert all(re.search(rf"exit codes? (?:\d and )?{code}\b", table) for code in range(1, 8))


@pytest.mark.parametrize("name", sorted({block.section for block in BLOCKS if block.name}))
def test_every_page_is_run(name: str) -> None:
    """By the test of its name, which runs every block of it."""
    assert f"test_{name.replace('-', '_')}" in globals()


def test_variables_are_introduced() -> None:
    used = {name for block in BLOCKS for name in re.findall(r"\$\{?([A-Z]\w+)", block.script)}
    set_before = {
        name for block in BLOCKS if block.reason for name in re.findall(r"\b([A-Z_]+)=", block.script)
    }
    assert used and used <= set_before


@functools.cache
def help_of(command: str) -> str:
    """What ``tl COMMAND --help`` prints."""
    done = subprocess.run([TL, command, "--help"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"RUNBOOK.md names tl {command}: {done.stderr}"
    return done.stdout


def test_commands_of_the_prose_exist() -> None:
    spans = [span for span in re.findall(r"`([^`\n]+)`", TEXT) if span.startswith("tl ")]
    lines = [line.strip() for block in BLOCKS for line in block.script.splitlines() if line.startswith("tl ")]
    assert len(spans) > 20 and len(lines) > 20
    for said in {*spans, *lines}:
        known = set(_OPTION.findall(help_of(said.split()[1])))
        assert set(_OPTION.findall(said.split("#")[0])) <= known, said


def test_keys_of_tl_toml_exist() -> None:
    reference = (ROOT / "cli/tl.toml.example").read_text()
    for table in re.findall(r"`\[cluster\.prod\.(\w+)\]`", TEXT):
        assert f"[cluster.example.{table}]" in reference


def test_a_page_is_read_strictly() -> None:
    with pytest.raises(ValueError, match="without a comment"):
        read_blocks("## A\n```sh\ntl status\n```\n")
    with pytest.raises(ValueError, match="no block prints"):
        read_blocks("## A\n<!-- not run: so -->\n```sh\ntl status\n```\n```text\nx\n```\n")
    (block,) = read_blocks("## A b\n<!-- run: x, exit 4 -->\n```sh\ntl status\n```\n\n```text\ny\n```\n")
    assert block == Block("a-b", "x", None, 4, "tl status\n", ("y",))


# A production.


@dataclass(slots=True)
class Site:
    """Production, its store, and the host with tl.toml from which somebody works."""

    directory: Path
    server: PostgresServer
    host: Host
    programs: Path
    store: Path
    extra: list[str] = field(default_factory=list)
    """More of tl.toml."""

    def configure(self, *more: str) -> None:
        """Write tl.toml, with these tables added for good."""
        self.extra += more
        text = _CONFIG.format(store=f"file://{self.store}", source=json.dumps(self.server.conninfo))
        (self.host.directory / "tl.toml").write_text(text + "".join(self.extra))

    @property
    def app(self) -> str:
        """Conninfo of the application's database."""
        return self.server.conninfo.replace("dbname=postgres", "dbname=app")

    def incident(self, section: str, **variables: object) -> Incident:
        """That page, with these variables besides PATH, PGDATA and PROD."""
        environment = self.host.environment | {name: str(value) for name, value in variables.items()}
        return Incident(section, self.directory, environment)

    def sql(self, *statements: str) -> list[tuple[object, ...]]:
        """In the application's database."""
        return self.server.sql(*statements, dbname="app")

    def orders(self) -> int:
        """Rows of the table, in production."""
        return int(self.server.value("select count(*) from orders", dbname="app"))

    def add(self, count: int = 100) -> str:
        """Some orders; production's time after they were committed."""
        self.sql(f"insert into orders (price) select n from generate_series(1, {count}) n")
        return self.time()

    def time(self) -> str:
        """Production's clock, a moment after everything that was committed."""
        [(now,)] = self.sql("select clock_timestamp()::text from pg_sleep(0.01)")
        self.sql("select pg_sleep(0.01)")
        return str(now)

    def serve(self) -> None:
        """Start the daemon, and wait until everything is archived."""
        self.manage("start")
        self.settle()

    def manage(self, verb: str) -> None:
        """``systemctl VERB tl-daemon``."""
        subprocess.run(
            [str(self.programs / "systemctl"), verb, "tl-daemon"],
            env=self.host.environment,
            timeout=90,
            check=True,
        )

    def settle(self) -> None:
        """Until a base backup and all WAL are in the store."""
        goal = Lsn.parse(self.server.position())
        self.wait(lambda status: status["recoverable"] and Lsn.parse(status["durable"]) >= goal)

    def wait(self, condition: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
        """Until ``tl status`` says so."""
        deadline = time.monotonic() + _SECONDS
        while True:
            done = self.host.run("status", "--json", "--cluster", "prod")
            status = json.loads(done.stdout) if done.returncode == 0 else {}
            if status and condition(status):
                return dict(status)
            log = self.programs / "daemon.log"
            assert time.monotonic() < deadline, (
                done.stdout,
                done.stderr,
                log.read_text() if log.exists() else "",
            )
            time.sleep(0.1)

    def archive_once(self) -> None:
        """Without a daemon."""
        self.host.tl("archive", "--once", "--cluster", "prod")

    def seal(self) -> None:
        """Move what can be moved from chunks to packs."""

        async def run() -> None:
            store = LocalStore(self.store)
            try:
                await seal(store, BranchLog(store, "main", SystemClock(), "test"), SystemClock(), force=True)
            finally:
                await store.aclose()

        asyncio.run(run())

    def lose_host(self) -> None:
        """The server dies, and its files are gone."""
        self.server.kill9()
        shutil.rmtree(self.server.data)

    def end(self) -> None:
        """Whatever is still running."""
        end_service(self.programs)
        for branch in self.host.branches():
            self.host.run("delete", branch["name"], "--yes")
        self.host.end_agent()


SetUp = Callable[..., Site]


@pytest.fixture
def set_up(make_postgres: MakePostgres) -> Iterator[SetUp]:
    """Factory of a production with 1,000 orders: ``set_up(settings={…})``."""
    directory = scratch("tl-rb-")
    sites: list[Site] = []

    def make(*, settings: Mapping[str, str] | None = None, initdb: tuple[str, ...] = ()) -> Site:
        server = make_postgres(15, settings=settings, initdb=initdb)
        server.sql("create database app")
        programs = make_stand_ins(directory / "programs", server)
        host = make_host(directory / "host", "")
        for name in ("TL_STORE", "TL_SOURCE"):
            host.environment.pop(name, None)
        site = Site(directory, server, host, programs, directory / "store")
        path = [programs, Path(TL).parent, server.bin]
        host.environment.update(
            {
                "PATH": os.pathsep.join([*map(str, path), os.environ["PATH"]]),
                "PGDATA": str(server.data),
                "PROD": site.app,
                "TZ": "UTC",
            }
        )
        site.sql("create table orders (id int generated always as identity primary key, price numeric)")
        site.add(1000)
        host.tl("init", f"file://{site.store}", "--source", server.conninfo, "--no-save")
        site.configure()
        sites.append(site)
        return site

    yield make
    for site in sites:
        site.end()
    shutil.rmtree(directory, ignore_errors=True)


def flip(path: Path) -> None:
    """One byte in the middle becomes another."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 0xFF]))


def largest_pack(store: Path) -> Path:
    """The pack with the base backup's pages."""
    return max(
        (path for path in (store / "packs").rglob("*") if path.is_file()),
        key=lambda path: path.stat().st_size,
    )


def counts(output: str) -> list[str]:
    """Lines that are figures."""
    return re.findall(r"^\s*(\d+)\s*$", output, re.MULTILINE)


# The incidents.


def test_a_table_was_dropped(set_up: SetUp) -> None:
    site = set_up()
    site.archive_once()
    early = site.time()
    site.add(10)
    late = site.time()
    site.sql("drop table orders")
    site.archive_once()
    page = site.incident("a-table-was-dropped", WHEN=early, LATER=late)
    assert counts(page.run("look")) == ["1000"]
    assert counts(page.run("closer")) == ["1010"]
    page.run("copy-back")
    assert page.run("check") == "1010|1010\n1010|1010\n"
    [(number,)] = site.sql("insert into orders (price) values (1) returning id")
    assert int(str(number)) > 1010, "its sequence is back"
    page.run("afterwards")
    page.finish()
    assert site.host.branches() == []


@pytest.mark.slow
def test_rows_were_deleted_or_changed(set_up: SetUp) -> None:
    site = set_up()
    site.archive_once()
    before = site.time()
    site.sql("delete from orders where id between 100 and 299", "update orders set price = 7 where id = 1")
    site.add(5)
    site.archive_once()
    page = site.incident("rows-were-deleted-or-changed", WHEN=before)
    assert counts(page.run("look")) == ["1000"]
    assert counts(page.run("beside")) == ["200"]
    page.run("put-back")
    assert page.run("check") == "0\n"
    assert site.orders() == 1005
    assert site.sql("select price from orders where id = 1") == [(7,)], "what is there stays"
    [update] = re.findall(r"^```sql\n(UPDATE .*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    site.sql(update)
    assert site.sql("select price from orders where id = 1") == [(1,)]
    page.run("afterwards")
    page.finish()
    assert site.host.branches() == []
    assert site.sql("select to_regclass('orders_then')") == [(None,)]


@pytest.mark.slow
def test_the_host_of_the_source_is_lost(set_up: SetUp) -> None:
    """EDGE 15, 17: and the present line goes on in the same store."""
    site = set_up()
    site.serve()
    site.add(50)
    site.settle()
    site.lose_host()
    page = site.incident("the-host-of-the-source-is-lost")
    page.run("stop")
    page.run("restore")
    assert site.orders() == 1050
    site.add(1)
    page.run("archive")
    checked = page.run("check").splitlines()
    assert checked[0].startswith("f|00000002") and checked[0].endswith("|1051") and "1051" in checked[1:]
    page.run("afterwards")
    page.finish()
    auto = (site.server.data / "postgresql.auto.conf").read_text()
    assert "recovery" not in auto and "hot_standby" not in auto and "archive_mode" not in auto
    assert [one["kind"] for one in site.host.tl("status")["snapshots"]] == ["base", "base"]


@pytest.mark.slow
def test_the_region_is_lost(set_up: SetUp, seaweed: Seaweed) -> None:
    """EDGE 63: replicated without order; a manifest of sealed WAL is missing, and newer objects are there."""
    site = set_up()
    site.archive_once()
    site.add(20)
    site.archive_once()
    site.seal()
    site.add(30)
    site.archive_once()
    site.seal()
    site.add(40)
    site.archive_once()
    site.seal()
    head = asyncio.run(read_head(LocalStore(site.store), "main"))
    assert head is not None
    lost = keys.manifest(head.state.sealed[-1].manifest.digest)
    prefix, client = fresh_prefix(), seaweed.client()
    for path in site.store.rglob("*"):
        key = path.relative_to(site.store).as_posix()
        if path.is_file() and not key.startswith(".") and key != lost:
            client.put_object(Bucket=BUCKET, Key=f"{prefix}/{key}", Body=path.read_bytes())
    site.lose_host()
    shutil.rmtree(site.store)
    site.configure(
        f'[cluster.replica]\nstore = "s3://{BUCKET}/{prefix}"\nendpoint_url = "{seaweed.endpoint_url}"\n'
    )
    site.host.environment.update(
        {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    )
    new = site.directory / "new"
    # What its reader takes from line 1 of `tl status`.
    [known] = site.host.tl("status", "--cluster", "replica")["ranges"]
    page = site.incident("the-region-is-lost", WHEN=known["last_time"], NEW_STORE=f"file://{new}")
    page.run("look")
    assert lost in page.run("verify")
    assert ", 0 failed" in page.run("drill")
    page.run("restore")
    restored = site.orders()
    assert restored in (1020, 1050), "as far as is known for certain, and nothing from beyond the hole"
    page.run("archive")
    page.run("check")
    page.finish()
    assert site.orders() == restored


def test_the_slot_is_lost(set_up: SetUp) -> None:
    """EDGE 8: the daemon was down for too long."""
    site = set_up(settings={"max_slot_wal_keep_size": "64MB", "min_wal_size": "32MB", "max_wal_size": "32MB"})
    site.serve()
    before = site.server.position()
    site.manage("stop")
    inside = site.add(1)
    for _ in range(20):
        site.sql(
            "select pg_logical_emit_message(true, 'x', repeat('x', 1000000))",
            "select pg_switch_wal()",
            "checkpoint",
        )
        if site.server.sql("select from pg_replication_slots where wal_status = 'lost'"):
            break
    site.manage("start")
    page = site.incident("the-slot-is-lost")
    page.run("look")
    page.run("mend")
    page.run("check")
    page.finish()
    refused = site.host.run("branch", "--at", inside)
    assert refused.returncode == 3, refused.stderr
    site.host.tl("branch", "old", "--at", before)
    assert Lsn.parse(site.host.tl("branch", "new")["lsn"]) > Lsn.parse(before)


def test_the_archiver_is_fenced(set_up: SetUp) -> None:
    """P4, EDGE 11: the archiver slept through another one's take-over."""
    site = set_up()
    site.serve()
    mine = site.wait(lambda status: status["daemon"]["archiver"]["pid"])["daemon"]["archiver"]["pid"]
    os.kill(mine, signal.SIGSTOP)
    try:
        [(walsender,)] = site.sql("select pg_terminate_backend(pid) from pg_stat_replication")
        assert walsender
        other = make_host(site.directory / "other", f"file://{site.store}", source=site.server.conninfo)
        rival = other.start_archiver("--snapshot-every", "0")
        try:
            site.wait(lambda status: status["slot"]["active"])
            site.add(5)
            site.settle()
            os.kill(mine, signal.SIGCONT)
            site.wait(lambda status: status["daemon"]["archiver"]["phase"] == "fenced")
            page = site.incident("the-archiver-is-fenced")
            page.run("look")
            assert "streaming" in page.run("who")
        finally:
            rival.terminate()
            assert rival.wait(60) == 0
    finally:
        try:
            os.kill(mine, signal.SIGCONT)
        except ProcessLookupError:
            pass
    page.run("take-back")
    page.run("check")
    page.finish()
    assert site.sql("select count(*) from pg_stat_replication") == [(1,)]


@pytest.mark.slow
def test_the_store_is_damaged(set_up: SetUp) -> None:
    """P5: a byte of the base backup's pages flips; the future is made safe, then the past mended."""
    site = set_up()
    site.archive_once()
    replica = site.directory / "replica"
    shutil.copytree(site.store, replica)
    pack = largest_pack(site.store)
    flip(pack)
    key = pack.relative_to(site.store).as_posix()
    page = site.incident("the-store-is-damaged", STORE=site.store, REPLICA=replica, KEY=key)
    page.run("anew")
    site.archive_once()
    assert key in page.run("look")
    # The new base backup names nothing of the damaged pack.
    site.host.tl("branch", "safe", "--mode", "copy")
    site.host.tl("delete", "safe", "--yes")
    page.run("mend")
    try:
        page.run("check")
    finally:
        Path("/var/tmp/damaged-object").unlink()
    page.finish()


@pytest.mark.slow
def test_a_drill_failed(set_up: SetUp) -> None:
    site = set_up()
    (site.directory / "checks.sql").write_text("-- database: app\nselect count(*) > 990 from orders")
    site.archive_once()
    site.sql("delete from orders where id > 500")
    bad = site.time()
    site.add(600)
    site.archive_once()
    assert site.host.run("drill", "--at", bad, "--sql", str(site.directory / "checks.sql")).returncode == 6
    page = site.incident("a-drill-failed", WHEN=bad)
    assert "checks.sql" in page.run("look")
    page.run("again")
    assert counts(page.run("inspect")) == ["500"]
    page.run("check")
    page.finish()
    assert site.host.branches() == []


@pytest.mark.slow
def test_a_disk_is_filling(set_up: SetUp) -> None:
    """EDGE 10, 51: WAL held by the slot, branches and cache, history beyond the window."""
    site = set_up()
    site.serve()
    site.manage("stop")
    site.sql("select pg_logical_emit_message(true, 'x', repeat('x', 100000))", "select pg_switch_wal()")
    [(behind,)] = site.sql("select restart_lsn::text from pg_replication_slots")
    page = site.incident("a-disk-is-filling", TL_CACHE=site.host.environment["TL_CACHE"])
    assert re.search(r"tl_\w+_main \| f", page.run("slot"))
    page.run("archiver")
    [(now,)] = site.sql("select restart_lsn::text from pg_replication_slots")
    assert Lsn.parse(str(now)) > Lsn.parse(str(behind))
    page.run("give-up")
    assert site.sql("select from pg_replication_slots") == []
    site.host.tl("branch", "old")
    lived = site.host.tl("branch", "lived")
    cache = Path(site.host.environment["TL_CACHE"])
    cache.mkdir(exist_ok=True)
    (cache / "something").touch()
    page.run("branches")
    page.run("host")
    assert [branch["name"] for branch in site.host.branches()] == ["lived"]
    assert list(cache.iterdir()) == []
    with psycopg.connect(lived["dsn"].replace("/postgres?", "/app?")) as connection:
        assert connection.execute("select count(*) from orders").fetchone() == (1000,)
    page.run("store")
    page.run("collect")
    page.finish()


@pytest.mark.slow
def test_a_secret_leaked(set_up: SetUp) -> None:
    """EDGE 44: the password is changed under a running archiver."""
    site = set_up()
    (site.directory / "checks.sql").write_text("-- database: app\nselect count(*) = 1000 from orders")
    site.sql("create role tl login replication password 'old'", "grant pg_monitor to tl")
    hba = site.server.data / "pg_hba.conf"
    scram = "host all tl 127.0.0.1/32 scram-sha-256\nhost replication tl 127.0.0.1/32 scram-sha-256\n"
    hba.write_text(scram + hba.read_text())
    site.sql("select pg_reload_conf()")
    passfile = site.directory / "pgpass"
    passfile.write_text("*:*:*:tl:old\n")
    passfile.chmod(0o600)
    site.host.environment["PGPASSFILE"] = str(passfile)
    as_tl = f"host=127.0.0.1 port={site.server.port} user=tl dbname=postgres"
    config = site.host.directory / "tl.toml"
    config.write_text(config.read_text().replace(json.dumps(site.server.conninfo), json.dumps(as_tl)))
    site.serve()
    leaked = psycopg.connect(as_tl, password="old")
    page = site.incident("a-secret-leaked")
    site.sql("alter role tl password 'new'")
    passfile.write_text("*:*:*:tl:new\n")
    page.run("password")
    with pytest.raises(psycopg.OperationalError):
        leaked.execute("select 1")
    leaked.close()
    with pytest.raises(psycopg.OperationalError, match="password"):
        psycopg.connect(as_tl, password="old")
    site.wait(lambda status: status["slot"]["active"])
    page.run("key")
    page.run("prove")
    site.host.tl("branch", "preview", "--listen", f"127.0.0.1:{free_port()}")
    assert "127.0.0.1" in page.run("branch")
    page.finish()
    assert site.host.branches() == []


@pytest.mark.slow
@pytest.mark.skipif(bin_dir(18) is None, reason="no Postgres 18 on this machine")
def test_postgresql_gets_a_new_major_version(set_up: SetUp) -> None:
    """EDGE 12, 34: pg_upgrade to 18; both sides can be had, each from its store."""
    site = set_up()
    site.serve()
    site.add(11)
    new = PostgresServer(18, site.server.directory, port=site.server.port)
    new.data = site.server.directory / "data18"
    page = site.incident("postgresql-gets-a-new-major-version", NEW_STORE=f"file://{site.directory}/store18")
    page.run("last")
    site.server.stop()
    new.initdb("--no-data-checksums")
    new.tool(
        "pg_upgrade",
        *("-b", str(site.server.bin), "-B", str(new.bin), "-d", str(site.server.data), "-D", str(new.data)),
        *("-U", "postgres", "-s", str(site.server.sockets)),
    )
    new.start()
    try:
        refused = site.host.run("archive", "--once", "--cluster", "prod")
        assert refused.returncode == 2 and "another cluster" in refused.stderr, refused.stderr
        site.add(1)
        page.run("first")
        said = page.run("check").splitlines()
        assert [line for line in said if "|" in line and line[0].isdigit()] == [
            f"{site.server.tool('postgres', '--version').stdout.split()[2]}|1011",
            f"{new.tool('postgres', '--version').stdout.split()[2]}|1012",
        ]
        page.finish()
    finally:
        new.stop("immediate")


@pytest.mark.slow
def test_tl_gets_a_new_version(set_up: SetUp) -> None:
    site = set_up()
    site.serve()
    page = site.incident("tl-gets-a-new-version")
    page.run("restart")
    page.run("check")
    page.finish()
    site.wait(lambda status: status["slot"]["active"])


@pytest.mark.slow
def test_leaving_tl_for_good(set_up: SetUp) -> None:
    """P11, P12: nothing is left on production, and the last copy needs nothing of us."""
    site = set_up()
    site.serve()
    site.add(7)
    (site.directory / "restore").mkdir()
    shutil.copy(ROOT / "restore/rescue.py", site.directory / "restore")
    copy = site.directory / "copy"
    page = site.incident("leaving-tl-for-good", STORE=site.store, COPY=copy)
    page.run("detach")
    assert site.sql("select from pg_replication_slots") == []
    try:
        page.run("rescue")
        assert counts(page.run("check"))[0] == "1007"
    finally:
        site.server.tool("pg_ctl", "-D", str(copy), "-m", "immediate", "stop", check=False)
    page.run("delete")
    page.finish()
    assert not site.store.exists()
    assert site.orders() == 1007
