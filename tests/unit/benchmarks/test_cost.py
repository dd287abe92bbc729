"""The cost model: the README tells what it computes, and it counts as S3 does."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from benchmarks.cost import LOADS, MeteredStore, Month, Prices, Requests, Weights, markdown, simulate, written

README = Path(__file__).resolve().parents[3] / "README.md"


def test_the_readme_has_the_table_of_the_simulation() -> None:
    text = README.read_text()
    table = markdown([simulate(load) for load in LOADS], Prices())
    assert written(text, table) == text, "run `make cost-table`"


def test_requests_are_counted_as_s3_counts_them() -> None:
    """A listing costs a request for each thousand keys, and one at least; so does a deletion."""

    async def run() -> Requests:
        store = MeteredStore(Weights(chunk=700))
        for number in range(3):
            await store.create(f"wal/main/1/{number:016X}", b"x")
        await store.get("wal/main/1/" + "0" * 16)
        await store.list("wal/")
        await store.list("packs/")
        await store.delete([f"wal/main/1/{number:016X}" for number in range(2)])
        await store.delete([])
        return store.requests

    assert asyncio.run(run()) == Requests(put=3, get=1, list=3 + 1, delete=2)


def test_the_price_of_a_month() -> None:
    prices = Prices(per_1000_put=1.0, per_1000_get=0.1, per_1000_list=2.0, gb_month=0.5)
    month = Month(LOADS[0], Requests(1000, 0, 0, 0), Requests(0, 1000, 500, 7), objects=1, gigabytes=10)
    assert month.dollars(prices) == pytest.approx(30 * (1.0 + 0.1 + 1.0) + 5.0)


def test_a_text_without_a_place_for_the_table_is_refused() -> None:
    with pytest.raises(ValueError, match="cost"):
        written("no table here", "| table |")
