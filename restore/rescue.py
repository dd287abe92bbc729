"""Read a store without us: a base directory and WAL segments that stock Postgres recovers (P12).

python rescue.py STORE_DIRECTORY NEW_DIRECTORY [--branch ID] [--snapshot ID] [--tli N]

One file, long for that reason alone, that needs the standard library, pyarrow and zstandard and imports
nothing of this project; written from timeline/format/SPEC.md, whose clauses it cites. For a store in S3 copy
it first: ``aws s3 sync s3://bucket/prefix DIR``.

What it verifies: the SHA-256 of JSON objects, the CRC of headers and Parquet pages, and the checksum and
length of every zstd frame; and BLAKE3 digests as well where the module ``blake3`` happens to be installed.

WAL is written as far as it goes without a hole. To stop earlier set ``recovery_target_time`` (or ``_lsn``,
``_xid``) in the postgresql.conf it writes, before Postgres is started for the first time.

Exit codes: 0 done; 1 failed; 2 usage; 4 damaged (when only WAL is, the directory is complete up to there, and
says so).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import mmap
import re
import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow.parquet as pq
import zstandard

try:
    from blake3 import blake3 as _blake3
except ImportError:
    _blake3 = None  # type: ignore[assignment,misc]
blake3: Any = _blake3

Json = Any
WalAndCreates = tuple[bytes, list[tuple[int, int]]]

GROUP_BYTES = 131_072
BLOCK_BYTES = 8_192
PAGE_BYTES = 8_192
LAST_LOG_NUMBER = 10**20 - 1
STATE_EVERY = 100

MINIMUM_DIRECTORIES = ("pg_wal", "pg_wal/archive_status", "pg_tblspc")
RAISED_SETTINGS = (
    "max_connections",
    "max_locks_per_transaction",
    "max_prepared_transactions",
    "max_wal_senders",
    "max_worker_processes",
)
CARRIED_SETTINGS = (
    "max_replication_slots",
    "max_active_replication_origins",
    "track_commit_timestamp",
    "wal_log_hints",
)


class RescueError(Exception):
    """It cannot be done; the text says why."""

    exit_code = 1


class Damaged(RescueError):
    """The store is not what was written."""

    exit_code = 4


def say(text: str) -> None:
    """A line on what is being done."""
    print(text, file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------------------
# Objects and their checks (SPEC.md, chapters 1 to 4)


class StoreDirectory:
    """A store as files named by its keys; reading only."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._pack: tuple[str, mmap.mmap] | None = None

    def read(self, key: str) -> bytes:
        """A whole object."""
        try:
            return (self.root / key).read_bytes()
        except FileNotFoundError:
            raise Damaged(f"{key}: object is missing") from None

    def names(self, prefix: str) -> list[str]:
        """Names of the objects directly under a prefix, ascending."""
        try:
            return sorted(
                path.name for path in (self.root / prefix).iterdir() if not path.name.startswith(".")
            )
        except FileNotFoundError:
            return []

    def pack_range(self, pack: str, offset: int, length: int) -> bytes:
        """Some bytes of a pack; the last pack asked for stays mapped."""
        if self._pack is None or self._pack[0] != pack:
            key = f"packs/{pack[:2]}/{pack}"
            try:
                with (self.root / key).open("rb") as file:
                    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (FileNotFoundError, ValueError):
                raise Damaged(f"{key}: object is missing or empty") from None
            _header(mapped[:4096], b"TLPACK\x00\x01", key)
            self._pack = (pack, mapped)
        found = self._pack[1][offset : offset + length]
        if len(found) != length:
            raise Damaged(f"pack {pack}: expected {length} bytes at {offset}")
        return found

    def manifest(self, ref: Json, kind: str) -> Any:
        """A manifest as an open Parquet file [MAN-1] to [MAN-5]."""
        key = f"manifests/{ref['digest']}.parquet"
        path = self.root / key
        if not path.exists() or path.stat().st_size != ref["size"]:
            raise Damaged(f"{key}: expected an object of {ref['size']} bytes")
        if blake3 is not None:
            check_digest(path.read_bytes(), ref["digest"], key)
        try:
            file = pq.ParquetFile(path, page_checksum_verification=True)
        except (OSError, ValueError) as error:
            raise Damaged(f"{key}: {error}") from error
        values = file.metadata.metadata or {}
        if values.get(b"tl.kind") != kind.encode() or file.metadata.num_rows != ref["rows"]:
            raise Damaged(f"{key}: expected a manifest of {kind} with {ref['rows']} rows")
        envelope = json.loads(values[b"tl.envelope"])
        _check_features(key, envelope["requires"])
        _check_envelope(key, envelope)
        return file


