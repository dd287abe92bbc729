"""Tar archives as BASE_BACKUP sends them, parsed as they arrive, without I/O.

The server writes plain ustar headers (src/port/tar.c): names of at most 99 bytes, sizes in octal or, from 8
GiB, in base 256, directories and symlinks with a trailing slash. Headers are read by ``tarfile`` of the
standard library, which verifies their checksum; only the framing is done here, because its stream mode
wants to pull from a blocking file.

Memory: one header. File content is passed on as views of what was fed, and must be used or copied before
the next call.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass

from timeline.errors import TimelineError

_HEADER_BYTES = 512
_KINDS = {tarfile.REGTYPE: "f", tarfile.AREGTYPE: "f", tarfile.DIRTYPE: "d", tarfile.SYMTYPE: "l"}


class BackupStreamError(TimelineError):
    """What the source sent is no base backup as its protocol describes it."""


@dataclass(frozen=True, slots=True)
class Member:
    """One file, directory or symlink begins; ``size`` bytes of content follow."""

    path: str
    """Relative to the archive's root, without a leading ``./`` or a trailing slash."""
    kind: str
    """``f``, ``d`` or ``l``, as in a file listing."""
    size: int
    mode: int
    """Permission bits."""
    target: str | None
    """Of a symlink."""


@dataclass(frozen=True, slots=True)
class Content:
    """The next bytes of the member that began last."""

    data: memoryview


@dataclass(frozen=True, slots=True)
class MemberEnd:
    """All of the member's content has been seen."""


Event = Member | Content | MemberEnd


class TarStream:
    """One archive. Feed it bytes in any portions; ask ``finish`` when there are no more."""

    def __init__(self, name: str) -> None:
        """``name``: what to call the archive in errors."""
        self._name = name
        self._header = bytearray()
        self._left = 0
        self._padding = 0
        self._position = 0
        self._ended = False

    def feed(self, data: memoryview) -> Iterator[Event]:
        """The events in ``data``; raises BackupStreamError naming the archive and the byte."""
        at = 0
        size = len(data)
        while at < size:
            if self._left:
                end = min(size, at + self._left)
                yield Content(data[at:end])
                self._left -= end - at
                self._position += end - at
                at = end
                if not self._left:
                    yield MemberEnd()
                continue
            if self._padding:
                step = min(size - at, self._padding)
                self._padding -= step
                self._position += step
                at += step
                continue
            step = min(size - at, _HEADER_BYTES - len(self._header))
            self._header += data[at : at + step]
            self._position += step
            at += step
            if len(self._header) == _HEADER_BYTES:
                member = self._parse_header()
                self._header.clear()
                if member is not None:
                    yield member
                    if not self._left:
                        yield MemberEnd()

    def finish(self) -> None:
        """The archive ends here; raises BackupStreamError when that is in the middle of something.

        The two blocks of zeros that end a tar file may be missing: before Postgres 15 they are not sent.
        """
        if self._left or self._padding or self._header:
            raise self._error("the archive ends in the middle of a member")

    def _parse_header(self) -> Member | None:
        raw = bytes(self._header)
        if not any(raw):
            self._ended = True
            return None
        if self._ended:
            raise self._error("a member after the end of the archive")
        try:
            info = tarfile.TarInfo.frombuf(raw, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise self._error(f"expected a tar header: {error}") from error
        kind = _KINDS.get(info.type)
        if kind is None:
            raise self._error(f"{info.name!r} is of the unknown tar type {info.type!r}")
        path = info.name.removeprefix("./").rstrip("/")
        if not path or path.startswith("/") or any(part in ("", ".", "..") for part in path.split("/")):
            raise self._error(f"{info.name!r} is no path inside a data directory")
        size = info.size if kind == "f" else 0
        self._left = size
        self._padding = -size % _HEADER_BYTES
        return Member(path, kind, size, info.mode & 0o7777, info.linkname if kind == "l" else None)

    def _error(self, what: str) -> BackupStreamError:
        return BackupStreamError(f"base backup, archive {self._name}: at byte {self._position}: {what}")
