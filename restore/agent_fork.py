"""Make the mount agent out of the caller's own process, which has imported nearly all that a mount needs.

A second interpreter would import the same libraries once more, a quarter of a second of processor time (twice
that with S3) while the caller waits for it. So a command that is about to mount forks an agent before it
starts its event loop. The agent is none the less outside the caller's session, with nothing of the caller
open.

Forking is safe only while the process has one thread; with more of them nothing is done, and the agent is
started as an interpreter of its own when it is first asked (agent.py).
"""

from __future__ import annotations

import ctypes
import os
import select
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from restore import agent
from restore.host import find_host, told_plainly
from timeline.clock import SystemClock
from timeline.errors import Unavailable

_M_ARENA_MAX = -8
_ARENAS = 2


def prepare_libraries() -> None:
    """Keep libraries that are imported later from making threads and arenas of their own; call it first."""
    for name, value in agent.LIBRARY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def fork_agent(environ: Mapping[str, str], store_url: str) -> None:
    """See to it that there is an agent that has imported what this kind of store needs.

    Raises TimelineError when the host's directories cannot be used or the agent does not start.
    """
    # What else a lazy branch lacks here is met again, and told, when one is made; a copy needs no agent.
    if sys.platform != "linux" or not os.path.exists("/dev/fuse") or find_spec("pyfuse3") is None:
        return
    host = find_host(environ)
    with told_plainly():
        host.make()
    if agent.answers(host.state, store_url):
        return
    from restore import agent_server

    agent_server.import_for(store_url)
    if len(os.listdir("/proc/self/task")) > 1:
        return
    with agent.starting(host.state):
        if not agent.answers(host.state, store_url):
            _fork(host.state)


def _fork(state: Path) -> None:
    """Returns when the agent listens; the caller holds the lock."""
    sys.stdout.flush()
    sys.stderr.flush()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        _become_agent(state, writer)
    os.close(writer)
    try:
        os.waitpid(child, 0)
        if not select.select([reader], [], [], agent.START_SECONDS)[0] or os.read(reader, 1) != b"r":
            raise Unavailable("the mount agent did not start", hint=f"see {state / agent.LOG}")
    finally:
        os.close(reader)


def _become_agent(state: Path, ready: int) -> NoReturn:
    """Leave session, directory and descriptors of the caller behind; never returns into its code."""
    from restore import agent_server

    code = 1
    try:
        os.setsid()
        if os.fork() != 0:
            # The agent is nobody's child: the caller need not wait for it, nor outlive it.
            os._exit(0)
        os.chdir("/")
        null = os.open(os.devnull, os.O_RDWR)
        log = os.open(state / agent.LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
        for target, source in ((0, null), (1, null), (2, log)):
            os.dup2(source, target)
        os.closerange(3, ready)
        os.closerange(ready + 1, os.sysconf("SC_OPEN_MAX"))
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, _ARENAS)
        agent_server.serve(state, ready, SystemClock())
        code = 0
    except BaseException as error:  # noqa: BLE001 - the last line of a process, told in the agent's log
        print(f"the agent failed: {error!r}", file=sys.stderr, flush=True)
    os._exit(code)
