"""Synthetic redo points: replay that begins where the source made no checkpoint.

An *image* is a data directory that stock Postgres recovered to a record boundary S, promoted and shut down
cleanly: everything the records before S did is in its files. Replay of the source's WAL may go on at S, if
Postgres can be made to begin there, and it begins at checkpoints only. So one is forged, in WAL that only
this branch reads: a shutdown checkpoint at L = S - 120 that is its own redo point, in place of bytes that are
never read again; the record at S is linked to it; and pg_control names it. Postgres reads the checkpoint at
L, does not replay it, and goes on with the record at S as if nothing had ever been otherwise.

What Postgres insists on, and what follows for S (src/backend/access/transam/xlogrecovery.c, xlogreader.c):

- The checkpoint ends where the record at S starts, so L is 120 bytes before: 114 bytes and their alignment.
  It shares S's page, and the record at S stays within its segment, so that one file holds all that changes
  (EDGE 53). That record may go on over page ends: its checksum covers no page header.
- A record that starts right behind a page header is refused where the page continues an earlier record,
  and most pages do; so L is never there.
- The tli of the checkpoint must be that of L and of the byte before S in the history of the target, so L is
  not before the tli's start. Its page may carry an ancestor's tli: a new tli goes on with its parent's page.
- Read at random, the checkpoint may follow any earlier record. It follows none (0): nothing before it counts.

And what a branch must not undo:

- ``hot_standby=off`` throughout: the forged checkpoint is a shutdown's, from which a hot standby concludes
  that no transaction is in progress, while some may be.
- State "shut down in recovery" and a minimum recovery point make Postgres enter archive recovery and
  call the cluster consistent at once, which it is; any reference to a page that is not there is an error.
- Prepared transactions are in the image's ``pg_twophase``, and replication origins in its ``pg_logical``,
  where the image's shutdown put them; the image has as many as the source only if its builder's limits
  were not below the source's.
- Postgres compares pg_control's settings with the records that change them (commit timestamps above all):
  they must be the source's as of S, not the builder's.
- ``wal_log_hints`` is among them: replay stamps some pages with an LSN only where it, or checksums, are on.
- With either on, replay changes free space maps without marking their pages dirty (MarkBufferDirtyHint does
  nothing in recovery). Such a change is stored only when something else dirties the page before it leaves
  memory, so an image may lack some that recovery without a stop would have stored. It is advice that
  Postgres corrects as it goes; every other page is the same.
- Replay that was interrupted is begun anew with a fresh image, never resumed (EDGE 57): pages that the source
  had changed since its own last checkpoint come without the full-page image that would mend a torn write.
- The segment file to patch is the one Postgres will read: of the youngest tli of the target's line that has
  the segment, which begins with a copy of its parent's bytes (EDGE 17).

Sources: src/include/access/xlogrecord.h, xlog_internal.h, src/include/catalog/pg_control.h.
"""

from __future__ import annotations

import dataclasses
import struct

from timeline.lsn import Lsn
from timeline.pg.control import (
    CHECKPOINT_BYTES,
    CONTROL_FILE,
    ClusterState,
    Parameters,
    format_checkpoint,
    parse_control,
    rewrite_control,
)
from timeline.pg.errors import FormatError, WalFormatError
from timeline.pg.segment import segment_start
from timeline.pg.wal_machine import (
    MAGIC_OF_MAJOR,
    PAGE_BYTES,
    RECORD_HEADER_BYTES,
    Buffer,
    page_header_bytes,
)
from timeline.pg.wal_patch import (
    RM_XLOG,
    Patch,
    format_record,
    page_header,
    read_record,
    record_end,
    record_patches,
    relink_record,
)

FORGED_BYTES = 120
"""Distance from the forged checkpoint to the redo point."""

_CHECKPOINT_SHUTDOWN = 0x00
_MAIN_DATA_SHORT = 255
_PAGE_HEADER = struct.Struct("<HHIQI")
_LONG_HEADER = struct.Struct("<QII")
_IS_CONTINUATION = 0x0001
_NO_RECORD = Lsn(0)


def checkpoint_place(lsn: Lsn) -> Lsn:
    """Where the forged checkpoint for a redo point at ``lsn`` starts."""
    return Lsn(lsn - FORGED_BYTES)


