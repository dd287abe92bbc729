"""A child that ends when whoever started it is gone, however that came."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1
_ORPHANED = 7


def attach(parent: int) -> None:
    """Have the kernel send us SIGTERM when the thread that started us ends (Linux; elsewhere nothing happens).

    ``parent``: the process it belongs to; if it is gone already, this process ends here. So a worker that is killed
    leaves no command behind that nobody watches, and what the command cleans up on SIGTERM is cleaned up.
    """
    if sys.platform != "linux":
        return
    if ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0) != 0:
        raise OSError("prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:
        sys.exit(_ORPHANED)
