"""``tl restore``: a full copy of the source as it was at T, in an empty directory, for stock Postgres to
start.

The source's own configuration is kept. Added, at the end of ``postgresql.auto.conf``, are recovery to
exactly T with promotion, and guards: a copy started beside production must not archive into its archive,
stream from it, wait for its standbys, apply its subscriptions or run its jobs. A copy that is to replace the
source is asked for without them; else whoever lets it take over removes them: they stand in one marked block, until
the first ALTER SYSTEM rewrites that file. Where the source keeps its configuration outside
the data directory (EDGE 45), one is made from the settings the snapshot recorded.

Tablespaces are directories inside ``pg_tblspc`` (EDGE 49). Crash behaviour: ``global/pg_control`` is
written last, so what an interrupted restore leaves never starts; a failed or cancelled one removes what
it made (EDGE 31).
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from restore.branch_make import control_content, plan_branch, tablespace_creates, wal_reader
from restore.branch_request import StoreAddress
from restore.data_files import PlainDirectory
from restore.eager import Progress, read_listing, write_control, write_files
from restore.host import Account, Host, told_plainly
from restore.metered_store import MeteredStore
from restore.plan import BACKUP_LABEL, RECOVERY_SIGNAL, BranchPlan, bounds_as_of
from restore.recovery import NEVER
from restore.settings import format_conf
from restore.threads import to_the_end
from restore.wal_files import write_histories, write_wal
from timeline.catalog.history import History
from timeline.catalog.line import incarnation_at
from timeline.catalog.target import Target
from timeline.catalog.when import When
from timeline.clock import Clock
from timeline.errors import UsageError
from timeline.format.branch_state import Setting
from timeline.format.file_listing import FileListing
from timeline.ids import MAIN
from timeline.pg.control import Parameters, parse_control
from timeline.store.open import open_store

_FREE_BYTES = 1 << 30
_LEVELS = ("minimal", "replica", "logical")
_PLACES = frozenset(
    ("config_file", "data_directory", "external_pid_file", "hba_file", "ident_file", "lc_collate", "lc_ctype")
)
"""Of the source's host, or not settings at all."""
_READ_ONLY = frozenset(
    ("block_size", "server_encoding", "server_version_num", "server_version", "wal_segment_size")
)


@dataclass(frozen=True, slots=True)
class RestoreResult:
    """What ``tl restore --json`` tells."""

    directory: str
    target: Target
    replayed_bytes: int
    """WAL that Postgres will replay at its first start."""
    requests: int
    fetched_bytes: int
    elapsed_seconds: float
    major: int
    warnings: tuple[str, ...]


async def restore_directory(
    address: StoreAddress,
    when: When,
    directory: Path,
    host: Host,
    clock: Clock,
    *,
    tli: int | None = None,
    parent: str = MAIN,
    take_over: bool = False,
    report: Callable[[Progress], None] = lambda _: None,
) -> RestoreResult:
    """Write the copy; raises UsageError unless the directory is empty or absent, and what reading raises.

    ``take_over``: without the guards, for a server that replaces the source.
    """
    began = clock.monotonic()
    created = _claim(directory)
    store = MeteredStore(
        await open_store(address.url, endpoint_url=address.endpoint_url, region=address.region, clock=clock)
    )
    try:
        with told_plainly():
            history = await History.load(store, parent)
            target = await history.resolve(when, tli=tli, stock=True)
            incarnation = incarnation_at(history.state, target.lsn)
            listing = await read_listing(store, target.snapshot)
            plan = plan_branch(history, target, incarnation)
            bounds = bounds_as_of(parse_control(control_content(listing)), plan.events)
            check_room(directory, plan.snapshot.bytes + plan.replayed_bytes)
            host, owner = _owner(directory, host)
            await write_files(store, plan.snapshot, listing, directory, owner, report=report)
            warnings = await to_the_end(
                lambda: _configure(directory, plan, bounds, listing, host, guarded=not take_over)
            )
            wal = directory / "pg_wal"
            write_histories(plan, wal, host)
            await write_wal(plan, wal_reader(history), wal, host, creates=tablespace_creates(target))
            await to_the_end(lambda: write_control(listing, directory, owner))
            remarks = await history.remarks(target.tli)
    except BaseException:
        await to_the_end(lambda: _clear(directory, created))
        raise
    finally:
        await store.aclose()
    return RestoreResult(
        directory=str(directory),
        target=target,
        replayed_bytes=plan.replayed_bytes,
        requests=store.requests,
        fetched_bytes=store.fetched_bytes,
        elapsed_seconds=clock.monotonic() - began,
        major=incarnation.major,
        warnings=(*warnings, *remarks),
    )


