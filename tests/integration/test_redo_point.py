"""Replay from a synthetic redo point ends where stock recovery from the full backup ends (P6, EDGE 52, 53, 59).

Nothing here is ours but the forged bytes: the image is made by stock Postgres from a stock base backup, and so is
what the result is compared with, byte for byte, before anyone has connected to either.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.fix_postgres import MAJORS
from tests.support.crossing_workload import (
    OPEN_KINDS,
    OpenSpan,
    prepare_crossing,
    run_crossing,
    run_promotion,
)
from tests.support.postgres import PostgresServer
from tests.support.redo_points import (
    Recording,
    differing_pages,
    recorded,
    recover_backup,
    recover_image,
)
from timeline.lsn import Lsn

pytestmark = pytest.mark.majors

EACH = [
    pytest.param(major, id=f"pg{major}", marks=pytest.mark.xdist_group(f"redo point {major}"))
    for major in MAJORS
]
"""One worker for a version: a recording and its end are made once."""
SHARES = 6
SPREAD = 60
"""Redo points beside those at every kind of record."""
KINDS = frozenset(
    """
    Btree_DEDUP Btree_NEWROOT Btree_SPLIT_L Btree_SPLIT_R Btree_VACUUM CommitTs_ZEROPAGE Gin_DELETE_LISTPAGE
    Gin_INSERT_LISTPAGE Gin_UPDATE_META_PAGE Gist_PAGE_UPDATE Hash_INSERT Heap2_MULTI_INSERT Heap2_NEW_CID Heap2_VISIBLE
    Heap_DELETE Heap_HOT_UPDATE Heap_INPLACE Heap_INSERT Heap_LOCK MultiXact_CREATE_ID SPGist_PICKSPLIT Sequence_LOG
    Standby_LOCK Storage_CREATE Transaction_ABORT Transaction_ASSIGNMENT Transaction_COMMIT Transaction_PREPARE XLOG_FPI
    """.split()  # noqa: SIM905
)
"""A redo point is at one of each …"""
RARE_KINDS = frozenset(
    """
    CLOG_TRUNCATE CLOG_ZEROPAGE CommitTs_TRUNCATE Database_CREATE_FILE_COPY Database_CREATE_WAL_LOG Database_DROP
    Heap_TRUNCATE MultiXact_TRUNCATE_ID MultiXact_ZERO_MEM_PAGE MultiXact_ZERO_OFF_PAGE RelMap_UPDATE Standby_RUNNING_XACTS
    Storage_TRUNCATE Tablespace_CREATE Transaction_ABORT_PREPARED Transaction_COMMIT_PREPARED XLOG_CHECKPOINT_ONLINE
    XLOG_CHECKPOINT_SHUTDOWN XLOG_NEXTOID XLOG_PARAMETER_CHANGE XLOG_SWITCH
    """.split()  # noqa: SIM905
)
"""… and of these, of which there are a few, wherever one lies at a place where a redo point can be."""


@dataclass(frozen=True, slots=True)
class Case:
    """A recorded source and the truth about its end."""

    recording: Recording
    expected: Path
    """Recovered by stock Postgres from the base backup to T."""

    def check(self, kind: str, begin: Lsn) -> None:
        """Make an image of ``begin``, go on from it to T, and compare."""
        place = self.recording.place
        image = recover_backup(self.recording, begin, place / "image")
        try:
            self.check_image(kind, image, begin)
        finally:
            shutil.rmtree(image)

    def check_image(self, kind: str, image: Path, begin: Lsn) -> None:
        """Go on from an image to T, and compare."""
        branch = self.recording.place / "branch"
        try:
            recover_image(self.recording, image, begin, self.recording.end, branch)
            differing, compared = differing_pages(self.expected, branch)
            if self.recording.hints:
                # Replay changes free space maps without marking the pages dirty, so that what of it is
                # stored depends on what else happens to a page while it is in memory; it is advice only.
                differing = [entry for entry in differing if "_fsm page" not in entry]
            assert differing == [], f"{kind} at {begin}: {len(differing)} of {compared}: {differing[:10]}"
            assert compared > 5000
        finally:
            shutil.rmtree(branch, ignore_errors=True)


def _case(recording: Recording, *has: str) -> Case:
    expected = recover_backup(recording, recording.end, recording.place / "expected")
    # What is not there could not differ.
    for path in ("pg_commit_ts", "pg_xact", *has):
        assert any((expected / path).iterdir()), path
    return Case(recording, expected)


def _switches(major: int, *, checksums: bool) -> list[str]:
    # Checksums are what initdb does by itself from 18 on; the switch for none came with that.
    return ["--data-checksums"] if checksums else ["--no-data-checksums"] if major >= 18 else []


@pytest.fixture(scope="module", params=EACH)
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    """Of each major version, without checksums, so that every page has one right content."""
    major: int = request.param
    switches = _switches(major, checksums=False)
    with recorded(major, run_crossing, *switches, prepare=prepare_crossing) as recording:
        made = _case(recording, "pg_twophase", "pg_multixact/members", "pg_tblspc")
        assert (made.expected / "pg_logical/replorigin_checkpoint").stat().st_size > 8
        yield made


@pytest.fixture(scope="module", params=EACH)
def verified(request: pytest.FixtureRequest) -> Iterator[Case]:
    """With checksums and small segments (EDGE 23), and with every page's state in the WAL: replay compares
    it with its own, and ends at a difference."""
    major: int = request.param

    def work(server: PostgresServer) -> tuple[OpenSpan, ...]:
        server.sql("alter system set wal_consistency_checking = 'all'", "select pg_reload_conf()")
        return run_crossing(server)

    switches = [*_switches(major, checksums=True), "--wal-segsize=1"]
    with recorded(major, work, *switches, prepare=prepare_crossing) as recording:
        assert recording.hints
        yield _case(recording, "pg_twophase", "pg_multixact/members", "pg_tblspc")


@pytest.fixture(scope="module", params=EACH)
def promoted(request: pytest.FixtureRequest) -> Iterator[Case]:
    """The source was promoted on the way."""
    major: int = request.param
    switches = _switches(major, checksums=False)
    with recorded(major, run_promotion, *switches, prepare=prepare_crossing) as recording:
        assert [span.tli for span in recording.spans] == [1, 2]
        yield _case(recording)


@pytest.mark.parametrize("kind", ["Btree SPLIT_R", "Heap LOCK", "Transaction PREPARE"])
def test_replay_goes_on_as_if_it_had_never_stopped(case: Case, kind: str) -> None:
    """While transactions of all kinds are open (EDGE 52)."""
    records = case.recording.candidates()[kind]
    case.check(kind, Lsn(records[len(records) // 2].start))


def test_a_record_over_several_pages(case: Case) -> None:
    """EDGE 53: the longest record within a segment; its checksum is over bytes of many pages."""
    records = [record for found in case.recording.candidates().values() for record in found]
    longest = max(records, key=lambda record: record.length)
    assert longest.length > 3 * 8192
    case.check("the longest record", Lsn(longest.start))


def test_images_of_images(case: Case) -> None:
    """Each snapshot is built from the one before it; no difference adds up."""
    recording = case.recording
    points = [point for _, point in recording.points(4, seed=1)[-4:]]
    image = recover_backup(recording, points[0], recording.place / "image-0")
    for number, (begin, lsn) in enumerate(itertools.pairwise(points), start=1):
        image = recover_image(recording, image, begin, lsn, recording.place / f"image-{number}")
        shutil.rmtree(recording.place / f"image-{number - 1}")
    assert differing_pages(case.expected, image)[0] != [], "the last image is of an earlier moment"
    case.check_image("the last of four images", image, points[-1])
    shutil.rmtree(image)


def test_a_promoted_source(promoted: Case) -> None:
    """Redo points on both sides of the fork, in the segment, and on the page, that both tlis have (EDGE 17)."""
    recording = promoted.recording
    fork = recording.spans[1].begin
    places = sorted(Lsn(record.start) for records in recording.candidates().values() for record in records)
    before = max(place for place in places if place < fork)
    after = min(place for place in places if place > fork)
    assert before // recording.segment_bytes == fork // recording.segment_bytes
    assert after // 8192 == fork // 8192
    for begin in (before, after, places[-1]):
        promoted.check(f"tli {recording.span_of(begin).tli}", begin)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("share", range(SHARES))
def test_redo_points_everywhere(case: Case, share: int) -> None:
    """At a record of every kind that the workload wrote, inside every kind of open transaction, and all over its WAL."""
    points = case.recording.points(SPREAD, seed=case.recording.server.major)
    kinds = {kind.replace(" ", "_") for kind, _ in points}
    assert len(points) >= SPREAD + 60, kinds
    wanted = {*KINDS, *(f"in:_{kind.replace(' ', '_')}" for kind in OPEN_KINDS)}
    assert wanted <= kinds, wanted - kinds
    written = {record.kind.replace(" ", "_") for record in case.recording.records}
    assert written >= RARE_KINDS, RARE_KINDS - written
    for kind, begin in points[share::SHARES]:
        case.check(kind, begin)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_replay_agrees_with_the_source_page_by_page(verified: Case) -> None:
    """wal_consistency_checking on the source: each record brings the pages it changed."""
    points = verified.recording.points(12, seed=verified.recording.server.major)
    for kind, begin in points[::8]:
        verified.check(kind, begin)
