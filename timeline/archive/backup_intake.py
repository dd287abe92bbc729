"""From the archives of a base backup to rows of a file listing and groups of bytes.

Memory: one group under construction, one inline file (at most pg_control's 8 KiB), and about 0.3 KB for
every file, which is what its row of the listing takes until the listing is written at the end.
"""

from __future__ import annotations

from dataclasses import dataclass

from timeline.archive.backup_compare import Comparison, FileDifference
from timeline.archive.backup_files import BACKUP_LABEL, CONTROL_FILE, TABLESPACE_DIRECTORY, is_storable, treat
from timeline.archive.boot_set import BootFile, BootRule
from timeline.archive.extent_writer import UNKNOWN, Encoded, ExtentWriter, Group, KnownGroup
from timeline.archive.known_pages import KnownPages
from timeline.archive.tar_stream import Content, Member, MemberEnd, TarStream
from timeline.format.extent import GROUP_BYTES
from timeline.format.file_listing import FileListing
from timeline.format.manifest import FileRow
from timeline.lsn import Lsn

_TABLESPACE_MODE = 0o700


@dataclass(slots=True)
class _Open:
    """The member that is being received."""

    member: Member
    listed: bool
    inline: bool
    boot: BootFile | None
    content: bytearray
    groups: int = 0


@dataclass(slots=True)
class _Compared:
    """A file whose groups are on their way through the threads."""

    size_before: int | None
    groups: int = 0
    changed: int = 0
    unexplained: int = 0
    complete: bool = False


class Previous:
    """The newest snapshot, as far as a new backup is compared with it."""

    def __init__(self, pages: KnownPages, files: FileListing, comparison: Comparison) -> None:
        self.pages = pages
        self.files = files
        self.comparison = comparison


