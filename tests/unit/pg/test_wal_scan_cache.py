"""Compiled code where its cache cannot be written: slower, never broken (EDGE 51)."""

from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import numba
import pytest
from numba.core import caching

from timeline.pg import wal_scan
from timeline.pg.wal import warm_up


def test_a_full_disk_costs_only_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = []

    def refuse(*args: object) -> NoReturn:
        attempts.append(args)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(caching.IndexDataCacheFile, "save", refuse)

    def add(a: int, b: int) -> int:
        return a + b

    kernel = wal_scan._kernel(add)
    assert kernel(2, 3) == 5
    assert len(attempts) == 1
    assert kernel(3, 4) == 7


def test_nowhere_to_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    original: Callable[..., Any] = numba.njit

    def refuse_cache(*args: Any, **options: Any) -> Any:
        if options.get("cache"):
            raise RuntimeError("cannot cache function 'add': no locator available")
        return original(*args, **options)

    monkeypatch.setattr(numba, "njit", refuse_cache)
    assert wal_scan._kernel(lambda a: a + 1)(1) == 2


def test_warm_up_loads_everything_once() -> None:
    warm_up()
    warm_up()


def test_numba_is_imported_late() -> None:
    code = (
        "import sys, timeline.pg.wal, timeline.pg.wal_blocks, timeline.pg.wal_patch, timeline.pg.page;"
        "sys.exit('numba' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
