"""What `tl doctor` finds out about this host."""

from __future__ import annotations

import os
import resource
from collections.abc import Sequence
from pathlib import Path

import pytest

from restore import host_checks, host_fits
from restore.host_checks import check_host
from restore.host_fits import Wanted, check_fit
from restore.sparse import OverlayUnusable
from tests.support.postgres import bin_dir
from timeline.findings import Finding, Severity


def verdicts(found: Sequence[Finding]) -> dict[str, Severity]:
    return {one.code: one.severity for one in found}


def environ(state: Path) -> dict[str, str]:
    return {**os.environ, "TL_STATE": str(state)}


def test_looking_creates_nothing(tmp_path: Path) -> None:
    found = verdicts(check_host(environ(tmp_path / "state"), database_bytes=None))
    assert {"account", "fuse", "overlay", "state-space", "open-files", "time-zones"} <= found.keys()
    assert found["overlay"] is Severity.OK
    assert list(tmp_path.iterdir()) == []


def test_no_fuse_is_a_warning_with_a_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """EDGE 54: branches are possible all the same."""
    monkeypatch.setattr("restore.lazy_host._DEVICE", tmp_path / "fuse")
    found = check_host(environ(tmp_path), database_bytes=1 << 60)
    (fuse,) = (one for one in found if one.code == "fuse")
    assert fuse.severity is Severity.WARNING and "full copies" in fuse.what and fuse.cure
    assert verdicts(found)["state-space"] is Severity.WARNING, "a copy of that database does not fit"


def test_a_file_system_that_holds_no_overlay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Path) -> None:
        raise OverlayUnusable("no holes here", hint="put it elsewhere")

    monkeypatch.setattr(host_checks, "probe_file_system", refuse)
    (overlay,) = (one for one in check_host(environ(tmp_path), database_bytes=None) if one.code == "overlay")
    assert overlay.severity is Severity.WARNING and overlay.cure == "put it elsewhere"


def test_no_account_for_postgres(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """EDGE 48."""
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    found = verdicts(
        check_host({**environ(tmp_path), "TL_RUN_AS": "nobody-of-that-name"}, database_bytes=None)
    )
    assert found["account"] is Severity.ERROR and found["overlay"] is Severity.OK


def test_few_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 4096))
    assert verdicts(check_host(environ(tmp_path), database_bytes=None))["open-files"] is Severity.WARNING


def test_a_state_directory_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    found = verdicts(check_host(environ(tmp_path), database_bytes=None))
    assert found["state-directory"] is Severity.ERROR and "overlay" not in found


def test_this_hosts_postgres_fits() -> None:
    assert bin_dir(15) is not None
    wanted = Wanted(
        15, host_fits._libc_version(), ("pg_stat_statements",), ("plpgsql",), "Europe/Berlin", ("C",)
    )
    found = verdicts(check_fit(wanted, os.environ))
    assert found["binaries"] is Severity.OK
    assert set(found) <= {"binaries", "preload-libraries", "time-zone"}


def test_what_this_host_lacks() -> None:
    """EDGE 45, 47."""
    assert bin_dir(15) is not None
    wanted = Wanted(15, "1.0", ("no_such_library",), ("no_such_extension",), "Nowhere/At_All", ("xx_XX",))
    found = {one.code: one for one in check_fit(wanted, os.environ)}
    assert found["preload-libraries"].severity is Severity.WARNING
    assert "no_such_library" in found["preload-libraries"].what
    assert "no_such_extension" in found["extensions"].what
    assert "C library 1.0" in found["collation"].what
    assert found["time-zone"].severity is Severity.WARNING
    assert found["locales"].severity is Severity.NOTE
    assert all(one.cure for one in found.values() if one.severity is not Severity.OK)


def test_no_binaries_is_a_warning() -> None:
    (found,) = check_fit(Wanted(13), {"PATH": ""})
    assert (found.code, found.severity) == ("binaries", Severity.WARNING) and found.cure
