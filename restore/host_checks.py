"""Whether this host can hold branches: account, FUSE, file system, room, limits, time zones."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Mapping
from pathlib import Path

from restore.host import Host, find_host, state_directory
from restore.lazy_host import fuse_obstacle
from restore.sparse import OverlayUnusable, probe_file_system
from timeline.errors import TimelineError
from timeline.findings import Finding, Severity

OPEN_FILES = 1024
LITTLE_BYTES = 1 << 30
SCARCE_BYTES = 5 << 30
_AREA = "host"
_ZONES = (Path("/usr/share/zoneinfo"), Path("/usr/lib/zoneinfo"), Path("/usr/share/lib/zoneinfo"))
_COPIES = "branches here are full copies (--mode copy)"


def check_host(environ: Mapping[str, str], *, database_bytes: int | None) -> list[Finding]:
    """Findings about this host; ``database_bytes``: of the source, where known. Leaves nothing behind."""
    found = []
    host: Host | None = None
    try:
        host = find_host(environ)
        found.append(
            Finding(_AREA, Severity.OK, "account", f"Postgres of branches runs as {host.account.name}")
        )
    except TimelineError as error:
        found.append(Finding(_AREA, Severity.ERROR, "account", error.message, error.hint))
    obstacle = fuse_obstacle()
    if obstacle is None:
        found.append(Finding(_AREA, Severity.OK, "fuse", "FUSE is there: branches can be lazy"))
    else:
        what = f"{obstacle}: {_COPIES}"
        found.append(Finding(_AREA, Severity.WARNING, "fuse", what, _fuse_cure(obstacle)))
    found += _of_state(state_directory(environ), lazy=obstacle is None, database_bytes=database_bytes)
    found.append(_of_open_files())
    found.append(_of_time_zones())
    return found


def _fuse_cure(obstacle: str) -> str:
    if "fusermount3" in obstacle:
        return "install the package fuse3"
    if "pyfuse3" in obstacle:
        return "install tl with pyfuse3 (packages libfuse3-dev, pkg-config, gcc and python3-dev first)"
    if "/dev/fuse" in obstacle:
        return "give this user, or container, /dev/fuse"
    return "make branches on a Linux host"


def _of_state(state: Path, *, lazy: bool, database_bytes: int | None) -> list[Finding]:
    there = state
    while not there.exists() and there != there.parent:
        there = there.parent
    if not os.access(there, os.W_OK | os.X_OK):
        return [
            Finding(
                _AREA,
                Severity.ERROR,
                "state-directory",
                f"{there} may not be written by this user, and branches live in {state}",
                "set TL_STATE to a directory that may be written",
            )
        ]
    found = []
    try:
        probe_file_system(there)
        found.append(Finding(_AREA, Severity.OK, "overlay", f"the file system of {there} can hold overlays"))
    except OverlayUnusable as error:
        found.append(Finding(_AREA, Severity.WARNING, "overlay", f"{error.message}: {_COPIES}", error.hint))
        lazy = False
    except OSError as error:
        found.append(
            Finding(
                _AREA,
                Severity.ERROR,
                "state-directory",
                f"{there} cannot be used: {error.strerror}",
                "set TL_STATE to a directory on a local disk with room",
            )
        )
        return found
    free = shutil.disk_usage(there).free
    what = f"{free / (1 << 30):.1f} GiB are free for branches in {state}"
    if free < SCARCE_BYTES:
        severity = Severity.ERROR if free < LITTLE_BYTES else Severity.WARNING
        found.append(
            Finding(
                _AREA, severity, "state-space", what, "make room, or set TL_STATE to a larger file system"
            )
        )
    elif not lazy and database_bytes is not None and database_bytes > free:
        what += f"; a copy of the database takes {database_bytes / (1 << 30):.1f} GiB"
        cure = "make lazy branches possible (see fuse, overlay), or set TL_STATE to a larger file system"
        found.append(Finding(_AREA, Severity.WARNING, "state-space", what, cure))
    else:
        found.append(Finding(_AREA, Severity.OK, "state-space", what))
    return found


def _of_open_files() -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    what = (
        f"a process may have {soft} files open"
        if soft != resource.RLIM_INFINITY
        else "open files are not limited"
    )
    if soft == resource.RLIM_INFINITY or soft >= OPEN_FILES:
        return Finding(_AREA, Severity.OK, "open-files", what)
    return Finding(
        _AREA, Severity.WARNING, "open-files", what, f"raise the limit to {OPEN_FILES} or more (ulimit -n)"
    )


def _of_time_zones() -> Finding:
    if any(zones.is_dir() for zones in _ZONES):
        return Finding(_AREA, Severity.OK, "time-zones", "the host has time zone data")
    return Finding(
        _AREA,
        Severity.WARNING,
        "time-zones",
        "the host has no time zone data: branches fall back to UTC, and local times cannot be named",
        "install the package tzdata",
    )