def check_digest(data: bytes, expected: str, what: str) -> None:
    """BLAKE3, where we have it [DIG-1]; zstd and Parquet checksums stand in for it elsewhere."""
    if blake3 is not None and blake3(data).hexdigest() != expected:
        raise Damaged(f"{what}: expected BLAKE3 {expected}")


def unseal(data: bytes, key: str) -> Json:
    """The members of a sealed JSON object [JSN-1], [JSN-2]."""
    match = re.search(rb',"sha256":"([0-9a-f]{64})"\}\n\Z', data)
    if match is None or hashlib.sha256(data[: match.start()]).hexdigest().encode() != match[1]:
        raise Damaged(f"{key}: expected a JSON object with its own SHA-256")
    return json.loads(data[: match.start()] + b"}")


def unpack(stored: bytes, raw_bytes: int, what: str) -> bytes:
    """One zstd frame [ZST-1]."""
    try:
        parameters = zstandard.get_frame_parameters(stored)
        if parameters.content_size != raw_bytes or not parameters.has_checksum:
            raise Damaged(f"{what}: expected a zstd frame of {raw_bytes} bytes with a checksum")
        return zstandard.ZstdDecompressor().decompress(
            stored, max_output_size=raw_bytes, allow_extra_data=False
        )
    except zstandard.ZstdError as error:
        raise Damaged(f"{what}: expected an intact zstd frame of {raw_bytes} bytes") from error


def _header(data: bytes, magic: bytes, key: str) -> tuple[Json, int]:
    """The JSON header of a chunk or pack, and where it ends."""
    if data[:8] != magic:
        raise Damaged(f"{key}: expected the magic {magic!r}")
    length, crc = struct.unpack_from("<II", data, 8)
    text = data[16 : 16 + length]
    if len(text) != length or zlib.crc32(text) != crc:
        raise Damaged(f"{key}: expected a header of {length} bytes with CRC-32 {crc:08x}")
    header = json.loads(text)
    _check_envelope(key, header)
    return header, 16 + length


def _check_envelope(key: str, envelope: Json) -> None:
    if envelope["digest_kind"] != "blake3" or envelope.get("cipher") or envelope.get("key_id"):
        raise RescueError(
            f"{key}: made with a digest, key or cipher that this reader does not know: {envelope}"
        )


def _check_features(key: str, features: list[str]) -> None:
    unknown = [feature for feature in features if feature != "collection"]  # binds writers only [COL-9]
    if unknown:
        raise RescueError(f"{key}: needs features that this reader does not know: {', '.join(unknown)}")


# ---------------------------------------------------------------------------------------------------------------------
# The branch log (SPEC.md, chapter 6)


def read_state(store: StoreDirectory, branch: str) -> Json:
    """The state of a branch as its log says [LOG-4]."""
    prefix = f"branches/{branch}/log"
    names = [name for name in store.names(prefix) if re.fullmatch(r"[0-9]{20}\.json", name)]
    if not names:
        branches = ", ".join(store.names("branches")) or "none"
        raise RescueError(f"no log of a branch {branch!r} here; branches: {branches}")
    number = LAST_LOG_NUMBER - int(names[0][:20])
    changes = []
    while True:
        key = f"{prefix}/{LAST_LOG_NUMBER - number:020d}.json"
        entry = unseal(store.read(key), key)
        if entry["format"] != 1:
            raise RescueError(f"{key}: log format {entry['format']} is not known to this reader")
        _check_features(key, entry["requires"])
        if entry["number"] != number or entry["branch"] != branch:
            raise Damaged(f"{key}: expected entry {number} of {branch}")
        if entry.get("state") is not None:
            break
        if number % STATE_EVERY == 0:
            raise Damaged(f"{key}: expected a state")
        changes.append(entry["change"])
        number -= 1
    state = entry["state"]
    for change in reversed(changes):
        apply_change(state, change)
    return state