def recovery_block(plan: BranchPlan, bounds: Parameters, *, guarded: bool = True) -> bytes:
    """What is added to ``postgresql.auto.conf``; ``guarded``: for a copy that must leave production alone."""
    told = {setting.name: setting.value for setting in plan.snapshot.settings}
    limits = [
        Setting("max_connections", str(bounds.max_connections)),
        Setting("max_worker_processes", str(bounds.max_worker_processes)),
        Setting("max_wal_senders", str(bounds.max_wal_senders)),
        Setting("max_prepared_transactions", str(bounds.max_prepared_transactions)),
        Setting("max_locks_per_transaction", str(bounds.max_locks_per_transaction)),
        Setting("wal_level", _LEVELS[bounds.wal_level]),
        Setting("wal_log_hints", "on" if bounds.wal_log_hints else "off"),
        Setting("track_commit_timestamp", "on" if bounds.track_commit_timestamp else "off"),
    ]
    recovery = [
        Setting("restore_command", NEVER),
        *plan.recovery,
        # A reader during replay from a snapshot that was built could cost committed rows.
        Setting("hot_standby", "off"),
        *(limit for limit in limits if told.get(limit.name) != limit.value),
        Setting("allow_in_place_tablespaces", "on"),
    ]
    guards = [
        Setting("archive_mode", "off"),
        Setting("primary_conninfo", ""),
        Setting("primary_slot_name", ""),
        Setting("recovery_end_command", ""),
        Setting("archive_cleanup_command", ""),
        Setting("synchronous_standby_names", ""),
        Setting("max_logical_replication_workers", "0"),
    ]
    if "pg_cron" in told.get("shared_preload_libraries", ""):
        guards.append(Setting("cron.launch_active_jobs", "off"))
    block = b"\n" + format_conf(recovery, heading=f"tl restore: recovery to {plan.lsn}, on tli {plan.tli}")
    if guarded:
        block += format_conf(guards, heading="tl restore: guards; remove them when this server takes over")
    return block


def check_room(directory: Path, size_bytes: int) -> None:
    """Raise UsageError when the copy does not fit on the disk."""
    free = shutil.disk_usage(directory).free
    if free < size_bytes + _FREE_BYTES:
        raise UsageError(f"the copy takes {size_bytes >> 20} MiB, and {directory} has {free >> 20} MiB free")


def _claim(directory: Path) -> bool:
    """Make sure that the directory is there and empty; whether it was made."""
    try:
        directory.mkdir(mode=0o700)
    except FileExistsError:
        if not directory.is_dir() or any(directory.iterdir()):
            raise UsageError(
                f"{directory} is not an empty directory",
                hint="nothing is ever written over: name an empty one",
            ) from None
        return False
    except OSError as error:
        raise UsageError(f"cannot make {directory}: {error.strerror}") from error
    return True


def _owner(directory: Path, host: Host) -> tuple[Host, Account | None]:
    """Files belong to whoever owns the directory; where that is root, to the account that runs Postgres."""
    if not host.switches_user:
        return host, None
    found = directory.stat()
    if found.st_uid != 0:
        account = dataclasses.replace(host.account, uid=found.st_uid, gid=found.st_gid)
        host = dataclasses.replace(host, account=account)
    os.chown(directory, host.account.uid, host.account.gid)
    directory.chmod(0o700)
    return host, host.account


def _configure(
    directory: Path,
    plan: BranchPlan,
    bounds: Parameters,
    listing: FileListing,
    host: Host,
    *,
    guarded: bool,
) -> list[str]:
    files = PlainDirectory(directory, host)
    warnings = []
    for path in plan.hidden:
        files.whiteout(path)
    if listing.get("postgresql.conf") is None:
        kept = [
            setting
            for setting in plan.snapshot.settings
            if setting.name not in _PLACES | _READ_ONLY and not setting.name.startswith("ssl_")
        ]
        files.put_file("postgresql.conf", format_conf(kept, heading="The settings that the source ran with."))
        warnings.append(
            "the source keeps its configuration elsewhere: postgresql.conf was made from its settings"
        )
    for name, content in (("pg_hba.conf", b"local all all peer\n"), ("pg_ident.conf", b"")):
        if listing.get(name) is None:
            files.put_file(name, content)
            warnings.append(f"the source keeps its {name} elsewhere: check the one made here")
    auto = directory / "postgresql.auto.conf"
    files.put_file(
        "postgresql.auto.conf",
        (auto.read_bytes() if auto.exists() else b"") + recovery_block(plan, bounds, guarded=guarded),
    )
    files.put_file(RECOVERY_SIGNAL, b"")
    if plan.backup_label is not None:
        files.put_file(BACKUP_LABEL, plan.backup_label.encode())
    for setting in plan.snapshot.tablespaces:
        warnings.append(
            f"tablespace {setting.oid} lies in pg_tblspc/{setting.oid}, not in {setting.source_path}"
        )
    return warnings


def _clear(directory: Path, created: bool) -> None:
    if created:
        shutil.rmtree(directory)
        return
    for entry in directory.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
