"""What psql says, however it arrives; kept scripts."""

from __future__ import annotations

from pathlib import Path

import pytest

from restore.branch_scripts import LOG_BYTES, MOST_BYTES, Script, Scripts, _Said, read_scripts
from timeline.errors import UsageError

_TOLD = b"a notice\npsql:/b/001.sql:12: ERROR:  first\nDETAIL:  so\npsql:/b/after.sql:2: ERROR:  second"


@pytest.mark.parametrize("step", [1, 7, 40, 1000])
def test_the_first_error_counts(tmp_path: Path, step: int) -> None:
    said = _Said(tmp_path / "log")
    for start in range(0, len(_TOLD), step):
        said.take(_TOLD[start : start + step])
    said.close()
    assert said.error is not None
    assert said.error.groupdict() == {"file": "/b/001.sql", "line": "12", "what": "ERROR:  first"}
    assert (tmp_path / "log").read_bytes() == _TOLD
    quoted = said.quoted(Scripts((Script("/home/mask.sql", b""),)), (Path("/b/001.sql"),))
    assert quoted.splitlines()[2:4] == ["  psql:/home/mask.sql:12: ERROR:  first", "  DETAIL:  so"]


def test_a_last_line_without_an_end_counts(tmp_path: Path) -> None:
    said = _Said(tmp_path / "log")
    said.take(b"psql:/b/001.sql:1: ERROR:  only")
    assert said.error is None
    said.close()
    assert said.error is not None


def test_a_flood_is_not_logged_without_end(tmp_path: Path) -> None:
    said = _Said(tmp_path / "log")
    for _ in range(LOG_BYTES // 65536 + 5):
        said.take(b"x" * 65536)
    said.close()
    assert LOG_BYTES < (tmp_path / "log").stat().st_size < LOG_BYTES + 100


def test_scripts_that_are_none(tmp_path: Path) -> None:
    binary, large = tmp_path / "binary.sql", tmp_path / "large.sql"
    binary.write_bytes(b"select 1;\0")
    with large.open("wb") as file:
        file.truncate(MOST_BYTES + 1)
    for path, message in ((binary, "zero byte"), (large, "larger than 64 MiB"), (tmp_path, "cannot read")):
        with pytest.raises(UsageError, match=message):
            read_scripts((path,), database="postgres", timeout_seconds=1)