def apply_change(state: Json, change: Json) -> None:
    """What a change does to the state (the table in chapter 6); the writer has checked that it fits."""
    kind = change["kind"]
    tlis = {tli["tli"]: tli for tli in state["tlis"]}
    if kind == "begin":
        if state["incarnations"] and state["incarnations"][-1]["to_lsn"] is None:
            state["incarnations"][-1]["to_lsn"] = change["incarnation"]["from_lsn"]
        state["incarnations"].append(change["incarnation"])
        state["tlis"].append(change["tli"])
        state["current_tli"] = change["tli"]["tli"]
    elif kind == "claim_epoch":
        state["epoch"] = change["epoch"]
    elif kind == "switch_tli":
        if tlis[change["closed"]]["end"] is None:
            tlis[change["closed"]]["end"] = change["end"]
        state["tlis"].append(change["opened"])
        state["current_tli"] = change["opened"]["tli"]
    elif kind == "seal":
        sealed = change["sealed"]
        tlis[sealed["tli"]]["sealed"] = sealed["end"]
        state["sealed"].append(sealed)
    elif kind == "add_snapshot":
        state["snapshots"].append(change["snapshot"])
        if change["snapshot"]["kind"] == "base":
            state["progress"] = None
    elif kind == "drop_snapshots":
        state["snapshots"] = [one for one in state["snapshots"] if one["id"] not in change["ids"]]
    elif kind == "forget_wal":
        state["sealed"] = [
            one
            for one in state["sealed"]
            if not any(
                one["tli"] == gone["tli"]
                and gone.get("start", 0) <= one["start"]
                and one["end"] <= gone["below"]
                for gone in change["ranges"]
            )
        ]
    elif kind == "merge_sealed":
        merged = change["merged"]
        state["sealed"] = [
            one
            for one in state["sealed"]
            if one["tli"] != merged["tli"] or one["start"] < merged["start"] or one["end"] > merged["end"]
        ]
        state["sealed"].append(merged)
    elif kind == "record_gap":
        state["gaps"].append(change["gap"])
    elif kind not in ("record_progress", "cover", "mark", "collect"):
        raise RescueError(f"change {kind!r} in the branch log is not known to this reader")


def lineage(state: Json, tli: int) -> list[tuple[int, int, int | None]]:
    """(tli, from, to) of the line that ends in ``tli``, oldest first; ``to`` is where the child starts
    [LOG-6]."""
    tlis = {known["tli"]: known for known in state["tlis"]}
    line: list[tuple[int, int, int | None]] = []
    number: int | None = tli
    end: int | None = None
    while number is not None:
        if number not in tlis or any(number == seen for seen, _, _ in line):
            raise RescueError(f"the branch has no tli {number}; it has {sorted(tlis)}")
        line.append((number, tlis[number]["start"], end))
        end = tlis[number]["start"]
        number = tlis[number]["parent"]
    return line[::-1]


def choose_snapshot(state: Json, line: list[tuple[int, int, int | None]], wanted: str | None) -> Json:
    """The snapshot asked for, or the newest base backup on the line [REC-1]."""
    ends = {tli: end for tli, _, end in line}
    usable = [
        snapshot
        for snapshot in state["snapshots"]
        if snapshot["kind"] == "base"
        and snapshot["tli"] in ends
        and ((end := ends[snapshot["tli"]]) is None or snapshot["end"] <= end)
        and (wanted is None or snapshot["id"] == wanted)
    ]
    if not usable:
        known = ", ".join(f"{s['id']} ({s['kind']}, tli {s['tli']})" for s in state["snapshots"]) or "none"
        raise RescueError(f"no usable base backup on the line of tli {line[-1][0]}; snapshots: {known}")
    return usable[-1]


