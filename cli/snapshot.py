"""``tl snapshot``: build a snapshot from WAL, without the source."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Coroutine
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import click

from cli.config import Settings, store_options
from cli.duration import Duration
from cli.footprint import give_back, keep_small
from cli.output import duration_text, emit_json, iso, say, warn
from timeline.errors import Unavailable
from timeline.ids import MAIN
from timeline.size_text import size_text

if TYPE_CHECKING:
    from restore.overlay_snapshot import Build

NICENESS = 10


@click.command("snapshot")
@click.option(
    "--at-least",
    "at_least_mib",
    type=click.FloatRange(min=0),
    default=0,
    metavar="MIB",
    help="Do nothing while less WAL than this lies beyond the newest snapshot.",
)
@click.option(
    "--spacing",
    "spacing_mib",
    type=click.FloatRange(min=1),
    metavar="MIB",
    help="How much WAL lies between two, where more than one is to be built (64 to 512; default: tl.toml's `every`, or 64).",
)
@click.option(
    "--wait",
    "wait_seconds",
    type=Duration(),
    default=0.0,
    metavar="DURATION",
    help="Wait so long while another snapshot is being built on this host (default: not at all).",
)
@store_options
def snapshot_command(
    *, settings: Settings, at_least_mib: float, spacing_mib: float | None, wait_seconds: float
) -> None:
    """Build a snapshot of the newest moment in the store, from its WAL alone.

    A branch replays from the newest snapshot before its moment, so this bounds how long it takes. A server of
    this host replays the WAL and is thrown away again; the source is not involved. Needs FUSE, the binaries of
    the source's major version, and write access to the store. Harmless at any time: with nothing new nothing
    is done, and of two builders at once one wins.
    """
    from restore.agent_fork import prepare_libraries

    # Whatever else this host does comes first, the archiver above all; server and mount inherit it.
    os.nice(NICENESS)
    keep_small()
    prepare_libraries()
    from restore.branch_request import StoreAddress
    from restore.host import find_host
    from restore.snapshot_build import build_snapshots
    from timeline.clock import SystemClock
    from timeline.maintain.thin import rules_of_ages

    retention = settings.operations.retention
    address = StoreAddress(settings.need_store(), settings.endpoint_url, settings.region)

    async def run() -> list[Build]:
        found = build_snapshots(
            address,
            find_host(os.environ),
            SystemClock(),
            os.environ,
            at_least_bytes=max(1, int(at_least_mib * (1 << 20))),
            wait_seconds=wait_seconds,
            spacing_bytes=int(spacing_mib * (1 << 20))
            if spacing_mib
            else settings.operations.snapshots.every_bytes,
            rules=rules_of_ages(
                retention.keep_all_seconds, retention.hourly_seconds, retention.daily_seconds
            ),
        )
        done: list[Build] = []
        async with aclosing(found) as builds:
            async for build in builds:
                done.append(build)
                # Else it would stay while the next step replays, beside mount and prefetcher.
                give_back()
                if not settings.json and build.snapshot is not None:
                    say(_line(build))
                warn(build.warnings)
        return done

    builds = asyncio.run(stoppable(run()))
    made = [build for build in builds if build.snapshot is not None]
    if settings.json:
        warnings = [warning for build in builds for warning in build.warnings]
        emit_json(
            {
                "snapshots": [_document(build) for build in made],
                "reason": builds[-1].reason,
                "warnings": warnings,
            }
        )
    elif not made:
        say(f"nothing to build: {builds[-1].reason}")


async def stoppable(work: Coroutine[None, None, list[Build]]) -> list[Build]:
    """Let SIGTERM end the work as SIGINT does: with everything cleared up."""
    task = asyncio.ensure_future(work)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        return await task
    except asyncio.CancelledError:
        raise Unavailable("stopped before a snapshot was built", hint="nothing was changed") from None


def _line(build: Build) -> str:
    snapshot = build.snapshot
    if snapshot is None:
        return build.reason
    return (
        f"snapshot {snapshot.id} of {MAIN} at {snapshot.lsn}: {size_text(build.replayed_bytes)} of WAL replayed, "
        f"{size_text(build.uploaded_bytes)} uploaded, in {duration_text(build.elapsed_seconds)}"
    )


def _document(build: Build) -> dict[str, Any]:
    snapshot = build.snapshot
    return {
        "id": snapshot.id if snapshot is not None else None,
        "lsn": str(snapshot.lsn) if snapshot is not None else None,
        "tli": snapshot.tli if snapshot is not None else None,
        "time": iso(snapshot.time) if snapshot is not None else None,
        "replayed_bytes": build.replayed_bytes,
        "changed_blocks": build.changed_blocks,
        "uploaded_bytes": build.uploaded_bytes,
        "elapsed_seconds": build.elapsed_seconds,
    }
