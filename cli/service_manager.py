"""What systemd is told: sd_notify(3), datagrams of ``NAME=value`` lines to the socket in ``NOTIFY_SOCKET``.

Nothing here ever fails for its caller: a service manager that does not listen is no reason to stop archiving.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Mapping

from timeline.clock import Clock

_STATUS_CHARACTERS = 500
_PATIENCE_SECONDS = 1.0
"""How long a full socket is waited for; what it has no room for then is lost."""


class ServiceManager:
    """The notification socket, if there is one."""

    def __init__(self, environment: Mapping[str, str], clock: Clock) -> None:
        self._clock = clock
        self._address = _address(environment.get("NOTIFY_SOCKET", ""))
        self._interval = _watchdog_interval(environment)
        self._fed_at: float | None = None
        self._socket: socket.socket | None = None
        self._status = ""
        if self._address is not None:
            with contextlib.suppress(OSError):
                self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
                self._socket.settimeout(_PATIENCE_SECONDS)

    @property
    def feed_seconds(self) -> float | None:
        """How often the watchdog is fed: half of what it allows. ``None``: there is none."""
        return self._interval

    def ready(self, status: str) -> None:
        """Start-up or a reload is over."""
        self._status = status
        self._send("READY=1", f"STATUS={status[:_STATUS_CHARACTERS]}")

    def reloading(self) -> None:
        """A reload begins; ``ready`` ends it."""
        self._send("RELOADING=1", f"MONOTONIC_USEC={int(self._clock.monotonic() * 1_000_000)}")

    def stopping(self, status: str) -> None:
        """The end begins."""
        self._send("STOPPING=1", f"STATUS={status[:_STATUS_CHARACTERS]}")

    def say(self, status: str) -> None:
        """One line for ``systemctl status``, when it is a new one."""
        if status != self._status:
            self._status = status
            self._send(f"STATUS={status[:_STATUS_CHARACTERS]}")

    def feed(self) -> None:
        """Feed the watchdog when it is time; to be called by what must not get stuck."""
        now = self._clock.monotonic()
        if self._interval is None or (self._fed_at is not None and now - self._fed_at < self._interval):
            return
        self._fed_at = now
        self._send("WATCHDOG=1")

    def close(self) -> None:
        """No more is said."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _send(self, *lines: str) -> None:
        if self._socket is None or self._address is None:
            return
        text = "\n".join(line.replace("\n", " ") for line in lines)
        with contextlib.suppress(OSError):
            self._socket.sendto(text.encode(), self._address)


def _address(text: str) -> str | None:
    """A path, or an abstract name, which the environment spells with ``@``."""
    if text.startswith("@"):
        return "\0" + text[1:]
    return text if text.startswith("/") else None


def _watchdog_interval(environment: Mapping[str, str]) -> float | None:
    micros, pid = environment.get("WATCHDOG_USEC", ""), environment.get("WATCHDOG_PID", "")
    if not micros.isdecimal() or int(micros) == 0 or (pid and pid != str(os.getpid())):
        return None
    return int(micros) / 1_000_000 / 2
