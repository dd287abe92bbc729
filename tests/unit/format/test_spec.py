"""SPEC.md and the code say the same: every clause that is cited exists, every member that is stored is
described."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from timeline.format import (
    branch_state,
    file_listing,
    log,
    log_change,
    manifest,
    mark,
    meta,
    pack,
    page_manifest,
    pin,
    wal_manifest,
)
from timeline.format.chunk import ChunkHeader
from timeline.format.wal_index import COMMIT_DTYPE, TOUCH_DTYPE, Coverage, EventKind, WalEvent
from timeline.format.wal_index_codec import event_name

ROOT = Path(__file__).parents[3]
SPEC = (ROOT / "timeline/format/SPEC.md").read_text()
_CLAUSE = re.compile(r"\[([A-Z]{3}-\d+)\]")

STORED = [
    meta.StoreMeta,
    ChunkHeader,
    pack.PackHeader,
    WalEvent,
    Coverage,
    manifest.ManifestRef,
    branch_state.BranchState,
    branch_state.Incarnation,
    branch_state.Tli,
    branch_state.SealedRange,
    branch_state.Snapshot,
    branch_state.Tablespace,
    branch_state.Setting,
    branch_state.Gap,
    branch_state.BackupProgress,
    branch_state.OpenMark,
    branch_state.Collection,
    log_change.Forgotten,
    log.LogEntry,
    mark.MarkObject,
    mark.Garbage,
    mark.VoidChunks,
    mark.VoidEntries,
    pin.Pin,
    *log_change.Change.__args__,
]


def test_every_clause_is_defined_once() -> None:
    defined = re.findall(r"^- \*\*\[([A-Z]{3}-\d+)\]\*\*", SPEC, re.MULTILINE)
    assert len(defined) == len(set(defined)) > 50


def test_every_clause_cited_is_defined() -> None:
    defined = set(re.findall(r"^- \*\*\[([A-Z]{3}-\d+)\]\*\*", SPEC, re.MULTILINE))
    files = [ROOT / "timeline/format/SPEC.md"]
    for package in ("timeline", "restore", "cli", "tests"):
        files += (ROOT / package).rglob("*.py")
    cited = {(clause, file.name) for file in files for clause in _CLAUSE.findall(file.read_text())}
    assert {(clause, name) for clause, name in cited if clause not in defined} == set()


@pytest.mark.parametrize("stored", STORED, ids=lambda stored: stored.__name__)
def test_every_stored_member_is_described(stored: type) -> None:
    """A field added to a stored value must be added here, with its default for readers of older objects."""
    missing = [field.name for field in dataclasses.fields(stored) if f"`{field.name}`" not in SPEC]
    missing = [name for name in missing if f'"{name}"' not in SPEC]
    assert missing == []


@pytest.mark.parametrize(
    "module", [page_manifest, file_listing, wal_manifest], ids=lambda module: module.__name__
)
def test_every_column_is_described(module: object) -> None:
    schema = module._SCHEMA  # type: ignore[attr-defined]
    assert [name for name in schema.names if f"`{name}`" not in SPEC] == []


def test_every_kind_of_event_and_packed_field_is_described() -> None:
    names = [event_name(kind) for kind in EventKind]
    names += [name for dtype in (COMMIT_DTYPE, TOUCH_DTYPE) for name in dtype.names or () if name != "pad"]
    assert [name for name in names if f"`{name}`" not in SPEC] == []
    assert (COMMIT_DTYPE.itemsize, TOUCH_DTYPE.itemsize) == (32, 40)
