"""The whole way back: a complete copy (``tl restore``), recovered by stock Postgres, answering a query.

Everything lies in the drill's workshop and goes with it. The copy keeps the source's configuration, as a real
restore would; only what ties it to the source's host is overridden: where it listens and who may come in, the
libraries it preloads, its memory and where it logs. Postgres is stopped at the end, also on failure.
"""

from __future__ import annotations

from dataclasses import dataclass

from restore.binaries import find_binaries
from restore.branch_make import plan_branch, ready_seconds
from restore.branch_request import StoreAddress
from restore.compute import Instance, kill, launch
from restore.drill_checks import Counted, SqlChecks
from restore.drill_workshop import Workshop
from restore.export import check_room, restore_directory
from restore.isolation import Endpoint
from timeline.catalog.history import History
from timeline.catalog.line import incarnation_at
from timeline.catalog.target import Target
from timeline.catalog.when import AtLsn
from timeline.clock import Clock
from timeline.format.branch_state import Incarnation, Setting

PORT = 5432


@dataclass(frozen=True, slots=True)
class FullCopy:
    """What the copy came to."""

    first_query_micros: int
    """From the start of the restore."""
    requests: int
    fetched_bytes: int
    replayed_bytes: int
    counted: tuple[Counted, ...]
    warnings: tuple[str, ...]


async def check_full_room(history: History, target: Target, workshop: Workshop) -> None:
    """Raise UsageError, with the numbers, when the copy does not fit beside what is there."""
    stock = await history.resolve(AtLsn(target.lsn), tli=target.tli, stock=True)
    plan = plan_branch(history, stock, incarnation_at(history.state, stock.lsn))
    check_room(workshop.directory, plan.snapshot.bytes + plan.replayed_bytes)


async def full_copy(
    address: StoreAddress,
    target: Target,
    incarnation: Incarnation,
    workshop: Workshop,
    clock: Clock,
) -> FullCopy:
    """Make it, start it, ask it. Raises what a restore raises, and TimelineError in Postgres's words."""
    began = clock.monotonic()
    home = workshop.host.make_private(workshop.copy)
    if workshop.host.switches_user:
        # Ours to write in, the server's to pass through.
        home.chmod(0o711)
    sockets = workshop.host.make_private(home / "s")
    data = home / "data"
    result = await restore_directory(address, AtLsn(target.lsn), data, workshop.host, clock, tli=target.tli)
    hba = home / "hba.conf"
    hba.write_text("local all all trust\n")
    workshop.host.own(hba)
    binaries = find_binaries(result.major, workshop.environ)
    instance = Instance(workshop.host, binaries, data, home / "postgres.log")
    starting = launch(instance, options=_overrides(str(sockets), str(hba)))
    server = await starting.wait(clock, ready_seconds=ready_seconds(result.replayed_bytes))
    try:
        checks = SqlChecks(Endpoint(str(sockets), PORT, incarnation.superuser), result.major, clock)
        await checks.first_query()
        elapsed = int((clock.monotonic() - began) * 1e6)
        counted = await checks.count(await checks.databases())
    finally:
        await kill(server, clock)
    return FullCopy(
        elapsed, result.requests, result.fetched_bytes, result.replayed_bytes, counted, result.warnings
    )


def _overrides(sockets: str, hba: str) -> tuple[Setting, ...]:
    """What would tie the copy to the source's host, or let others in."""
    return (
        Setting("listen_addresses", ""),
        Setting("port", str(PORT)),
        Setting("unix_socket_directories", sockets),
        Setting("unix_socket_group", ""),
        Setting("unix_socket_permissions", "0700"),
        Setting("hba_file", hba),
        Setting("external_pid_file", ""),
        Setting("ssl", "off"),
        Setting("shared_preload_libraries", ""),
        Setting("session_preload_libraries", ""),
        Setting("local_preload_libraries", ""),
        Setting("shared_buffers", "128MB"),
        Setting("huge_pages", "off"),
        Setting("logging_collector", "off"),
        Setting("log_destination", "stderr"),
    )
