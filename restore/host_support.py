"""Whether this host knows the locales and time zones that a source names."""

from __future__ import annotations

import locale
from pathlib import Path

from restore.binaries import Binaries
from restore.settings import HostSupport

_SYSTEM_ZONES = (Path("/usr/share/zoneinfo"), Path("/usr/lib/zoneinfo"), Path("/usr/share/lib/zoneinfo"))
_ALWAYS = ("C", "POSIX")


def host_support(binaries: Binaries) -> HostSupport:
    """Answers for branches served by these binaries."""
    shared = binaries.directory.parent / "share"
    zones = (
        *_SYSTEM_ZONES,
        shared / "timezone",
        shared / "postgresql" / "timezone",
        Path(f"/usr/share/postgresql/{binaries.major}/timezone"),
    )
    return HostSupport(has_locale=_has_locale, has_time_zone=lambda name: _has_zone(name, zones))


def _has_locale(name: str) -> bool:
    if name in _ALWAYS:
        return True
    # Postgres takes an empty name from an environment that on the source's host was another.
    if not name:
        return False
    before = locale.setlocale(locale.LC_TIME)
    try:
        locale.setlocale(locale.LC_TIME, name)
    except locale.Error:
        return False
    finally:
        locale.setlocale(locale.LC_TIME, before)
    return True


def _has_zone(name: str, directories: tuple[Path, ...]) -> bool:
    if name in ("UTC", "GMT"):
        return True
    parts = Path(name).parts
    if not parts or ".." in parts or name.startswith("/"):
        return False
    return any((directory / name).is_file() for directory in directories)