# ---------------------------------------------------------------------------------------------------------------------
# Files (SPEC.md, chapter 5)


class BaseDirectory:
    """Writes the files of a snapshot [REC-2]."""

    def __init__(self, store: StoreDirectory, snapshot: Json, target: Path) -> None:
        self._store = store
        self._snapshot = snapshot
        self._target = target
        self._born: dict[str, int] = {}
        """Files made of extents, with the LSN from which on they are these files."""
        self._sizes: dict[str, int] = {}
        self.bytes = 0

    def write(self) -> Callable[[], None]:
        """Write everything but pg_control; the result writes that, and is to be called last."""
        control: list[tuple[Path, bytes, int]] = []
        for row in self._listing():
            path = self._path(row["directory"], row["name"])
            if row["kind"] == "f" and row["content"] is not None:
                if row["directory"] == "global" and row["name"] == "pg_control":
                    control.append((path, row["content"], row["mode"]))
                else:
                    self._create(path, row["content"], row["mode"])
        self._write_extents()
        if not control:
            raise Damaged("the file listing has no global/pg_control")

        def finish() -> None:
            for path, content, mode in control:
                self._create(path, content, mode)

        return finish

    def _listing(self) -> Iterator[Json]:
        """The rows; directories are made on the way, and what needs extents is remembered."""
        file = self._store.manifest(self._snapshot["files"], "files")
        for name in MINIMUM_DIRECTORIES:
            (self._target / name).mkdir(mode=0o700, parents=True, exist_ok=True)
        for number in range(file.num_row_groups):
            for row in _rows(file, number):
                path = f"{row['directory']}/{row['name']}".lstrip("/")
                in_tablespaces = row["directory"] == "pg_tblspc" or row["directory"].startswith("pg_tblspc/")
                if row["kind"] == "d" or (row["kind"] == "l" and in_tablespaces):
                    # Never a symlink: its target is a directory of the source [FIL-4].
                    self._path(row["directory"], row["name"]).mkdir(mode=0o700, parents=True, exist_ok=True)
                elif row["kind"] == "l":
                    say(f"left out: symlink {path} to {row['target']}")
                else:
                    self._path(row["directory"], row["name"]).parent.mkdir(
                        mode=0o700, parents=True, exist_ok=True
                    )
                    self.bytes += row["size"]
                    if row["content"] is None:
                        self._born[path] = row["born"]
                        self._sizes[path] = row["size"]
                        self._create(self._target / path, b"", row["mode"])
                    yield row

    def _write_extents(self) -> None:
        """Manifest after manifest, so that later ones override earlier ones block by block [PAG-4]."""
        current: tuple[str, BinaryIO] | None = None
        try:
            for ref in self._snapshot["pages"]:
                file = self._store.manifest(ref, "pages")
                for number in range(file.num_row_groups):
                    for row in _rows(file, number):
                        path = row["path"]
                        if path not in self._sizes:
                            continue
                        if ref.get("lsn") is not None and ref["lsn"] < self._born[path]:
                            continue
                        if current is None or current[0] != path:
                            if current is not None:
                                current[1].close()
                            current = (path, (self._target / path).open("r+b"))
                        self._write_extent(current[1], row, self._sizes[path])
        finally:
            if current is not None:
                current[1].close()
        for path, size in self._sizes.items():
            with (self._target / path).open("r+b") as opened:
                opened.truncate(size)

    def _write_extent(self, file: BinaryIO, row: Json, size: int) -> None:
        stored = self._store.pack_range(row["pack"], row["offset"], row["stored_bytes"])
        what = f"{row['path']}, group {row['group']}, in pack {row['pack']} at {row['offset']}"
        raw = unpack(stored, row["raw_bytes"], what)
        check_digest(raw, row["digest"].hex(), what)
        at = row["group"] * GROUP_BYTES + row["first_block"] * BLOCK_BYTES
        file.seek(at)
        file.write(raw[: max(0, size - at)])

    def _path(self, directory: str, name: str) -> Path:
        parts = [*directory.split("/"), name] if directory else [name]
        if any(part in ("", ".", "..") for part in parts):
            raise Damaged(f"the file listing names {directory}/{name}")
        return self._target.joinpath(*parts)

    def _create(self, path: Path, content: bytes, mode: int) -> None:
        with path.open("xb") as file:
            file.write(content)
        path.chmod(mode | 0o600)


