"""``tl drill``: evidence that recovery works, and the truth when it does not."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from restore import mount_table
from restore.drill_point import measure_point
from tests.fix_stores import BUCKET, fresh_prefix
from tests.support.archived_server import archived_server
from tests.support.postgres import PostgresServer, free_port, scratch, server_user
from tests.support.seaweed import READER_ACCESS_KEY, READER_SECRET_KEY, Seaweed
from tests.support.tl_host import TL, Host, make_host
from timeline.catalog.branch_log import read_head
from timeline.catalog.history import History
from timeline.catalog.when import Latest
from timeline.clock import SystemClock
from timeline.format import keys
from timeline.format.branch_state import Snapshot
from timeline.format.evidence import Evidence, decode_evidence
from timeline.format.manifest import PageRow
from timeline.format.page_manifest import read_page_rows
from timeline.lsn import Lsn
from timeline.store.local import LocalStore

FORMS = ("json", "html", "junit.xml")
VOID = frozenset(("meta", "br"))


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    path = scratch("tl-dr-")
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="module")
def source(make_postgres_session: Callable[..., PostgresServer]) -> PostgresServer:
    return make_postgres_session(15, initdb=["--wal-segsize=1"], settings={"track_commit_timestamp": "on"})


@pytest.fixture(scope="module")
def original(source: PostgresServer, place: Path) -> Path:
    """A store with a base backup, WAL in several chunks beyond it, and no archiver any more."""
    source.sql("create database shop")
    source.sql(
        "create table things as select n, repeat(md5(n::text), 5) what from generate_series(1, 20000) n",
        "create index on things (n)",
        "checkpoint",
        dbname="shop",
    )
    with archived_server(source, place / "store") as archived:
        source.sql(
            "create table orders (id int primary key, what text)",
            "create sequence s",
            "select nextval('s')",
            dbname="shop",
        )
        for first in range(0, 20000, 4000):
            source.sql(
                f"insert into orders select n, 'order' from generate_series({first + 1}, {first + 4000}) n",
                dbname="shop",
            )
            archived.position()
        point, warnings = asyncio.run(
            measure_point(LocalStore(place / "store"), source.conninfo, SystemClock(), objective_micros=None)
        )
        # Whatever WAL the server writes by itself: every commit is there.
        assert point.source_reachable and point.rpo_micros == 0 and warnings == ()
    return place / "store"


@pytest.fixture
def store(original: Path, place: Path) -> Iterator[Path]:
    """A copy of that store, to be written to and damaged."""
    path = place / "copy"
    shutil.copytree(original, path)
    yield path
    shutil.rmtree(path)


def drill(host: Host, *args: str) -> tuple[int, dict[str, Any]]:
    """Exit code and the decoded document of ``tl drill``."""
    done = host.run("drill", *args, "--json", timeout=300)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def left_behind(host: Host) -> list[str]:
    """Files of drills in the host's state, mounts below it, and processes that name it."""
    state = host.environment["TL_STATE"]
    found = [str(path) for path in (Path(state) / "drilling").rglob("*")]
    found += [each.mountpoint for each in mount_table.mounted() if each.mountpoint.startswith(state)]
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if state in command:
                found.append(command)
    return found


