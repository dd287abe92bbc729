"""A snapshot's listing and contents out of plain bytes in memory, for tests of the tree alone."""

from __future__ import annotations

import asyncio
import atexit
import os
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import Any, TypeVar

from restore.overlay import Overlay
from restore.tree import Tree
from timeline.format.file_listing import FileListing, read_file_listing, write_file_listing
from timeline.format.manifest import FileRow
from timeline.lsn import Lsn

T = TypeVar("T")


class BytesContent:
    """Contents that are there at once, or only after a step of the event loop."""

    def __init__(self, data: bytes, *, at_once: bool) -> None:
        self._data = data
        self._at_once = at_once
        self.reads = 0
        self.ahead: list[range] = []

    def read_now(self, offset: int, length: int) -> bytes | None:
        return self._data[offset : offset + length].ljust(length, b"\0") if self._at_once else None

    async def read(self, offset: int, length: int) -> bytes:
        self.reads += 1
        await asyncio.sleep(0)
        return self._data[offset : offset + length].ljust(length, b"\0")

    def read_ahead(self, groups: range) -> int:
        self.ahead.append(groups)
        return groups.stop


_loop = asyncio.new_event_loop()
atexit.register(_loop.close)


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run to the end, in one event loop for all: making one costs more than most of what is run here."""
    return _loop.run_until_complete(work)


def listing_of(files: Mapping[str, bytes | None]) -> FileListing:
    """Path → content, ``None`` for a directory; directories above are made."""
    paths = dict(files)
    for path in files:
        while path := os.path.dirname(path):
            paths.setdefault(path, None)
    rows = [
        FileRow(path, "d", 0, 0o700, None, None, Lsn(0))
        if content is None
        else FileRow(path, "f", len(content), 0o600, None, None, Lsn(0))
        for path, content in paths.items()
    ]
    return read_file_listing(*write_file_listing(rows))


def tree_of(
    files: Mapping[str, bytes | None],
    directory: Path,
    *,
    at_once: bool = True,
    listing: FileListing | None = None,
) -> Tree:
    """A tree over those files; the overlay in ``directory`` is made, or opened again as after a kill."""
    overlay = Overlay.open(directory) if (directory / "overlay.json").exists() else Overlay.create(directory)
    return Tree(
        listing if listing is not None else listing_of(files),
        lambda row: BytesContent(files[row.path] or b"", at_once=at_once),
        overlay,
        snapshot_mtime_ns=1,
    )


def inode_of(tree: Tree, path: str) -> int:
    """Look a path up, step by step, as the kernel does; the references are never given back."""
    inode = 1
    for name in path.split("/") if path else ():
        inode = tree.lookup(inode, name).inode
    return inode


def names_of(tree: Tree, inode: int) -> dict[str, str]:
    """Name → kind of a directory's entries."""
    handle = tree.open_directory(inode)
    found = {}
    for name, attributes, _ in tree.read_directory(handle, 0):
        assert name not in found
        found[name] = attributes.kind
        tree.drop(attributes.inode)
    tree.release_directory(handle)
    return found


def content_of(tree: Tree, inode: int) -> bytes:
    """The whole content of a file."""
    handle = tree.open(inode)
    try:
        return run(tree.read(handle, 0, 1 << 24))
    finally:
        tree.release(handle)


def everything(tree: Tree, inode: int = 1, prefix: str = "") -> dict[str, bytes | None]:
    """Path → content of all there is; ``None`` for directories."""
    found: dict[str, bytes | None] = {}
    for name, kind in names_of(tree, inode).items():
        attributes = tree.lookup(inode, name)
        path = prefix + name
        if kind == "d":
            found[path] = None
            found |= everything(tree, attributes.inode, f"{path}/")
        else:
            content = content_of(tree, attributes.inode)
            assert tree.attributes(attributes.inode).size == len(content)
            found[path] = content
        tree.forget(attributes.inode, 1)
    return found
