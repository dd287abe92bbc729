"""A walsender at the other end of a socket: commands, and a WAL stream read without ever blocking the event
loop.

Source: doc/src/sgml/protocol.sgml ("Streaming Replication Protocol"). libpq is used in non-blocking mode;
the socket is watched only while somebody waits in ``wait``, so that not reading is all it takes to push back
(the server then stops when the socket's buffers are full; libpq holds at most one message).
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass

import psycopg
from psycopg import pq

from timeline.archive.connect import ServerError, SqlConnection, connect_replication
from timeline.archive.protocol import ProtocolError
from timeline.errors import Unavailable
from timeline.lsn import Lsn

COMMAND_TIMEOUT_SECONDS = 60.0
"""For commands that answer at once; the stream itself has no limit of its own."""

_ROWS = pq.ExecStatus.TUPLES_OK
_DONE = (pq.ExecStatus.COMMAND_OK, pq.ExecStatus.EMPTY_QUERY)
_STREAMING = pq.ExecStatus.COPY_BOTH
_HALF_CLOSED = pq.ExecStatus.COPY_IN
"""The server has ended its half of the stream; the protocol asks us to end ours."""


@dataclass(frozen=True, slots=True)
class SystemIdentity:
    """The answer to IDENTIFY_SYSTEM."""

    system_identifier: int
    tli: int
    """The server's current one."""
    flushed: Lsn
    """End of its WAL."""


@dataclass(frozen=True, slots=True)
class NextTli:
    """The row that ends the stream of a tli the server has left."""

    tli: int
    start: Lsn
    """Where the next tli begins: the end of the one streamed."""


