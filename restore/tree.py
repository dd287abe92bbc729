"""The virtual data directory of a branch: the snapshot's listing under the overlay. Knows nothing of FUSE.

Inodes: 1 is the root; a name of the snapshot has a number made from its row in the listing, so that nothing
has to be remembered for the files of a database that nobody has open; whatever the branch made itself has a
number above FIRST_OWN, given out once. An object is held in memory only while a file is open, or while the
kernel knows an inode whose place cannot be derived from its number: directories, names of the branch's own,
moved and removed files.

Choices: a symlink of the snapshot shows as a directory (the source's paths are never followed, EDGE 49:
tablespaces are in place); directories can be renamed, with what shows through them; hard links, device nodes
and RENAME_EXCHANGE do not exist. Errors are OSError with the errno a file system gives, and TimelineError
from reading the snapshot.
"""

from __future__ import annotations

import errno
import itertools
import os
from array import array
from collections.abc import Awaitable, Callable, Iterator

from restore.open_file import OpenFile
from restore.overlay import DIRECTORY, FILE, SYMLINK, WHITEOUT, Entry, Overlay, is_tablespace_path
from restore.tree_node import (
    Attributes,
    DirectoryHandle,
    Handle,
    Node,
    SnapshotContent,
    shown_kind,
    shown_mode,
)
from timeline.format.file_listing import FileListing
from timeline.format.manifest import FileRow

ROOT = 1
_FIRST_ROW = 2
FIRST_OWN = 1 << 40
"""Inodes from here on are not the snapshot's."""


