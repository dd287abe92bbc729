"""Children for supervision tests: small Python programs instead of ``tl``."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable


def program(text: str) -> tuple[str, ...]:
    """The argv of a Python program that needs no installed package."""
    return (sys.executable, "-I", "-S", "-c", text)


async def until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    """Wait for it; fails when it does not come."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        await asyncio.sleep(0.01)
