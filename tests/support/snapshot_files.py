"""What a snapshot in a store says, read the straightforward way: whole manifests, all of it in memory."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from tests.support.postgres import PostgresServer, server_user
from timeline.archive.backup_stream import open_backup_stream
from timeline.catalog.branch_log import BranchLog
from timeline.catalog.meta import create_store
from timeline.clock import Clock
from timeline.format import keys
from timeline.format.branch_state import Incarnation, Snapshot, Tli
from timeline.format.extent import BLOCK_BYTES, GROUP_BYTES, decode_extent
from timeline.format.file_listing import FileListing, read_file_listing
from timeline.format.log_change import Begin
from timeline.format.manifest import ManifestRef, PageRow
from timeline.format.page_manifest import read_page_rows
from timeline.lsn import Lsn
from timeline.pg.control import parse_control
from timeline.store.base import Store


async def begin_branch(
    server: PostgresServer, store: Store, clock: Clock, *, branch: str = "main"
) -> BranchLog:
    """A new store whose branch has begun with that server; WAL itself is not archived."""
    await create_store(store, clock)
    log = BranchLog(store, branch, clock, clock.token(8))
    async with open_backup_stream(server.conninfo, silence_seconds=60) as stream:
        identity = await stream.identify()
    control = parse_control((server.data / "global/pg_control").read_bytes())
    incarnation = Incarnation(
        system_identifier=identity.system_identifier,
        major=server.major,
        version_num=server.major * 10000,
        architecture="x86_64",
        block_bytes=BLOCK_BYTES,
        segment_bytes=control.segment_bytes,
        relation_segment_bytes=1 << 30,
        catalog_version=control.catalog_version,
        control_version=control.control_version,
        libc_version=None,
        icu_version=None,
        superuser="postgres",
        data_checksums=control.data_checksums,
        from_lsn=Lsn(0),
        to_lsn=None,
    )
    await log.append(Begin(incarnation, Tli(identity.tli, None, Lsn(0), Lsn(0), None, None)))
    return log


async def read_listing(store: Store, snapshot: Snapshot) -> FileListing:
    """The snapshot's files."""
    return read_file_listing(await store.get(keys.manifest(snapshot.files.digest)), snapshot.files)


async def read_manifest(store: Store, ref: ManifestRef) -> list[PageRow]:
    """The rows of a page manifest."""
    return list(read_page_rows(await store.get(keys.manifest(ref.digest)), ref))


async def read_files(store: Store, snapshot: Snapshot) -> dict[str, bytes]:
    """Path → content of every file of a snapshot; KeyError where an extent is missing."""
    packs: dict[str, bytes] = {}
    groups: dict[tuple[str, int], list[PageRow]] = {}
    for ref in snapshot.pages:
        for row in await read_manifest(store, ref):
            groups.setdefault((row.path, row.group), []).append(row)
    files: dict[str, bytes] = {}
    for file in await read_listing(store, snapshot):
        if file.kind != "f":
            continue
        if file.content is not None:
            files[file.path] = file.content
            continue
        content = bytearray()
        for number in range(-(-file.size // GROUP_BYTES)):
            raw = bytearray(min(GROUP_BYTES, file.size - number * GROUP_BYTES))
            for row in groups[file.path, number]:
                extent = row.extent
                key = keys.pack(extent.pack)
                if key not in packs:
                    packs[key] = await store.get(key)
                stored = packs[key][extent.offset : extent.offset + extent.stored_bytes]
                at = extent.first_block * BLOCK_BYTES
                raw[at : at + extent.raw_bytes] = decode_extent(stored, extent, key)
            content += raw
        files[file.path] = bytes(content[: file.size])
    return files


async def write_data_directory(store: Store, snapshot: Snapshot, directory: Path, wal: Path) -> None:
    """The snapshot as a data directory that recovers by itself from the WAL files in ``wal``."""
    directory.mkdir(mode=0o700, exist_ok=True)
    for row in await read_listing(store, snapshot):
        if row.kind == "d":
            (directory / row.path).mkdir(mode=row.mode, parents=True, exist_ok=True)
    for path, content in (await read_files(store, snapshot)).items():
        (directory / path).write_bytes(content)
    (directory / "backup_label").write_text(snapshot.backup_label or "")
    for segment in wal.iterdir():
        if segment.is_file():
            shutil.copy(segment, directory / "pg_wal" / segment.name)
    give_to_server_user(directory)


def give_to_server_user(directory: Path) -> None:
    """Make it what Postgres accepts: owned by its user, nobody else may look."""
    if os.geteuid() == 0:
        user = server_user()
        for path in (directory, *directory.rglob("*")):
            os.chown(path, user.pw_uid, user.pw_gid)
    directory.chmod(0o700)
