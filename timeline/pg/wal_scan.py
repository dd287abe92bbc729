"""The compiled part of reading WAL: a resumable machine that turns stream bytes into records.

The only module that imports numba: import it late. Kernels are compiled once per host and user and then
loaded from numba's cache: ``__pycache__`` beside this file when it can be written, else the user's cache
directory (or ``NUMBA_CACHE_DIR``). Where none can be written they are compiled in every process: slow to
start, same results.

The machine never holds a record: it takes fields as they arrive, counts over the rest, and keeps a few KiB of
state however long the record is.

Sources: src/include/access/xlogrecord.h, xlog_internal.h, xact.h; src/backend/access/transam/xlogreader.c;
src/backend/access/rmgrdesc/xactdesc.c.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np

# Slots of the state vector (int64).
LSN = 0  # of the next byte expected
STAGE = 1
HAVE = 2  # bytes of the current field already gathered
LEFT = 3  # bytes of the current record still to come, padding not counted
UNTIL = 4  # value of LEFT (in a switch: of LSN) that ends the stage
NEXT = 5  # stage after SKIP
RECORD = 6  # start of the current record
XID = 7
INFO = 8
RMID = 9
ANNOUNCED = 10  # bytes of block and main data announced by the headers so far
MAIN = 11  # of which main data
FORK_FLAGS = 12
IMAGE_FLAGS = 13
SPC = 14
DB = 15
REL = 16
NREFS = 17  # block references of the current record
LAST_ID = 18
XACT_TIME = 19
XACT_INFO = 20
XACT_SECTION = 21
XACT_ITEM = 22
CAPTURED = 23
PREVIOUS = 24  # start of the last complete record, -1 when unknown
RECORDS = 25
LAST_START = 26
LAST_END = 27
CLEAN = 28  # where the zeros or the foreign record being skipped begin, -1 outside of them
SEGMENT = 29  # bytes
TLI = 30
MAJOR = 31  # 0 until a page told
PAGE_TLI = 32
SYSTEM_ID = 33
FIRST_PAGE = 34  # 1: the record that the next page continues began before us
OUT_REFS = 35
OUT_COMMITS = 36
OUT_EVENTS = 37
OUT_BYTES = 38
ERROR = 39
ERROR_LSN = 40  # -1: of the current record
ERROR_GOT = 41
ERROR_WANTED = 42
STATE_SLOTS = 43

# Stages that take a field of fixed size.
LENGTH, HEAD, ID, BLOCK, IMAGE, HOLE, REL_BLOCK, BLOCK_NUMBER, MAIN_SHORT, MAIN_LONG, ORIGIN, TOP_XID = range(
    12
)
X_TIME, X_INFO, X_COUNT, X_TWOPHASE = range(12, 16)
# Stages that take a run of bytes, or none at all.
SKIP, CAPTURE, TAIL, FINISH, SWITCH, ZERO, FOREIGN, X_NEXT = range(16, 24)

(
    BAD_MAGIC, BAD_MAJOR, BAD_FLAGS, BAD_ADDRESS, BAD_TLI, TLI_BACKWARDS, BAD_SEGMENT_SIZE, BAD_PAGE_SIZE,
    NO_CONTINUATION, BAD_CONTINUATION, BAD_LENGTH, BAD_PREVIOUS, BAD_RMID, BAD_BLOCK_ID, BAD_RECORD, NOT_ZERO,
) = range(1, 17)  # fmt: skip

DONE, FULL, FAILED = range(3)

# Flag of a reference, beside the fork number in the low 4 bits.
REF_IMAGE = 0x10  # replay restores a full-page image

REF_COLUMNS = 6  # spc, db, rel, block, flags, start of the record
COMMIT_COLUMNS = 5  # start, end, time of Postgres's epoch, xid, kind
EVENT_COLUMNS = 5  # rmid << 8 | info, start, end, offset and length of the captured main data
TOUCH_COLUMNS = 8  # spc, db, rel, references, images, highest main-fork block, first, last
CAPTURE_BYTES = 4096  # the longest main data of interest holds a tablespace path of at most 1024 bytes
PAGE_HEADER_BYTES = 40
FIELD_BYTES = 20
RECORD_REFS = 33
MAX_RECORD_BYTES = 1 << 30

_RM_XLOG = 0
_RM_XACT = 1
_RM_DBASE = 4
_RM_TBLSPC = 5

_inline = numba.njit(nogil=True)


def _kernel(function: Callable[..., Any]) -> Any:
    """Compile on first use; cached on disk where a directory can be written."""
    try:
        compiled = numba.njit(cache=True, nogil=True)(function)
    except RuntimeError:
        # numba found nowhere to write: a service user without a home, a read-only root.
        return numba.njit(nogil=True)(function)

    def call(*args: Any) -> Any:
        try:
            return compiled(*args)
        except OSError:
            # Compiled, but not stored (a full disk), and not yet run: the call itself does no I/O.
            return compiled(*args)

    return call


@_inline
def _u16(b, o):
    return np.int64(b[o]) | np.int64(b[o + 1]) << 8


@_inline
def _u32(b, o):
    return np.int64(b[o]) | np.int64(b[o + 1]) << 8 | np.int64(b[o + 2]) << 16 | np.int64(b[o + 3]) << 24


@_inline
def _i64(b, o):
    return _u32(b, o) | _u32(b, o + 4) << 32


@_inline
def _major_of(magic):
    if magic == 0xD10D:
        return 14
    if magic == 0xD110:
        return 15
    if magic == 0xD113:
        return 16
    if magic == 0xD116:
        return 17
    if magic == 0xD118:
        return 18
    return 0


@_inline
def _ends_transaction(rmid, info):
    op = info & 0x70
    return rmid == _RM_XACT and (op == 0x00 or op == 0x20 or op == 0x30 or op == 0x40)


@_inline
def _is_event(rmid, info):
    """Whether such a record is reported with its main data."""
    op = info & 0xF0
    if rmid == _RM_XLOG:
        return op <= 0x10 or (op >= 0x40 and op <= 0x90) or op == 0xD0
    if rmid == _RM_DBASE:
        return op == 0x00
    return rmid == _RM_TBLSPC and op <= 0x10


@_inline
def _field_bytes(stage):
    if stage in (ID, MAIN_SHORT):
        return 1
    if stage in (HOLE, ORIGIN):
        return 2
    if stage == BLOCK:
        return 3
    if stage == IMAGE:
        return 5
    if stage == X_TIME:
        return 8
    if stage == REL_BLOCK:
        return 16
    if stage == HEAD:
        return 20
    return 4


@_inline
def _check_page(header, page, stage, left, st):
    """Judge a complete page header, given as 32-bit words; the stage to go on with.

    A failure is left in the state.
    """
    magic = np.int64(header[0]) & 0xFFFF
    flags = np.int64(header[0]) >> 16
    tli = np.int64(header[1])
    address = np.int64(header[2]) | np.int64(header[3]) << 32
    rest = np.int64(header[4])
    between = stage == LENGTH
    first = st[FIRST_PAGE] != 0
    st[FIRST_PAGE] = 0
    if between and magic | flags | tli | address | rest == 0:
        if st[CLEAN] < 0:
            st[CLEAN] = page
        return ZERO
    major = _major_of(magic)
    at_segment = page & (st[SEGMENT] - 1) == 0
    continued = flags & 0x01 != 0
    overwritten = flags & 0x08 != 0 and not between
    error = 0
    got = np.int64(0)
    wanted = np.int64(0)
    if major == 0:
        error, got = BAD_MAGIC, magic
    elif st[MAJOR] != 0 and st[MAJOR] != major:
        error, got, wanted = BAD_MAJOR, major, st[MAJOR]
    elif flags > 0x0F or (flags & 0x02 != 0) != at_segment:
        error, got = BAD_FLAGS, flags
    elif address != page:
        error, got, wanted = BAD_ADDRESS, address, page
    elif tli > st[TLI]:
        # Smaller ones are right: the segment in which a tli begins repeats the ancestor's pages.
        error, got, wanted = BAD_TLI, tli, st[TLI]
    elif tli < st[PAGE_TLI]:
        error, got, wanted = TLI_BACKWARDS, tli, st[PAGE_TLI]
    elif at_segment and np.int64(header[8]) != st[SEGMENT]:
        error, got, wanted = BAD_SEGMENT_SIZE, np.int64(header[8]), st[SEGMENT]
    elif at_segment and np.int64(header[9]) != 8192:
        error, got, wanted = BAD_PAGE_SIZE, np.int64(header[9]), np.int64(8192)
    elif between:
        if continued and not (first and rest > 0):
            error, got = BAD_CONTINUATION, rest
    elif not overwritten:
        if not continued:
            error, wanted = NO_CONTINUATION, left
        elif rest != left:
            error, got, wanted = BAD_CONTINUATION, rest, left
    if error != 0:
        st[ERROR] = error
        st[ERROR_LSN] = page
        st[ERROR_GOT] = got
        st[ERROR_WANTED] = wanted
        return stage
    st[MAJOR] = major
    st[PAGE_TLI] = tli
    if at_segment:
        st[SYSTEM_ID] = np.int64(header[6]) | np.int64(header[7]) << 32
    if between and continued:
        st[CLEAN] = page
        return FOREIGN
    if between or overwritten:
        # Overwritten: the server crashed before the rest was flushed, and wrote another record here instead.
        st[CLEAN] = -1
        return LENGTH
    return stage


@_kernel
def scan(data, begin, st, header, header_words, field, record_refs, main, refs, commits, events, event_bytes):
    """Run the machine over ``data[begin:]``: (index where it stopped, DONE | FULL | FAILED).

    FULL: an output has no room for the record just completed; drain the outputs and call again.
    """
    n = data.shape[0]
    i = begin
    span = i  # end of the page payload that begins at i
    lsn = st[LSN]
    stage = st[STAGE]
    have = st[HAVE]
    left = st[LEFT]
    announced = st[ANNOUNCED]
    nrefs = st[NREFS]
    segment_mask = st[SEGMENT] - 1
    status = DONE
    while True:
        if stage >= SKIP:
            # Transitions that need no further byte.
            if stage == TAIL:
                if left == 0 and lsn & 7 == 0:
                    stage = FINISH
                    if st[RMID] == _RM_XLOG and st[INFO] & 0xF0 == 0x40 and lsn & segment_mask != 0:
                        # XLOG_SWITCH owns the rest of its segment, page headers and all.
                        st[UNTIL] = (lsn | segment_mask) + 1
                        stage = SWITCH
                        span = i
            elif stage == SKIP:
                if left == st[UNTIL]:
                    stage = st[NEXT]
                    if stage == CAPTURE:
                        st[UNTIL] = max(left - CAPTURE_BYTES, 0)
                    continue
            elif stage == CAPTURE:
                if left == st[UNTIL]:
                    stage = TAIL
                    continue
            elif stage == SWITCH:
                if lsn == st[UNTIL]:
                    stage = FINISH
            elif stage == ZERO:
                if lsn & segment_mask == 0:
                    stage = LENGTH
            elif stage == FOREIGN:
                if left == 0 and lsn & 7 == 0:
                    st[CLEAN] = -1
                    stage = LENGTH
            elif stage == X_NEXT:
                # The sections of a commit or abort record in their order, up to the two-phase xid.
                section = st[XACT_SECTION]
                st[XACT_SECTION] = section + 1
                xinfo = st[XACT_INFO]
                item = 0
                if section == 0 and xinfo & 0x01 != 0:
                    st[UNTIL] = left - 8
                    st[NEXT] = X_NEXT
                    stage = SKIP
                    if left < 8:
                        st[ERROR] = BAD_RECORD
                        st[ERROR_GOT] = 8
                        st[ERROR_WANTED] = left
                        break
                elif section == 1 and xinfo & 0x02 != 0:
                    item = 4
                elif section == 2 and xinfo & 0x04 != 0:
                    item = 12
                elif section == 3 and xinfo & 0x100 != 0:
                    item = 16 if st[MAJOR] >= 18 else 12
                elif section == 4 and xinfo & 0x08 != 0 and st[INFO] & 0x70 == 0x30:
                    item = 16
                elif section == 5:
                    stage = X_TWOPHASE if xinfo & 0x10 != 0 else TAIL
                if item > 0:
                    st[XACT_ITEM] = item
                    stage = X_COUNT
                continue
            if stage == FINISH:
                rmid = st[RMID]
                start = st[RECORD]
                out = st[OUT_REFS]
                if out + nrefs > refs.shape[0]:
                    status = FULL
                    break
                if _ends_transaction(rmid, st[INFO]):
                    k = st[OUT_COMMITS]
                    if k == commits.shape[0]:
                        status = FULL
                        break
                    op = st[INFO] & 0x70
                    commits[k, 0] = start
                    commits[k, 1] = lsn
                    commits[k, 2] = st[XACT_TIME]
                    commits[k, 3] = st[XID]
                    commits[k, 4] = 0 if op == 0x00 else (1 if op == 0x20 else (2 if op == 0x30 else 3))
                    st[OUT_COMMITS] = k + 1
                elif _is_event(rmid, st[INFO]):
                    k = st[OUT_EVENTS]
                    o = st[OUT_BYTES]
                    length = st[CAPTURED]
                    if k == events.shape[0] or o + length > event_bytes.shape[0]:
                        status = FULL
                        break
                    events[k, 0] = rmid << 8 | (st[INFO] & 0xF0)
                    events[k, 1] = start
                    events[k, 2] = lsn
                    events[k, 3] = o
                    events[k, 4] = length
                    for j in range(length):
                        event_bytes[o + j] = main[j]
                    st[OUT_BYTES] = o + length
                    st[OUT_EVENTS] = k + 1
                for j in range(nrefs):
                    for c in range(REF_COLUMNS):
                        refs[out + j, c] = record_refs[j, c]
                st[OUT_REFS] = out + nrefs
                nrefs = 0
                st[RECORDS] += 1
                st[PREVIOUS] = start
                st[LAST_START] = start
                st[LAST_END] = lsn
                stage = LENGTH
                continue
        if i == span:
            if i == n:
                break
            if stage in (SWITCH, ZERO):
                k = min((lsn | segment_mask) + 1 - lsn, n - i)
                if stage == ZERO:
                    for j in range(i, i + k):
                        if data[j] != 0:
                            st[ERROR] = NOT_ZERO
                            st[ERROR_LSN] = lsn + j - i
                            st[ERROR_GOT] = data[j]
                            break
                    if st[ERROR] != 0:
                        break
                i += k
                lsn += k
                span = i
                continue
            off = lsn & 8191
            size = 40 if (lsn - off) & segment_mask == 0 else 24
            if off < size:
                k = min(size - off, n - i)
                for j in range(k):
                    header[off + j] = data[i + j]
                i += k
                lsn += k
                span = i
                if off + k == size:
                    before = stage
                    stage = _check_page(header_words, lsn - size, stage, left, st)
                    if st[ERROR] != 0:
                        break
                    if stage == FOREIGN and before == LENGTH:
                        left = np.int64(header_words[4])
                    elif stage == LENGTH:
                        have = 0
                        nrefs = 0
                continue
            span = i + min(8192 - off, n - i)
        if stage < SKIP:
            need = _field_bytes(stage)
            if stage > HEAD and need - have > left:
                st[ERROR] = BAD_RECORD
                st[ERROR_GOT] = need - have
                st[ERROR_WANTED] = left
                break
            if have == 0 and span - i >= need:
                src = data
                p = i
                i += need
                lsn += need
                left -= need
            else:
                k = min(need - have, span - i)
                for j in range(k):
                    field[have + j] = data[i + j]
                have += k
                i += k
                lsn += k
                left -= k
                if have < need:
                    continue
                src = field
                p = 0
                have = 0
            if stage == LENGTH:
                total = _u32(src, p)
                st[RECORD] = lsn - 4
                if total == 0:
                    if st[CLEAN] < 0:
                        st[CLEAN] = lsn - 4
                    stage = ZERO
                    span = i
                    continue
                if total < 24 or total > MAX_RECORD_BYTES:
                    st[ERROR] = BAD_LENGTH
                    st[ERROR_GOT] = total
                    st[ERROR_WANTED] = 24
                    break
                left = total - 4
                stage = HEAD
                continue
            if stage == ID:
                ident = np.int64(src[p])
                if ident < RECORD_REFS and ident > st[LAST_ID]:
                    st[LAST_ID] = ident
                    stage = BLOCK
                elif ident == 255:
                    stage = MAIN_SHORT
                elif ident == 254:
                    stage = MAIN_LONG
                elif ident == 253:
                    stage = ORIGIN
                elif ident == 252:
                    stage = TOP_XID
                else:
                    st[ERROR] = BAD_BLOCK_ID
                    st[ERROR_GOT] = ident
                    st[ERROR_WANTED] = st[LAST_ID]
                    break
                continue
            if stage == BLOCK:
                fork_flags = np.int64(src[p])
                st[FORK_FLAGS] = fork_flags
                st[IMAGE_FLAGS] = 0
                announced += _u16(src, p + 1)
                if fork_flags & 0x10 != 0:
                    stage = IMAGE
                else:
                    stage = BLOCK_NUMBER if fork_flags & 0x80 != 0 else REL_BLOCK
                continue
            if stage == IMAGE:
                announced += _u16(src, p)
                bits = np.int64(src[p + 4])
                if st[MAJOR] == 14:
                    packed = bits & 0x02 != 0
                    applied = bits & 0x04 != 0
                elif st[MAJOR] != 0:
                    packed = bits & 0x1C != 0
                    applied = bits & 0x02 != 0
                else:
                    # Begun inside a page and the major not told: 3 and 5 are uncompressed images of 15 and of
                    # 14. The readings clash only for images kept for wal_consistency_checking.
                    packed = bits != 3 and bits != 5
                    applied = True
                st[IMAGE_FLAGS] = REF_IMAGE if applied else 0
                if packed and bits & 0x01 != 0:
                    stage = HOLE
                else:
                    stage = BLOCK_NUMBER if st[FORK_FLAGS] & 0x80 != 0 else REL_BLOCK
                continue
            if stage == HOLE:
                stage = BLOCK_NUMBER if st[FORK_FLAGS] & 0x80 != 0 else REL_BLOCK
                continue
            if stage == X_TIME:
                st[XACT_TIME] = _i64(src, p)
                op = st[INFO] & 0x70
                stage = X_INFO if (op == 0x30 or op == 0x40) and st[INFO] & 0x80 != 0 else TAIL
                continue
            if stage == X_INFO:
                st[XACT_INFO] = _u32(src, p)
                st[XACT_SECTION] = 0
                stage = X_NEXT
                continue
            if stage == X_COUNT:
                st[UNTIL] = left - _u32(src, p) * st[XACT_ITEM]
                st[NEXT] = X_NEXT
                stage = SKIP
                if st[UNTIL] < 0:
                    st[ERROR] = BAD_RECORD
                    st[ERROR_GOT] = left - st[UNTIL]
                    st[ERROR_WANTED] = left
                    break
                continue
            if stage == X_TWOPHASE:
                st[XID] = _u32(src, p)
                stage = TAIL
                continue
            headers_end = False
            if stage == HEAD:
                st[XID] = _u32(src, p)
                previous = _i64(src, p + 4)
                rmid = np.int64(src[p + 13])
                st[INFO] = src[p + 12]
                st[RMID] = rmid
                # The chain of records proves that none was missed, and that this is one.
                if previous >= st[RECORD] or (st[PREVIOUS] >= 0 and previous != st[PREVIOUS]):
                    st[ERROR] = BAD_PREVIOUS
                    st[ERROR_GOT] = previous
                    st[ERROR_WANTED] = st[PREVIOUS]
                    break
                if rmid > 21 and rmid < 128:
                    st[ERROR] = BAD_RMID
                    st[ERROR_GOT] = rmid
                    break
                announced = 0
                st[MAIN] = 0
                st[SPC] = -1
                st[LAST_ID] = -1
                st[CAPTURED] = 0
            elif stage in (REL_BLOCK, BLOCK_NUMBER):
                if stage == REL_BLOCK:
                    st[SPC] = _u32(src, p)
                    st[DB] = _u32(src, p + 4)
                    st[REL] = _u32(src, p + 8)
                    p += 12
                elif st[SPC] < 0:
                    st[ERROR] = BAD_RECORD
                    st[ERROR_WANTED] = left
                    break
                fork_flags = st[FORK_FLAGS]
                record_refs[nrefs, 0] = st[SPC]
                record_refs[nrefs, 1] = st[DB]
                record_refs[nrefs, 2] = st[REL]
                record_refs[nrefs, 3] = _u32(src, p)
                record_refs[nrefs, 4] = (fork_flags & 0x0F) | st[IMAGE_FLAGS]
                record_refs[nrefs, 5] = st[RECORD]
                nrefs += 1
            elif stage in (MAIN_SHORT, MAIN_LONG):
                length = np.int64(src[p]) if stage == MAIN_SHORT else _u32(src, p)
                st[MAIN] = length
                announced += length
                headers_end = True
            if left > announced and not headers_end:
                stage = ID
                continue
            if left != announced:
                st[ERROR] = BAD_RECORD
                st[ERROR_GOT] = announced
                st[ERROR_WANTED] = left
                break
            st[UNTIL] = st[MAIN]
            if _ends_transaction(st[RMID], st[INFO]):
                st[NEXT] = X_TIME
                stage = SKIP
            elif _is_event(st[RMID], st[INFO]):
                st[NEXT] = CAPTURE
                stage = SKIP
            else:
                stage = TAIL
        elif stage == CAPTURE:
            k = min(left - st[UNTIL], span - i)
            o = st[CAPTURED]
            for j in range(k):
                main[o + j] = data[i + j]
            st[CAPTURED] = o + k
            left -= k
            i += k
            lsn += k
        elif left > 0:  # TAIL, FOREIGN, SKIP
            k = min(left - (st[UNTIL] if stage == SKIP else 0), span - i)
            left -= k
            i += k
            lsn += k
        else:  # padding after TAIL and FOREIGN
            k = min((-lsn) & 7, span - i)
            i += k
            lsn += k
    if st[ERROR] != 0:
        status = FAILED
        if st[ERROR_LSN] < 0:
            st[ERROR_LSN] = st[RECORD]
    st[LSN] = lsn
    st[STAGE] = stage
    st[HAVE] = have
    st[LEFT] = left
    st[ANNOUNCED] = announced
    st[NREFS] = nrefs
    return i, status


@_kernel
def tally(refs, begin, end, table, slots, used):
    """Add references to the relations' table (TOUCH_COLUMNS): (index where it stopped, rows used).

    It stops early when the table has no row left. ``slots``: open-addressing hash of row numbers, -1 for
    empty; a power of two, at least twice the table's rows."""
    mask = slots.shape[0] - 1
    last = -1
    for i in range(begin, end):
        spc = refs[i, 0]
        db = refs[i, 1]
        rel = refs[i, 2]
        if last < 0 or table[last, 2] != rel or table[last, 1] != db or table[last, 0] != spc:
            h = rel * 0x9E3779B1 + db * 0x85EBCA77 + spc * 0xC2B2AE3D
            s = (h ^ (h >> 29)) & mask
            while slots[s] >= 0:
                last = slots[s]
                if table[last, 2] == rel and table[last, 1] == db and table[last, 0] == spc:
                    break
                s = (s + 1) & mask
            if slots[s] < 0:
                if used == table.shape[0]:
                    return i, used
                last = used
                slots[s] = used
                used += 1
                table[last, 0] = spc
                table[last, 1] = db
                table[last, 2] = rel
                table[last, 3] = 0
                table[last, 4] = 0
                table[last, 5] = 0
                table[last, 6] = refs[i, 5]
        table[last, 3] += 1
        if refs[i, 4] & REF_IMAGE != 0:
            table[last, 4] += 1
        if refs[i, 4] & 0x0F == 0:
            table[last, 5] = max(table[last, 5], refs[i, 3])
        table[last, 7] = refs[i, 5]
    return end, used


@_kernel
def fill_slots(table, used, slots):
    """Hash the rows of a grown table again, as ``tally`` does."""
    mask = slots.shape[0] - 1
    for t in range(used):
        h = table[t, 2] * 0x9E3779B1 + table[t, 1] * 0x85EBCA77 + table[t, 0] * 0xC2B2AE3D
        s = (h ^ (h >> 29)) & mask
        while slots[s] >= 0:
            s = (s + 1) & mask
        slots[s] = t