class Page(HTMLParser):
    """Checks that every element is closed in order, and gathers what a page could load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.references: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [str(value) for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def read_forms(directory: Path) -> tuple[Evidence, str, ElementTree.Element]:
    data = {form: (directory / f"evidence.{form}").read_bytes() for form in FORMS}
    return (
        decode_evidence(data["json"], "evidence.json"),
        data["html"].decode(),
        ElementTree.fromstring(data["junit.xml"]),
    )


def test_a_drill_that_passes(source: PostgresServer, store: Path, place: Path) -> None:
    """All three forms, in the store and beside it, say the same; nothing but them is left; two make a history."""
    host = make_host(place / "h1", f"file://{store}", source=source.conninfo)
    good = place / "good.sql"
    good.write_text("-- database: shop\nselect count(*) = 20000 from orders\n")
    code, told = drill(
        host,
        "--sql",
        str(good),
        "--full",
        "--rto",
        "5m",
        "--full-rto",
        "5m",
        "--rpo",
        "1h",
        "--output",
        str(place / "out"),
    )
    assert code == 0, told
    assert told["result"] == "passed" and told["exit_code"] == 0
    assert told["rpo_bytes"] is not None and told["recovery_point"]["source_reachable"]
    assert 0 < told["rto_seconds"] < 300 and 0 < told["full_rto_seconds"] < 300
    assert left_behind(host) == []
    in_store = store / "drills" / told["id"]
    assert Path(told["written"]["directory"]) == place / "out" / told["id"]
    for form in FORMS:
        copy = (place / "out" / told["id"] / f"evidence.{form}").read_bytes()
        assert copy == (in_store / f"evidence.{form}").read_bytes()
    evidence, html, junit = read_forms(in_store)
    assert keys.parse_drill_evidence(told["written"]["store"]) == (evidence.id, "json")
    outcomes = {(c.group, c.name, c.database): c.outcome for c in evidence.checks}
    assert outcomes["assertion", "good.sql", "shop"] == "passed"
    assert outcomes["amcheck", "heap and btree", "shop"] == "passed"
    assert outcomes["amcheck", "heap and btree", "template0"] == "skipped"
    assert outcomes["catalog", "connect", "template0"] == "skipped"
    assert outcomes["catalog", "relation files", "shop"] == "passed"
    assert outcomes["full", "same relations as the branch", None] == "passed"
    assert {o for (group, _, _), o in outcomes.items() if group in ("objective", "history")} == {"passed"}
    names = [step.name for step in evidence.steps]
    assert names[:3] == ["start", "resolve the target", "make the branch"] and names[-1] == "full copy"
    assert all(step.elapsed_micros > 0 for step in evidence.steps)
    assert sum(step.fetched_bytes for step in evidence.steps) > 1 << 20
    page = Page(html)
    assert page.references == [] and "script" not in page.tags and page.tags.count("svg") == 4
    assert "http" not in html.replace("http-equiv", "")
    cases = junit.findall("testcase")
    assert len(cases) == len(evidence.checks) + 1 == int(junit.attrib["tests"])
    assert junit.findall("testcase/failure") == [] and junit.attrib["failures"] == "0"
    assert len(junit.findall("testcase/skipped")) == len(evidence.checks_with("skipped")) > 0

    again, second = drill(host, "--random", "--seed", "7")
    assert again == 0, second
    third = drill(host, "--random", "--seed", "7")[1]
    assert second["seed"] == 7 and second["target"]["lsn"] == third["target"]["lsn"] != told["target"]["lsn"]
    past = json.loads(host.run("drill", "--history", "--json").stdout)
    assert [each["id"] for each in past] == [third["id"], second["id"], told["id"]]
    assert past[2]["rto_seconds"] == told["rto_seconds"] and past[2]["failed_checks"] == []
    assert "passed" in host.run("drill", "--history").stdout
    assert (
        Page((store / "drills" / third["id"] / "evidence.html").read_text()).tags.count("rect")
        > page.tags.count("rect") - 4
    )
    assert left_behind(host) == []


ASSERTIONS = {
    "false": ("select false", "gave False"),
    "null": ("select null::bool", "gave None"),
    "number": ("select 1", "gave 1"),
    "none": ("select true where false", "gave no row"),
    "many": ("select generate_series(1, 1000000000) > 0", "more than one row"),
    "two": ("select true; select true", "multiple commands"),
    "writes": ("-- database: shop\ninsert into orders values (0) returning true", "read-only"),
    "absent": ("select true from nowhere", "nowhere"),
    "slow": ("select pg_sleep(100) is not null", "timeout"),
}


def test_assertions_that_fail_are_named(store: Path, place: Path) -> None:
    """Exit code 6; the first one is in the message; the others are looked at all the same."""
    host = make_host(place / "h2", f"file://{store}")
    arguments = []
    for name, (sql, _) in {"good": ("select true", ""), **ASSERTIONS}.items():
        (place / f"{name}.sql").write_text(sql)
        arguments += ["--sql", str(place / f"{name}.sql")]
    code, told = drill(host, *arguments, "--statement-timeout", "5s", "--at", "latest")
    assert code == 6 and told["exit_code"] == 6 and told["result"] == "failed"
    assert "false.sql" in told["message"] and "gave False" in told["message"]
    found = {check["name"]: check for check in told["checks"] if check["group"] == "assertion"}
    assert found.pop("good.sql")["outcome"] == "passed"
    assert list(found) == [f"{name}.sql" for name in ASSERTIONS]
    for name, (_, why) in ASSERTIONS.items():
        assert found[f"{name}.sql"]["outcome"] == "failed"
        assert why in found[f"{name}.sql"]["message"], found[f"{name}.sql"]
    _, _, junit = read_forms(store / "drills" / told["id"])
    failed = [case.attrib["name"] for case in junit.findall("testcase") if case.find("failure") is not None]
    assert failed == [f"{name}.sql [{'shop' if name == 'writes' else 'postgres'}]" for name in ASSERTIONS]
    assert left_behind(host) == []


def test_an_objective_that_is_missed(store: Path, place: Path) -> None:
    """A source that is not named leaves an age as the RPO, and says so."""
    host = make_host(place / "h3", f"file://{store}")
    code, told = drill(host, "--rto", "0.001s", "--rpo", "0")
    assert code == 6 and "RTO, first query" in told["message"]
    failed = [check["name"] for check in told["checks"] if check["outcome"] == "failed"]
    assert failed == ["RTO, first query", "RPO"]
    assert (
        told["rpo_bytes"] is None and told["rpo_seconds"] > 0 and "no source was named" in told["rpo_method"]
    )


@pytest.mark.slow
def test_commits_that_the_store_has_not(source: PostgresServer, store: Path, place: Path) -> None:
    """RPO against a source that went on: bytes by its flushed WAL, seconds by its commit times."""
    host = make_host(place / "h4", f"file://{store}", source=source.conninfo)
    source.sql("create table later (n int)")
    wanted = float(source.value("select extract(epoch from timestamp) from pg_last_committed_xact()"))
    code, told = drill(host, "--mode", "copy", "--rpo", "0")
    assert code == 6 and told["rpo_bytes"] > 0
    assert "commit times" in told["rpo_method"]
    last = told["recovery_point"]["head_commit_time"] / 1e6
    assert told["rpo_seconds"] >= wanted - last - 0.001 > 0


@pytest.mark.slow
def test_moments_and_stores_that_are_not_there(store: Path, place: Path) -> None:
    """3 with evidence for a moment beyond the history; 2 without for what is no store, or a wrong request."""
    host = make_host(place / "h5", f"file://{store}")
    code, told = drill(host, "--at", "FF/0")
    assert code == 3 and told["result"] == "unreachable" and told["written"]["store"]
    assert host.run("drill", "--store", f"file://{place}/nothing").returncode == 2
    assert host.run("drill", "--random", "--at", "latest").returncode == 2
    assert host.run("drill", "--seed", "1").returncode == 2
    assert left_behind(host) == []


@pytest.mark.slow
def test_a_host_without_amcheck(source: PostgresServer, store: Path, place: Path) -> None:
    """What could not run is skipped, with the reason, and never passed."""
    programs = source.make_directory(place / "bin")
    for program in source.bin.iterdir():
        if program.name != "pg_amcheck":
            (programs / program.name).symlink_to(program)
    host = make_host(place / "h15", f"file://{store}")
    host = replace(host, environment=host.environment | {"TL_PG_BIN": str(programs)})
    code, told = drill(host)
    assert code == 0, told
    checks = [check for check in told["checks"] if check["group"] == "amcheck"]
    assert {check["outcome"] for check in checks} == {"skipped"} and len(checks) == 4
    assert all(f"no pg_amcheck in {programs}" in check["message"] for check in checks)


@pytest.mark.slow
def test_a_store_that_does_not_answer(place: Path) -> None:
    """7, and the evidence says that nothing is proved."""
    host = make_host(place / "h16", f"s3://{BUCKET}/nothing", endpoint_url=f"http://127.0.0.1:{free_port()}")
    code, told = drill(host, "--output", str(place / "silent"))
    assert code == 7 and told["result"] == "unavailable" and told["target"] is None
    assert (place / "silent" / told["id"] / "evidence.junit.xml").exists()
    assert left_behind(host) == []


def row_of(store: Path, server: PostgresServer, table: str) -> PageRow:
    """Where the store keeps the first extent of a table of shop."""
    path = server.value(f"select pg_relation_filepath('{table}')", dbname="shop")

    for ref in reversed(snapshot_of(store).pages):
        for row in read_page_rows((store / keys.manifest(ref.digest)).read_bytes(), ref):
            if row.path == path and row.group == 0:
                return row
    raise AssertionError(f"{path} is not in the snapshot")


def snapshot_of(store: Path) -> Snapshot:
    """What a branch of the latest moment starts from."""

    async def find() -> Snapshot:
        return (await (await History.load(LocalStore(store))).resolve(Latest())).snapshot

    return asyncio.run(find())


@pytest.mark.parametrize("mode", ["lazy", "copy"])
def test_a_flipped_extent(source: PostgresServer, store: Path, place: Path, mode: str) -> None:
    """P5: 4, with object, range and what lies there, also where Postgres sees no more than an I/O error."""
    row = row_of(store, source, "things")
    key = keys.pack(row.extent.pack)
    data = bytearray((store / key).read_bytes())
    data[row.extent.offset + row.extent.stored_bytes // 2] ^= 1
    (store / key).chmod(0o600)
    (store / key).write_bytes(data)
    host = make_host(place / f"h6-{mode}", f"file://{store}")
    code, told = drill(host, "--mode", mode)
    assert code == 4 and told["result"] == "damaged", told
    [damage] = told["damages"]
    assert (damage["key"], damage["offset"], damage["length"]) == (
        key,
        row.extent.offset,
        row.extent.stored_bytes,
    )
    assert damage["holds"] == [f"{row.path}, blocks 0 to {row.extent.blocks - 1}"]
    assert key in told["message"] and str(row.extent.offset) in told["message"]
    evidence, html, junit = read_forms(store / "drills" / told["id"])
    assert evidence.damages[0].key == key and key in html
    assert any(key in str(failure.attrib["message"]) for failure in junit.findall("testcase/failure"))
    assert left_behind(host) == []


@pytest.mark.slow
def test_a_flipped_chunk(store: Path, place: Path) -> None:
    """P5: WAL that does not verify: the chunk and the WAL it holds."""
    chunks = sorted(path for path in (store / "wal/main/1").iterdir())
    hurt, after = chunks[-3], chunks[-2]
    data = bytearray(hurt.read_bytes())
    data[len(data) // 2] ^= 1
    hurt.chmod(0o600)
    hurt.write_bytes(data)
    host = make_host(place / "h13", f"file://{store}")
    code, told = drill(host)
    assert code == 4, told
    [damage] = told["damages"]
    start, end = (Lsn(int(path.name, 16)) for path in (hurt, after))
    assert damage["key"] == str(hurt.relative_to(store))
    assert damage["holds"] == [f"WAL of tli 1 from {start} to {end}"]
    assert left_behind(host) == []


@pytest.mark.slow
def test_two_drills_at_once(store: Path, place: Path) -> None:
    """Neither takes the other's place for debris."""
    host = make_host(place / "h14", f"file://{store}")
    running = [
        subprocess.Popen(
            [TL, "drill", "--json"],
            env=host.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    said = [process.communicate(timeout=200) for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    assert len({json.loads(out)["id"] for out, _ in said}) == 2
    assert left_behind(host) == []


@pytest.mark.parametrize("kind", ["pack", "manifest"])
def test_a_missing_object(source: PostgresServer, store: Path, place: Path, kind: str) -> None:
    """What the mount meets while Postgres runs, and what keeps it from beginning."""
    key = keys.pack(row_of(store, source, "things").extent.pack)
    if kind == "manifest":
        key = keys.manifest(snapshot_of(store).pages[0].digest)
    (store / key).unlink()
    host = make_host(place / f"h7-{kind}", f"file://{store}")
    code, told = drill(host)
    assert code == 4 and told["damages"][0]["key"] == key, told
    assert "missing" in told["damages"][0]["expectation"]
    assert left_behind(host) == []


def test_a_missing_chunk(store: Path, place: Path) -> None:
    """EDGE 63: what lies before the hole is recovered, and the drill fails with the chunk and the range."""
    chunks = sorted(path for path in (store / "wal/main/1").iterdir())
    lost, after = chunks[-3], chunks[-2]
    lost.unlink()
    host = make_host(place / "h8", f"file://{store}")
    code, told = drill(host)
    assert code == 6 and str(lost.relative_to(store)) in told["message"]
    start, end = (Lsn(int(path.name, 16)) for path in (lost, after))
    assert f"from {start} to {end}" in told["message"]
    assert Lsn.parse(told["target"]["lsn"]) <= start
    assert left_behind(host) == []


@pytest.mark.slow
def test_an_incomplete_copy_of_a_store(source: PostgresServer, place: Path) -> None:
    """EDGE 63: a moment named in its whole part is proven; that any moment can be had is not so."""
    store = place / "incomplete"
    with archived_server(source, store) as archived:
        for number in range(3):
            source.sql(f"create table part_{number} as select generate_series(1, 2000)")
            inside = archived.position()
            archived.seal()
        source.sql("create table beyond as select 1")
        archived.position()
    head = asyncio.run(read_head(LocalStore(store), "main"))
    assert head is not None and len(head.state.sealed) == 3
    lost = head.state.sealed[-1]
    (store / keys.manifest(lost.manifest.digest)).unlink()
    host = make_host(place / "h16", f"file://{store}")
    code, told = drill(host, "--at", str(Lsn(lost.start - 8)))
    assert code == 0 and any(lost.manifest.digest in warning for warning in told["warnings"]), told
    assert Lsn.parse(told["recovery_point"]["head"]) <= lost.start < inside
    code, told = drill(host, "--random", "--seed", "7")
    assert code == 6 and lost.manifest.digest in told["message"], told
    code, told = drill(host)
    assert code == 3 and lost.manifest.digest in told["message"], told
    assert left_behind(host) == []


@pytest.mark.slow
def test_data_that_was_broken_on_the_source(
    source: PostgresServer, make_postgres: Callable[..., PostgresServer], place: Path
) -> None:
    """The store is faithful and the data is not: the checks say what is wrong, and where. RPO by clocks."""
    server = make_postgres(15)
    server.sql(
        "create table torn as select n from generate_series(1, 1000) n",
        "vacuum freeze torn",
        "create table gone as select 1 n",
        "create table hollow as select 1 n",
        "create index emptied on hollow (n)",
        "create index unfinished on hollow (n)",
        "update pg_index set indisvalid = false where indexrelid = 'unfinished'::regclass",
        "checkpoint",
    )
    torn, gone, emptied = (
        server.data / server.value(f"select pg_relation_filepath('{name}')")
        for name in ("torn", "gone", "emptied")
    )
    server.stop()
    with torn.open("r+b") as page:
        # The first line pointer: a tuple that begins in the middle of the line pointers.
        page.seek(24)
        page.write(b"\x05\x80\x38\x00")
    gone.unlink()
    os.truncate(emptied, 0)
    server.start()
    with archived_server(server, place / "torn"):
        pass
    server.sql("create table later (n int)")
    host = make_host(place / "h9", f"file://{place}/torn", source=server.conninfo)
    code, told = drill(host)
    assert code == 6 and told["damages"] == [], told
    found = {(check["name"], check["database"]): check for check in told["checks"]}
    files = found["relation files", "postgres"]
    assert files["outcome"] == "failed" and files["findings_total"] == 2
    assert (
        files["findings"][0].startswith("emptied: file ") and "is empty, as no btree" in files["findings"][0]
    )
    assert files["findings"][1].startswith("gone: file ") and "missing" in files["findings"][1]
    assert "relation files in database postgres" in told["message"]
    invalid = found["invalid indexes", "postgres"]
    assert invalid["outcome"] == "passed" and invalid["findings"] == ["unfinished"]
    heaps = found["heap and btree", "postgres"]
    assert heaps["outcome"] == "failed" and any("torn" in line for line in heaps["findings"])
    assert found["heap and btree", "template1"]["outcome"] == "passed"
    assert told["rpo_bytes"] > 0 and told["rpo_seconds"] > 0 and "the source's clock" in told["rpo_method"]

    point, warnings = asyncio.run(
        measure_point(LocalStore(place / "torn"), source.conninfo, SystemClock(), objective_micros=None)
    )
    assert not point.source_reachable and point.rpo_bytes is None
    assert any("another cluster" in warning for warning in warnings)


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, marks=pytest.mark.slow),
    ],
)
def test_a_drill_that_is_stopped(store: Path, place: Path, number: signal.Signals) -> None:
    """Nothing is left: at once, and after SIGKILL when the next drill is over."""
    host = make_host(place / f"h10-{number}", f"file://{store}")
    (place / "sleep.sql").write_text("select pg_sleep(200) is not null")
    log = place / f"stopped-{number}.log"
    with log.open("w") as err:
        process = subprocess.Popen(
            [TL, "drill", "--sql", str(place / "sleep.sql")], env=host.environment, stdout=err, stderr=err
        )
    try:
        deadline = time.monotonic() + 60
        while "drill: assertions" not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        assert left_behind(host) != []
        process.send_signal(number)
        if number == signal.SIGTERM:
            process.send_signal(number)
        process.wait(timeout=60)
    finally:
        process.kill()
        process.wait()
    if number == signal.SIGKILL:
        assert left_behind(host) != []
        assert drill(host)[0] == 0
    else:
        assert process.returncode == 7, log.read_text()
        assert "stopped" in log.read_text()
        assert not (store / "drills").exists()
    assert left_behind(host) == []


