"""Waiting until all that a branch's first start replayed is in its files."""

from __future__ import annotations

import time
from pathlib import Path

from timeline.pg.control import CONTROL_FILE, parse_control
from timeline.pg.errors import FormatError


def wait_for_first_checkpoint(data: Path, *, parent_tli: int = 1, seconds: float = 60) -> None:
    """Wait until the branch in that directory has made a checkpoint since it left its parent's tli."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            if parse_control((data / CONTROL_FILE).read_bytes()).tli > parent_tli:
                return
        except FormatError:
            pass  # torn: it is being written
        if time.monotonic() > deadline:
            raise TimeoutError(f"no checkpoint in {data} within {seconds} s")
        time.sleep(0.02)