def _rows(file: Any, number: int, columns: list[str] | None = None) -> Iterator[Json]:
    try:
        table = file.read_row_group(number, columns=columns)
    except OSError as error:
        raise Damaged(f"a manifest: {error}") from error
    for batch in table.to_batches(max_chunksize=4096):
        yield from batch.to_pylist()


# ---------------------------------------------------------------------------------------------------------------------
# WAL (SPEC.md, chapters 3, 5 and 7)


class Piece:
    """A run of WAL of one tli: where it is, and the tablespace creations in it."""

    def __init__(self, tli: int, start: int, end: int, read: Callable[[], WalAndCreates]) -> None:
        self.tli = tli
        self.start = start
        self.end = end
        self.read = read


def pieces_of(store: StoreDirectory, state: Json, tli: int, start: int, end: int | None) -> Iterator[Piece]:
    """All WAL of a tli that overlaps [start, end), in order: sealed ranges, then the chain [REC-3]."""
    (known,) = [candidate for candidate in state["tlis"] if candidate["tli"] == tli]
    branch = state["branch"]
    for sealed in sorted((s for s in state["sealed"] if s["tli"] == tli), key=lambda s: s["start"]):
        if sealed["end"] > start and (end is None or sealed["start"] < end):
            file = store.manifest(sealed["manifest"], "wal")
            for number in range(file.num_row_groups):
                columns = ["tli", "start", "end", "pack", "offset", "stored_bytes", "digest", "events"]
                for row in _rows(file, number, columns):
                    yield Piece(tli, row["start"], row["end"], partial(_read_frame, store, row))
    prefix = f"wal/{branch}/{tli}"
    starts = {int(name, 16) for name in store.names(prefix) if re.fullmatch(r"[0-9a-f]{16}", name)}
    position = after_gaps(state, tli, known["sealed"])
    while position in starts and (end is None or position < end):
        key = f"{prefix}/{position:016x}"
        data = store.read(key)
        header, _ = _header(data, b"TLCHUNK\x01", key)
        if (header["branch"], header["tli"], header["start"]) != (branch, tli, position):
            raise Damaged(f"{key}: expected this key's chunk")
        yield Piece(tli, position, header["end"], partial(_read_chunk, key, data))
        position = after_gaps(state, tli, header["end"])


def after_gaps(state: Json, tli: int, lsn: int) -> int:
    """Where the WAL goes on, past gaps that start here [GAP-1]."""
    for gap in sorted(state["gaps"], key=lambda gap: int(gap["start"])):
        if gap["tli"] == tli and gap["start"] == lsn:
            lsn = gap["end"]
    return lsn


def _read_frame(store: StoreDirectory, row: Json) -> WalAndCreates:
    stored = store.pack_range(row["pack"], row["offset"], row["stored_bytes"])
    what = f"WAL {text(row['start'])} in pack {row['pack']} at {row['offset']}"
    raw = unpack(stored, row["end"] - row["start"], what)
    check_digest(raw, row["digest"].hex(), what)
    return raw, _creates(row["events"])


def _read_chunk(key: str, data: bytes) -> WalAndCreates:
    header, at = _header(data, b"TLCHUNK\x01", key)
    parts = []
    for stored_bytes, raw_bytes in header["frames"]:
        parts.append(unpack(data[at : at + stored_bytes], raw_bytes, f"{key}, byte {at}"))
        at += stored_bytes
    wal = b"".join(parts)
    stored_bytes, raw_bytes = header["index"]
    if len(wal) != header["end"] - header["start"] or len(data) != at + stored_bytes:
        raise Damaged(f"{key}: expected {at + stored_bytes} bytes")
    check_digest(wal, header["digest"], key)
    index = unpack(data[at:], raw_bytes, f"{key}, byte {at}")
    (head_bytes,) = struct.unpack_from("<I", index)
    events = json.loads(index[4 : 4 + head_bytes])["events"]
    return wal, _creates(events)


