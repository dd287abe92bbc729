"""What is asked for when a branch is made, and what is told about one."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, tzinfo
from urllib.parse import quote, urlencode

from restore.branch_scripts import Scripts
from restore.local_branch import LocalBranch, ScriptRecord, Server
from restore.pin_keeper import PinNote
from timeline.catalog.when import When
from timeline.clock import Micros
from timeline.errors import UsageError
from timeline.ids import MAIN
from timeline.lsn import Lsn

AUTO = "auto"
"""Mode: lazy where the host can, else a copy."""

DEFAULT_TTL_SECONDS = 24 * 3600
"""Time to live of a branch that was given no name."""
COPY_LIMIT_BYTES = 20 << 30
"""Mode auto makes no copy of a larger database."""


@dataclass(frozen=True, slots=True)
class StoreAddress:
    """How to open a store (``open_store``)."""

    url: str
    endpoint_url: str | None = None
    region: str | None = None


@dataclass(frozen=True, slots=True)
class Listen:
    """A TCP address to listen on besides the socket."""

    address: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Listen:
        """Read ``ADDR:PORT`` (``[::1]:5433`` for IPv6); raises UsageError."""
        address, colon, port = text.rpartition(":")
        address = address.removeprefix("[").removesuffix("]")
        if not colon or not address or not port.isdecimal() or not 0 < int(port) < 65536:
            raise UsageError(f"not an address to listen on: {text!r}", hint="write ADDRESS:PORT")
        return cls(address, int(port))


@dataclass(frozen=True, slots=True)
class BranchRequest:
    """One branch to make."""

    store: StoreAddress
    name: str | None = None
    when: When | str = "latest"
    """A text is read by ``parse_when``."""
    zone: tzinfo = UTC
    """For times in that text which name none."""
    tli: int | None = None
    """Line of history to look on; ``None``: the source's present one."""
    parent: str = MAIN
    ttl_seconds: float | None = None
    stop_when_idle_seconds: int | None = None
    """Stop it when no client has been connected for so long; ``None``: never."""
    mode: str = AUTO
    listen: Listen | None = None
    preload: tuple[str, ...] = ()
    if_exists: str = "fail"
    """``fail``, ``reuse`` (what is there, started if need be) or ``reset`` (deleted and made again)."""
    cache_bytes: int = 20 << 30
    scripts: Scripts = field(default_factory=Scripts)
    """Run before anybody can reach the branch."""
    stock: bool = False
    """Begin at a base backup, where stock Postgres would, whatever snapshots there are."""
    without: str | None = None
    """Id of a snapshot not to begin at."""
    untouched: bool = False
    """Nobody will connect, nor we to isolate it, and nothing runs in it by itself: its files are what is
    wanted."""


@dataclass(frozen=True, slots=True)
class BranchResult:
    """A branch as ``tl branch --json`` tells it."""

    name: str
    id: str
    parent: str
    lsn: Lsn
    time: Micros | None
    last_commit_time: Micros | None
    next_commit_time: Micros | None
    dsn: str
    port: int
    pid: int | None
    data_directory: str
    mode: str
    expires: Micros | None
    elapsed_seconds: float
    replayed_bytes: int
    fetched_bytes: int
    """From the store, since the branch (or its mount) was started."""
    requests: int
    scripts: tuple[ScriptRecord, ...]
    """Run before it was offered."""
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class BranchStatus:
    """A branch of this host and whether it runs."""

    branch: LocalBranch
    state: str
    """``running``, ``stopped``, ``broken`` (Postgres or its mount died) or ``void`` (lost with a reboot)."""
    dsn: str
    pin: PinNote | None = None
    """How long the store keeps for it what it reads; ``None`` for copies, and while nothing is known."""


def dsn_of(server: Server, *, database: str = "postgres") -> str:
    """A connection URI without a password (P8): over TCP where that was asked for, else the private
    socket."""
    user = quote(server.superuser, safe="")
    name = quote(database, safe="")
    if server.listen is not None:
        host = f"[{server.listen}]" if ":" in server.listen else server.listen
        return f"postgresql://{user}@{host}:{server.port}/{name}"
    return socket_dsn_of(server, database=database)


def socket_dsn_of(server: Server, *, database: str = "postgres") -> str:
    """The same over the private socket, whatever else it listens on."""
    parameters = {"host": server.sockets}
    if server.port != 5432:
        parameters["port"] = str(server.port)
    query = urlencode(parameters, safe="/", quote_via=quote)
    return f"postgresql://{quote(server.superuser, safe='')}@/{quote(database, safe='')}?{query}"
