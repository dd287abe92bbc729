"""What a branch's data directory shows and hides besides the snapshot's own files."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from restore.host import Host
from restore.plan import BACKUP_LABEL, BranchPlan
from restore.settings import AUTO_CONF, IDENT, BranchSettings, format_conf, format_hba


class PlainDirectory:
    """A data directory that is changed before Postgres sees it: a copy, or a mount.

    Nothing is durable before ``sync``.
    """

    def __init__(self, root: Path, host: Host) -> None:
        """What is made belongs to the account that runs Postgres, where we are someone else."""
        self._root = root
        self._host = host
        self._made: list[Path] = []

    def put_file(self, path: str, data: bytes, mode: int = 0o600) -> None:
        """Make or replace a file with exactly this content; the directory above must exist."""
        target = self._root / path
        target.unlink(missing_ok=True)
        with open(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(data)
        self._host.own(target)
        self._made.append(target)

    def symlink(self, path: str, target: str) -> None:
        """Make or replace a symlink."""
        self.whiteout(path)
        (self._root / path).symlink_to(target)
        self._host.own(self._root / path)

    def whiteout(self, path: str) -> None:
        """Make sure that nothing is there."""
        target = self._root / path
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        else:
            target.unlink(missing_ok=True)

    def names(self, path: str) -> list[str]:
        """What a directory holds; nothing when there is none."""
        try:
            return os.listdir(self._root / path)
        except FileNotFoundError:
            return []

    def sync(self) -> None:
        """Make the files made here, and the names in the data directory, durable.

        What Postgres has removed meanwhile (``recovery.signal``) is no error.
        """
        for path in (*self._made, self._root):
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except FileNotFoundError:
                continue
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def lay_out(
    directory: PlainDirectory, plan: BranchPlan, settings: BranchSettings, wal: Path, *, signal: str
) -> None:
    """Turn a snapshot's files into a branch's: own configuration, ``pg_wal`` elsewhere, and the file that makes its first start
    a recovery (``signal``, restore/recovery.py)."""
    for path in plan.hidden:
        directory.whiteout(path)
    for slot in directory.names("pg_replslot"):
        directory.whiteout(f"pg_replslot/{slot}")
    configure(directory, settings, listens=False)
    directory.symlink("pg_wal", str(wal))
    directory.put_file(signal, b"")
    if plan.backup_label is not None:
        directory.put_file(BACKUP_LABEL, plan.backup_label.encode())


def configure(directory: PlainDirectory, settings: BranchSettings, *, listens: bool) -> None:
    """Write the four configuration files (P8)."""
    heading = "Written by tl; a branch has no other configuration."
    directory.put_file("postgresql.conf", format_conf(settings.settings, heading=heading))
    directory.put_file("postgresql.auto.conf", AUTO_CONF)
    directory.put_file("pg_hba.conf", format_hba(listens=listens))
    directory.put_file("pg_ident.conf", IDENT)
