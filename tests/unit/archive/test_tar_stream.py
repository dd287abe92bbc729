"""Tar archives in arbitrary portions."""

from __future__ import annotations

import io
import itertools
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from timeline.archive.tar_stream import BackupStreamError, Content, Member, MemberEnd, TarStream

MEMBERS = {
    "PG_VERSION": b"15\n",
    "base/5/1259": bytes(range(256)) * 64,
    "empty": b"",
    "odd": b"x" * 513,
    "exact": b"y" * 1024,
}


def archive(*, terminated: bool = True) -> bytes:
    """As the server makes it: directories and links with a trailing slash, ustar."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        directory = tarfile.TarInfo("./pg_wal/archive_status/")
        directory.type, directory.mode = tarfile.DIRTYPE, 0o700
        tar.addfile(directory)
        link = tarfile.TarInfo("pg_tblspc/16384/")
        link.type, link.linkname = tarfile.SYMTYPE, "/elsewhere"
        tar.addfile(link)
        for name, content in MEMBERS.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(content), 0o600
            tar.addfile(info, io.BytesIO(content))
        end = tar.offset
    return out.getvalue()[: end + (1024 if terminated else 0)]


def parse(data: bytes, cuts: list[int]) -> list[tuple[Member, bytes]]:
    """The members with their contents, from portions cut at these places."""
    stream = TarStream("base.tar")
    found: list[tuple[Member, bytes]] = []
    ended = True
    places = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    for start, end in itertools.pairwise(places):
        for event in stream.feed(memoryview(data)[start:end]):
            if isinstance(event, Member):
                assert ended
                found.append((event, b""))
                ended = False
            elif isinstance(event, Content):
                found[-1] = (found[-1][0], found[-1][1] + event.data)
            elif isinstance(event, MemberEnd):
                ended = True
    assert ended
    stream.finish()
    return found


@given(st.lists(st.integers(0, 1 << 20), max_size=40), st.booleans())
def test_any_portions_give_the_same_members(cuts: list[int], terminated: bool) -> None:
    found = parse(archive(terminated=terminated), cuts)
    assert {member.path: content for member, content in found if member.kind == "f"} == MEMBERS
    assert found[0][0] == Member("pg_wal/archive_status", "d", 0, 0o700, None)
    assert (found[1][0].path, found[1][0].kind, found[1][0].target) == ("pg_tblspc/16384", "l", "/elsewhere")


@given(st.integers(1, 10_000))
def test_an_archive_that_stops_short_is_refused(missing: int) -> None:
    data = archive(terminated=False)
    stream = TarStream("base.tar")
    whole = sum(1 for event in stream.feed(memoryview(data)) if isinstance(event, MemberEnd))
    short = TarStream("base.tar")
    cut = len(data) - missing
    ends = sum(1 for event in short.feed(memoryview(data)[:cut]) if isinstance(event, MemberEnd))
    if ends < whole:
        try:
            short.finish()
        except BackupStreamError as error:
            assert "base.tar" in error.message
        else:
            # Cut exactly between two members: only the list of files could tell.
            assert cut % 512 == 0


def test_sizes_from_8_gib_are_read() -> None:
    info = tarfile.TarInfo("base/5/1")
    info.size = 9 << 30
    header = info.tobuf(format=tarfile.GNU_FORMAT)
    events = list(TarStream("base.tar").feed(memoryview(header)))
    assert isinstance(events[0], Member) and events[0].size == 9 << 30


@pytest.mark.parametrize("name", ["/etc/passwd", "../outside", "base/../../outside", "./", "base//5"])
def test_paths_outside_the_data_directory_are_refused(name: str) -> None:
    info = tarfile.TarInfo(name)
    with pytest.raises(BackupStreamError, match="no path inside"):
        list(TarStream("base.tar").feed(memoryview(info.tobuf(format=tarfile.USTAR_FORMAT))))


def test_damage_names_archive_and_byte() -> None:
    data = bytearray(archive())
    data[1024 + 10] ^= 1
    with pytest.raises(BackupStreamError, match=r"archive 16384\.tar: at byte 1536: expected a tar header"):
        list(TarStream("16384.tar").feed(memoryview(data)))
    fifo = tarfile.TarInfo("fifo")
    fifo.type = tarfile.FIFOTYPE
    with pytest.raises(BackupStreamError, match="unknown tar type"):
        list(TarStream("base.tar").feed(memoryview(fifo.tobuf(format=tarfile.USTAR_FORMAT))))
    with pytest.raises(BackupStreamError, match="after the end"):
        list(TarStream("base.tar").feed(memoryview(archive() + archive())))
