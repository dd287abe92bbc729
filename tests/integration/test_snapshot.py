"""Snapshots built from WAL alone: the same pages, small branches, no way to harm (P3, P6, P10; EDGE 49, 52, 57,
58)."""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import pytest

from restore import overlay_snapshot, wal_files
from restore.branch import HostBranches
from restore.branch_request import BranchRequest, StoreAddress
from restore.host import find_host
from restore.overlay_snapshot import newest_page
from tests.fix_postgres import MAJORS
from tests.support.snapshot_place import Place, control_of, state_of, unexpected_pages
from tests.support.tl_host import make_host
from tests.support.workload import prepare, steps
from timeline.clock import SystemClock
from timeline.errors import CheckFailed
from timeline.format.branch_state import BUILT
from timeline.format.file_listing import write_file_listing
from timeline.lsn import Lsn
from timeline.maintain.thin import Rule
from timeline.pg.control import parse_control
from timeline.pg.errors import WalFormatError
from timeline.pg.redo_point import redo_point_patches


@pytest.mark.fuse
@pytest.mark.majors
@pytest.mark.parametrize("major", MAJORS)
def test_a_chain_of_snapshots_is_what_stock_recovery_gives(
    make_place: Callable[[int], Place], major: int
) -> None:
    """P6, EDGE 27, 28, 49, 52: with everything open across the points, each built on the one before."""
    place = make_place(major)
    server = place.server
    prepare(server)
    space = server.make_directory(place.root / "space")
    place.archive()
    for number, (_, step) in enumerate(steps(server, space)):
        step()
        if number % 4 == 3:
            place.archive()
            place.snapshot()
    place.archive()
    place.snapshot()
    state = state_of(place.host.store)
    built = [snapshot for snapshot in state.snapshots if snapshot.kind == BUILT]
    assert len(built) >= 5
    assert all(two.parent == one.id for one, two in zip(state.snapshots, built, strict=False))
    assert max(len(snapshot.pages) for snapshot in state.snapshots) <= 8
    for snapshot in (built[len(built) // 2], built[-1]):
        ours, data = place.image(snapshot), place.recovered(snapshot)
        unexpected, compared = unexpected_pages(data, ours, hints=major >= 18)
        assert unexpected == []
        assert compared > 3000


@pytest.mark.fuse
def test_a_branch_replays_next_to_nothing(make_place: Callable[[int], Place]) -> None:
    """EDGE 58: at the snapshot itself, just after it, and before it."""
    place = make_place(15)
    server = place.server
    server.sql("create table t (i int)", "insert into t values (1)")
    place.archive()
    server.sql("insert into t select generate_series(2, 200000)", "insert into t values (0)")
    before = server.position()
    server.sql("insert into t values (-1)")
    place.archive()
    [lsn] = place.snapshot()
    server.sql("insert into t values (-2)")
    place.archive()
    at = place.host.tl("branch", "at", "--at", lsn)
    assert at["replayed_bytes"] == 0
    after = place.host.tl("branch", "after")
    assert 0 < after["replayed_bytes"] < 1 << 20
    earlier = place.host.tl("branch", "earlier", "--at", before)
    assert earlier["replayed_bytes"] > 1 << 20
    count = "select count(*) || ' ' || min(i) from t"
    assert place.value(earlier["dsn"], count) == "200001 0"
    assert place.value(at["dsn"], count).startswith(("200001 0", "200002 -1"))
    assert place.value(after["dsn"], count) == "200003 -2"
    with psycopg.connect(after["dsn"]) as conn:
        conn.execute("update t set i = i + 1")
    assert place.value(after["dsn"], count) == "200003 -1"


@pytest.mark.fuse
def test_nothing_new_builds_nothing(make_place: Callable[[int], Place]) -> None:
    place = make_place(15)
    place.server.sql("create table t as select generate_series(1, 1000) i")
    place.archive()
    first = place.host.tl("snapshot", "--at-least", "64")
    assert first["snapshots"] == []
    assert "bytes of WAL" in first["reason"]
    place.server.sql("insert into t select generate_series(1, 1000) i")
    place.archive()
    place.snapshot()
    count = len(state_of(place.host.store).snapshots)
    place.snapshot()
    assert len(state_of(place.host.store).snapshots) == count
    assert place.host.branches() == []


@pytest.mark.fuse
def test_of_two_builders_at_once_one_wins(
    make_place: Callable[[int], Place], monkeypatch: pytest.MonkeyPatch
) -> None:
    """P3: on two hosts; all that the slower one stored is there before it learns that it lost, and does no harm."""
    place = make_place(15)
    place.server.sql("create table t as select generate_series(1, 1000) i")
    place.archive()
    place.server.sql("insert into t select generate_series(1, 1000) i")
    place.archive()
    other = make_host(place.root / "other", place.host.store)
    won: list[dict[str, Any]] = []

    def after_the_other(*args: Any, **options: Any) -> Any:
        won.append(other.tl("snapshot"))
        return write_file_listing(*args, **options)

    monkeypatch.setattr(overlay_snapshot, "write_file_listing", after_the_other)
    assert place.build() == []
    [[faster]] = [each["snapshots"] for each in won]
    [built] = place.built()
    assert str(built.lsn) == faster["lsn"]
    place.host.tl("verify", "--data")
    unexpected, _ = unexpected_pages(place.recovered(built), place.image(built), hints=False)
    assert unexpected == []
    place.server.sql("insert into t values (0)")
    place.archive()
    assert len(place.snapshot()) == 1
    assert place.value(place.host.tl("branch", "x")["dsn"], "select count(*) from t") == "2001"
    other.end_agent()


@pytest.mark.fuse
def test_full_restore_goes_on_from_a_base_backup(make_place: Callable[[int], Place]) -> None:
    """A restored server owes nothing to a checkpoint that the source never made."""
    place = make_place(15)
    place.server.sql("create table t as select generate_series(1, 1000) i")
    place.archive()
    place.server.sql("insert into t select generate_series(1, 1000) i")
    place.archive()
    assert place.snapshot()
    restored = place.host.tl("restore", str(place.root / "restored"))
    assert restored["replayed_bytes"] > 0
    assert (place.root / "restored" / "backup_label").exists()


def test_the_newest_page_counts() -> None:
    """The one check against every unknown."""
    pages = b"".join(
        (high.to_bytes(4, "little") + low.to_bytes(4, "little")).ljust(8192, b"\0")
        for high, low in ((0, 5), (1, 2), (0, 0xFFFFFFFF))
    )
    assert newest_page(pages) == Lsn(1 << 32 | 2)
    assert newest_page(b"") == Lsn(0)


@pytest.mark.fuse
def test_the_archiver_builds_them_by_itself(make_place: Callable[[int], Place]) -> None:
    """In a child process; a stop in the middle of a build leaves nothing behind."""
    place = make_place(15)
    place.archive()
    archiver = place.host.start_archiver("--snapshot-every", "4")
    try:
        place.server.sql("create table t as select generate_series(1, 150000) i")
        deadline = time.monotonic() + 90
        while all(snapshot.kind != BUILT for snapshot in state_of(place.host.store).snapshots):
            assert time.monotonic() < deadline, (place.host.directory / "archive.log").read_text()
            time.sleep(0.2)
        place.server.sql("insert into t select generate_series(1, 150000) i")
        time.sleep(2.5)
    finally:
        archiver.terminate()
        assert archiver.wait(timeout=90) == 0
    build = Path(place.host.environment["TL_STATE"]) / "build"
    assert os.listdir(build / "branches") == []
    assert str(build) not in Path("/proc/mounts").read_text()


@pytest.mark.fuse
def test_a_point_that_does_not_fit_is_no_reason_to_fail(
    make_place: Callable[[int], Place], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ordinary recovery from the base backup, and a word about it; nothing is guessed."""
    place = make_place(15)
    place.server.sql("create table t as select generate_series(1, 1000) i")
    place.archive()
    place.server.sql("insert into t select generate_series(1, 1000) i")
    place.archive()
    place.snapshot()
    place.server.sql("insert into t values (0)")
    place.archive()

    monkeypatch.setattr(wal_files, "redo_point_patches", _refuse)
    host = find_host({**os.environ, "TL_STATE": place.host.environment["TL_STATE"]})
    branches = HostBranches(host, SystemClock(), os.environ)
    made = asyncio.run(branches.create(BranchRequest(StoreAddress(place.host.store), name="stock")))
    assert place.value(made.dsn, "select count(*) from t") == "2001"
    assert any("expected something else" in warning for warning in made.warnings)


@pytest.mark.fuse
def test_a_builder_goes_around_a_snapshot_that_does_not_fit(
    make_place: Callable[[int], Place], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else everything since the base backup would be replayed by every branch, for ever; and what it builds is right."""
    place = make_place(15)
    place.server.sql("create table t as select generate_series(1, 1000) i")
    place.archive()
    for _ in range(2):
        place.server.sql("insert into t select generate_series(1, 1000) i")
        place.archive()
        place.snapshot()
    place.server.sql("insert into t values (0)")
    place.archive()
    refused: list[object] = []

    def refuse_once(*args: Any, **options: Any) -> object:
        if not refused:
            refused.append(args)
            _refuse()
        return redo_point_patches(*args, **options)

    monkeypatch.setattr(wal_files, "redo_point_patches", refuse_once)
    [built] = place.build()
    _, first, second, third = state_of(place.host.store).snapshots
    assert (third.id, third.parent, second.parent) == (built.id, first.id, first.id)
    unexpected, _ = unexpected_pages(place.recovered(third), place.image(third), hints=False)
    assert unexpected == []
    branch = place.host.tl("branch", "x")
    assert branch["replayed_bytes"] < 1 << 20
    assert place.value(branch["dsn"], "select count(*) from t") == "3001"


@pytest.mark.fuse
def test_what_cannot_be_trusted_is_not_committed(
    make_place: Callable[[int], Place], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is everything replayed again and again where no snapshot fits."""
    place = make_place(15)
    place.server.sql("create table t as select generate_series(1, 1000) i")
    place.archive()
    for _ in range(2):
        place.server.sql("insert into t select generate_series(1, 1000) i")
        place.archive()
        place.snapshot()
    place.server.sql("insert into t values (0)")
    place.archive()
    before = state_of(place.host.store)
    with monkeypatch.context() as patch:
        patch.setattr(wal_files, "redo_point_patches", _refuse)
        with pytest.raises(CheckFailed, match=r"begin at snapshot .*, nor at .* expected something else"):
            place.build()
    with monkeypatch.context() as patch:
        # The checkpoint would be planted where the snapshot's pg_control does not look for it.
        moved = partial(replace, min_recovery_point=Lsn(8))
        patch.setattr(wal_files, "parse_control", lambda image: moved(parse_control(image)))
        with pytest.raises(CheckFailed, match="expected one made for"):
            place.build()
    with monkeypatch.context() as patch:
        patch.setattr(overlay_snapshot, "newest_page", lambda _: before.snapshots[-1].lsn + (1 << 30))
        with pytest.raises(CheckFailed, match="has a page of"):
            place.build()
    assert state_of(place.host.store) == before
    assert os.listdir(Path(place.host.environment["TL_STATE"]) / "build" / "branches") == []
    [newest] = place.build(rules=(Rule(math.inf, 1e9),))
    assert [each.id for each in state_of(place.host.store).snapshots] == [before.snapshots[0].id, newest.id]


def _refuse(*_: object, **__: object) -> None:
    raise WalFormatError(Lsn(0), "expected something else")


@pytest.mark.slow
@pytest.mark.fuse
@pytest.mark.majors
@pytest.mark.parametrize("major", MAJORS)
def test_the_sources_settings_as_of_the_redo_point(make_place: Callable[[int], Place], major: int) -> None:
    """EDGE 59: neither the base backup's nor the builder's own; EDGE 61: a long copy in what is replayed is told."""
    place = make_place(major)
    server = place.server
    server.sql("create table t as select generate_series(1, 1000) i")
    place.archive()
    for connections, images, hints in (("77", "off", "on"), ("55", "on", "off")):
        server.stop()
        server.configure({"max_connections": connections, "full_page_writes": images, "wal_log_hints": hints})
        server.start()
        server.sql("insert into t select generate_series(1, 1000) i", "checkpoint", "update t set i = i + 1")
        place.archive()
        assert place.snapshot()
    for built, told in zip(place.built(), ((77, False, True), (55, True, False)), strict=True):
        control = control_of(place.host.store, built)
        assert (control.max_connections, control.checkpoint.full_page_writes, control.wal_log_hints) == told
        unexpected, _ = unexpected_pages(
            place.recovered(built), place.image(built), hints=major >= 18 or told[2]
        )
        assert unexpected == []
    server.sql("create database copied strategy = 'file_copy'")
    place.archive()
    branch = place.host.tl("branch", "x")
    assert any("copied file by file" in warning for warning in branch["warnings"])
    assert place.value(branch["dsn"], "select count(*) || ' ' || sum(i) from t") == "3000 1506500"
