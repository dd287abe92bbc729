"""What a directory store stands on: who may enter it, and how much room is left.

Whether files there can be synced and linked is tried by creating an object (``verb_checks``).
"""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

from timeline.findings import Finding, Severity

LITTLE_BYTES = 1 << 30
SCARCE_BYTES = 10 << 30
_AREA = "store"


def check_directory(path: Path, *, read_only: bool) -> list[Finding]:
    """Findings about the directory of a store, which need not exist yet."""
    found = []
    there = path
    while not there.exists() and there != there.parent:
        there = there.parent
    needed = os.R_OK | os.X_OK | (0 if read_only else os.W_OK)
    if not os.access(there, needed):
        verb = "read" if read_only else "written"
        found.append(
            Finding(
                _AREA,
                Severity.ERROR,
                "directory-permission",
                f"{there} may not be {verb} by this user",
                f"give it to the user that runs tl (chown {os.geteuid()} {there})",
            )
        )
    if path.exists() and stat.S_IMODE(path.stat().st_mode) & 0o007:
        found.append(
            Finding(
                _AREA,
                Severity.WARNING,
                "directory-open",
                f"{path} is open to every user of this host, and holds all of the database",
                f"chmod o-rwx {path}",
            )
        )
    if not read_only:
        found.append(_of_space(there))
    return found


def _of_space(path: Path) -> Finding:
    free = shutil.disk_usage(path).free
    what = f"{free / (1 << 30):.1f} GiB are free for the store at {path}"
    if free >= SCARCE_BYTES:
        return Finding(_AREA, Severity.OK, "directory-space", what)
    severity = Severity.ERROR if free < LITTLE_BYTES else Severity.WARNING
    return Finding(
        _AREA,
        severity,
        "directory-space",
        what,
        "make room: a full store stops archiving, and the source then keeps its WAL",
    )