class Tree:
    """One branch's files. All methods but ``read`` and ``write`` return without waiting for the store."""

    def __init__(
        self,
        listing: FileListing,
        content: Callable[[FileRow], SnapshotContent],
        overlay: Overlay,
        *,
        snapshot_mtime_ns: int,
    ) -> None:
        self._listing = listing
        self._content = content
        self.overlay = overlay
        self._mtime_ns = snapshot_mtime_ns
        self._root = Node(ROOT, None, "", DIRECTORY, "", lookups=1)
        self._nodes: dict[int, Node] = {ROOT: self._root}
        self._own: dict[tuple[int, str], Node] = {}
        """The branch's own nodes by (parent inode, name)."""
        self._row_lookups = array("I", bytes(4 * len(listing)))
        self._inodes = itertools.count(FIRST_OWN)
        self._handle_numbers = itertools.count(1)
        self._handles: dict[int, Handle] = {}
        self._directories: dict[int, DirectoryHandle] = {}

    @property
    def nodes(self) -> int:
        """How many objects are held, for tests of what is promised above."""
        return len(self._nodes)

    # Looking.

    def lookup(self, parent: int, name: str) -> Attributes:
        """The entry of a directory; the caller owes a ``forget``."""
        node, entry = self._find(self._node(parent), name)
        attributes = self._attributes(node, entry)
        self.remember(node.inode)
        self._hold(node)
        return attributes

    def remember(self, inode: int) -> None:
        """The kernel was told of the inode; it owes a ``forget``."""
        if _FIRST_ROW <= inode < FIRST_OWN:
            self._row_lookups[inode - _FIRST_ROW] += 1
        elif inode in self._nodes:
            self._nodes[inode].lookups += 1

    def forget(self, inode: int, count: int) -> None:
        """The kernel gives references back."""
        if inode == ROOT:
            return
        if _FIRST_ROW <= inode < FIRST_OWN:
            row = inode - _FIRST_ROW
            self._row_lookups[row] = max(0, self._row_lookups[row] - count)
        node = self._nodes.get(inode)
        if node is not None:
            node.lookups = max(0, node.lookups - count)
            self._settle(node)

    def attributes(self, inode: int) -> Attributes:
        """Of a file, directory or symlink."""
        return self._attributes(self._node(inode), None)

    def read_link(self, inode: int) -> str:
        """Target of a symlink."""
        return self.overlay.read_link(self._path(self._node(inode)))

    def open_directory(self, inode: int) -> int:
        """A handle for ``read_directory``."""
        node = self._node(inode, DIRECTORY)
        own = sorted(self.overlay.names(self._path(node)))
        rows = self._listing.numbers(node.base) if node.base is not None else range(0)
        number = next(self._handle_numbers)
        self._directories[number] = DirectoryHandle(node, own, frozenset(own), rows)
        return number

    def read_directory(self, handle: int, after: int) -> Iterator[tuple[str, Attributes, int]]:
        """(name, attributes, position) of the entries behind a position; 0 is the beginning.

        Whoever passes an entry on to the kernel calls ``remember``; who does not calls ``drop``.
        """
        directory = self._directories[handle]
        node = directory.node
        if node.gone:
            return
        path = self._path(node)
        for position in range(after, len(directory.own)):
            name = directory.own[position]
            entry = self.overlay.lookup(_join(path, name))
            if entry is not None and entry.kind != WHITEOUT:
                child, _ = self._find(node, name, entry)
                yield name, self._attributes(child, entry), position + 1
        layered = self.overlay.has_dir(path)
        for position in range(max(0, after - len(directory.own)), len(directory.rows)):
            number = directory.rows[position]
            row = self._listing.row(number)
            name = os.path.basename(row.path)
            if name in directory.own_set:
                continue
            entry = self.overlay.lookup(_join(path, name)) if layered else None
            if entry is None:
                yield name, self._row_attributes(number, row), len(directory.own) + position + 1
            elif entry.kind != WHITEOUT:
                child, _ = self._find(node, name, entry)
                yield name, self._attributes(child, entry), len(directory.own) + position + 1

    def drop(self, inode: int) -> None:
        """An entry was not passed on after all."""
        node = self._nodes.get(inode)
        if node is not None:
            self._settle(node)

    def release_directory(self, handle: int) -> None:
        """The handle is not used any more."""
        self._directories.pop(handle, None)

    # Files.

    def open(self, inode: int, *, truncate: bool = False) -> int:
        """A handle for reading and writing."""
        node = self._node(inode, FILE)
        file = self._open_file(node)
        if truncate:
            try:
                file.truncate(0)
            except OSError:
                self._close_file(node)
                raise
        return self._add_handle(node, file)

    def create(self, parent: int, name: str, mode: int) -> tuple[Attributes, int]:
        """A new empty file and a handle of it; the caller owes a ``forget``."""
        directory = self._directory_for_new(parent, name)
        fd = self.overlay.add_file(self._child_path(directory, name), mode)
        node = self._new_own(directory, name, FILE, None)
        node.lookups = 1
        node.file = OpenFile(
            self.overlay,
            fd=fd,
            size=0,
            base=None,
            base_path=None,
            valid_bytes=0,
            adopt=lambda: self._adopt(node, 0),
        )
        node.file.unsynced_name = True
        node.opens = 1
        return self._attributes(node, None), self._add_handle(node, node.file)

    async def read(self, handle: int, offset: int, length: int) -> bytes:
        """The bytes, fewer at the end of the file."""
        opened = self._handles[handle]
        content = opened.node.content
        if content is not None:
            groups = opened.ahead.note(offset, length, opened.file.size)
            if groups:
                wanted = opened.file.groups_to_fetch(groups)
                first_left = content.read_ahead(wanted) if wanted else groups.stop
                opened.ahead.taken(groups.stop if first_left == wanted.stop else first_left)
        now = opened.file.read_now(offset, length)
        return now if now is not None else await opened.file.read(offset, length)

    async def write(self, handle: int, offset: int, data: bytes) -> int:
        """Write all of it; how many bytes that were."""
        return await self._handles[handle].file.write(offset, data)

    def inode_of(self, handle: int) -> int:
        """Inode of an open file."""
        return self._handles[handle].node.inode

    async def sync(self, handle: int, in_thread: Callable[[Callable[[], None]], Awaitable[None]]) -> None:
        """Bring the file, and the directories that name it when they are new, to the disk."""
        opened = self._handles[handle]
        file, node = opened.file, opened.node
        fd = file.fd
        if fd is None:
            return
        directory = None
        if file.unsynced_name and not node.gone and node.parent is not None:
            directory = self._path(node.parent)
        file.unsynced_name = False
        try:
            await in_thread(lambda: self._sync_now(fd, directory))
        except OSError:
            file.unsynced_name = True
            raise

    def _sync_now(self, fd: int, directory: str | None) -> None:
        os.fdatasync(fd)
        if directory is not None:
            self.overlay.sync_dirs(directory)

    def directory_path(self, handle: int) -> str:
        """Overlay path of an open directory, for its fsync."""
        return self._path(self._directories[handle].node)

    def release(self, handle: int) -> None:
        """The handle is not used any more."""
        opened = self._handles.pop(handle)
        self._close_file(opened.node)

    def truncate(self, inode: int, size: int) -> None:
        """Cut a file or extend it with zeros."""
        node = self._node(inode, FILE)
        file = self._open_file(node)
        try:
            file.truncate(size)
        finally:
            self._close_file(node)

    def set_mode(self, inode: int, mode: int) -> None:
        """Permission bits."""
        node = self._node(inode)
        if not node.gone:
            self._make_local(node)
            self.overlay.set_mode(self._path(node), mode)

    def set_mtime(self, inode: int, mtime_ns: int) -> None:
        """Time of the last change; of a file that was never changed it stays the snapshot's."""
        node = self._node(inode)
        path = self._path(node)
        if not node.gone and self.overlay.lookup(path) is not None:
            self.overlay.set_mtime(path, mtime_ns)

    # Names.

    def make_directory(self, parent: int, name: str, mode: int) -> Attributes:
        """A new directory; the caller owes a ``forget``."""
        directory = self._directory_for_new(parent, name)
        self.overlay.add_dir(self._child_path(directory, name), mode)
        node = self._new_own(directory, name, DIRECTORY, None)
        node.lookups = 1
        return self._attributes(node, None)

    def make_symlink(self, parent: int, name: str, target: str) -> Attributes:
        """A new symlink, not under ``pg_tblspc`` (EPERM); the caller owes a ``forget``."""
        directory = self._directory_for_new(parent, name)
        self.overlay.add_symlink(self._child_path(directory, name), target)
        node = self._new_own(directory, name, SYMLINK, None)
        node.lookups = 1
        return self._attributes(node, None)

    def unlink(self, parent: int, name: str) -> None:
        """Remove a file or symlink; what has it open keeps its content."""
        directory = self._node(parent, DIRECTORY)
        node, _ = self._find(directory, name)
        if node.kind == DIRECTORY:
            raise _error(errno.EISDIR, name)
        hide = self._in_snapshot(directory, name)
        if hide:
            self._make_local(directory)
        self.overlay.remove_file(self._child_path(directory, name), hide=hide)
        self._detach(node)

    def remove_directory(self, parent: int, name: str) -> None:
        """Remove an empty directory."""
        directory = self._node(parent, DIRECTORY)
        node, _ = self._find(directory, name)
        if node.kind != DIRECTORY:
            raise _error(errno.ENOTDIR, name)
        self._check_empty(node)
        hide = self._in_snapshot(directory, name)
        if hide:
            self._make_local(directory)
        self.overlay.remove_dir(self._child_path(directory, name), hide=hide)
        self._detach(node)

    def rename(self, parent: int, name: str, new_parent: int, new_name: str, *, replace: bool = True) -> None:
        """Move a file or directory, over what may be there."""
        old_directory = self._node(parent, DIRECTORY)
        new_directory = self._node(new_parent, DIRECTORY)
        node, _ = self._find(old_directory, name)
        target: Node | None
        try:
            target, _ = self._find(new_directory, new_name)
        except FileNotFoundError:
            target = None
        new_path = self._child_path(new_directory, new_name)
        if target is not None and target.inode == node.inode:
            return
        if target is not None:
            self._check_replaceable(node, target, new_name, replace=replace)
        if node.kind == SYMLINK and is_tablespace_path(new_path):
            raise _error(errno.EPERM, new_path)
        self._make_local(node)
        self._make_local(new_directory)
        if target is not None:
            self._make_local(target)
        hide = self._in_snapshot(old_directory, name)
        self.overlay.rename(self._child_path(old_directory, name), new_path, hide_old=hide)
        if target is not None:
            self._detach(target)
        self._own.pop((old_directory.inode, name), None)
        node.parent, node.name = new_directory, new_name
        if node.inode >= FIRST_OWN:
            self._own[(new_directory.inode, new_name)] = node
        if node.file is not None:
            node.file.unsynced_name = True
        self._hold(node)
        self._settle(node)

    # Where nodes come from and go to.

    def _node(self, inode: int, kind: str | None = None) -> Node:
        node = self._nodes.get(inode)
        if node is None:
            if not _FIRST_ROW <= inode < _FIRST_ROW + len(self._listing):
                raise _error(errno.ESTALE, str(inode))
            node = self._row_node(inode - _FIRST_ROW)
        if kind is not None and node.kind != kind:
            wrong = (
                errno.ENOTDIR
                if kind == DIRECTORY
                else errno.EISDIR
                if node.kind == DIRECTORY
                else errno.EINVAL
            )
            raise _error(wrong, node.name)
        return node

    def _row_node(self, number: int) -> Node:
        """The node of a snapshot's name that lies where the listing says: any other is in ``_nodes``."""
        row = self._listing.row(number)
        directory, name = os.path.split(row.path)
        parent = self._root if not directory else self._directory_node(directory)
        entry = self.overlay.lookup(self._child_path(parent, name))
        if entry is not None and entry.base != row.path:
            raise _error(errno.ESTALE, row.path)
        node = Node(number + _FIRST_ROW, parent, name, shown_kind(row), row.path)
        if node.kind == DIRECTORY:
            self._nodes[node.inode] = node
        return node

    def _directory_node(self, path: str) -> Node:
        number = self._listing.find(path)
        if number is None:
            raise _error(errno.ESTALE, path)
        return self._node(number + _FIRST_ROW, DIRECTORY)

    def _find(self, parent: Node, name: str, entry: Entry | None = None) -> tuple[Node, Entry | None]:
        """The node of a name, and what the overlay has there."""
        if parent.kind != DIRECTORY:
            raise _error(errno.ENOTDIR, parent.name)
        if parent.gone:
            raise _error(errno.ENOENT, name)
        own = self._own.get((parent.inode, name))
        if own is not None:
            return own, entry
        entry = entry or self.overlay.lookup(self._child_path(parent, name))
        if entry is not None and entry.kind == WHITEOUT:
            raise _error(errno.ENOENT, name)
        base = entry.base if entry is not None else None if parent.base is None else _join(parent.base, name)
        number = self._listing.find(base) if base is not None else None
        if number is None:
            if entry is None:
                raise _error(errno.ENOENT, name)
            return self._new_own(parent, name, entry.kind, entry.base), entry
        node = self._nodes.get(number + _FIRST_ROW)
        if node is None:
            kind = entry.kind if entry is not None else shown_kind(self._listing.row(number))
            node = Node(number + _FIRST_ROW, parent, name, kind, base)
        return node, entry

    def _new_own(self, parent: Node, name: str, kind: str, base: str | None) -> Node:
        node = Node(next(self._inodes), parent, name, kind, base)
        self._nodes[node.inode] = node
        self._own[(parent.inode, name)] = node
        return node

    def _hold(self, node: Node) -> None:
        """Keep a node in memory if its place does not follow from its number."""
        if node.kind == DIRECTORY or node.opens or node.gone or self._displaced(node):
            self._nodes[node.inode] = node

    def _settle(self, node: Node) -> None:
        """Let a node go that nobody can ask for, or that can be made again."""
        if node.opens or node.inode == ROOT:
            return
        if node.inode >= FIRST_OWN:
            known = node.lookups > 0
        else:
            known = self._row_lookups[node.inode - _FIRST_ROW] > 0
            known = known and (node.kind == DIRECTORY or node.gone or self._displaced(node))
        if known:
            return
        if self._nodes.get(node.inode) is node:
            del self._nodes[node.inode]
        if node.parent is not None and self._own.get((node.parent.inode, node.name)) is node:
            del self._own[(node.parent.inode, node.name)]

    def _displaced(self, node: Node) -> bool:
        if node.inode >= FIRST_OWN or node.parent is None:
            return False
        return node.parent.base is None or _join(node.parent.base, node.name) != node.base

    def _detach(self, node: Node) -> None:
        """The name is gone; an open file lives on."""
        if node.parent is not None and self._own.get((node.parent.inode, node.name)) is node:
            del self._own[(node.parent.inode, node.name)]
        node.gone = True
        self._hold(node)
        self._settle(node)

    # Places and contents.

    def _path(self, node: Node) -> str:
        parts = []
        at: Node | None = node
        while at is not None and at.parent is not None:
            parts.append(at.name)
            at = at.parent
        return "/".join(reversed(parts))

    def _child_path(self, parent: Node, name: str) -> str:
        return _join(self._path(parent), name)

    def _in_snapshot(self, parent: Node, name: str) -> bool:
        return parent.base is not None and self._listing.find(_join(parent.base, name)) is not None

    def _directory_for_new(self, parent: int, name: str) -> Node:
        """The directory, made local, after making sure that the name is free."""
        directory = self._node(parent, DIRECTORY)
        try:
            node, _ = self._find(directory, name)
        except FileNotFoundError:
            if directory.gone:
                raise
            self._make_local(directory)
            return directory
        self._settle(node)
        raise _error(errno.EEXIST, name)

    def _make_local(self, node: Node) -> None:
        """Make sure that the overlay has it."""
        if node.parent is None or node.gone:
            return
        path = self._path(node)
        if self.overlay.lookup(path) is not None:
            return
        self._make_local(node.parent)
        if node.base is None:
            raise _error(errno.ENOENT, path)
        row = self._listing.get(node.base)
        if row is None:
            raise _error(errno.ENOENT, path)
        if node.kind == DIRECTORY:
            self.overlay.adopt_dir(path, node.base, shown_mode(row))
        elif node.file is not None:
            node.file.make_local()
        else:
            os.close(self.overlay.adopt_file(path, node.base, row.size, shown_mode(row)))

    def _adopt(self, node: Node, size: int) -> int:
        """A local file for one that had none, called by OpenFile before the first change."""
        if node.gone or node.parent is None or node.base is None:
            return self.overlay.anonymous_file(size)
        row = self._listing.get(node.base)
        self._make_local(node.parent)
        mode = 0o600 if row is None else shown_mode(row)
        return self.overlay.adopt_file(self._path(node), node.base, size, mode)

    def _open_file(self, node: Node) -> OpenFile:
        """The content, opened once for all who have it open."""
        if node.file is None:
            node.file = self._new_file(node)
        node.opens += 1
        self._nodes[node.inode] = node
        return node.file

    def _close_file(self, node: Node) -> None:
        node.opens -= 1
        if node.opens == 0 and node.file is not None:
            node.file.close()
            node.file = None
            node.content = None
            self._settle(node)

    def _new_file(self, node: Node) -> OpenFile:
        if node.gone:
            raise _error(errno.ESTALE, node.name)
        path = self._path(node)
        entry = self.overlay.lookup(path)
        row = self._listing.get(node.base) if node.base is not None else None
        if row is not None and row.kind == FILE:
            node.content = self._content(row)
        if entry is None:
            if row is None:
                raise _error(errno.ENOENT, path)
            fd, size, valid = None, row.size, row.size
        else:
            if entry.base is not None and node.content is None:
                raise OSError(errno.EIO, f"shows {entry.base}, which the snapshot does not have", path)
            fd, size, valid = self.overlay.open_file(path), entry.size, entry.valid_bytes
            if entry.base is not None:
                self.overlay.settle_valid(fd, entry.base, valid)
        return OpenFile(
            self.overlay,
            fd=fd,
            size=size,
            base=node.content,
            base_path=node.base,
            valid_bytes=valid,
            adopt=lambda: self._adopt(node, size),
        )

    def _add_handle(self, node: Node, file: OpenFile) -> int:
        number = next(self._handle_numbers)
        self._handles[number] = Handle(node, file)
        return number

    def _attributes(self, node: Node, entry: Entry | None) -> Attributes:
        if node.gone:
            size = node.file.size if node.file is not None else 0
            return Attributes(node.inode, node.kind, size, 0o600, self._mtime_ns, 0)
        entry = entry or self.overlay.lookup(self._path(node))
        if entry is None:
            number = node.inode - _FIRST_ROW
            return self._row_attributes(number, self._listing.row(number))
        size = entry.size if node.file is None else node.file.size
        if node.kind == DIRECTORY:
            return Attributes(node.inode, DIRECTORY, 0, entry.mode, entry.mtime_ns, 2)
        return Attributes(node.inode, node.kind, size, entry.mode, entry.mtime_ns, 1)

    def _row_attributes(self, number: int, row: FileRow) -> Attributes:
        kind = shown_kind(row)
        size = row.size if kind == FILE else 0
        links = 1 if kind == FILE else 2
        return Attributes(number + _FIRST_ROW, kind, size, shown_mode(row), self._mtime_ns, links)

    def _check_empty(self, node: Node) -> None:
        handle = self.open_directory(node.inode) if node.inode in self._nodes else self._open_unknown(node)
        try:
            for _, attributes, _ in self.read_directory(handle, 0):
                self.drop(attributes.inode)
                raise _error(errno.ENOTEMPTY, node.name)
        finally:
            self.release_directory(handle)

    def _open_unknown(self, node: Node) -> int:
        self._nodes[node.inode] = node
        return self.open_directory(node.inode)

    def _check_replaceable(self, node: Node, target: Node, name: str, *, replace: bool) -> None:
        if not replace:
            raise _error(errno.EEXIST, name)
        if node.kind == DIRECTORY:
            if target.kind != DIRECTORY:
                raise _error(errno.ENOTDIR, name)
            self._check_empty(target)
        elif target.kind == DIRECTORY:
            raise _error(errno.EISDIR, name)


def _join(directory: str, name: str) -> str:
    return f"{directory}/{name}" if directory else name


def _error(code: int, name: str) -> OSError:
    return OSError(code, os.strerror(code), name)