def _creates(events: list[Json]) -> list[tuple[int, int]]:
    """(start, end) of the tablespace creations [IDX-4]."""
    return [(event["start"], event["end"]) for event in events if event["kind"] == "tablespace_create"]


class SegmentWriter:
    """WAL segments of one line, full length, zero where nothing was written [REC-4]."""

    def __init__(self, directory: Path, segment_bytes: int, line: list[tuple[int, int, int | None]]) -> None:
        self._directory = directory
        self.segment_bytes = segment_bytes
        self._line = line
        self.written: set[Path] = set()

    def path(self, lsn: int) -> Path:
        """The file that holds that LSN: it belongs to the newest tli with WAL in the segment."""
        number = lsn // self.segment_bytes
        segment_end = (number + 1) * self.segment_bytes
        tli = max(
            (index, tli)
            for index, (tli, start, _) in enumerate(self._line)
            if index == 0 or start < segment_end
        )[1]
        per_id = (1 << 32) // self.segment_bytes
        return self._directory / f"{tli:08X}{number // per_id:08X}{number % per_id:08X}"

    def write(self, lsn: int, data: bytes) -> None:
        """Put WAL where it belongs."""
        done = 0
        while done < len(data):
            at = lsn + done
            inside = at % self.segment_bytes
            part = data[done : done + self.segment_bytes - inside]
            path = self.path(at)
            if path not in self.written:
                with path.open("xb") as created:
                    created.truncate(self.segment_bytes)
                path.chmod(0o600)
                self.written.add(path)
            with path.open("r+b") as file:
                file.seek(inside)
                file.write(part)
            done += len(part)

    def read(self, lsn: int, length: int) -> bytes:
        """Bytes of one segment."""
        with self.path(lsn).open("rb") as file:
            file.seek(lsn % self.segment_bytes)
            return file.read(length)

    def record_spans(self, start: int) -> list[tuple[int, int]]:
        """(LSN, length) of the parts of the record at ``start``, without the page headers between them."""
        position = self._past_page_header(start)
        (left,) = struct.unpack("<I", self.read(position, 4))
        if not 24 <= left <= 65_536:
            raise Damaged(f"WAL {text(start)}: expected a short record, found a length of {left}")
        spans = []
        while left:
            position = self._past_page_header(position)
            length = min(left, PAGE_BYTES - position % PAGE_BYTES)
            spans.append((position, length))
            position += length
            left -= length
        return spans

    def _past_page_header(self, lsn: int) -> int:
        if lsn % PAGE_BYTES:
            return lsn
        return lsn + (40 if lsn % self.segment_bytes == 0 else 24)


def blank_tablespace_path(segments: SegmentWriter, start: int) -> str | None:
    """Empty the path in a Tablespace/CREATE record and mend its CRC [REC-6]; the path it had."""
    spans = segments.record_spans(start)
    record = bytearray(b"".join(segments.read(lsn, length) for lsn, length in spans))
    if record[16] & 0xF0 != 0 or record[17] != 5:
        raise Damaged(f"WAL {text(start)}: expected the creation of a tablespace")
    at = 24
    while record[at] in (0xFC, 0xFD):
        at += 5 if record[at] == 0xFC else 3
    if record[at] not in (0xFE, 0xFF):
        raise Damaged(f"WAL {text(start)}: expected a record without blocks")
    path_at = at + (2 if record[at] == 0xFF else 5) + 4
    path = bytes(record[path_at : record.index(0, path_at)])
    if not path:
        return None
    record[path_at] = 0
    struct.pack_into("<I", record, 20, crc32c(bytes(record[24:]) + bytes(record[:20])))
    done = 0
    for lsn, length in spans:
        segments.write(lsn, bytes(record[done : done + length]))
        done += length
    return path.decode("utf-8", "backslashreplace")


def crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli), bit by bit: it runs over a few hundred bytes."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def text(lsn: int) -> str:
    """An LSN for people."""
    return f"{lsn >> 32:X}/{lsn & 0xFFFFFFFF:08X}"


class WalCopy:
    """Writes the WAL of a line from a snapshot on, as far as it goes without a hole."""

    def __init__(self, store: StoreDirectory, state: Json, snapshot: Json, segments: SegmentWriter) -> None:
        self._store = store
        self._state = state
        self._snapshot = snapshot
        self._segments = segments
        self.start: int | None = None
        self.end = int(snapshot["lsn"]) - int(snapshot["lsn"]) % segments.segment_bytes
        self.creates: list[int] = []
        self.damage: str | None = None

    def write(self, line: list[tuple[int, int, int | None]]) -> None:
        """Write it all; damage ends it early and is remembered."""
        try:
            for tli, _, end in line:
                # An ancestor may be needed for the first bytes of the segment in which its child begins.
                if end is None or end > self.end:
                    pieces = pieces_of(self._store, self._state, tli, self.end, end)
                    if not all(self._take(piece, end) for piece in pieces if piece.end > self.end):
                        return
                    if end is not None and self.end < end:
                        return
        except Damaged as error:
            self.damage = str(error)

    def _take(self, piece: Piece, end: int | None) -> bool:
        """Write the part of a piece that is new; whether it joins what is there."""
        redo = self._snapshot["lsn"]
        if end is not None and piece.start >= end:
            return True
        if self.end < piece.start <= redo:
            self.start, self.end = None, piece.start
        if piece.start > self.end:
            return False
        wal, creates = piece.read()
        if end is not None:
            wal = wal[: end - piece.start]
        self._segments.write(self.end, wal[self.end - piece.start :])
        self.start = self.end if self.start is None else self.start
        self.end = piece.start + len(wal)
        self.creates += [create for create, after in creates if create >= redo and after <= self.end]
        return True


# ---------------------------------------------------------------------------------------------------------------------
# Recovery settings (SPEC.md [REC-7])


def settings_of(snapshot: Json, line: list[tuple[int, int, int | None]]) -> str:
    """A postgresql.conf for the recovery."""
    known = {setting["name"]: setting["value"] for setting in snapshot["settings"]}
    lines = [
        "# Written by rescue.py: enough to recover and look around; the source's own file, if it was in the",
        "# data directory, is postgresql.conf.source.",
        "listen_addresses = ''",
        "unix_socket_directories = '.'",
        "archive_mode = off",
        "hot_standby = off",
        "shared_preload_libraries = ''",
        "allow_in_place_tablespaces = on",
        "restore_command = 'false'",
        f"recovery_target_timeline = '{line[-1][0]}'",
        "# recovery_target_time = '2026-01-20 10:00:00+00'",
    ]
    for name in RAISED_SETTINGS:
        # Too high costs a little memory; too low stops recovery, and the source may have raised it since.
        value = int(known.get(name, "0"))
        if value:
            lines.append(f"{name} = {2 * value if name == 'max_prepared_transactions' else value}")
    lines += [f"{name} = {known[name]}" for name in CARRIED_SETTINGS if name in known]
    return "\n".join(lines) + "\n"


def write_settings(target: Path, snapshot: Json, line: list[tuple[int, int, int | None]]) -> None:
    """Configuration of our own making: nothing of the source's takes effect."""
    for name in ("postgresql.conf", "pg_hba.conf", "pg_ident.conf", "postgresql.auto.conf"):
        if (target / name).exists():
            (target / name).rename(target / f"{name}.source")
    for name, content in (
        ("postgresql.conf", settings_of(snapshot, line)),
        (
            "pg_hba.conf",
            "# the socket is in the data directory, which only the server's user may enter\nlocal all all trust\n",
        ),
        ("pg_ident.conf", ""),
        ("postgresql.auto.conf", ""),
        ("recovery.signal", ""),
    ):
        (target / name).write_text(content)
        (target / name).chmod(0o600)


