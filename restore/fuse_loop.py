"""pyfuse3 on asyncio, without a round through the selector for every request.

pyfuse3 waits for the FUSE descriptor before each request by registering a reader with the loop and removing
it again. While requests keep coming, asking the descriptor directly costs a fiftieth of that. A bounded
number of requests is taken in a row, so that what else the loop has to do gets its turn.

Everybody gets pyfuse3 from here. It imports trio, a tenth of a second and 10 MB, only to have it replaced by
its asyncio layer: an empty module stands in for it during the import.
"""

from __future__ import annotations

import select
import sys
import types
from collections.abc import Awaitable, Callable

_stands_in = "trio" not in sys.modules
if _stands_in:
    sys.modules["trio"] = types.ModuleType("trio")
try:
    import pyfuse3
    import pyfuse3.asyncio
finally:
    if _stands_in:
        del sys.modules["trio"]

__all__ = ["enable", "pyfuse3"]

IN_A_ROW = 16


class _Waiter:
    def __init__(self, wait: Callable[[int], Awaitable[None]]) -> None:
        self._wait = wait
        self._poll = select.poll()
        self._fd = -1
        self._taken = 0

    async def wait_readable(self, fd: int) -> None:
        """Return when a request can be read."""
        if fd != self._fd:
            self._poll = select.poll()
            self._poll.register(fd, select.POLLIN)
            self._fd = fd
        if self._taken < IN_A_ROW and self._poll.poll(0):
            self._taken += 1
            return
        self._taken = 0
        await self._wait(fd)


def enable() -> None:
    """Switch pyfuse3 to asyncio, once per process."""
    pyfuse3.asyncio.enable()
    pyfuse3.asyncio.wait_readable = _Waiter(pyfuse3.asyncio.wait_readable).wait_readable