def python_for_others() -> str | None:
    """An interpreter of our version that another user may run."""
    for path in ("/usr/bin/python3", sys.executable):
        try:
            done = subprocess.run(
                [path, "-c", "import sys; print(sys.version_info[:2])"],
                user=server_user().pw_uid, group=server_user().pw_gid, extra_groups=[],
                capture_output=True, text=True, check=False, cwd="/",
            )  # fmt: skip
        except OSError:
            continue
        if done.stdout.strip() == str(sys.version_info[:2]):
            return path
    return None


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user takes root")
def test_another_user_who_may_only_read(store: Path, place: Path) -> None:
    """P10: empty state, a store that cannot be written, a source that nobody answers; the evidence stays here."""
    python = python_for_others()
    if python is None:
        pytest.skip("no interpreter that another user may run")
    user = server_user()
    for path in (store, *store.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    home = place / "elsewhere"
    home.mkdir()
    os.chown(home, user.pw_uid, user.pw_gid)
    host = make_host(place / "h11", f"file://{store}")
    environment = host.environment | {
        "HOME": str(home),
        "TL_STATE": str(home / "state"),
        "TL_CACHE": str(home / "cache"),
        "PYTHONPATH": f"{Path(__file__).parents[2]}:{sysconfig.get_path('purelib')}",
    }
    before = sorted(store.rglob("*"))
    done = subprocess.run(
        [python, "-m", "cli.main", "drill", "--full", "--json",
         "--source", f"host=127.0.0.1 port={free_port()} user=nobody connect_timeout=2"],
        env=environment, cwd="/", user=user.pw_uid, group=user.pw_gid, extra_groups=[],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["account"] == user.pw_name and told["result"] == "passed"
    assert not told["recovery_point"]["source_reachable"] and "did not answer" in told["rpo_method"]
    assert any("source was not asked" in warning for warning in told["warnings"])
    assert told["written"]["store"] is None and "could not be written to the store" in done.stderr
    evidence, _, _ = read_forms(home / "state" / "drills" / told["id"])
    assert evidence.id == told["id"]
    assert sorted(store.rglob("*")) == before
    assert left_behind(replace(host, environment=environment)) == []


def test_s3_with_credentials_that_read_and_list(original: Path, seaweed: Seaweed, place: Path) -> None:
    """P10: the drill passes, and its evidence stays on this host; with others it goes to the store."""
    prefix = fresh_prefix()
    client = seaweed.client()
    for path in original.rglob("*"):
        if path.is_file() and ".tmp" not in path.parts:
            client.put_object(
                Bucket=BUCKET, Key=f"{prefix}/{path.relative_to(original)}", Body=path.read_bytes()
            )
    host = make_host(place / "h12", f"s3://{BUCKET}/{prefix}", endpoint_url=seaweed.endpoint_url)
    reading = {"AWS_ACCESS_KEY_ID": READER_ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": READER_SECRET_KEY}
    reader = replace(host, environment=host.environment | reading)
    code, told = drill(reader, "--full")
    assert code == 0 and told["written"]["store"] is None
    assert Path(told["written"]["directory"]).parent == Path(host.environment["TL_STATE"]) / "drills"
    assert left_behind(reader) == []
    assert json.loads(host.run("drill", "--history", "--json").stdout) == []
    ids: list[str] = []
    for at in ("--latest", "--random"):
        code, told = drill(host, at)
        assert code == 0 and told["written"] == {
            "store": f"drills/{told['id']}/evidence.json",
            "directory": None,
        }
        ids.insert(0, told["id"])
    past = json.loads(reader.run("drill", "--history", "--json").stdout)
    assert [each["id"] for each in past] == ids
    assert left_behind(host) == []
