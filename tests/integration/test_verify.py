"""``tl verify`` on what a real server left: clean, damaged one object at a time, and in turns."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.fix_stores import BUCKET, fresh_prefix
from tests.support.archived_server import archived_server
from tests.support.postgres import PostgresServer, free_port, scratch
from tests.support.seaweed import Seaweed
from tests.support.tl_host import Host, make_host
from timeline.catalog.branch_log import BranchLog, LogHead, read_head
from timeline.clock import SystemClock
from timeline.format import keys
from timeline.format.branch_state import BranchState
from timeline.format.log_change import Cover
from timeline.format.wal_index import Coverage
from timeline.lsn import Lsn
from timeline.store.local import LocalStore

ROWS = "insert into t select n, repeat(md5(n::text), 20) from generate_series(1, 8000) n"


@dataclass(frozen=True, slots=True)
class Archived:
    """An archived store in a directory, and what its log says."""

    directory: Path
    state: BranchState


@pytest.fixture(scope="module")
def archived(make_postgres_session: Callable[..., PostgresServer]) -> Iterator[Archived]:
    """A server with checksums: base backup, sealed WAL, a tail of chunks."""
    server = make_postgres_session(15, initdb=["--data-checksums"])
    server.sql("create table t (id int, text text)", ROWS, "checkpoint")
    place = scratch("tl-verify-")
    with archived_server(server, place / "store") as source:
        server.sql(ROWS)
        source.position()
        source.seal()
        for number in range(3):
            server.sql(f"create table more{number} (id int)")
            end = source.position()
    asyncio.run(_cover(place / "store", end))
    yield Archived(place / "store", asyncio.run(_head(place / "store")).state)
    shutil.rmtree(place, ignore_errors=True)


@pytest.fixture
def place() -> Iterator[Path]:
    path = scratch("tl-verify-")
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def copy(archived: Archived, place: Path) -> Host:
    """A copy of the store to damage, and a host that looks at it."""
    shutil.copytree(archived.directory, place / "store")
    return make_host(place, f"file://{place}/store")


async def _cover(directory: Path, end: Lsn) -> None:
    """Say in the log that all WAL up to there was stored, as an archiver at rest does sooner or later."""
    store, clock = LocalStore(directory), SystemClock()
    try:
        await BranchLog(store, "main", clock, "test").append(Cover(Coverage(1, end, clock.now())))
    finally:
        await store.aclose()


async def _head(directory: Path) -> LogHead:
    store = LocalStore(directory)
    try:
        head = await read_head(store, "main")
    finally:
        await store.aclose()
    assert head is not None
    return head


def verdict(host: Host, *args: str, code: int) -> dict[str, Any]:
    """The report as JSON; the exit code must be this."""
    result = host.run("verify", *args, "--json")
    assert result.returncode == code, (result.returncode, result.stdout, result.stderr)
    decoded: dict[str, Any] = json.loads(result.stdout.strip().splitlines()[-1])
    return decoded


def packs(directory: Path, kind: bytes) -> list[Path]:
    """Packs of a kind, the largest first."""
    found = [path for path in (directory / "packs").rglob("*") if path.is_file()]
    return sorted(
        (path for path in found if b'"kind":"%s"' % kind in path.read_bytes()[:300]),
        key=lambda path: -path.stat().st_size,
    )


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 0xFF]))


def test_clean_in_a_directory(copy: Host) -> None:
    quick = verdict(copy, code=0)
    assert quick["problems"] == [] and quick["data"] is None and len(quick["restorable"]) == 1
    full = verdict(copy, "--data", code=0)
    data = full["data"]
    assert data["complete"] and data["packs"] == data["packs_total"] == full["checked"]["packs"] > 1
    assert data["pages"] > 1000, "of a cluster with checksums, every page of a relation"
    assert data["chunks"] == full["checked"]["chunks"] > 0
    assert data["never"] == 0 and 0 <= data["oldest_age_seconds"] < 600
    said = copy.run("verify")
    assert said.returncode == 0 and said.stdout.startswith("intact: ")


def test_clean_in_s3(archived: Archived, seaweed: Seaweed, place: Path) -> None:
    prefix = fresh_prefix()
    client = seaweed.client()
    for path in archived.directory.rglob("*"):
        key = path.relative_to(archived.directory).as_posix()
        if path.is_file() and not key.startswith("."):
            client.put_object(Bucket=BUCKET, Key=f"{prefix}/{key}", Body=path.read_bytes())
    host = make_host(place, f"s3://{BUCKET}/{prefix}", endpoint_url=seaweed.endpoint_url)
    assert verdict(host, "--data", code=0)["data"]["complete"]
    gone = packs(archived.directory, b"extents")[0]
    key = gone.relative_to(archived.directory).as_posix()
    client.delete_object(Bucket=BUCKET, Key=f"{prefix}/{key}")
    found = verdict(host, code=4)
    assert [problem["key"] for problem in found["problems"]] == [key]
    assert found["problems"][0]["fault"] == "missing" and found["problems"][0]["file_runs"] > 100


def test_a_flipped_extent(archived: Archived, copy: Host, place: Path) -> None:
    pack = packs(place / "store", b"extents")[0]
    flip(pack, pack.stat().st_size // 2)
    assert verdict(copy, code=0)["problems"] == [], "the structure is whole"
    (problem,) = verdict(copy, "--data", code=4)["problems"]
    assert problem["key"] == pack.relative_to(place / "store").as_posix()
    assert 0 < problem["offset"] <= pack.stat().st_size // 2
    assert problem["snapshots"] == [archived.state.snapshots[0].id] and not problem["snapshots_unusable"]
    assert problem["file_runs"] >= 1 and problem["files"][0]["path"]


def test_a_pack_of_wal_that_is_missing(archived: Archived, copy: Host, place: Path) -> None:
    (pack, *_) = packs(place / "store", b"wal")
    pack.unlink()
    found = verdict(copy, code=4)
    (problem,) = found["problems"]
    assert problem["key"] == pack.relative_to(place / "store").as_posix() and problem["fault"] == "missing"
    sealed = archived.state.sealed
    assert problem["holes"] == [{"tli": 1, "start": str(sealed[0].start), "end": str(sealed[-1].end)}]
    assert found["restorable"] == [] and found["unrestorable"][0]["tli"] == 1
    said = copy.run("verify")
    assert said.returncode == 4 and said.stdout.startswith("DAMAGED: 1 problem(s)")
    assert f"tli 1, {sealed[0].start}..{sealed[-1].end}" in said.stdout


def test_a_chunk_that_is_missing(archived: Archived, copy: Host, place: Path) -> None:
    """Coverage in the log proves that it was there."""
    chunks = sorted((place / "store/wal/main/1").iterdir())
    sealed = archived.state.tlis[0].sealed
    tail = [path for path in chunks if int(path.name, 16) >= sealed]
    assert len(tail) > 2
    tail[1].unlink()
    assert archived.state.coverage is not None and archived.state.coverage.lsn > int(tail[1].name, 16)
    (problem,) = verdict(copy, code=4)["problems"]
    assert problem["key"] == keys.chunk("main", 1, int(tail[1].name, 16))
    (hole,) = problem["holes"]
    assert hole["tli"] == 1 and hole["start"].endswith(tail[1].name[-8:].upper())
    assert hole["end"].endswith(tail[2].name[-8:].upper())


def test_a_manifest_cut_short(archived: Archived, copy: Host, place: Path) -> None:
    ref = archived.state.snapshots[0].pages[0]
    path = place / "store" / keys.manifest(ref.digest)
    os.truncate(path, ref.size - 100)
    found = verdict(copy, code=4)
    (problem,) = found["problems"]
    assert (problem["key"], problem["offset"]) == (keys.manifest(ref.digest), ref.size - 100)
    assert problem["snapshots_unusable"] and problem["snapshots"] == [archived.state.snapshots[0].id]
    assert found["restorable"] == [] and len(found["unrestorable"]) == 1


def test_a_log_entry_that_is_gone(copy: Host, place: Path) -> None:
    head = asyncio.run(_head(place / "store"))
    gone = keys.log_entry("main", head.number // 2)
    (place / "store" / gone).unlink()
    found = verdict(copy, code=4)
    assert [(one["key"], one["fault"]) for one in found["problems"]] == [(gone, "missing")]
    assert found["unrestorable"] == [], "later entries hold the state"


def test_in_turns(copy: Host) -> None:
    """Each run reads a part; together they read everything, and then begin anew."""
    total = verdict(copy, code=0)["checked"]["packs"]
    left = []
    for _ in range(total):
        data = verdict(copy, "--data", "--budget", "1", code=0)["data"]
        assert data["packs"] == 1
        left.append(data["never"])
    assert left == list(range(total - 1, -1, -1))
    assert data["oldest"] is not None and data["oldest_age_seconds"] > 0


def test_in_parts_by_two_processes(copy: Host, place: Path) -> None:
    """What each part finds is in the one report, and what both find is there once."""
    extents, wal = packs(place / "store", b"extents")[0], packs(place / "store", b"wal")[0]
    flip(extents, extents.stat().st_size // 2)
    wal.unlink()
    whole = verdict(copy, "--data", code=4)
    found = verdict(copy, "--data", "--executor", "local:2", code=4)
    for name in ("problem_count", "restorable", "unrestorable", "checked", "remarks", "damaged"):
        assert found[name] == whole[name], name
    by_key = {problem["key"]: problem for problem in whole["problems"]}
    assert {problem["key"]: problem for problem in found["problems"]} == by_key and len(by_key) == 2
    for name in ("packs", "chunks", "bytes", "pages", "packs_total"):
        assert found["data"][name] == whole["data"][name], name
    halves = [verdict(copy, "--data", "--part", f"{number}/2", code=4)["data"] for number in (1, 2)]
    assert sum(half["packs"] for half in halves) == whole["data"]["packs"]
    assert [half["chunks"] for half in halves] == [whole["data"]["chunks"], 0]


def test_words(copy: Host, place: Path) -> None:
    """Exit codes 2 and 7 are not 4."""
    assert copy.run("verify", "--budget", "1GB").returncode == 2
    assert copy.run("verify", "--data", "--budget", "much").returncode == 2
    for wrong in (["--part", "1/2"], ["--executor", "local"], ["--data", "--part", "3/2"]):
        assert copy.run("verify", *wrong).returncode == 2
    for wrong in (["--data", "--executor", "here"], ["--data", "--executor", "local", "--part", "1/2"]):
        assert copy.run("verify", *wrong).returncode == 2
    assert make_host(place / "other", f"file://{place}/nothing").run("verify").returncode == 2
    away = make_host(place / "away", f"s3://{BUCKET}/x", endpoint_url=f"http://127.0.0.1:{free_port()}")
    assert away.run("verify").returncode == 7