def first_page(lsn: Lsn) -> Lsn:
    """The first page of WAL that replay from a redo point at ``lsn`` reads, besides its segment's header."""
    return Lsn(checkpoint_place(lsn) // PAGE_BYTES * PAGE_BYTES)


def segment_header(wal: Buffer, start: Lsn, control: bytes) -> Patch:
    """The header that the segment of ``start`` must have for Postgres to read ``wal``, which begins at a page of
    it.

    ``control``: of that cluster. Raises FormatError.
    """
    known = parse_control(control)
    _, _, tli, _, _ = _PAGE_HEADER.unpack_from(wal, 0)
    begin = segment_start(start, known.segment_bytes)
    return Patch(begin, page_header(begin, 0, tli, known.major, known.system_identifier, known.segment_bytes))


def is_candidate(lsn: Lsn, record_bytes: int, *, tli_start: Lsn, segment_bytes: int) -> bool:
    """Whether replay might begin with the record at ``lsn``, as far as can be told without its bytes.

    ``record_bytes``: its total length; ``tli_start``: first LSN of the tli that wrote it, 0 for the oldest.
    ``check_redo_point`` decides the rest.
    """
    return _obstacle(lsn, record_bytes, tli_start, segment_bytes) is None


def check_redo_point(
    wal: Buffer, start: Lsn, lsn: Lsn, *, tli: int, tli_start: Lsn, segment_bytes: int, major: int
) -> None:
    """Raise WalFormatError unless replay can begin with the record at ``lsn``.

    ``wal``: the WAL of ``tli`` from ``start`` on, page headers included, with the page of ``lsn`` and the
    whole record. What passes is also a candidate; of pg_control nothing is asked.
    """
    _checked_record(wal, start, lsn, tli, tli_start, segment_bytes, major)


def find_redo_point(
    wal: Buffer, start: Lsn, latest: Lsn, *, tli: int, tli_start: Lsn, segment_bytes: int, major: int
) -> Lsn | None:
    """The last place at or before ``latest`` that ``check_redo_point`` accepts, ``None`` without one.

    Looks back page by page and only at what ``wal`` holds, usually at one or two pages.
    """
    page = latest - latest % PAGE_BYTES
    while page >= start:
        for lsn in reversed(_records_of_page(wal, start, Lsn(page), segment_bytes)):
            try:
                if lsn <= latest:
                    _checked_record(wal, start, lsn, tli, tli_start, segment_bytes, major)
                    return lsn
            except WalFormatError:
                continue
        page -= PAGE_BYTES
    return None


def redo_point_control(
    image: bytes, lsn: Lsn, *, tli: int, parameters: Parameters, full_page_writes: bool
) -> bytes:
    """The pg_control with which replay begins at ``lsn`` of ``tli``; the branch sees nothing of the image's.

    ``image``: pg_control of the image, whose counters the checkpoint takes over. ``parameters`` and
    ``full_page_writes``: the source's as of ``lsn``; limits may be higher. Raises FormatError for a
    pg_control that is not known, and for one that no promoted and cleanly stopped server left.
    """
    control = parse_control(image)
    point = control.checkpoint
    if control.state is not ClusterState.SHUT_DOWN:
        raise FormatError(
            CONTROL_FILE,
            0,
            f"the server that left this image was not shut down cleanly ({control.state.name})",
            hint="there is no snapshot of it; build it again",
        )
    for holds, expectation in (
        (control.tli > tli, f"a tli above {tli}, found {control.tli}: not promoted"),
        (control.redo == control.checkpoint_lsn, "a checkpoint that is its own redo point"),
        (control.checkpoint_lsn > lsn, f"a checkpoint after {lsn}, found {control.checkpoint_lsn}"),
        (point.oldest_active_xid == 0, "no transaction in progress"),
        (not control.backup_end_required, "no backup under way"),
    ):
        if not holds:
            raise FormatError(CONTROL_FILE, 0, f"expected of an image: {expectation}")
    place = checkpoint_place(lsn)
    forged = dataclasses.replace(
        control,
        state=ClusterState.SHUT_DOWN_IN_RECOVERY,
        checkpoint_lsn=place,
        checkpoint=dataclasses.replace(
            point,
            redo=place,
            tli=tli,
            prev_tli=tli,
            full_page_writes=full_page_writes,
            wal_level=None if point.wal_level is None else parameters.wal_level,
        ),
        min_recovery_point=lsn,
        min_recovery_point_tli=tli,
        backup_start_point=Lsn(0),
        backup_end_point=Lsn(0),
        backup_end_required=False,
        wal_level=parameters.wal_level,
        wal_log_hints=parameters.wal_log_hints,
        track_commit_timestamp=parameters.track_commit_timestamp,
        max_connections=parameters.max_connections,
        max_worker_processes=parameters.max_worker_processes,
        max_wal_senders=parameters.max_wal_senders,
        max_prepared_transactions=parameters.max_prepared_transactions,
        max_locks_per_transaction=parameters.max_locks_per_transaction,
    )
    return rewrite_control(image, forged)


def redo_point_patches(
    wal: Buffer, start: Lsn, control: bytes, *, tli_start: Lsn, follows: bool = True
) -> tuple[Patch, ...]:
    """What makes private WAL fit a pg_control of ``redo_point_control``: the checkpoint, and the link to it.

    ``wal`` as for ``check_redo_point``; patches for WAL that has them already are the same again. Other
    patches that touch the record at S (``tablespace_patches``) are applied before this is called, or made
    after these are applied. Without ``follows`` the WAL ends at S: nothing is linked.
    Raises FormatError when ``control`` is not from there, WalFormatError when the WAL
    does not allow it.
    """
    forged = parse_control(control)
    lsn, tli = forged.min_recovery_point, forged.checkpoint.tli
    if (
        forged.state is not ClusterState.SHUT_DOWN_IN_RECOVERY
        or not forged.checkpoint_lsn == forged.redo == checkpoint_place(lsn)
        or tli != forged.min_recovery_point_tli
    ):
        raise FormatError(CONTROL_FILE, 0, "expected one made for a synthetic redo point")
    if follows:
        record = _checked_record(wal, start, lsn, tli, tli_start, forged.segment_bytes, forged.major)
    else:
        _check_page(wal, start, Lsn(lsn - lsn % PAGE_BYTES), tli, forged.major)
    _check_cluster(wal, start, lsn, forged.segment_bytes, forged.system_identifier)
    body = bytes((_MAIN_DATA_SHORT, CHECKPOINT_BYTES)) + format_checkpoint(forged.checkpoint)
    checkpoint = format_record(RM_XLOG, _CHECKPOINT_SHUTDOWN, previous=_NO_RECORD, parts=body)
    planted = Patch(forged.checkpoint_lsn, checkpoint.ljust(FORGED_BYTES, b"\0"))
    if not follows:
        return (planted,)
    linked = relink_record(record, forged.checkpoint_lsn)
    return (
        planted,
        *record_patches(lsn, linked[:RECORD_HEADER_BYTES], forged.segment_bytes),
    )


def _obstacle(lsn: Lsn, record_bytes: int, tli_start: Lsn, segment_bytes: int) -> str | None:
    """Why no redo point can be there, from the place and the length of its record."""
    page = lsn - lsn % PAGE_BYTES
    boundary = segment_start(lsn, segment_bytes) + segment_bytes
    place = lsn - FORGED_BYTES
    if lsn % 8 or record_bytes < RECORD_HEADER_BYTES:
        return "expected the start of a record"
    if place <= page + page_header_bytes(page, segment_bytes):
        return "too near to the start of its page for a checkpoint before it"
    if place < tli_start:
        return f"too near to {tli_start}, where its tli starts, for a checkpoint before it"
    if lsn + record_bytes > boundary or record_end(lsn, record_bytes, segment_bytes) > boundary:
        return "the record goes on in the next segment"
    return None


def _checked_record(
    wal: Buffer, start: Lsn, lsn: Lsn, tli: int, tli_start: Lsn, segment_bytes: int, major: int
) -> bytes:
    """The record at ``lsn``, where a redo point can be."""
    # The place first: a record found behind a page header would be taken for one at the page's start.
    obstacle = _obstacle(lsn, RECORD_HEADER_BYTES, tli_start, segment_bytes)
    if obstacle is None:
        _check_page(wal, start, Lsn(lsn - lsn % PAGE_BYTES), tli, major)
        record = read_record(wal, start, lsn, segment_bytes)
        obstacle = _obstacle(lsn, len(record), tli_start, segment_bytes)
    if obstacle is not None:
        raise WalFormatError(lsn, f"no redo point: {obstacle}")
    return record


def _check_page(wal: Buffer, start: Lsn, page: Lsn, tli: int, major: int) -> None:
    offset = page - start
    if offset < 0 or len(wal) < offset + _PAGE_HEADER.size:
        raise WalFormatError(page, "page is not in the WAL at hand")
    magic, _, page_tli, address, _ = _PAGE_HEADER.unpack_from(wal, offset)
    if magic != MAGIC_OF_MAJOR.get(major) or address != page:
        raise WalFormatError(page, f"expected the header of this page, written by Postgres {major}")
    if not 0 < page_tli <= tli:
        raise WalFormatError(page, f"page of tli {page_tli}, expected {tli} or an ancestor")


def _check_cluster(wal: Buffer, start: Lsn, lsn: Lsn, segment_bytes: int, system_identifier: int) -> None:
    """The segment's own header, where it is at hand: Postgres looks at it before it reads anything else."""
    begin = segment_start(lsn, segment_bytes)
    if begin < start:
        return
    found = _LONG_HEADER.unpack_from(wal, begin - start + 24)
    if found != (system_identifier, segment_bytes, PAGE_BYTES):
        raise WalFormatError(begin, f"segment of another cluster, expected system {system_identifier}")


def _records_of_page(wal: Buffer, start: Lsn, page: Lsn, segment_bytes: int) -> list[Lsn]:
    """Where records start on a page, judged by their lengths alone."""
    offset = page - start
    if len(wal) < offset + _PAGE_HEADER.size:
        return []
    _, flags, _, _, rest = _PAGE_HEADER.unpack_from(wal, offset)
    lsn = page + page_header_bytes(page, segment_bytes) + (rest + 7 & ~7 if flags & _IS_CONTINUATION else 0)
    found: list[Lsn] = []
    while lsn < page + PAGE_BYTES and lsn + 4 <= start + len(wal):
        length = int.from_bytes(wal[lsn - start : lsn - start + 4], "little")
        if length < RECORD_HEADER_BYTES:
            break
        found.append(Lsn(lsn))
        lsn += length + 7 & ~7
    return found
