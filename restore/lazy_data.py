"""A branch's lazy data directory: its overlay and its mount."""

from __future__ import annotations

import contextlib
from pathlib import Path

from restore import agent, mount_table
from restore.host import Host
from restore.local_branch import LocalBranch
from restore.mount_control import refresh_stats
from restore.mount_spec import MountSpec, MountStats, encode_spec, read_stats
from restore.overlay import Overlay
from restore.pin_keeper import PinNote, read_note
from restore.replay_task import replay_file
from restore.threads import to_the_end
from timeline.errors import TimelineError
from timeline.format.branch_state import Snapshot

PIN = "pin.json"
"""In the branch's directory: what its mount says of its pin."""


def make_overlay(directory: Path) -> Overlay:
    """An empty overlay in the branch's directory; raises OverlayUnusable."""
    return Overlay.create(directory / "overlay")


async def mount_data(
    directory: Path, branch: LocalBranch, snapshot: Snapshot, host: Host, *, cache_bytes: int
) -> None:
    """Write ``mount.json`` and mount ``data``; raises TimelineError."""
    origin = branch.origin
    if origin is None:
        raise TimelineError(f"branch {branch.name!r} does not know its store")
    mountpoint = directory / "data"
    mountpoint.mkdir(mode=0o700, exist_ok=True)
    spec = MountSpec(
        store_url=origin.store_url,
        endpoint_url=origin.endpoint_url,
        region=origin.region,
        branch=origin.parent,
        snapshot=snapshot,
        overlay=str(directory / "overlay"),
        mountpoint=str(mountpoint),
        uid=host.account.uid,
        gid=host.account.gid,
        durable=branch.durable,
        log=str(directory / "mount.log"),
        stats=str(directory / "stats.json"),
        cache=str(host.cache),
        cache_bytes=cache_bytes,
        expires=branch.expires,
        pin=str(directory / PIN),
        name=branch.name,
        replay=str(replay_file(directory)),
    )
    (directory / "mount.json").write_bytes(encode_spec(spec))
    await to_the_end(lambda: agent.mount(host.state, directory / "mount.json"))


async def remount_data(directory: Path, host: Host) -> None:
    """Mount what ``mount_data`` described; raises TimelineError."""
    await to_the_end(lambda: agent.mount(host.state, directory / "mount.json"))


async def unmount_data(directory: Path, host: Host) -> None:
    """Unmount, also what a killed mount left; no error when nothing is mounted."""
    await to_the_end(lambda: agent.unmount(host.state, directory / "data"))


def pin_note(directory: Path) -> PinNote | None:
    """How long its snapshot is kept for it; ``None`` when its mount has not said so (yet)."""
    return read_note(directory / PIN)


def mount_stats(directory: Path) -> MountStats | None:
    """What the mount counted since it started; of a mount that is gone, the last it told."""
    if mount_table.find(directory / "data") is not None:
        with contextlib.suppress(OSError):
            refresh_stats(directory / "data")
    return read_stats(directory / "stats.json")
