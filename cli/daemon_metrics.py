"""Where the daemon's facts meet the server that publishes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from cli.observed import DaemonState
from timeline.errors import UsageError


class MetricsServer(Protocol):
    """What the daemon asks of a running one."""

    async def aclose(self) -> None:
        """Stop listening."""
        ...


async def start_metrics(address: str, facts: Callable[[], DaemonState]) -> MetricsServer:
    """Serve ``facts()`` on HOST:PORT. Raises UsageError while this build has no server to serve them with: a
    setting without an effect would be worse."""
    raise UsageError(
        f"daemon.metrics: this build cannot serve metrics on {address}", hint='set it to "off" in [daemon]'
    )
