"""Whether this host's Postgres can serve branches of one particular source."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from restore.binaries import Binaries, find_binaries, library_directory
from restore.host_support import host_support
from timeline.errors import TimelineError
from timeline.findings import Finding, Severity

_AREA = "host"
_SECONDS = 10.0
_BUILT_IN = ("plpgsql",)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the source has, as far as it is known."""

    major: int
    libc_version: str | None = None
    """The C library's version by which its indexes are sorted."""
    preload_libraries: tuple[str, ...] = ()
    extensions: tuple[str, ...] = ()
    time_zone: str | None = None
    locales: tuple[str, ...] = ()


def check_fit(wanted: Wanted, environ: Mapping[str, str]) -> list[Finding]:
    """Findings about binaries, modules and locales."""
    try:
        binaries = find_binaries(wanted.major, environ)
    except TimelineError as error:
        return [
            Finding(_AREA, Severity.WARNING, "binaries", f"{error.message}: no branches here yet", error.hint)
        ]
    found = [Finding(_AREA, Severity.OK, "binaries", f"PostgreSQL {wanted.major} is in {binaries.directory}")]
    found += _of_modules(wanted, binaries)
    found += _of_collations(wanted)
    found += _of_names(wanted, binaries)
    return found


def _of_modules(wanted: Wanted, binaries: Binaries) -> Iterator[Finding]:
    libraries = library_directory(binaries)
    if libraries is not None:
        lacking = [
            name
            for name in wanted.preload_libraries
            if "/" not in name and not any((libraries / f"{name}.{end}").exists() for end in ("so", "dylib"))
        ]
        if lacking:
            yield Finding(
                _AREA,
                Severity.WARNING,
                "preload-libraries",
                f"this host's PostgreSQL lacks {', '.join(lacking)}, which the source preloads; branches start without",
                "install their packages where a branch should have them (--preload)",
            )
    shared = _extension_directory(binaries)
    if shared is not None:
        lacking = [
            name
            for name in wanted.extensions
            if name not in _BUILT_IN and not (shared / f"{name}.control").exists()
        ]
        if lacking:
            yield Finding(
                _AREA,
                Severity.WARNING,
                "extensions",
                f"this host's PostgreSQL lacks the extensions {', '.join(lacking)}: what uses them fails on branches",
                "install their packages, in the source's versions",
            )


def _of_collations(wanted: Wanted) -> Iterator[Finding]:
    here = _libc_version()
    if wanted.libc_version is not None and here is not None and wanted.libc_version != here:
        yield Finding(
            _AREA,
            Severity.WARNING,
            "collation",
            f"the source sorts text by C library {wanted.libc_version}, this host has {here}: indexes on text may "
            "be out of order on branches",
            "make branches on a host with the source's distribution, or REINDEX there",
        )


def _of_names(wanted: Wanted, binaries: Binaries) -> Iterator[Finding]:
    support = host_support(binaries)
    if wanted.time_zone is not None and not support.has_time_zone(wanted.time_zone):
        yield Finding(
            _AREA,
            Severity.WARNING,
            "time-zone",
            f"this host does not know the source's time zone {wanted.time_zone}",
            "install the package tzdata",
        )
    lacking = [name for name in wanted.locales if not support.has_locale(name)]
    if lacking:
        yield Finding(
            _AREA,
            Severity.NOTE,
            "locales",
            f"this host does not have the source's locales {', '.join(lacking)}: messages and numbers look different",
            "generate them (locale-gen)",
        )


def _libc_version() -> str | None:
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
    except ValueError:
        return None
    return version if name == "glibc" else None


def _extension_directory(binaries: Binaries) -> Path | None:
    """Where this installation keeps extensions' control files; ``None`` when it does not tell."""
    try:
        answer = subprocess.run(
            [binaries.directory / "pg_config", "--sharedir"],
            env=binaries.environment(),
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
        )
        told = [Path(answer.stdout.strip())] if answer.returncode == 0 else []
    except (OSError, subprocess.TimeoutExpired):
        told = []
    root = binaries.directory.parent
    for shared in (
        *told,
        Path(f"/usr/share/postgresql/{binaries.major}"),
        root / "share",
        root / "share/postgresql",
    ):
        if (shared / "extension/plpgsql.control").exists():
            return shared / "extension"
    return None
