"""Connections to the source: conninfo, and what libpq says when one cannot be made, as one clear line.

Messages never repeat the conninfo, which may hold a password (libpq's own complaints about a conninfo quote
it, so those are not passed on either).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg import conninfo as libpq

from timeline.errors import TimelineError, Unavailable, UsageError

CONNECT_TIMEOUT_SECONDS = 15
"""When the conninfo does not say otherwise (``connect_timeout``)."""
_KEEPALIVE_DEFAULTS = {"keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3}
"""So that a peer that vanished is noticed within about a minute, also while we have nothing to send."""

SqlConnection = psycopg.AsyncConnection[tuple[Any, ...]]


@dataclass(frozen=True, slots=True)
class _Refusal:
    pattern: re.Pattern[str]
    message: str
    hint: str
    passing: bool = False
    """Whether it may go away by itself."""


def _refusal(pattern: str, message: str, hint: str, *, passing: bool = False) -> _Refusal:
    return _Refusal(re.compile(pattern, re.IGNORECASE), message, hint, passing)


_REFUSALS = (
    _refusal(
        r"pg_hba\.conf (entry for|rejects) replication|pg_hba\.conf rejects replication",
        "the source's pg_hba.conf does not admit replication connections from here",
        "add 'host replication USER ADDRESS scram-sha-256' to the source's pg_hba.conf, and reload it",
    ),
    _refusal(
        r"no pg_hba\.conf entry|pg_hba\.conf rejects",
        "the source's pg_hba.conf does not admit this connection",
        "add a line for this user, database and address to pg_hba.conf on the source and reload it",
    ),
    _refusal(
        r"must be superuser or replication role|permission denied to start WAL sender",
        "the source's user may not stream WAL",
        "on the source: ALTER ROLE … REPLICATION",
    ),
    _refusal(
        r"password authentication failed|no password supplied|fe_sendauth",
        "the source did not accept the user or the password",
        "check user, PGPASSWORD or the passfile; for replication connections the database in a passfile "
        "entry is 'replication' or '*'",
    ),
    _refusal(
        r"role \".*\" does not exist",
        "the source does not know this user",
        "check the user in the conninfo",
    ),
    _refusal(
        r"database \".*\" does not exist",
        "the source does not have this database",
        "check dbname in the conninfo",
    ),
    _refusal(
        r"certificate|SSL error|server does not support SSL",
        "the source's TLS settings and the conninfo do not fit",
        "check sslmode, sslrootcert, sslcert and sslkey",
    ),
    _refusal(
        r"number of requested standby connections exceeds|max_wal_senders",
        "the source has no free WAL sender",
        "raise max_wal_senders on the source, or stop another replication client",
        passing=True,
    ),
    _refusal(
        r"too many clients|remaining connection slots",
        "the source has no free connection",
        "raise max_connections on the source, or close other connections",
        passing=True,
    ),
    _refusal(
        r"starting up|shutting down|in recovery mode|not yet accepting",
        "the source is starting up or shutting down",
        "try again in a moment",
        passing=True,
    ),
)


class ServerError(TimelineError):
    """The source answered a command with an error."""

    def __init__(self, sqlstate: str, message: str, detail: str = "") -> None:
        super().__init__(f"the source says: {message}" + (f" ({detail})" if detail else ""))
        self.sqlstate = sqlstate
        self.server_message = message
        self.detail = detail


class ConnectionRefused(UsageError):
    """The source answered, and does not let us in: user, password, rights, pg_hba.conf or TLS."""


def connection_error(error: psycopg.Error) -> TimelineError:
    """What a failed connection attempt means; ConnectionRefused when trying again is no use, else
    Unavailable."""
    text = " ".join(str(error).split())
    for refusal in _REFUSALS:
        if refusal.pattern.search(text):
            kind = Unavailable if refusal.passing else ConnectionRefused
            return kind(refusal.message, hint=refusal.hint)
    if isinstance(error, psycopg.errors.ConnectionTimeout):
        text = "no answer in time"
    text = re.sub(r"^(connection (is bad|failed): )+", "", text)
    text = re.sub(r"\bMultiple connection attempts failed.*$", "", text)
    return Unavailable(
        f"no connection to the source: {_short(text)}", hint="is it running, and reachable from here?"
    )


def sql_error(error: psycopg.Error) -> TimelineError:
    """What a failed statement on an ordinary connection means: ServerError, or Unavailable when it was
    lost."""
    if error.sqlstate is None or error.sqlstate.startswith(("08", "57P")):
        return Unavailable(f"the source does not answer: {_short(' '.join(str(error).split()))}")
    return ServerError(
        error.sqlstate, error.diag.message_primary or str(error), error.diag.message_detail or ""
    )


def _short(text: str) -> str:
    text = re.sub(r"(?i)(password|passwd|pwd)\s*=\s*\S+", r"\1=…", text)
    return text if len(text) <= 300 else text[:299] + "…"


def parse_conninfo(conninfo: str) -> dict[str, Any]:
    """The parameters of a conninfo string or URI; raises UsageError."""
    try:
        return dict(libpq.conninfo_to_dict(conninfo))
    except psycopg.Error:
        raise UsageError(
            "the source's conninfo cannot be read",
            hint="expected 'host=… port=… user=… dbname=…' or postgresql://user@host:port/dbname",
        ) from None


def describe_conninfo(conninfo: str) -> str:
    """Where a conninfo leads, for people: no password, no other secret."""
    said = parse_conninfo(conninfo)
    where = str(said.get("host") or said.get("hostaddr") or "the local socket")
    port = f":{said['port']}" if "port" in said else ""
    return f"{where}{port}" + (f" as {said['user']}" if "user" in said else "")


async def connect_sql(conninfo: str, *, application_name: str) -> SqlConnection:
    """An ordinary connection in autocommit mode; raises UsageError or Unavailable."""
    return await _connect(conninfo, {"application_name": application_name})


async def connect_replication(conninfo: str, *, application_name: str) -> SqlConnection:
    """A connection to a walsender, of which only ``pgconn`` is to be used; raises as ``connect_sql``."""
    return await _connect(
        conninfo,
        {"application_name": application_name, "replication": "true", "dbname": "replication"},
    )


async def _connect(conninfo: str, changes: dict[str, str]) -> SqlConnection:
    said = parse_conninfo(conninfo)
    merged = {"connect_timeout": CONNECT_TIMEOUT_SECONDS, **_KEEPALIVE_DEFAULTS, **said, **changes}
    try:
        return await psycopg.AsyncConnection.connect(**merged, autocommit=True)
    except psycopg.OperationalError as error:
        raise connection_error(error) from None
    except psycopg.Error:
        # A parameter that libpq does not take: its message may quote the value.
        raise UsageError("the source's conninfo cannot be used", hint="check its parameters") from None