# ---------------------------------------------------------------------------------------------------------------------


def rescue(source: Path, target: Path, branch: str, snapshot_id: str | None, tli: int | None) -> int:
    """Do all of it; the exit code."""
    store = StoreDirectory(source)
    meta = unseal(store.read("tl.json"), "tl.json")
    if meta["magic"] != "timeline store" or meta["format_version"] != 1:
        raise RescueError(f"tl.json: format {meta['format_version']} is not known to this reader")
    _check_features("tl.json", meta["read_features"])
    _check_envelope("tl.json", meta)
    if target.exists() and any(target.iterdir()):
        raise RescueError(f"{target}: not empty")
    digests = "with BLAKE3" if blake3 is not None else "by checksums (BLAKE3 is not installed)"
    say(f"store {meta['store_id']}, branch {branch}; verifying {digests}")

    state = read_state(store, branch)
    line = lineage(state, state["current_tli"] if tli is None else tli)
    snapshot = choose_snapshot(state, line, snapshot_id)
    incarnation = [i for i in state["incarnations"] if i["from_lsn"] <= snapshot["lsn"]][-1]
    say(
        f"snapshot {snapshot['id']}: tli {snapshot['tli']}, redo {text(snapshot['lsn'])}, {snapshot['bytes']} bytes"
    )

    target.mkdir(mode=0o700, parents=True, exist_ok=True)
    target.chmod(0o700)
    base = BaseDirectory(store, snapshot, target)
    write_control = base.write()
    (target / "backup_label").write_text(snapshot["backup_label"])
    say(f"files written: {base.bytes} bytes")

    for known in state["tlis"]:
        if known["history"] is not None and any(known["tli"] == number for number, _, _ in line):
            (target / "pg_wal" / f"{known['tli']:08X}.history").write_text(known["history"])
    segments = SegmentWriter(target / "pg_wal", incarnation["segment_bytes"], line)
    copy = WalCopy(store, state, snapshot, segments)
    copy.write(line)
    say(
        f"WAL written: {text(copy.start or copy.end)} to {text(copy.end)} in {len(segments.written)} segments"
    )
    for lsn in copy.creates:
        path = blank_tablespace_path(segments, lsn)
        if path is not None:
            say(f"tablespace created at {text(lsn)} in {path}: will be inside the data directory instead")
    if copy.end < snapshot["end"]:
        say(
            f"WARNING: the WAL ends before {text(snapshot['end'])}; Postgres cannot make this backup consistent"
        )

    write_settings(target, snapshot, line)
    write_control()
    say(
        f"done. Give {target} to the server's user (chown -R postgres) and start Postgres {incarnation['major']} "
        f"({incarnation['architecture']}) on it; connect with: psql -h {target} -U {incarnation['superuser']} postgres"
    )
    if copy.damage is not None:
        say(f"DAMAGED: the WAL ends early, at {text(copy.end)}: {copy.damage}")
        return Damaged.exit_code
    return 0


def main(words: list[str] | None = None) -> int:
    """Command line; the exit code."""
    parser = argparse.ArgumentParser(
        description="Turn a store directory into a data directory for stock Postgres."
    )
    parser.add_argument("store", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--branch", default="main")
    parser.add_argument("--snapshot", help="id of a base backup; default: the newest on the line")
    parser.add_argument(
        "--tli", type=int, help="Postgres timeline to follow; default: the source's present one"
    )
    arguments = parser.parse_args(words)
    try:
        return rescue(arguments.store, arguments.target, arguments.branch, arguments.snapshot, arguments.tli)
    except RescueError as error:
        say(f"rescue: {error}")
        return error.exit_code
    except (KeyError, TypeError, ValueError, struct.error) as error:
        say(f"rescue: damaged: something in the store has not the form it should have: {error!r}")
        return Damaged.exit_code


if __name__ == "__main__":
    sys.exit(main())
