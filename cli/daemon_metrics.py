"""Where the daemon's facts meet the server that publishes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from cli.observed import DaemonState


class MetricsServer(Protocol):
    """What the daemon asks of a running one."""

    async def aclose(self) -> None:
        """Stop listening."""
        ...


async def start_metrics(
    address: str, facts: Callable[[], DaemonState], environment: Mapping[str, str]
) -> MetricsServer:
    """Serve ``facts()`` on HOST:PORT; ``environment``: of the children that ask stores and sources. Raises
    UsageError, TimelineError."""
    # Late: a daemon without metrics needs neither the library nor its memory.
    from cli.metrics_feed import start_metrics as start

    return await start(address, facts, environment=environment)
