"""Run a program and tell which of its descendants outlive it, however far they detached themselves (Linux)."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True, slots=True)
class Watched:
    """A program that has ended."""

    returncode: int
    stdout: str
    stderr: str
    survivors: list[str]
    """Command lines of descendants that were still there after the grace."""


def run_watched(arguments: Sequence[str], *, grace_seconds: float = 5.0, timeout: float = 300) -> Watched:
    """Run to the end, then give descendants that many seconds to end as well; survivors are killed."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.orphans", str(grace_seconds), *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=True,
        stdin=subprocess.DEVNULL,
    )
    return Watched(*json.loads(done.stdout))


def _children() -> dict[int, str]:
    """Our living children; those that have ended are reaped."""
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return {}
        if pid == 0:
            break
    found = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return {int(pid): Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ") for pid in found}


def main() -> None:
    """Entry point of the watching process, to which every orphan is given."""
    if ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError("this process cannot adopt orphans")
    grace_seconds, *arguments = sys.argv[1:]
    # Files, not pipes: a survivor that holds the end of a pipe open would be waited for.
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        done = subprocess.run(arguments, stdout=out, stderr=err, check=False, stdin=subprocess.DEVNULL)
        said = []
        for file in (out, err):
            file.seek(0)
            said.append(file.read())
    deadline = time.monotonic() + float(grace_seconds)
    while (survivors := _children()) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in survivors:
        os.kill(pid, signal.SIGKILL)
    print(json.dumps([done.returncode, *said, list(survivors.values())]))


if __name__ == "__main__":
    main()
