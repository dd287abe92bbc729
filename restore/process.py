"""Processes that outlive us: told apart by pid *and* start time, for pids are used again."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

_HAS_PROC = Path("/proc/self/stat").exists()
_PS_SECONDS = 5.0


def start_time(pid: int) -> str | None:
    """When the process began, in the system's own terms; ``None`` when there is none, or a dead one."""
    if _HAS_PROC:
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return None
        # The name, in parentheses, may hold anything.
        fields = stat[stat.rindex(")") + 2 :].split()
        return None if fields[0] in ("Z", "X") else fields[19]
    answer = subprocess.run(
        ["ps", "-o", "stat=,lstart=", "-p", str(pid)],
        capture_output=True,
        text=True,
        timeout=_PS_SECONDS,
        check=False,
    )
    status, _, started = answer.stdout.strip().partition(" ")
    return None if not status or status.startswith("Z") else started.strip()


def is_alive(pid: int, started: str | None) -> bool:
    """Whether that very process runs. Reaps it if it was a child of ours and has ended."""
    try:
        os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        pass
    return started is not None and start_time(pid) == started


def send(pid: int, started: str | None, signal: int) -> bool:
    """Send a signal to that very process; ``False`` when it is gone."""
    if not is_alive(pid, started):
        return False
    try:
        os.kill(pid, signal)
    except ProcessLookupError:
        return False
    return True


def children(pid: int) -> list[tuple[int, str]]:
    """Direct children (pid, start time) of a process, Linux only; elsewhere none are told."""
    found = []
    if not _HAS_PROC:
        return []
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            stat = Path(f"/proc/{entry}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        fields = stat[stat.rindex(")") + 2 :].split()
        if int(fields[1]) == pid and fields[0] not in ("Z", "X"):
            found.append((int(entry), fields[19]))
    return found


def command_line(pid: int) -> list[str]:
    """Arguments of a process, Linux only; elsewhere, and of a process that is gone, none."""
    try:
        return [os.fsdecode(part) for part in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")]
    except (FileNotFoundError, ProcessLookupError):
        return []
