"""Requests on one file at once, while the snapshot's bytes are still on their way."""

from __future__ import annotations

import asyncio
import itertools
import random
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.support.tree_snapshot import inode_of, listing_of, run, tree_of

BASE = random.Random(11).randbytes(20_000)
FILES: dict[str, bytes | None] = {"file": BASE}
LISTING = listing_of(FILES)


@dataclass(frozen=True)
class Write:
    offset: int
    length: int
    seed: int

    @property
    def data(self) -> bytes:
        return random.Random(self.seed).randbytes(self.length)

    def apply(self, content: bytes) -> bytes:
        content = content.ljust(self.offset, b"\0")
        return content[: self.offset] + self.data + content[self.offset + self.length :]


@dataclass(frozen=True)
class Truncate:
    size: int

    def apply(self, content: bytes) -> bytes:
        return content[: self.size].ljust(self.size, b"\0")


offsets = st.one_of(
    st.integers(0, 24_000), st.sampled_from([0, 4095, 4096, 4100, 8192, 12288, 19_999, 20_000])
)
changes = st.one_of(
    st.builds(Write, offsets, st.integers(1, 9000), st.integers(0, 9)), st.builds(Truncate, offsets)
)


def states_of(ops: list[Write | Truncate]) -> set[bytes]:
    """What the file may hold while they are under way, in whatever order they take effect."""
    found = {BASE}
    for order in itertools.permutations(ops):
        content = BASE
        for op in order:
            content = op.apply(content)
            found.add(content)
    return found


@given(
    st.lists(changes, min_size=1, max_size=3),
    st.lists(st.tuples(offsets, st.integers(1, 20_000)), max_size=3),
)
@example([Write(6000, 100, 1), Truncate(0)], [(0, 20_000)])
@example([Write(5000, 100, 1), Write(5050, 100, 2), Truncate(5060)], [(4096, 4096)])
@settings(deadline=None, max_examples=150)
def test_changes_take_effect_one_after_the_other_and_reads_see_one_moment(
    ops: list[Write | Truncate], reads: list[tuple[int, int]]
) -> None:
    directory = Path(tempfile.mkdtemp(prefix="tl-file-"))
    tree = tree_of(FILES, directory / "overlay", at_once=False, listing=LISTING)
    inode = inode_of(tree, "file")
    handle = tree.open(inode)

    async def change(op: Write | Truncate) -> None:
        if isinstance(op, Write):
            assert await tree.write(handle, op.offset, op.data) == op.length
        else:
            tree.truncate(inode, op.size)

    async def everything() -> list[bytes]:
        changing = asyncio.gather(*(change(op) for op in ops))
        found = await asyncio.gather(*(tree.read(handle, *read) for read in reads))
        await changing
        return found

    found = run(everything())
    moments = states_of(ops)
    for (offset, length), data in zip(reads, found, strict=True):
        assert any(data == moment[offset : offset + length] for moment in moments)
    final = run(tree.read(handle, 0, 1 << 20))
    finals = set()
    for order in itertools.permutations(ops):
        content = BASE
        for op in order:
            content = op.apply(content)
        finals.add(content)
    assert final in finals
    tree.release(handle)
    again = tree_of(FILES, directory / "overlay", listing=LISTING)
    handle = again.open(inode_of(again, "file"))
    assert run(again.read(handle, 0, 1 << 20)) == final
    again.release(handle)
    shutil.rmtree(directory)
