"""Tree and overlay against a model of plain bytes: whatever is done, whenever the process is killed (EDGE 51)."""

from __future__ import annotations

import errno
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from restore import overlay, sparse
from restore.tree import Tree
from tests.support.tree_snapshot import everything, inode_of, listing_of, run, tree_of

GROUP = 131072
_PATTERN = random.Random(7).randbytes(3 * GROUP)
BASE: dict[str, bytes | None] = {
    "base": None,
    "base/1": None,
    "base/1/10": _PATTERN[:8192],
    "base/1/11": _PATTERN[5 : 5 + 2 * GROUP + 5000],
    "base/1/12": b"",
    "base/2": None,
    "base/2/10": _PATTERN[77:20000],
    "global": None,
    "global/20": _PATTERN[3 : 3 + GROUP],
    "empty": None,
    "PG_VERSION": b"15\n",
}
LISTING = listing_of(BASE)
NAMES = ("10", "11", "12", "20", "x", "y")
DIRECTORIES = ("", "base", "base/1", "base/2", "global", "empty", "d", "base/d", "d/e")

directories = st.sampled_from(DIRECTORIES)
names = st.sampled_from((*NAMES, "1", "2", "d", "e", "base", "global"))
offsets = st.one_of(
    st.integers(0, 3 * GROUP),
    st.sampled_from([0, 1, 4095, 4096, 4097, 8191, 8192, GROUP - 1, GROUP, 2 * GROUP]),
)
lengths = st.one_of(st.integers(1, 9000), st.sampled_from([1, 4096, 8192, GROUP]))


def join(directory: str, name: str) -> str:
    return f"{directory}/{name}" if directory else name


class Model:
    """What the data directory should hold: path → content, ``None`` for directories."""

    def __init__(self) -> None:
        self.files: dict[str, bytearray | None] = {
            path: None if data is None else bytearray(data) for path, data in BASE.items()
        }

    def kind(self, path: str) -> str | None:
        if path == "":
            return "d"
        if path not in self.files:
            return None
        return "d" if self.files[path] is None else "f"

    def children(self, path: str) -> list[str]:
        return [p for p in self.files if p.startswith(f"{path}/")]

    def snapshot(self) -> dict[str, bytes | None]:
        return {p: None if d is None else bytes(d) for p, d in self.files.items()}


def errno_of(work: Callable[[], object]) -> int:
    """0, or what the file system said."""
    try:
        work()
    except OSError as error:
        return error.errno or -1
    return 0


