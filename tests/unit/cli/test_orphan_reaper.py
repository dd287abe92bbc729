"""Orphans that come to process 1 of a container; here to a process that has asked for them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import cli

_PROGRAM = """
import ctypes, os, sys, time
sys.path.insert(0, sys.argv[1])
from cli.orphan_reaper import Reaper
assert ctypes.CDLL(None).prctl(36, 1, 0, 0, 0) == 0  # PR_SET_CHILD_SUBREAPER
reader, writer = os.pipe()
middle = os.fork()
if middle == 0:
    if os.fork() == 0:
        os.read(reader, 1)
    os._exit(0)
os.waitpid(middle, 0)
reaper = Reaper()
assert reaper.look() == 0 and reaper.look() == 0, "it lives"
os.write(writer, b"x")
deadline = time.monotonic() + 30
while reaper.look() == 0:
    assert time.monotonic() < deadline
try:
    os.waitpid(-1, os.WNOHANG)
except ChildProcessError:
    print("reaped")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's subreapers")
def test_an_orphan_is_reaped_at_the_second_look() -> None:
    root = str(Path(cli.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, root], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == "reaped\n", done.stderr
