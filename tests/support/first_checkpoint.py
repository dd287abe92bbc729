"""Waiting until all that a branch's first start replayed is in its files."""

from __future__ import annotations

import time
from pathlib import Path

from restore.compute import read_control
from restore.recovery import has_own_checkpoint


def wait_for_first_checkpoint(data: Path, *, parent_tli: int, seconds: float = 60) -> None:
    """Wait until the branch in that directory has made a checkpoint since it left its parent's tli."""
    deadline = time.monotonic() + seconds
    while True:
        if has_own_checkpoint(read_control(data), parent_tli):
            return
        if time.monotonic() > deadline:
            raise TimeoutError(f"no checkpoint in {data} within {seconds} s")
        time.sleep(0.02)