class ReplicationConnection:
    """One replication connection. Not for concurrent use, except ``wake``."""

    def __init__(self, connection: SqlConnection) -> None:
        self._connection = connection
        self._pgconn = connection.pgconn
        self._loop = asyncio.get_running_loop()
        self._woken = asyncio.Event()
        self._ended = False

    @classmethod
    async def open(cls, conninfo: str, *, application_name: str) -> ReplicationConnection:
        """Connect; raises UsageError or Unavailable with the reason in one line."""
        return cls(await connect_replication(conninfo, application_name=application_name))

    async def aclose(self) -> None:
        """Close at once; an unfinished stream ends with it."""
        await self._connection.close()

    @property
    def server_pid(self) -> int:
        """Process id of the walsender."""
        return self._pgconn.backend_pid

    @property
    def major(self) -> int:
        """Server's major version."""
        return self._pgconn.server_version // 10000

    async def identify(self) -> SystemIdentity:
        """Run IDENTIFY_SYSTEM."""
        row = await self._row("IDENTIFY_SYSTEM", columns=3)
        return SystemIdentity(int(row[0]), int(row[1]), Lsn.parse(row[2].decode()))

    async def history(self, tli: int) -> str:
        """Text of the history file of ``tli``, verbatim; raises ServerError when the server has none."""
        row = await self._row(f"TIMELINE_HISTORY {tli}", columns=2)
        return row[1].decode("utf-8", "replace")

    async def setting(self, name: str) -> str:
        """Value of a server setting, with its unit."""
        return (await self._row(f"SHOW {name}", columns=1))[0].decode()

    async def start(self, *, slot: str | None, start: Lsn, tli: int) -> NextTli | None:
        """Begin to stream. ``None``: WAL follows; a row: the tli ends at ``start`` already.

        Raises ServerError. Some refusals (a slot that lost its WAL, on 15) come only with the stream.
        """
        named = f'SLOT "{slot}" ' if slot is not None else ""
        command = f"START_REPLICATION {named}PHYSICAL {start >> 32:X}/{start & 0xFFFFFFFF:X} TIMELINE {tli}"
        try:
            async with asyncio.timeout(COMMAND_TIMEOUT_SECONDS):
                self._send_query(command)
                result = await self._result()
                if result is not None and result.status == _STREAMING:
                    self._ended = False
                    return None
                return await self._next_tli(result)
        except TimeoutError:
            raise Unavailable("the source did not begin to stream in time") from None

    @property
    def ended(self) -> bool:
        """The server has ended the stream; ``finish`` says why."""
        return self._ended

    def take(self) -> memoryview | None:
        """The next message that is here already; ``None`` when there is none (or the stream has ended).

        Raises Unavailable when the connection is gone.
        """
        if self._ended:
            return None
        try:
            size, data = self._pgconn.get_copy_data(1)
            if size == 0:
                self._pgconn.consume_input()
                size, data = self._pgconn.get_copy_data(1)
        except psycopg.Error as error:
            raise _lost(error) from error
        if size > 0:
            return data
        self._ended = size < 0
        return None

    def send(self, message: bytes) -> None:
        """Send a message of ours; what the socket does not take now goes out in ``wait``."""
        if self._ended:
            return
        try:
            self._pgconn.put_copy_data(message)
            self._pgconn.flush()
        except psycopg.Error as error:
            raise _lost(error) from error

    def wake(self) -> None:
        """End the present or next ``wait``."""
        self._woken.set()

    async def wait(self, *, read: bool, timeout: float) -> None:
        """Until the socket has something to read (if asked), ``wake`` is called, or ``timeout`` seconds are
        over.

        Meanwhile pending output goes out.
        """
        if not self._woken.is_set() and timeout > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    await self._ready(read=read)
        self._woken.clear()

    async def finish(self) -> NextTli | None:
        """Leave the stream that has ended: the next tli, or ``None`` when the server just stopped streaming.

        Raises ServerError with what the server had to say, Unavailable when the connection is gone.
        """
        try:
            async with asyncio.timeout(COMMAND_TIMEOUT_SECONDS):
                result = await self._result()
                if result is not None and result.status == _HALF_CLOSED:
                    self._pgconn.put_copy_end()
                    result = await self._result()
                return await self._next_tli(result)
        except psycopg.Error as error:
            raise _lost(error) from error
        except TimeoutError:
            raise Unavailable("the source did not finish its stream in time") from None

    async def _next_tli(self, result: pq.abc.PGresult | None) -> NextTli | None:
        found: NextTli | None = None
        while result is not None:
            if result.status == _ROWS and result.ntuples == 1 and result.nfields >= 2:
                tli, start = result.get_value(0, 0), result.get_value(0, 1)
                if tli is None or start is None:
                    raise ProtocolError("the source ended a tli without naming the next one")
                found = NextTli(int(tli), Lsn.parse(start.decode()))
            elif result.status not in _DONE:
                raise _server_error(result)
            result = await self._result()
        return found

    async def _row(self, command: str, *, columns: int) -> list[bytes]:
        try:
            async with asyncio.timeout(COMMAND_TIMEOUT_SECONDS):
                self._send_query(command)
                found: list[bytes] | None = None
                failure: ServerError | None = None
                while (result := await self._result()) is not None:
                    if result.status == _ROWS and result.ntuples == 1 and result.nfields >= columns:
                        values = [result.get_value(0, column) for column in range(columns)]
                        found = [value if value is not None else b"" for value in values]
                    elif result.status not in _DONE:
                        failure = _server_error(result)
        except TimeoutError:
            raise Unavailable(f"the source did not answer {command.split()[0]} in time") from None
        if failure is not None:
            raise failure
        if found is None:
            raise ProtocolError(
                f"the source answered {command.split()[0]} without a row of {columns} columns"
            )
        return found

    def _send_query(self, command: str) -> None:
        try:
            self._pgconn.send_query(command.encode())
        except psycopg.Error as error:
            raise _lost(error) from error

    async def _result(self) -> pq.abc.PGresult | None:
        try:
            while True:
                self._pgconn.flush()
                if not self._pgconn.is_busy():
                    return self._pgconn.get_result()
                await self._ready(read=True)
                self._woken.clear()
                self._pgconn.consume_input()
        except psycopg.Error as error:
            raise _lost(error) from error

    async def _ready(self, *, read: bool) -> None:
        """Until the socket can be read (if asked) or ``wake`` was called, flushing what is to be sent."""
        descriptor = self._pgconn.socket
        writing = self._flush()
        if read:
            self._loop.add_reader(descriptor, self._woken.set)
        if writing:
            self._loop.add_writer(descriptor, self._drain, descriptor)
        try:
            await self._woken.wait()
        finally:
            if read:
                self._loop.remove_reader(descriptor)
            self._loop.remove_writer(descriptor)

    def _flush(self) -> bool:
        """Send what can be sent; whether something is left."""
        try:
            return self._pgconn.flush() != 0
        except psycopg.Error as error:
            raise _lost(error) from error

    def _drain(self, descriptor: int) -> None:
        try:
            left = self._pgconn.flush() != 0
        except psycopg.Error:
            # The next use of the connection raises it where somebody can handle it.
            left = False
            self._woken.set()
        if not left:
            self._loop.remove_writer(descriptor)


def _server_error(result: pq.abc.PGresult) -> ServerError:
    def field(which: pq.DiagnosticField) -> str:
        return (result.error_field(which) or b"").decode("utf-8", "replace")

    message = field(pq.DiagnosticField.MESSAGE_PRIMARY) or "an error without a message"
    return ServerError(field(pq.DiagnosticField.SQLSTATE), message, field(pq.DiagnosticField.MESSAGE_DETAIL))


def _lost(error: psycopg.Error) -> Unavailable:
    text = " ".join(str(error).split())
    return Unavailable(f"the connection to the source was lost: {text}", hint="trying again")
