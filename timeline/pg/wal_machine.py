"""Runs the compiled machine of wal_scan.py over bytes as they arrive, and says what is wrong with them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from timeline.lsn import Lsn
from timeline.pg.errors import WalFormatError
from timeline.pg.segment import check_segment_bytes

PAGE_BYTES = 8192
SHORT_HEADER_BYTES, LONG_HEADER_BYTES = 24, 40
"""Of a page; the long one where a segment begins."""
RECORD_HEADER_BYTES, MAX_RECORD_BYTES = 24, 1 << 30
"""Of a record, header included; Postgres itself writes none above 1,020 MiB (src/include/access/xlogrecord.h)."""
ANY_TLI = 0xFFFFFFFF
MAGIC_OF_MAJOR = {14: 0xD10D, 15: 0xD110, 16: 0xD113, 17: 0xD116, 18: 0xD118}
"""XLOG_PAGE_MAGIC of each major (src/include/access/xlog_internal.h)."""

Matrix = npt.NDArray[np.int64]
Buffer = bytes | bytearray | memoryview

_REFS = 16_384
_COMMITS = 4_096
_EVENTS = 256
_EVENT_BYTES = 64 << 10


def page_header_bytes(page: int, segment_bytes: int) -> int:
    """Size of the header of the WAL page that begins at this LSN."""
    return LONG_HEADER_BYTES if page % segment_bytes == 0 else SHORT_HEADER_BYTES


class Machine:
    """One run of WAL, from a record boundary or a page start on.

    ``run`` fills ``refs``, ``commits``, ``events`` and ``event_bytes``; the caller reads as many rows as
    ``take`` says and calls again while ``full``. The arrays have fixed sizes, about 1 MiB in all."""

    def __init__(self, segment_bytes: int, tli: int, position: int, major: int | None) -> None:
        from timeline.pg import wal_scan

        check_segment_bytes(segment_bytes)
        offset = position % PAGE_BYTES
        header = page_header_bytes(position - offset, segment_bytes)
        if position % 8 or 0 < offset < header:
            raise WalFormatError(position, "expected the start of a record or of a page")
        if major is not None and major not in MAGIC_OF_MAJOR:
            raise WalFormatError(position, f"WAL of Postgres {major} is not known; 14 to 18 are")
        self._scan = wal_scan
        self.segment_bytes = segment_bytes
        state = np.zeros(wal_scan.STATE_SLOTS, np.int64)
        state[wal_scan.LSN] = position
        state[wal_scan.CLEAN] = -1
        state[wal_scan.PREVIOUS] = -1
        state[wal_scan.ERROR_LSN] = -1
        state[wal_scan.SEGMENT] = segment_bytes
        state[wal_scan.TLI] = tli
        state[wal_scan.MAJOR] = major or 0
        state[wal_scan.FIRST_PAGE] = offset == 0
        self.state: Matrix = state
        self._header = np.zeros(wal_scan.PAGE_HEADER_BYTES, np.uint8)
        self._header_words = self._header.view("<u4")
        self._field = np.zeros(wal_scan.FIELD_BYTES, np.uint8)
        self._record_refs = np.zeros((wal_scan.RECORD_REFS, wal_scan.REF_COLUMNS), np.int64)
        self._main = np.zeros(wal_scan.CAPTURE_BYTES, np.uint8)
        self.refs = np.zeros((_REFS, wal_scan.REF_COLUMNS), np.int64)
        self.commits = np.zeros((_COMMITS, wal_scan.COMMIT_COLUMNS), np.int64)
        self.events = np.zeros((_EVENTS, wal_scan.EVENT_COLUMNS), np.int64)
        self.event_bytes = np.zeros(_EVENT_BYTES, np.uint8)

    def run(self, data: npt.NDArray[np.uint8], begin: int) -> int:
        """Read ``data[begin:]`` and return how far; less than its length when the outputs want draining.

        Raises WalFormatError, and again for every later call: a broken stream has no continuation.
        """
        scan = self._scan
        if self.state[scan.ERROR] == 0:
            stop, status = scan.scan(
                data,
                begin,
                self.state,
                self._header,
                self._header_words,
                self._field,
                self._record_refs,
                self._main,
                self.refs,
                self.commits,
                self.events,
                self.event_bytes,
            )
            if status != scan.FAILED:
                return int(stop)
        raise self._error()

    @property
    def full(self) -> bool:
        """Whether the machine holds a complete record for which the outputs have no room."""
        return bool(self.state[self._scan.STAGE] == self._scan.FINISH)

    @property
    def position(self) -> int:
        """LSN of the next byte expected."""
        return int(self.state[self._scan.LSN])

    @property
    def pending(self) -> int:
        """Where reading could begin again without losing anything but what is already reported."""
        scan, state = self._scan, self.state
        stage = int(state[scan.STAGE])
        if state[scan.CLEAN] >= 0:
            return int(state[scan.CLEAN])
        if stage != scan.LENGTH:
            return int(state[scan.RECORD])
        lsn = int(state[scan.LSN] - state[scan.HAVE])
        offset = lsn % PAGE_BYTES
        inside_header = offset < page_header_bytes(lsn - offset, self.segment_bytes)
        return lsn - offset if inside_header else lsn

    @property
    def at_zeros(self) -> bool:
        """Whether the bytes read last are zeros after the end of WAL (a file's tail, never a stream's)."""
        scan, state = self._scan, self.state
        return bool(state[scan.CLEAN] >= 0 and state[scan.STAGE] != scan.FOREIGN)

    def take(self, slot: int) -> int:
        """Read a counter of the state and set it to zero."""
        value = int(self.state[slot])
        self.state[slot] = 0
        return value

    def _error(self) -> WalFormatError:
        scan, state = self._scan, self.state
        code = int(state[scan.ERROR])
        lsn = int(state[scan.ERROR_LSN])
        got, wanted = int(state[scan.ERROR_GOT]), int(state[scan.ERROR_WANTED])
        texts: dict[int, str] = {
            scan.BAD_MAGIC: f"page magic {got:04X} is not that of Postgres 14 to 18",
            scan.BAD_MAJOR: f"page of Postgres {got}, expected {wanted}",
            scan.BAD_FLAGS: f"page flags {got:04X} do not fit this place",
            scan.BAD_ADDRESS: f"page says it belongs to {_lsn(got)}",
            scan.BAD_TLI: f"page of tli {got}, expected {wanted} or an ancestor",
            scan.TLI_BACKWARDS: f"page of tli {got} after one of tli {wanted}",
            scan.BAD_SEGMENT_SIZE: f"segment size {got} in the page header, expected {wanted}",
            scan.BAD_PAGE_SIZE: f"WAL page size {got} in the page header, expected {wanted}",
            scan.NO_CONTINUATION: f"expected a page that continues a record with {wanted} bytes",
            scan.BAD_CONTINUATION: f"page continues a record with {got} bytes, expected {wanted}",
            scan.BAD_LENGTH: f"record length {got}, expected {wanted} bytes to 1 GiB",
            scan.BAD_PREVIOUS: f"record follows one at {_lsn(got)}, expected {_lsn(wanted)}",
            scan.BAD_RMID: f"record of the unknown resource manager {got}",
            scan.BAD_BLOCK_ID: f"record with block id {got} after {wanted}",
            scan.BAD_RECORD: f"record whose parts need {got} bytes with {wanted} left",
            scan.NOT_ZERO: f"byte {got:02X} after the end of WAL, expected zeros up to the segment's end",
        }
        return WalFormatError(lsn, texts[code])


def warm_up() -> None:
    """Load the compiled code into this process, or compile it when this host and user never did.

    Takes about 0.3 s, or 5 to 10 s of one core when compiling: for set-up steps, and for processes that fork.
    """
    from timeline.pg import wal_scan

    machine = Machine(1 << 20, ANY_TLI, 0, None)
    machine.run(as_bytes_array(b""), 0)
    slots = np.full(4, -1, np.int32)
    table = np.empty((1, wal_scan.TOUCH_COLUMNS), np.int64)
    wal_scan.tally(machine.refs, 0, 0, table, slots, 0)
    wal_scan.fill_slots(table, 0, slots)


def as_bytes_array(data: Buffer) -> npt.NDArray[np.uint8]:
    """A read-only view: one array type, hence one compiled kernel, whatever holds the bytes."""
    array: Any = np.frombuffer(data, np.uint8)
    if array.flags.writeable:
        array = array.view()
        array.flags.writeable = False
    return array  # type: ignore[no-any-return]


def _lsn(value: int) -> str:
    return "an earlier record" if value < 0 else str(Lsn(value & (1 << 64) - 1))