class TreeMachine(RuleBasedStateMachine):
    """Random operations on both; what the one refuses the other must refuse."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="tl-tree-"))
        self.model = Model()
        self.at_once = True
        self.tree = self.open_tree()
        self.handles: dict[int, bytearray] = {}

    def open_tree(self) -> Tree:
        return tree_of(BASE, self.directory / "overlay", at_once=self.at_once, listing=LISTING)

    def teardown(self) -> None:
        for handle in self.handles:
            self.tree.release(handle)
        assert self.tree.nodes < 60
        shutil.rmtree(self.directory)

    def parent(self, directory: str) -> int | None:
        return inode_of(self.tree, directory) if self.model.kind(directory) == "d" else None

    @rule(directory=directories, name=names)
    def create(self, directory: str, name: str) -> None:
        parent = self.parent(directory)
        if parent is None:
            return
        path = join(directory, name)
        expected = 0 if self.model.kind(path) is None else errno.EEXIST

        def work() -> None:
            _, handle = self.tree.create(parent, name, 0o600)
            self.tree.release(handle)

        assert errno_of(work) == expected
        if expected == 0:
            self.model.files[path] = bytearray()

    @rule(directory=directories, name=names)
    def make_directory(self, directory: str, name: str) -> None:
        parent = self.parent(directory)
        if parent is None:
            return
        path = join(directory, name)
        expected = 0 if self.model.kind(path) is None else errno.EEXIST
        assert errno_of(lambda: self.tree.make_directory(parent, name, 0o700)) == expected
        if expected == 0:
            self.model.files[path] = None

    @rule(directory=directories, name=names, offset=offsets, length=lengths, seed=st.integers(0, 99))
    def write(self, directory: str, name: str, offset: int, length: int, seed: int) -> None:
        path = join(directory, name)
        if self.model.kind(path) != "f":
            return
        data = bytes(length) if seed == 0 else _PATTERN[seed : seed + length]
        handle = self.tree.open(inode_of(self.tree, path))
        assert run(self.tree.write(handle, offset, data)) == length
        self.tree.release(handle)
        self.put(self.model.files[path], offset, data)

    def put(self, content: bytearray | None, offset: int, data: bytes) -> None:
        assert content is not None
        content.extend(bytes(max(0, offset - len(content))))
        content[offset : offset + len(data)] = data

    @rule(directory=directories, name=names, size=st.one_of(offsets, st.just(0)), by_open=st.booleans())
    def truncate(self, directory: str, name: str, size: int, by_open: bool) -> None:
        path = join(directory, name)
        if self.model.kind(path) != "f":
            return
        content = self.model.files[path]
        assert content is not None
        inode = inode_of(self.tree, path)
        if by_open:
            size = 0
            self.tree.release(self.tree.open(inode, truncate=True))
        else:
            self.tree.truncate(inode, size)
        content.extend(bytes(max(0, size - len(content))))
        del content[size:]

    @rule(directory=directories, name=names)
    def unlink(self, directory: str, name: str) -> None:
        parent = self.parent(directory)
        if parent is None:
            return
        path = join(directory, name)
        expected = {"f": 0, "d": errno.EISDIR, None: errno.ENOENT}[self.model.kind(path)]
        assert errno_of(lambda: self.tree.unlink(parent, name)) == expected
        if expected == 0:
            del self.model.files[path]

    @rule(directory=directories, name=names)
    def remove_directory(self, directory: str, name: str) -> None:
        parent = self.parent(directory)
        if parent is None:
            return
        path = join(directory, name)
        kind = self.model.kind(path)
        expected = {"f": errno.ENOTDIR, None: errno.ENOENT, "d": 0}[kind]
        if kind == "d" and self.model.children(path):
            expected = errno.ENOTEMPTY
        assert errno_of(lambda: self.tree.remove_directory(parent, name)) == expected
        if expected == 0:
            del self.model.files[path]

    @rule(old=directories, name=names, new=directories, new_name=names)
    def rename(self, old: str, name: str, new: str, new_name: str) -> None:
        parent, new_parent = self.parent(old), self.parent(new)
        source, target = join(old, name), join(new, new_name)
        if parent is None or new_parent is None or target.startswith(f"{source}/"):
            return
        kind, there = self.model.kind(source), self.model.kind(target)
        expected = 0
        if kind is None:
            expected = errno.ENOENT
        elif source == target:
            expected = 0
        elif kind == "d" and there == "f":
            expected = errno.ENOTDIR
        elif kind == "f" and there == "d":
            expected = errno.EISDIR
        elif kind == "d" and there == "d" and self.model.children(target):
            expected = errno.ENOTEMPTY
        assert errno_of(lambda: self.tree.rename(parent, name, new_parent, new_name)) == expected
        if expected == 0 and source != target:
            self.model.files.pop(target, None)
            for path in [source, *self.model.children(source)]:
                self.model.files[target + path[len(source) :]] = self.model.files.pop(path)

    @rule(directory=directories, name=names)
    def hold_open(self, directory: str, name: str) -> None:
        path = join(directory, name)
        if self.model.kind(path) == "f" and len(self.handles) < 6:
            content = self.model.files[path]
            assert content is not None
            self.handles[self.tree.open(inode_of(self.tree, path))] = content

    @rule(offset=offsets, length=lengths, which=st.integers(0, 5))
    def use_held(self, offset: int, length: int, which: int) -> None:
        """An open file keeps its content, whatever became of its name."""
        for handle, content in list(self.handles.items())[which : which + 1]:
            assert run(self.tree.read(handle, offset, length)) == bytes(content[offset : offset + length])
            run(self.tree.write(handle, offset, _PATTERN[:length]))
            self.put(content, offset, _PATTERN[:length])
            assert run(self.tree.read(handle, 0, 1 << 22)) == bytes(content)

    @rule(which=st.integers(0, 5))
    def let_go(self, which: int) -> None:
        for handle in list(self.handles)[which : which + 1]:
            self.tree.release(handle)
            del self.handles[handle]

    @rule(at_once=st.booleans())
    def kill_and_mount_again(self, at_once: bool) -> None:
        for handle in self.handles:
            self.tree.release(handle)
        self.handles = {}
        self.at_once = at_once
        self.tree = self.open_tree()

    @invariant()
    def same(self) -> None:
        assert everything(self.tree) == self.model.snapshot()


TestTreeMachine = TreeMachine.TestCase
TestTreeMachine.settings = settings(
    max_examples=40,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


class Killed(BaseException):
    """Stands for SIGKILL between two system calls."""


KILL_POINTS = (
    "rename",
    "setxattr",
    "ftruncate",
    "pwrite",
    "unlink",
    "mkdir",
    "open",
    "chmod",
    "fchmod",
    "symlink",
)


def operations() -> list[tuple[str, Callable[[Tree], object]]]:
    """One of each kind, on files of the snapshot, of the branch, and both."""

    def write(path: str, offset: int, length: int) -> Callable[[Tree], object]:
        def work(tree: Tree) -> None:
            handle = tree.open(inode_of(tree, path))
            run(tree.write(handle, offset, _PATTERN[:length]))

        return work

    def move(old: str, new: str) -> Callable[[Tree], object]:
        def work(tree: Tree) -> None:
            tree.rename(
                inode_of(tree, os.path.dirname(old)),
                os.path.basename(old),
                inode_of(tree, os.path.dirname(new)),
                os.path.basename(new),
            )

        return work

    return [
        ("write a page of the snapshot", write("base/1/11", 8192, 8192)),
        ("write inside a page", write("base/1/11", 100, 50)),
        ("write past the end", write("base/1/10", 9000, 100)),
        ("truncate a snapshot's file", lambda tree: tree.truncate(inode_of(tree, "base/1/11"), 5000)),
        ("truncate a changed file", lambda tree: tree.truncate(inode_of(tree, "global/20"), 5000)),
        ("extend", lambda tree: tree.truncate(inode_of(tree, "base/1/10"), 50000)),
        ("unlink a snapshot's file", lambda tree: tree.unlink(inode_of(tree, "base/1"), "10")),
        ("unlink a changed file", lambda tree: tree.unlink(inode_of(tree, "global"), "20")),
        ("unlink an own file", lambda tree: tree.unlink(1, "own")),
        ("move a snapshot's file away", move("base/1/10", "base/2/new")),
        ("move a snapshot's file over another", move("base/1/10", "base/2/10")),
        ("move a snapshot's file over a changed one", move("base/1/10", "global/20")),
        ("move a changed file over a snapshot's", move("global/20", "base/2/10")),
        ("move an own file over a snapshot's", move("own", "base/2/10")),
        ("move an own file over a removed one", move("own", "base/1/12")),
        ("move a snapshot's file over a removed one", move("base/1/10", "base/1/12")),
        ("move a snapshot's directory", move("base/1", "moved")),
        ("move a directory over an empty one", move("base/1", "empty")),
        ("create over a removed one", lambda tree: tree.create(inode_of(tree, "base/1"), "12", 0o600)),
        (
            "directory over a removed one",
            lambda tree: tree.make_directory(inode_of(tree, "base/1"), "12", 0o700),
        ),
        ("remove an empty directory", lambda tree: tree.remove_directory(1, "empty")),
        ("change a mode", lambda tree: tree.set_mode(inode_of(tree, "base/1/10"), 0o640)),
    ]


def prepare(directory: Path) -> Tree:
    """A tree with a changed file, one of its own, and a removed one."""
    tree = tree_of(BASE, directory, listing=LISTING)
    handle = tree.open(inode_of(tree, "global/20"))
    run(tree.write(handle, 0, b"changed" * 2000))
    tree.release(handle)
    _, handle = tree.create(1, "own", 0o600)
    run(tree.write(handle, 0, b"own" * 3000))
    tree.release(handle)
    tree.unlink(inode_of(tree, "base/1"), "12")
    return tree


@pytest.mark.parametrize(("name", "work"), operations(), ids=[name for name, _ in operations()])
def test_killed_between_any_two_system_calls(
    name: str, work: Callable[[Tree], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EDGE 51: the overlay shows the state before or the state after, never a third."""
    before = everything(prepare(tmp_path / "before"))
    done = prepare(tmp_path / "after")
    work(done)
    after = everything(tree_of(BASE, tmp_path / "after", listing=LISTING))
    for survived in range(100):
        directory = tmp_path / f"kill{survived}"
        tree = prepare(directory)
        with monkeypatch.context() as patch:
            die_after(survived, patch)
            try:
                work(tree)
            except Killed:
                killed = True
            else:
                killed = False
        state = everything(tree_of(BASE, directory, listing=LISTING))
        assert state in (before, after), f"{name}: a third state after {survived} system calls"
        if not killed:
            assert state == after
            return
    pytest.fail("never finished")


def die_after(survived: int, patch: pytest.MonkeyPatch) -> None:
    """Let so many of the system calls that change something happen, then raise Killed."""
    left = survived

    def counted(real: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return real(*args, **kwargs)

        return call

    for point in KILL_POINTS:
        patch.setattr(os, point, counted(getattr(os, point)))
    patch.setattr(overlay, "exchange", counted(sparse.exchange))
