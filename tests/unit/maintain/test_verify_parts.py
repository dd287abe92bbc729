"""A store verified in parts: each pack once, and one report as of the whole."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli.verify_document import read_report, report_document
from tests.golden.damage import CHANGES
from tests.golden.store import choose
from tests.unit.maintain.test_verify import CLOCK, OBJECTS, filled
from timeline.errors import UsageError
from timeline.lsn import Lsn
from timeline.maintain.pack_set import PackSet, list_packs
from timeline.maintain.verify import verify
from timeline.maintain.verify_ledger import Ledger
from timeline.maintain.verify_merge import merge_reports
from timeline.maintain.verify_part import Part
from timeline.maintain.verify_report import LsnRange, VerifyReport


def in_parts(objects: Mapping[str, bytes], of: int) -> list[VerifyReport]:
    """A report of each part."""

    async def work() -> list[VerifyReport]:
        store = await filled(objects)
        return [await verify(store, CLOCK, data=True, part=Part(number + 1, of)) for number in range(of)]

    return asyncio.run(work())


def as_a_whole(objects: Mapping[str, bytes]) -> VerifyReport:
    async def work() -> VerifyReport:
        return await verify(await filled(objects), CLOCK, data=True)

    return asyncio.run(work())


@given(
    st.lists(st.binary(min_size=32, max_size=32), unique=True, max_size=50),
    st.integers(1, 256),
)
def test_every_pack_is_in_exactly_one_part(digests: list[bytes], of: int) -> None:
    ids = np.array(sorted(digests), "S32") if digests else np.empty(0, "S32")
    held = np.array([Part(number + 1, of).holds(ids) for number in range(of)])
    assert held.sum(axis=0).tolist() == [1] * len(digests)


def test_parts_are_about_equal() -> None:
    ids = np.frombuffer(os.urandom(32 * 4000), "S32")
    counts = [int(Part(number + 1, 4).holds(ids).sum()) for number in range(4)]
    assert min(counts) > 800


def test_spelling() -> None:
    assert Part.parse("2/7") == Part(2, 7) and str(Part(2, 7)) == "2/7"
    for wrong in ("0/2", "3/2", "1", "1/257", "a/b", ""):
        with pytest.raises(UsageError, match="not a part"):
            Part.parse(wrong)


@pytest.mark.parametrize("of", [1, 2, 5])
def test_the_report_of_the_parts_is_that_of_the_whole(of: int) -> None:
    found, whole = merge_reports(in_parts(OBJECTS, of)), as_a_whole(OBJECTS)
    assert found.data is not None and whole.data is not None and found.data.oldest is not None
    # They were read at other moments.
    data = dataclasses.replace(found.data, oldest=whole.data.oldest)
    assert dataclasses.replace(found, data=data) == whole


@pytest.mark.parametrize("what", sorted(choose(OBJECTS)))
def test_damage_is_found_by_the_part_it_falls_to_and_told_once(what: str) -> None:
    key = choose(OBJECTS)[what]
    objects = CHANGES["last-byte"](key, OBJECTS[key]).apply(OBJECTS)
    found, whole = merge_reports(in_parts(objects, 3)), as_a_whole(objects)
    assert set(found.problems) == set(whole.problems) and found.problem_count == whole.problem_count
    assert (found.restorable, found.unrestorable) == (whole.restorable, whole.unrestorable)
    assert found.damaged == whole.damaged


def test_moments_that_different_parts_lose() -> None:
    whole = as_a_whole(OBJECTS)

    def lacking(start: int, end: int) -> VerifyReport:
        """Of 0..100, those in between are lost."""
        kept = tuple(LsnRange(1, Lsn(a), Lsn(b)) for a, b in ((0, start), (end, 100)) if a < b)
        return dataclasses.replace(whole, restorable=kept, unrestorable=(LsnRange(1, Lsn(start), Lsn(end)),))

    merged = merge_reports([lacking(10, 20), lacking(15, 30), lacking(90, 100)])
    assert [(int(one.start), int(one.end)) for one in merged.unrestorable] == [(10, 30), (90, 100)]
    assert [(int(one.start), int(one.end)) for one in merged.restorable] == [(0, 10), (30, 90)]


@pytest.mark.parametrize("what", [None, *sorted(choose(OBJECTS))])
def test_a_report_comes_back_from_its_document(what: str | None) -> None:
    objects: Mapping[str, bytes] = OBJECTS
    if what is not None:
        key = choose(OBJECTS)[what]
        objects = CHANGES["last-byte"](key, OBJECTS[key]).apply(OBJECTS)
    found = as_a_whole(objects)
    assert read_report(json.dumps(report_document(found, 1.0, CLOCK.now()))) == found


def test_what_is_no_report_is_told() -> None:
    for text in ("{}", "[]", "1", '{"error": "no"}', "not json"):
        with pytest.raises(ValueError):
            read_report(text)


def test_readers_of_parts_keep_each_others_progress(tmp_path: Path) -> None:
    async def packs() -> PackSet:
        return await list_packs(await filled(OBJECTS))

    known = asyncio.run(packs())
    path = tmp_path / "x.packs"
    one, other = Ledger(path, known), Ledger(path, known)
    one.mark(0, 7)
    other.mark(1, 8)
    one.save()
    other.save()
    assert Ledger(path, known).at.tolist()[:2] == [7, 8]
    assert [item.name for item in tmp_path.iterdir()] == ["x.packs"]
