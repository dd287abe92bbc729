"""What an S3 proxy counts, and which requests it strikes: shared by all its connections."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

FAULT_KINDS = (
    "status",
    "stall",
    "reset-before",
    "reset-after-commit",
    "truncate",
    "strip-conditional",
    "delay",
)
AGENTS = 100
_PLACE = re.compile(r"(?:/|%2F|prefix=)(wal|packs|manifests|branches|pins|marks|drills|catalog|tl\.json)")


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens to requests that match ``verb`` and ``contains``."""

    kind: str
    """What happens:

    - ``status``: answered with ``status`` and ``code``, not passed on.
    - ``stall``: never answered, not passed on.
    - ``reset-before``: the connection is reset, nothing is passed on.
    - ``reset-after-commit``: passed on; the connection is reset when the server has answered.
    - ``truncate``: half of the answer's body, then end of file.
    - ``strip-conditional``: passed on without If-None-Match and If-Match.
    - ``delay``: the answer is held back by ``seconds`` more.
    """
    verb: str = ""
    """HTTP method, or "" for all."""
    contains: str = ""
    """Text that the path and query must contain."""
    times: int = 1_000_000
    """So many requests, then no more."""
    skip: int = 0
    """So many matching requests pass first."""
    status: int = 503
    code: str = "SlowDown"
    """S3's error code, for ``status``."""
    seconds: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in FAULT_KINDS:
            raise ValueError(f"no such fault: {self.kind}")


@dataclass(frozen=True, slots=True)
class Stats:
    """What has passed since the start or the last reset."""

    requests: dict[str, int]
    """By verb; deletions of many keys at once are ``POST``, listings ``LIST``."""
    statuses: dict[str, int]
    """Answers by status that came from the server."""
    bytes_up: int
    """Bytes of request bodies."""
    bytes_down: int
    """Bytes of answers' bodies."""
    connections: int
    """Client connections taken."""
    open_connections: int
    """Client connections open now."""
    most_in_flight: int
    """The most requests that were under way at one time."""
    faults_injected: int
    by_agent: dict[str, dict[str, int]] = field(default_factory=dict)
    """Requests that reached the server, by the client's user agent, then by verb and place: ``PUT wal``, ``LIST packs``.
    A deletion of many keys at once is ``DELETE``."""


class ProxyState:
    """What all connections share."""

    def __init__(self, upstream: tuple[str, int], latency_seconds: float, bytes_per_second: float) -> None:
        self.upstream = upstream
        self.latency_seconds = latency_seconds
        self.bytes_per_second = bytes_per_second
        self.faults: list[Fault] = []
        self.struck: list[int] = []
        self.open_connections = 0
        self.in_flight = 0
        self.reset()

    def reset(self) -> None:
        self.requests: Counter[str] = Counter()
        self.statuses: Counter[str] = Counter()
        self.by_agent: dict[str, Counter[str]] = {}
        self.bytes_up = 0
        self.bytes_down = 0
        self.connections = 0
        self.most_in_flight = self.in_flight
        self.faults_injected = 0
        self.set_faults([])

    def set_faults(self, faults: Sequence[Fault]) -> None:
        self.faults = list(faults)
        self.struck = [0] * len(self.faults)

    def fault_for(self, verb: str, target: str) -> Fault | None:
        for index, fault in enumerate(self.faults):
            if fault.verb not in ("", verb) or fault.contains not in target:
                continue
            seen, self.struck[index] = self.struck[index], self.struck[index] + 1
            if fault.skip <= seen < fault.skip + fault.times:
                self.faults_injected += 1
                return fault
        return None

    def passed(self, verb: str, target: str, agent: str) -> None:
        """A request goes on to the server. Bound: AGENTS names; what more there are count as one."""
        kind = "DELETE" if verb == "POST" and "delete" in target else verb
        kind = "LIST" if verb == "GET" and "list-type=" in target else kind
        if agent not in self.by_agent and len(self.by_agent) >= AGENTS:
            agent = "others"
        place = _PLACE.search(target)
        self.by_agent.setdefault(agent, Counter())[f"{kind} {place[1] if place else '-'}"] += 1

    def began(self, verb: str, target: str) -> None:
        listing = verb == "GET" and "list-type=" in target
        self.requests["LIST" if listing else verb] += 1
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)

    def stats(self) -> Stats:
        return Stats(
            dict(self.requests),
            dict(self.statuses),
            self.bytes_up,
            self.bytes_down,
            self.connections,
            self.open_connections,
            self.most_in_flight,
            self.faults_injected,
            {agent: dict(counted) for agent, counted in self.by_agent.items()},
        )
