"""Sorted runs of page rows, merged: whatever comes in comes out sorted, the newest of equals."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.manual_clock import ManualClock
from timeline.archive.known_pages import open_known, visible_extents
from timeline.archive.page_runs import FAN_IN, PageRuns, join_runs, read_rows
from timeline.format.extent import BLOCK_BYTES, ExtentRef
from timeline.format.manifest import PageRow
from timeline.store.memory import MemoryStore


def row(path: str, group: int, mark: int) -> PageRow:
    """A row that can be told from others by ``mark``."""
    return PageRow(path, group, ExtentRef(0, 8192, f"{mark:064x}", 100, 50, mark.to_bytes(32, "big")))


places = st.tuples(
    st.sampled_from(["base/1/9", "base/1/10", "base/12/1", "global/1", "ä"]), st.integers(0, 3)
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(places, max_size=8), max_size=2 * FAN_IN + 3), st.lists(places, max_size=5))
def test_merging_is_a_sorted_dictionary(
    batches: list[list[tuple[str, int]]], last: list[tuple[str, int]]
) -> None:
    expected: dict[tuple[str, int], PageRow] = {}
    marks = iter(range(10_000))

    def rows(keys: list[tuple[str, int]]) -> list[PageRow]:
        made = [row(path, group, next(marks)) for path, group in keys]
        expected.update({(one.path, one.group): one for one in made})
        return made

    async def run() -> tuple[list[PageRow], list[PageRow]]:
        store = MemoryStore()
        with ThreadPoolExecutor(1) as threads:
            runs = PageRuns(store, threads, ManualClock())
            for batch in batches:
                await runs.add(rows(batch))
            before = dict(expected)
            joined = await join_runs(store, threads, ManualClock(), runs.manifests)
            assert len(runs.manifests) <= 2 * FAN_IN
            assert [one async for one in read_rows(store, threads, joined)] == [
                before[key] for key in sorted(before)
            ]
            known = await open_known(store, threads, joined)
            for (path, group), one in before.items():
                assert await known.visible(path, group) == ((one.extent,), False)
            assert await known.visible("base/1/9", 99) == ((), False)
            merged = await runs.finish(rows(last))
            return [one async for one in read_rows(store, threads, merged)], list(expected.values())

    found, values = asyncio.run(run())
    assert found == sorted(values, key=lambda one: (one.path, one.group))


def test_groups_of_several_extents_stay_together() -> None:
    """A newer run's group replaces all extents of the older one, also those it has no counterpart for."""

    def extent(first: int, blocks: int, mark: int) -> ExtentRef:
        return ExtentRef(first, blocks * BLOCK_BYTES, f"{mark:064x}", 0, 9, mark.to_bytes(32, "big"))

    old = [
        PageRow("f", 0, extent(0, 4, 1)),
        PageRow("f", 0, extent(4, 12, 2)),
        PageRow("f", 1, extent(0, 16, 3)),
    ]
    new = [PageRow("f", 0, extent(0, 16, 4))]

    async def run() -> list[PageRow]:
        store = MemoryStore()
        with ThreadPoolExecutor(1) as threads:
            runs = PageRuns(store, threads, ManualClock())
            await runs.add(old)
            merged = await runs.finish(new)
            return [one async for one in read_rows(store, threads, merged)]

    assert asyncio.run(run()) == [new[0], old[2]]


extents = st.builds(
    lambda first, blocks, mark: ExtentRef(
        first, min(blocks, 16 - first) * BLOCK_BYTES, f"{mark:064x}", 0, 1, mark.to_bytes(32, "big")
    ),
    st.integers(0, 15),
    st.integers(1, 16),
    st.integers(0, 1 << 30),
)


@given(st.lists(extents, max_size=6))
def test_visible_extents_against_single_blocks(chain: list[ExtentRef]) -> None:
    """One extent in each manifest of the chain: what shows is what painting them in order leaves."""
    painted: dict[int, int] = {}
    for number, extent in enumerate(chain):
        painted.update(dict.fromkeys(range(extent.first_block, extent.first_block + extent.blocks), number))
    shown, overlapped = visible_extents([(extent,) for extent in chain])
    numbers = set(painted.values())
    assert sorted(map(id, shown)) == sorted(id(chain[number]) for number in numbers)
    complete = all(
        sum(1 for owner in painted.values() if owner == number) == chain[number].blocks for number in numbers
    )
    assert overlapped == (not complete)
    assert list(shown) == sorted(shown, key=lambda extent: extent.first_block)
