"""The connection that carries BASE_BACKUP: waits for the server, never blocks the event loop.

Backpressure is the caller's pace: bytes are read from the socket only inside ``BackupStream.read``, and
libpq holds at most a few messages (32 KiB each). Cancelling closes the connection, which makes the server
drop the backup. A server that is silent for ``silence_seconds`` once data flows is given up with
``Unavailable``; before that it may be busy with a spread checkpoint for as long as its
``checkpoint_timeout``, so there TCP keepalives alone decide.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from psycopg import OperationalError, pq

from timeline.archive.backup_protocol import (
    ArchiveData,
    Message,
    NewArchive,
    SourceTablespace,
    base_backup_command,
    has_typed_messages,
    parse_copy_message,
    parse_position,
    parse_tablespace,
)
from timeline.archive.connect import ServerError, connect_replication
from timeline.archive.tar_stream import BackupStreamError
from timeline.errors import TimelineError, Unavailable, UsageError
from timeline.lsn import Lsn

READ_BATCH_BYTES = 1 << 20
"""``read`` returns after about this much, so that the event loop gets its turn."""
MAX_NOTICES = 1000
"""Warnings of the server that are kept; those beyond are counted."""

_CORRUPTED = "XX001"
_DENIED = "42501"
_DIGITS = re.compile(r"\d+")


@dataclass(frozen=True, slots=True)
class SystemIdentity:
    """Answer of IDENTIFY_SYSTEM."""

    system_identifier: int
    tli: int
    position: Lsn


@dataclass(frozen=True, slots=True)
class BackupEnd:
    """What the server says after the last byte."""

    end: Lsn
    tli: int
    checksum_failures: int


class BackupStream:
    """One BASE_BACKUP, from its first result to its last."""

    def __init__(self, connection: pq.abc.PGconn, silence_seconds: float) -> None:
        self._connection = connection
        self._silence_seconds = silence_seconds
        self._typed = has_typed_messages(connection.server_version // 10000)
        self._archives_left: list[SourceTablespace] = []
        self._announced: list[Message] = []
        self._in_copy = False
        self._silence_bounded = False
        self._notice_total = 0
        self._failures_announced = 0
        self.major = connection.server_version // 10000
        self.start = Lsn(0)
        """Redo point of the backup."""
        self.tli = 0
        self.tablespaces: tuple[SourceTablespace, ...] = ()
        self.bytes_total: int | None = None
        """The server's estimate of what it will send."""
        self.notices: list[str] = []
        """Warnings of the server, at most MAX_NOTICES."""
        self.end: BackupEnd | None = None
        """Set when ``read`` has returned nothing."""
        connection.notice_handler = self._keep_notice

    async def identify(self) -> SystemIdentity:
        """Who the server is."""
        self._send(b"IDENTIFY_SYSTEM")
        result = await self._result(pq.ExecStatus.TUPLES_OK)
        row = _row(result, 0)
        await self._no_more_results()
        if row[0] is None or row[2] is None:
            raise BackupStreamError("the source does not say which system it is")
        position, tli = parse_position([row[2], row[1]])
        return SystemIdentity(int(row[0]), tli, position)

    async def begin(self, *, label: str, fast: bool, rate_kb: int | None) -> None:
        """Start the backup; returns after the server's checkpoint, when data is about to flow."""
        self._send(base_backup_command(self.major, label=label, fast=fast, rate_kb=rate_kb))
        self.start, self.tli = parse_position(_row(await self._result(pq.ExecStatus.TUPLES_OK), 0))
        listed = await self._result(pq.ExecStatus.TUPLES_OK)
        self.tablespaces = tuple(parse_tablespace(_row(listed, row)) for row in range(listed.ntuples))
        sizes = [space.size_bytes for space in self.tablespaces if space.size_bytes is not None]
        self.bytes_total = sum(sizes) if sizes else None
        self._silence_bounded = True
        await self._result(pq.ExecStatus.COPY_OUT)
        self._in_copy = True
        if not self._typed and self.tablespaces:
            self._archives_left = list(self.tablespaces)
            self._announce()

    async def read(self) -> list[Message]:
        """The next messages, about READ_BATCH_BYTES of them; none when the backup is complete (then ``end``
        is set).

        Raises Unavailable when the connection breaks, TimelineError when the server gives up.
        """
        messages: list[Message] = []
        size = 0
        drained = False
        while self._in_copy and size < READ_BATCH_BYTES:
            messages += self._announced
            self._announced = []
            length, data = self._copy_data()
            if length > 0:
                size += length
                drained = False
                messages.append(parse_copy_message(data) if self._typed else ArchiveData(data))
            elif length < 0:
                await self._copy_ended()
            elif not drained:
                # What the kernel already holds is taken first, so that a batch is worth a turn of the event
                # loop.
                self._consume()
                drained = True
            elif messages:
                break
            else:
                await self._readable()
                drained = False
        return messages

    def _announce(self) -> None:
        """Before Postgres 15 a new COPY *is* the announcement of the next archive in the list."""
        oid = self._archives_left.pop(0).oid
        self._announced = [NewArchive("base.tar" if oid is None else f"{oid}.tar", oid)]

    async def _copy_ended(self) -> None:
        """CopyDone arrived: another archive (before 15), or the end position and the server's verdict."""
        result = await self._next()
        if result is not None and result.status == pq.ExecStatus.COPY_OUT and self._archives_left:
            self._announce()
            return
        self._in_copy = False
        if result is None:
            raise BackupStreamError("the base backup ended without its end position")
        if result.status != pq.ExecStatus.TUPLES_OK:
            raise self._failure(result)
        end, tli = parse_position(_row(result, 0))
        failures = 0
        while (result := await self._next()) is not None:
            if result.status == pq.ExecStatus.FATAL_ERROR:
                if _sqlstate(result) != _CORRUPTED:
                    raise self._failure(result)
                failures = max(1, self._failures_announced)
        self.end = BackupEnd(end, tli, failures)

    def _send(self, command: bytes) -> None:
        self._connection.send_query(command)
        # Commands are far smaller than any socket buffer.
        self._connection.flush()

    async def _next(self) -> pq.abc.PGresult | None:
        while self._connection.is_busy():
            await self._readable()
            self._consume()
        return self._connection.get_result()

    async def _result(self, expected: pq.ExecStatus) -> pq.abc.PGresult:
        result = await self._next()
        if result is None:
            raise BackupStreamError(f"the source sent no {expected.name} where the protocol has one")
        if result.status != expected:
            raise self._failure(result)
        return result

    async def _no_more_results(self) -> None:
        while (result := await self._next()) is not None:
            if result.status == pq.ExecStatus.FATAL_ERROR:
                raise self._failure(result)

    async def _readable(self) -> None:
        try:
            async with asyncio.timeout(self._silence_seconds if self._silence_bounded else None):
                await _until_readable(self._connection.socket)
        except TimeoutError as error:
            raise Unavailable(
                f"the source sent nothing for {self._silence_seconds:.0f} s during the base backup"
            ) from error

    def _consume(self) -> None:
        try:
            self._connection.consume_input()
        except OperationalError as error:
            raise Unavailable(f"lost the connection to the source: {_one_line(str(error))}") from error

    def _copy_data(self) -> tuple[int, memoryview]:
        try:
            return self._connection.get_copy_data(1)
        except OperationalError as error:
            raise Unavailable(f"lost the connection to the source: {_one_line(str(error))}") from error

    def _failure(self, result: pq.abc.PGresult) -> TimelineError:
        state = _sqlstate(result)
        text = _one_line(result.error_message.decode(errors="replace")) or pq.ExecStatus(result.status).name
        if state == _DENIED:
            return UsageError(
                f"the source refuses a base backup: {text}", hint="on the source: ALTER ROLE … REPLICATION"
            )
        if not state or state.startswith(("08", "57P", "53")):
            return Unavailable(f"the base backup broke off: {text}")
        return ServerError(state, text)

    def _keep_notice(self, result: pq.abc.PGresult) -> None:
        text = (result.error_field(pq.DiagnosticField.MESSAGE_PRIMARY) or b"").decode(errors="replace")
        function = result.error_field(pq.DiagnosticField.SOURCE_FUNCTION)
        # The total is announced in the server's language: told by who says it, not by its words.
        if function in (b"perform_base_backup", b"SendBaseBackup") and (found := _DIGITS.search(text)):
            self._failures_announced = int(found[0])
        self._notice_total += 1
        if len(self.notices) < MAX_NOTICES:
            self.notices.append(_one_line(text))

    @property
    def notices_dropped(self) -> int:
        """How many warnings were not kept."""
        return self._notice_total - len(self.notices)


@asynccontextmanager
async def open_backup_stream(conninfo: str, *, silence_seconds: float) -> AsyncIterator[BackupStream]:
    """A replication connection for one backup; closed at the end, whatever happens.

    Raises UsageError or Unavailable when it cannot be made.
    """
    connection = await connect_replication(conninfo, application_name="tl base backup")
    try:
        yield BackupStream(connection.pgconn, silence_seconds)
    finally:
        await connection.close()


async def _until_readable(socket: int) -> None:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_reader(socket, wake)
    try:
        await ready
    finally:
        loop.remove_reader(socket)


def _row(result: pq.abc.PGresult, row: int) -> list[bytes | None]:
    if row >= result.ntuples:
        raise BackupStreamError("the source sent an empty answer where the protocol has a row")
    return [result.get_value(row, column) for column in range(result.nfields)]


def _sqlstate(result: pq.abc.PGresult) -> str:
    return (result.error_field(pq.DiagnosticField.SQLSTATE) or b"").decode(errors="replace")


def _one_line(text: str) -> str:
    return " ".join(text.split())