class Intake:
    """Takes the archives one after the other."""

    def __init__(self, writer: ExtentWriter, rule: BootRule) -> None:
        self._writer = writer
        self._rule = rule
        self._uploaded: KnownPages | None = None
        self._previous: Previous | None = None
        self._tar: TarStream | None = None
        self._prefix = ""
        self._open: _Open | None = None
        self._comparing: dict[str, _Compared] = {}
        self.files: dict[str, FileRow] = {}
        """Rows of the listing by path."""
        self.backup_label: str | None = None
        self.read_bytes = 0
        """Content of files seen so far."""
        self.left_out: list[str] = []
        """Files whose names are no text."""

    def know(self, uploaded: KnownPages | None, previous: Previous | None) -> None:
        """What the store has already: from an interrupted try, and in the newest snapshot."""
        self._uploaded = uploaded
        self._previous = previous

    def begin_archive(self, name: str, oid: int | None) -> None:
        """A tar archive begins; ``oid``: of its tablespace, ``None`` for the data directory."""
        self.end_archive()
        self._tar = TarStream(name)
        self._prefix = ""
        if oid is not None:
            # In a snapshot a tablespace lies in place, where the source has a link to it.
            directory = f"{TABLESPACE_DIRECTORY}/{oid}"
            self._prefix = directory + "/"
            self.files[directory] = FileRow(directory, "d", 0, _TABLESPACE_MODE, None, None, Lsn(0))

    def end_archive(self) -> None:
        """The archive is complete; raises BackupStreamError when it is not."""
        if self._tar is not None:
            self._tar.finish()

    async def feed(self, data: memoryview) -> None:
        """The next bytes of the archive; waits for the writer."""
        if self._tar is None:
            raise ValueError("no archive has begun")
        for event in self._tar.feed(data):
            if isinstance(event, Content):
                await self._take(event.data)
            elif isinstance(event, Member):
                self._open = self._begin(event)
            elif isinstance(event, MemberEnd):
                await self._end()

    def _begin(self, member: Member) -> _Open:
        member = Member(self._prefix + member.path, member.kind, member.size, member.mode, member.target)
        treatment = treat(member.path, member.kind, member.size)
        listed = treatment.listed
        if listed and not is_storable(member.path):
            listed = False
            self.left_out.append(ascii(member.path))
        boot = self._rule.boot_file(member.path, member.size) if listed and not treatment.inline else None
        # pg_control always differs, and means nothing by it.
        comparable = listed and member.kind == "f" and member.path != CONTROL_FILE
        if comparable and self._previous is not None:
            before = self._previous.files.get(member.path)
            self._comparing[member.path] = _Compared(before.size if before is not None else None)
        return _Open(member, listed, treatment.inline, boot, bytearray())

    async def _take(self, data: memoryview) -> None:
        current = self._open
        if current is None:
            raise ValueError("content without a file")
        self.read_bytes += len(data)
        if not current.listed and not current.inline:
            return
        if current.inline:
            current.content += data
            return
        at = 0
        while at < len(data):
            step = min(len(data) - at, GROUP_BYTES - len(current.content))
            current.content += data[at : at + step]
            at += step
            if len(current.content) == GROUP_BYTES:
                await self._put(current)

    async def _end(self) -> None:
        current, self._open = self._open, None
        if current is None:
            raise ValueError("the end of a file without its beginning")
        member = current.member
        if not current.inline and current.content:
            await self._put(current)
        if member.path == BACKUP_LABEL:
            self.backup_label = current.content.decode("utf-8", "surrogateescape")
        if not current.listed:
            return
        content = bytes(current.content) if current.inline else None
        self.files[member.path] = FileRow(
            member.path, member.kind, member.size, member.mode, content, member.target, Lsn(0)
        )
        compared = self._comparing.get(member.path)
        if compared is not None and self._previous is not None:
            before = self._previous.files.get(member.path)
            if before is not None and content is not None and before.content != content:
                # Files this small have no groups; they count as one that differs.
                compared.groups = compared.changed = compared.unexplained = 1
            compared.complete = True
            self._settle(member.path, current.groups)

    async def _put(self, current: _Open) -> None:
        path, number = current.member.path, current.groups
        raw = bytes(current.content)
        current.content.clear()
        current.groups += 1
        boot = current.boot
        await self._writer.put(
            Group(
                path,
                number,
                raw,
                await self._known(path, number),
                self._previous.comparison.lsn if self._previous is not None else None,
                boot.database if boot is not None and number < boot.groups else None,
            )
        )

    async def _known(self, path: str, number: int) -> KnownGroup:
        if self._uploaded is None and self._previous is None:
            return UNKNOWN
        uploaded = (await self._uploaded.visible(path, number))[0] if self._uploaded is not None else ()
        if self._previous is None:
            return KnownGroup(uploaded)
        snapshot, overlapped = await self._previous.pages.visible(path, number)
        if overlapped:
            self._previous.comparison.count_not_compared()
        return KnownGroup(uploaded, snapshot, bool(snapshot) and not overlapped)

    def group_finished(self, encoded: Encoded) -> None:
        """The writer is done with a group."""
        compared = self._comparing.get(encoded.group.path)
        if compared is None or self._previous is None:
            return
        compared.groups += 1
        known = encoded.group.known
        if encoded.equal:
            self._previous.comparison.count_equal()
        elif known.in_snapshot or not known.snapshot:
            compared.changed += 1
            compared.unexplained += not encoded.explained
        row = self.files.get(encoded.group.path)
        if compared.complete and row is not None:
            self._settle(encoded.group.path, -(-row.size // GROUP_BYTES))

    def _settle(self, path: str, groups: int) -> None:
        """Count a file's differences once all its groups are through."""
        compared = self._comparing[path]
        if self._previous is None or (compared.groups < groups and groups):
            return
        del self._comparing[path]
        size = self.files[path].size
        if compared.size_before is None:
            kind = "added"
        elif compared.changed or compared.size_before != size:
            kind = "changed"
        else:
            return
        self._previous.comparison.add(
            FileDifference(path, kind, compared.groups, compared.changed, compared.unexplained)
        )

    def count_removed(self) -> None:
        """After the last file: what the snapshot has and the source does not."""
        if self._previous is None:
            return
        for row in self._previous.files:
            if row.kind == "f" and row.path not in self.files:
                self._previous.comparison.add(FileDifference(row.path, "removed", 0, 0, 0))
