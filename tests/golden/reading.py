"""Everything that is in a store, through the codecs alone, as one JSON value to compare.

The store is a mapping of keys to bytes. Contents appear as SHA-256.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq

from timeline.errors import MissingObject
from timeline.format import branch_state, keys, log, value_json
from timeline.format.chunk import decode_chunk
from timeline.format.evidence import decode_evidence
from timeline.format.extent import BLOCK_BYTES, GROUP_BYTES, decode_extent
from timeline.format.file_listing import read_file_listing
from timeline.format.manifest import ManifestRef, PageRow
from timeline.format.mark import decode_mark
from timeline.format.meta import decode_meta
from timeline.format.pack import decode_pack_header, verify_pack
from timeline.format.page_manifest import open_footer, read_page_rows
from timeline.format.pin import Pin, decode_pin
from timeline.format.wal_frame import decode_wal_frame
from timeline.format.wal_index import CommitArray, TouchArray, WalEvent
from timeline.format.wal_index_codec import event_name
from timeline.format.wal_manifest import open_wal_manifest, read_wal_manifest

Json = Any


@dataclass(frozen=True, slots=True)
class GoldenReader:
    """Reads branch main of a store held in memory."""

    objects: Mapping[str, bytes]

    def read(self) -> Json:
        """All of it; raises what the codecs raise, and MissingObject."""
        state, entries = self.read_log()
        found = {
            "meta": value_json.to_json(decode_meta(self._get(keys.META))),
            "entries": entries,
            "state": value_json.to_json(state),
            "snapshots": {snapshot.id: self._files(snapshot) for snapshot in state.snapshots},
            "wal": {str(tli.tli): self._wal(state, tli) for tli in state.tlis},
            "merged": {
                str(sealed.start): bounds for sealed in state.sealed if (bounds := self._bounds(sealed))
            },
            "marks": self._marks(state),
            "pins": {pin.id: value_json.to_json(pin) | self._files(pin.snapshot) for pin in self._pins()},
            "drills": self._drills(),
        }
        self._verify_whole(state)
        return found | {"nonces": self._nonces()}

    def reachable(self, *, pinned: bool = True) -> set[str]:
        """Keys of the packs and manifests that the newest state and, if ``pinned``, the pins keep alive [COL-3]."""
        state, _ = self.read_log()
        pins = self._pins() if pinned else []
        snapshots = [*state.snapshots, *(pin.snapshot for pin in pins)]
        sealed = [*state.sealed, *(sealed for pin in pins for sealed in pin.sealed)]
        pages = {ref for snapshot in snapshots for ref in snapshot.pages}
        pages |= {snapshot.boot for snapshot in snapshots if snapshot.boot is not None}
        pages |= set(state.progress.manifests if state.progress is not None else ())
        packs = {page.extent.pack for ref in pages for page in self._pages(ref)}
        for one in sealed:
            data = self._get(keys.manifest(one.manifest.digest))
            packs |= {frame.pack for frame in read_wal_manifest(data, one.manifest)}
        manifests = {*pages, *(one.manifest for one in sealed), *(snapshot.files for snapshot in snapshots)}
        return {keys.manifest(ref.digest) for ref in manifests} | {keys.pack(pack) for pack in packs}

    def _get(self, key: str) -> bytes:
        if key not in self.objects:
            raise MissingObject(key)
        return self.objects[key]

    def read_log(self) -> tuple[branch_state.BranchState, Json]:
        """The newest state, and all entries, oldest first."""
        names = sorted(key for key in self.objects if keys.parse_log_entry(key) is not None)
        entries = [log.decode_entry(self._get(key), key) for key in reversed(names)]
        state = branch_state.BranchState.empty("main")
        for entry in entries:
            state = entry.change.apply(state)
            assert entry.state in (None, state)
        return state, [value_json.to_json(entry) | {"state": entry.state is not None} for entry in entries]

    def _files(self, snapshot: branch_state.Snapshot) -> Json:
        data = self._get(keys.manifest(snapshot.files.digest))
        contents: dict[str, bytearray] = {}
        listing = read_file_listing(data, snapshot.files)
        for row in listing:
            if row.kind == "f":
                contents[row.path] = bytearray(row.content or bytes(row.size))
        for ref in snapshot.pages:
            for page in self._pages(ref):
                found = listing.get(page.path)
                if found is None or (ref.lsn is not None and ref.lsn < found.born):
                    continue
                at = page.group * GROUP_BYTES + page.extent.first_block * BLOCK_BYTES
                raw = self._extent(page)
                contents[page.path][at : at + len(raw)] = raw[: max(0, found.size - at)]
        boot = [[page.path, page.group] for page in self._pages(snapshot.boot)] if snapshot.boot else []
        return {
            "files": [
                [row.path, row.kind, row.size, row.mode, row.target, int(row.born)]
                + ([sha256(bytes(contents[row.path]))] if row.kind == "f" else [])
                for row in listing
            ],
            "boot": boot,
        }

    def _pages(self, ref: ManifestRef) -> list[PageRow]:
        """By footer and row groups, as a mount reads them."""
        data = self._get(keys.manifest(ref.digest))
        footer = open_footer(ref, data[-ref.footer_bytes :])
        rows: list[PageRow] = []
        for number, entry in enumerate(footer.entries):
            rows += footer.decode(number, data[entry.offset : entry.offset + entry.length]).rows()
        return rows

    def _extent(self, page: PageRow) -> bytes:
        extent = page.extent
        key = keys.pack(extent.pack)
        stored = self._get(key)[extent.offset : extent.offset + extent.stored_bytes]
        return decode_extent(stored, extent, key)

    def _wal(self, state: branch_state.BranchState, tli: branch_state.Tli) -> Json:
        runs = []
        for sealed in state.sealed:
            if sealed.tli == tli.tli:
                data = self._get(keys.manifest(sealed.manifest.digest))
                for frame in read_wal_manifest(data, sealed.manifest):
                    key = keys.pack(frame.pack)
                    stored = self._get(key)[frame.offset : frame.offset + frame.stored_bytes]
                    raw = decode_wal_frame(stored, frame, key)
                    runs.append([int(frame.start), int(frame.end), sha256(raw), *_index_of(frame)])
        position = state.after_gap(tli.tli, tli.sealed)
        while (key := keys.chunk("main", tli.tli, position)) in self.objects:
            chunk = decode_chunk(self._get(key), key)
            header = value_json.to_json(chunk.header)
            runs.append(
                [int(position), int(chunk.header.end), sha256(chunk.wal), *_index_of(chunk.index), header]
            )
            position = state.after_gap(tli.tli, chunk.header.end)
        return runs

    def _bounds(self, sealed: branch_state.SealedRange) -> list[Json]:
        """What a merged manifest says of its row groups [MAN-3]; empty for any other."""
        data = self._get(keys.manifest(sealed.manifest.digest))
        footer = open_wal_manifest(data, sealed.manifest)
        bounds = []
        for group in footer.groups:
            frames = footer.frames(group.number, data[group.offset : group.offset + group.length])
            if group.start is not None and group.end is not None:
                assert (frames[0].start, frames[-1].end) == (group.start, group.end)
                times = [group.min_commit_time, group.max_commit_time]
                bounds.append(
                    [
                        int(group.start),
                        int(group.end),
                        *times,
                        group.commits,
                        group.restore_points,
                        len(frames),
                    ]
                )
        return bounds

    def _marks(self, state: branch_state.BranchState) -> Json:
        named = [keys.mark(state.collection.mark.id)] if state.collection.mark is not None else []
        there = [key for key in sorted(self.objects) if keys.parse_mark(key) is not None]
        return {key: value_json.to_json(decode_mark(self._get(key), key)) for key in {*named, *there}}

    def _pins(self) -> list[Pin]:
        there = [key for key in sorted(self.objects) if keys.parse_pin(key) is not None]
        return [decode_pin(self.objects[key], key) for key in there]

    def _drills(self) -> Json:
        """Evidence with the SHA-256 of its other forms; drills without it are none [DRL-1]."""
        found = {}
        for key in sorted(self.objects):
            parsed = keys.parse_drill_evidence(key)
            if parsed is not None and parsed[1] == "json":
                evidence = decode_evidence(self.objects[key], key)
                forms = {
                    form: sha256(self._get(keys.drill_evidence(parsed[0], form)))
                    for form in ("html", "junit.xml")
                }
                found[parsed[0]] = value_json.to_json(evidence) | forms
        return found

    def _nonces(self) -> Json:
        """Of all packs and manifests that have one [PAC-4]."""
        found = {}
        for key, data in sorted(self.objects.items()):
            if keys.parse_pack(key) is not None:
                found[key] = decode_pack_header(data, key)[0].nonce
            elif keys.parse_manifest(key) is not None:
                metadata = pq.read_metadata(io.BytesIO(data)).metadata
                found[key] = json.loads(metadata[b"tl.envelope"]).get("nonce")
        return {key: nonce for key, nonce in found.items() if nonce is not None}

    def _verify_whole(self, state: branch_state.BranchState) -> None:
        """What reading by parts leaves out: packs and page manifests against their names [PAC-3], [MAN-4]."""
        for key in self.objects:
            if key.startswith("packs/"):
                verify_pack(self.objects[key], key.rpartition("/")[2], key)
        snapshots = [*state.snapshots, *(pin.snapshot for pin in self._pins())]
        pages = {ref for snapshot in snapshots for ref in snapshot.pages}
        for ref in pages | {snapshot.boot for snapshot in snapshots if snapshot.boot is not None}:
            list(read_page_rows(self._get(keys.manifest(ref.digest)), ref))


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _index_of(index: Any) -> list[Json]:
    commits: CommitArray = index.commits
    touches: TouchArray = index.touches
    events: tuple[WalEvent, ...] = index.events
    numbers = [int(index.last_record), int(index.last_record_end), int(index.pending), index.records]
    plain = [
        [event_name(e.kind), int(e.start), int(e.end), e.time, e.name, [list(pair) for pair in e.values]]
        for e in events
    ]
    return [
        numbers,
        [list(row[:5]) for row in commits.tolist()],
        plain,
        [list(row) for row in touches.tolist()],
    ]
