"""What a source says of itself, how it lets us in, and how it goes away."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.archiver import (
    ArchiverProcess,
    flushed,
    log_head,
    make_store,
    server_wal,
    stored_wal,
    tail_of,
)
from tests.support.clones import Clones, clones
from tests.support.postgres import PostgresServer
from timeline.archive.preflight import Preflight, Severity, check_source
from timeline.archive.source import IncarnationFacts, Source
from timeline.errors import TimelineError, UsageError
from timeline.pg.control import parse_control

MakePostgres = Callable[..., PostgresServer]


@pytest.fixture
def store(tmp_path: Path) -> str:
    """A new store."""
    return make_store(tmp_path / "store")


def look(conninfo: str, **options: bool) -> Preflight:
    """A preflight."""
    return asyncio.run(check_source(conninfo, application_name="tl", **options))


def codes(preflight: Preflight) -> dict[str, Severity]:
    """The findings by code."""
    return {finding.code: finding.severity for finding in preflight.findings}


def change(server: PostgresServer, *settings: str) -> None:
    """Settings that need no restart."""
    for setting in settings:
        server.sql(f"alter system set {setting}")
    server.sql("select pg_reload_conf()")
    time.sleep(0.3)


def test_a_healthy_source_has_no_findings_and_nothing_is_made_on_it(each_postgres: PostgresServer) -> None:
    """P11."""
    found = look(each_postgres.conninfo)
    assert found.findings == ()
    assert found.facts.major == each_postgres.major
    assert each_postgres.sql("select * from pg_replication_slots") == []


def test_the_facts_are_those_of_pg_control(each_postgres: PostgresServer) -> None:
    async def read() -> IncarnationFacts:
        source = await Source.open(each_postgres.conninfo)
        try:
            return await source.facts()
        finally:
            await source.aclose()

    facts = asyncio.run(read())
    control = parse_control((each_postgres.data / "global" / "pg_control").read_bytes())
    assert facts.system_identifier == control.system_identifier
    assert facts.catalog_version == control.catalog_version
    assert facts.control_version == control.control_version
    assert facts.segment_bytes == control.segment_bytes
    assert facts.relation_segment_bytes == 1 << 30
    assert facts.superuser == "postgres"
    assert facts.architecture == os.uname().machine
    assert facts.data_checksums == ("on" if each_postgres.major >= 18 else "off")


def test_settings_that_forbid_archiving_are_found(make_postgres: MakePostgres) -> None:
    """EDGE 6, 10, 33."""
    server = make_postgres(18)
    change(
        server,
        "full_page_writes = off",
        "max_slot_wal_keep_size = -1",
        "idle_replication_slot_timeout = '1h'",
        "wal_sender_timeout = '1s'",
        "synchronous_standby_names = 'other, TL'",
        "synchronous_commit = remote_apply",
    )
    found = look(server.conninfo)
    assert codes(found) == {
        "full-page-writes": Severity.REFUSE,
        "unbounded-slot": Severity.REFUSE,
        "idle-slot-timeout": Severity.WARN,
        "sender-timeout": Severity.WARN,
        "synchronous": Severity.WARN,
        "remote-apply": Severity.REFUSE,
    }
    assert all(finding.what and finding.cure for finding in found.findings)
    assert {finding.code for finding in found.refused} == {
        "full-page-writes",
        "unbounded-slot",
        "remote-apply",
    }
    assert codes(look(server.conninfo, allow_unbounded=True))["unbounded-slot"] is Severity.WARN
    slotless = codes(look(server.conninfo, slotless=True))
    assert slotless["slotless"] is Severity.WARN
    assert "unbounded-slot" not in slotless


def test_a_server_that_cannot_stream_is_refused(make_postgres: MakePostgres) -> None:
    """EDGE 33."""
    server = make_postgres(
        15, settings={"wal_level": "minimal", "max_wal_senders": "0", "max_replication_slots": "0"}
    )
    found = codes(look(server.conninfo))
    for code in ("wal-level", "wal-senders", "replication-slots", "replication-connection"):
        assert found[code] is Severity.REFUSE


def test_a_user_without_rights_is_told_which_are_missing(make_postgres: MakePostgres) -> None:
    server = make_postgres(15)
    server.sql("create role plain login", "create role streamer login replication")
    plain = look(server.conninfo.replace("user=postgres", "user=plain"))
    assert codes(plain)["replication-privilege"] is Severity.REFUSE
    assert codes(plain)["statistics-privilege"] is Severity.WARN
    assert codes(plain)["replication-connection"] is Severity.REFUSE
    assert any("ALTER ROLE" in finding.cure for finding in plain.findings)
    streamer = look(server.conninfo.replace("user=postgres", "user=streamer"))
    assert codes(streamer) == {"statistics-privilege": Severity.WARN}


def test_a_missing_line_in_pg_hba_is_named(make_postgres: MakePostgres) -> None:
    server = make_postgres(15)
    (server.data / "pg_hba.conf").write_text("local all all trust\nhost all all 127.0.0.1/32 trust\n")
    server.sql("select pg_reload_conf()")
    time.sleep(0.3)
    (finding,) = look(server.conninfo).refused
    assert "pg_hba.conf" in finding.what
    assert "replication" in finding.cure


def test_managed_services_are_named(make_postgres: MakePostgres) -> None:
    server = make_postgres(15)
    server.sql("create role rdsadmin")
    found = look(server.conninfo)
    (finding,) = found.findings
    assert finding.severity is Severity.NOTE, "it does stream, so it only seems to be one"
    (server.data / "pg_hba.conf").write_text("local all all trust\n")
    server.sql("select pg_reload_conf()")
    time.sleep(0.3)
    refused = {finding.code: finding.what for finding in look(server.conninfo).refused}
    assert "Amazon RDS" in refused["managed-service"]


def test_a_standby_is_noted(make_postgres: MakePostgres) -> None:
    """EDGE 21."""
    server = make_postgres(15)
    server.stop()
    cloning: Clones
    with clones() as cloning:
        standby = cloning.make(server, standby=True)
        server.start()
        standby.start()
        found = look(standby.conninfo)
        assert found.in_recovery
        assert codes(found) == {"standby": Severity.NOTE}


@pytest.mark.parametrize("port", [1, None], ids=["nobody listens", "no such host"])
def test_a_source_that_is_not_there_is_one_clear_line(port: int | None) -> None:
    """EDGE 54."""
    where = f"host=127.0.0.1 port={port}" if port else "host=nowhere.invalid"
    with pytest.raises(TimelineError) as raised:
        look(f"{where} user=u password=hunter2 connect_timeout=2")
    assert raised.value.exit_code == 7
    assert "\n" not in raised.value.message
    assert "hunter2" not in raised.value.message


def test_a_source_that_shuts_down_is_not_held_up(make_postgres: MakePostgres, store: str) -> None:
    """P11: its last records are taken at once, whatever ``max_delay`` is."""
    server = make_postgres(15, settings={"wal_keep_size": "1GB"})
    with ArchiverProcess(store, server.conninfo, max_delay_seconds=30) as archiver:
        archiver.wait_until(lambda status: status["phase"] == "streaming")
        server.sql("create table t as select 1")
        began = time.monotonic()
        server.stop("fast")
        assert time.monotonic() - began < 10
        archiver.wait_until(lambda status: status["phase"] == "waiting")
        server.start()
        archiver.wait_until(lambda status: status["phase"] == "streaming", seconds=60)
        assert archiver.stop() == 0
    start, wal = stored_wal(store, 1)
    assert wal == server_wal(server, 1, start, start + len(wal))


def test_a_source_that_shuts_down_while_the_store_stalls_is_let_go(
    make_postgres: MakePostgres, store: str
) -> None:
    """P11: first, harm nothing."""
    server = make_postgres(15)
    with ArchiverProcess(store, server.conninfo, faults=True, shutdown_patience_seconds=1) as archiver:
        archiver.wait_until(lambda status: status["phase"] == "streaming")
        archiver.command("freeze")
        server.sql("create table t as select generate_series(1, 1000)")
        held = archiver.durable
        began = time.monotonic()
        server.stop("fast")
        assert server.postmaster_pid() is None
        assert time.monotonic() - began < 25
        archiver.command("thaw")
        server.start()
        archiver.wait_durable(flushed(server), seconds=60)
        assert archiver.durable > held


def make_certificates(server: PostgresServer, directory: Path) -> Path:
    """A key and certificate for localhost; the certificate is its own root."""
    root = directory / "root.crt"
    key, certificate = server.data / "server.key", server.data / "server.crt"
    request = "req -new -x509 -days 2 -nodes -subj /CN=localhost -newkey rsa:2048"
    request += " -addext subjectAltName=DNS:localhost"
    subprocess.run(
        ["openssl", *request.split(), "-keyout", str(key), "-out", str(certificate)],
        check=True,
        capture_output=True,
    )
    for path in (key, certificate):
        os.chown(path, server.user.pw_uid, server.user.pw_gid)
        path.chmod(0o600)
    root.write_bytes(certificate.read_bytes())
    return root


def test_tls_scram_and_a_password_that_is_changed_meanwhile(
    make_postgres: MakePostgres, store: str, tmp_path: Path
) -> None:
    """EDGE 44."""
    server = make_postgres(15)
    root = make_certificates(server, tmp_path)
    server.sql("create role streamer login replication password 'first'", "grant pg_monitor to streamer")
    (server.data / "pg_hba.conf").write_text(
        "local all postgres trust\n"
        "hostssl all streamer all scram-sha-256\nhostssl replication streamer all scram-sha-256\n"
    )
    change(server, "ssl = on", "listen_addresses = '127.0.0.1'")
    passfile = tmp_path / "passfile"

    def write_password(password: str) -> None:
        passfile.write_text(f"localhost:{server.port}:*:streamer:{password}\n")
        passfile.chmod(0o600)

    conninfo = (
        f"host=localhost hostaddr=127.0.0.1 port={server.port} user=streamer dbname=postgres "
        "sslmode=verify-full "
        f"sslrootcert={root} passfile={passfile}"
    )
    write_password("wrong")
    with pytest.raises(UsageError, match="password"):
        look(conninfo)
    with pytest.raises(UsageError, match="TLS"):
        look(conninfo.replace("host=localhost", "host=elsewhere.example"))
    write_password("first")
    assert look(conninfo).findings == ()
    with ArchiverProcess(store, conninfo) as archiver:
        archiver.wait_until(lambda status: status["phase"] == "streaming")
        server.sql(
            "alter role streamer password 'second'",
            "select pg_terminate_backend(pid) from pg_stat_replication",
        )
        archiver.wait_until(lambda status: "password" in (status["error"] or ""))
        write_password("second")
        server.sql("create table t as select 1")
        archiver.wait_durable(flushed(server))
        assert not any(re.search(r"\b(first|second)\b", str(status)) for status in archiver.history)
        assert archiver.stop() == 0
    assert tail_of(store, 1).end >= log_head(store).state.tlis[0].start
