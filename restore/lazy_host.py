"""Whether this host can show a data directory lazily, and if not, why."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path

from restore.host import Host
from restore.sparse import OverlayUnusable, probe_file_system

_DEVICE = Path("/dev/fuse")


def lazy_obstacle(host: Host) -> str | None:
    """One line on what is missing (EDGE 54); ``None`` when nothing is."""
    obstacle = fuse_obstacle()
    if obstacle is not None:
        return obstacle
    try:
        probe_file_system(host.branches)
    except OverlayUnusable as error:
        return error.message
    return None


def fuse_obstacle() -> str | None:
    """As ``lazy_obstacle``, of mounting alone: nothing is said of the file system."""
    if sys.platform != "linux":
        return f"mounting needs Linux, this is {sys.platform}"
    if not _DEVICE.exists():
        return "there is no /dev/fuse (in a container: --device /dev/fuse --cap-add SYS_ADMIN)"
    if not os.access(_DEVICE, os.R_OK | os.W_OK):
        return "/dev/fuse may not be opened by this user"
    if os.geteuid() != 0 and shutil.which("fusermount3") is None:
        return "there is no fusermount3 (package fuse3)"
    if importlib.util.find_spec("pyfuse3") is None:
        return "pyfuse3 is not installed"
    return None
