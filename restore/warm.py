"""Start the mount agent while the caller still imports what making a branch takes: both cost tenths of a
second."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

from restore import agent
from restore.host import find_host
from timeline.errors import TimelineError

_log = logging.getLogger(__name__)


def warm_up(environ: Mapping[str, str], store_url: str) -> None:
    """Begin to start an agent, if one may be needed and none is there; returns at once.

    Never fails: what is wrong with the host is met again, and told, when the branch is made.
    """
    if sys.platform != "linux" or not Path("/dev/fuse").exists():
        return
    threading.Thread(target=_start, args=(dict(environ), store_url), name="warm-up", daemon=True).start()


def _start(environ: Mapping[str, str], store_url: str) -> None:
    try:
        host = find_host(environ)
        host.make()
        agent.prepare(host.state, store_url)
    except (TimelineError, OSError) as error:
        _log.debug("warm-up: %s", error)
