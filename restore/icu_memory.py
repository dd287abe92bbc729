"""Which version of ICU's rules each Postgres of this host has: only a running server can tell, so it is
noted.

A file in the state directory, by the server's path and time of change. It is a memory, not a truth: lost or
unreadable it is made again, and of two writers at once the later one stays.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from restore.binaries import Binaries

_FILE = "icu.json"
_MAX_ENTRIES = 64


class IcuMemory:
    """The notes of one state directory."""

    def __init__(self, state: Path) -> None:
        self._path = state / _FILE

    def recall(self, binaries: Binaries) -> str | None:
        """The version, ``None`` when it is not known."""
        return self._read().get(_key(binaries))

    def note(self, binaries: Binaries, version: str) -> None:
        """Keep it for later."""
        known = dict(list(self._read().items())[1 - _MAX_ENTRIES :])
        known[_key(binaries)] = version
        temporary = self._path.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(known))
        temporary.replace(self._path)

    def _read(self) -> dict[str, str]:
        try:
            value = json.loads(self._path.read_text())
        except (FileNotFoundError, ValueError):
            return {}
        return {str(key): str(version) for key, version in value.items()} if isinstance(value, dict) else {}


def _key(binaries: Binaries) -> str:
    return f"{binaries.postgres}:{binaries.postgres.stat().st_mtime_ns}"
