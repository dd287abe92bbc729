"""``tl doctor`` beside real servers: good ones, badly set ones, and none at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fix_stores import BUCKET, fresh_prefix
from tests.support.moto_server import MotoServer
from tests.support.postgres import PostgresServer, free_port, scratch
from tests.support.seaweed import Seaweed
from tests.support.tl_host import Host, make_host


@pytest.fixture
def place() -> Iterator[Path]:
    path = scratch("tl-doctor-")
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="module")
def server(make_postgres_session: Callable[..., PostgresServer]) -> PostgresServer:
    """A source with nothing wrong about it; nothing here may change it."""
    return make_postgres_session(15)


def diagnosis(host: Host, *args: str, code: int) -> dict[str, dict[str, Any]]:
    """Findings by code; the exit code must be this."""
    result = host.run("doctor", *args, "--json")
    assert result.returncode == code, (result.returncode, result.stdout, result.stderr)
    assert "Traceback" not in result.stderr
    decoded = json.loads(result.stdout.strip().splitlines()[-1])
    assert (decoded["errors"] > 0) == (code == 6)
    for found in decoded["findings"]:
        assert found["cure"] or found["severity"] == "ok", found
    return {found["code"]: found for found in decoded["findings"]}


def footprint(server: PostgresServer) -> tuple[str, ...]:
    """What somebody who only looks leaves as it is."""
    return (
        server.value("select count(*) from pg_replication_slots"),
        server.value("select count(*) from pg_class"),
        server.value("select count(*) from pg_roles"),
        server.value(
            "select string_agg(name || setting, ',' order by name) from pg_settings where source = 'configuration file'"
        ),
    )


def test_all_well(server: PostgresServer, place: Path) -> None:
    """P11: and nothing is changed anywhere."""
    (place / "store").mkdir(mode=0o750)
    host = make_host(place, f"file://{place}/store", source=server.conninfo)
    before = footprint(server)
    found = diagnosis(host, code=0)
    assert footprint(server) == before
    for code in (
        "source",
        "store-list",
        "store-create",
        "conditional-create",
        "binaries",
        "overlay",
        "clock",
    ):
        assert found[code]["severity"] == "ok", found[code]
    assert found["store-empty"]["severity"] == "note"
    assert found["checksums"]["severity"] == "note"
    left = [path for path in (place / "store").rglob("*") if path.is_file()]
    assert left == [] and not (place / "state").exists()
    said = host.run("doctor")
    assert said.returncode == 0 and said.stdout.rstrip().endswith("nothing stands in the way")


def test_read_only_leaves_the_store_alone(server: PostgresServer, place: Path) -> None:
    (place / "store").mkdir(mode=0o750)
    host = make_host(place, f"file://{place}/store", source=server.conninfo)
    found = diagnosis(host, "--read-only", code=0)
    assert "store-create" not in found and list((place / "store").iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "code"),
    [
        ({"wal_level": "minimal", "max_wal_senders": "0"}, "wal-level"),
        ({"full_page_writes": "off"}, "full-page-writes"),
        ({"max_slot_wal_keep_size": "-1"}, "unbounded-slot"),
        ({"synchronous_standby_names": "'tl'", "synchronous_commit": "remote_apply"}, "remote-apply"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_source_set_badly(
    make_postgres: Callable[..., PostgresServer], place: Path, settings: dict[str, str], code: str
) -> None:
    """EDGE 6, 10, 33: said with its cure; store and host are looked at all the same."""
    (place / "store").mkdir(mode=0o750)
    server = make_postgres(15, settings=settings)
    host = make_host(place, f"file://{place}/store", source=server.conninfo)
    found = diagnosis(host, code=6)
    assert found[code]["severity"] == "error" and found[code]["area"] == "source"
    assert found["conditional-create"]["severity"] == "ok" and "overlay" in found
    if code == "unbounded-slot":
        assert diagnosis(host, "--unbounded-slot", code=0)[code]["severity"] == "warning"


def test_nothing_answers(place: Path) -> None:
    """Source and store away: two findings, and the host is looked at."""
    dead = free_port()
    host = make_host(
        place,
        f"s3://{BUCKET}/x",
        source=f"host=127.0.0.1 port={dead} user=x",
        endpoint_url=f"http://127.0.0.1:{dead}",
    )
    found = diagnosis(host, code=6)
    assert found["source-unreachable"]["severity"] == "error"
    assert found["store-unreachable"]["severity"] == "error"
    assert "overlay" in found and "binaries" not in found


def test_nothing_named(place: Path) -> None:
    host = make_host(place, "")
    found = diagnosis(host, code=0)
    assert found["no-source"]["severity"] == found["no-store"]["severity"] == "note"


def test_a_host_that_only_makes_branches(server: PostgresServer, place: Path) -> None:
    """The store tells what the source is, and the slot's state is told where the source answers."""
    host = make_host(place, f"file://{place}/store", source=server.conninfo)
    host.tl("init", host.store, "--source", server.conninfo, "--no-save")
    host.tl("archive", "--once")
    found = diagnosis(host, code=0)
    assert found["slot"]["severity"] == "warning" and "no archiver is connected" in found["slot"]["what"]
    alone = make_host(place / "other", f"file://{place}/store")
    assert diagnosis(alone, "--read-only", code=0)["binaries"]["severity"] == "ok"
    host.tl("detach", "--yes")


def test_in_s3(server: PostgresServer, seaweed: Seaweed, place: Path) -> None:
    prefix = fresh_prefix()
    host = make_host(
        place, f"s3://{BUCKET}/{prefix}", source=server.conninfo, endpoint_url=seaweed.endpoint_url
    )
    found = diagnosis(host, code=0)
    assert found["conditional-create"]["severity"] == "ok" and "lifecycle" in found
    assert seaweed.client().list_objects_v2(Bucket=BUCKET, Prefix=f"{prefix}/probe/").get("KeyCount", 0) == 0


def test_a_bucket_that_expires_the_store(moto: MotoServer, place: Path) -> None:
    moto.client().put_bucket_lifecycle_configuration(
        Bucket=moto.make_bucket("expiring"),
        LifecycleConfiguration={
            "Rules": [
                {"ID": "sweep", "Status": "Enabled", "Filter": {"Prefix": "prod/"}, "Expiration": {"Days": 9}}
            ]
        },
    )
    host = make_host(place, "s3://expiring/prod", endpoint_url=moto.endpoint_url)
    found = diagnosis(host, code=6)
    assert "'sweep'" in found["lifecycle-expiration"]["what"]
