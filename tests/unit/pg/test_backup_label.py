"""backup_label and tablespace_map (EDGE 32)."""

from __future__ import annotations

import pytest

from timeline.lsn import Lsn
from timeline.pg.backup_label import TablespaceLink, parse_backup_label, parse_tablespace_map
from timeline.pg.errors import FormatError

LABEL = """START WAL LOCATION: 2/4000028 (file 000000030000000200000004)
CHECKPOINT LOCATION: 2/4000060
BACKUP METHOD: streamed
BACKUP FROM: standby
START TIME: 2026-01-20 10:00:00 CET
LABEL: tl: first
START TIMELINE: 3
"""


def test_label_is_read() -> None:
    label = parse_backup_label(LABEL)
    assert (label.start, label.checkpoint, label.tli) == (Lsn.parse("2/4000028"), Lsn.parse("2/4000060"), 3)
    assert label.start_segment == "000000030000000200000004"
    assert label.from_standby
    assert label.method == "streamed"
    assert label.label == "tl: first"
    assert label.start_time == "2026-01-20 10:00:00 CET"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("START WAL LOCATION", "NOTHING"),
        ("2/4000028 (file", "2-4000028 (file"),
        ("CHECKPOINT LOCATION: 2/4000060\n", ""),
        ("CHECKPOINT LOCATION: 2/4000060", "CHECKPOINT LOCATION: here"),
        ("START TIMELINE: 3", "START TIMELINE: 2"),
        ("BACKUP FROM: standby\n", ""),
        ("LABEL:", "INCREMENTAL FROM LSN: 1/2\nLABEL:"),
    ],
)
def test_bad_labels_are_refused(old: str, new: str) -> None:
    assert old in LABEL
    with pytest.raises(FormatError):
        parse_backup_label(LABEL.replace(old, new))


def test_tablespace_map_unescapes() -> None:
    text = "16385 /srv/fast disk\n16386 /srv/odd\\\nname\\\\x\n"
    assert parse_tablespace_map(text) == (
        TablespaceLink(16385, "/srv/fast disk"),
        TablespaceLink(16386, "/srv/odd\nname\\x"),
    )
    assert parse_tablespace_map("") == ()


@pytest.mark.parametrize("text", ["16385\n", "x /srv\n", "16385 /srv\\", "16385 \n"])
def test_bad_tablespace_maps_are_refused(text: str) -> None:
    with pytest.raises(FormatError):
        parse_tablespace_map(text)
