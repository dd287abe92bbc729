"""A branch's configuration: what survives of the source's, what never does (P8, EDGE 45, 46)."""

from __future__ import annotations

import dataclasses

import pytest

from restore.settings import (
    BranchSettings,
    HostSupport,
    branch_settings,
    format_conf,
    format_hba,
)
from timeline.format.branch_state import Setting
from timeline.pg.control import Parameters

BOUNDS = Parameters(
    wal_level=1,
    wal_log_hints=True,
    track_commit_timestamp=True,
    max_connections=731,
    max_worker_processes=3,
    max_wal_senders=2,
    max_prepared_transactions=42,
    max_locks_per_transaction=100,
)
EVERYTHING = HostSupport(has_locale=lambda _: True, has_time_zone=lambda _: True)
NOTHING = HostSupport(has_locale=lambda _: False, has_time_zone=lambda _: False)


def make(
    major: int = 15,
    *,
    bounds: Parameters = BOUNDS,
    support: HostSupport = EVERYTHING,
    preload: tuple[str, ...] = (),
    **source: str,
) -> BranchSettings:
    told = tuple(Setting(name.replace("__", "."), value) for name, value in source.items())
    return branch_settings(
        major, told, bounds, support, name="b", sockets="/run/x", port=5432, preload=preload
    )


@pytest.mark.parametrize("major", [14, 15, 16, 17, 18])
def test_nothing_of_the_source_that_reaches_out_survives(major: int) -> None:
    made = make(
        major,
        archive_mode="on",
        archive_library="basic_archive",
        primary_conninfo="host=primary password=x",
        synchronous_standby_names="*",
        listen_addresses="*",
        ssl="on",
        ssl_cert_file="/etc/ssl/nowhere.pem",
        max_logical_replication_workers="4",
        restore_command="scp x",
        default_transaction_read_only="on",
        data_directory="/var/lib/postgresql",
    )
    assert made.value("archive_mode") == "off"
    assert made.value("primary_conninfo") == ""
    assert made.value("synchronous_standby_names") == ""
    assert made.value("listen_addresses") == ""
    assert made.value("ssl") == "off"
    assert made.value("max_logical_replication_workers") == "0"
    assert made.value("archive_library") == (None if major == 14 else "")
    for name in ("ssl_cert_file", "restore_command", "data_directory", "default_transaction_read_only"):
        assert made.value(name) is None
    assert not any("password" in warning for warning in made.warnings)


def test_limits_come_from_the_control_file() -> None:
    made = make(18, max_connections="5", max_prepared_transactions="0", max_replication_slots="300")
    assert made.value("max_connections") == "731"
    assert made.value("max_prepared_transactions") == "42"
    assert made.value("max_wal_senders") == "10"
    assert made.value("track_commit_timestamp") == "on"
    assert made.value("wal_log_hints") == "on"
    assert made.value("max_replication_slots") == "300"
    assert made.value("max_active_replication_origins") == "300"
    assert make(17).value("max_active_replication_origins") is None


def test_origins_that_came_after_the_base_backup_have_room() -> None:
    """Their number is in no WAL, and replay ends where it finds no room for one."""
    assert make(17, max_replication_slots="5").value("max_replication_slots") == "256"


def test_wal_level_is_never_minimal() -> None:
    assert make(bounds=dataclasses.replace(BOUNDS, wal_level=0)).value("wal_level") == "replica"
    assert make(bounds=dataclasses.replace(BOUNDS, wal_level=2)).value("wal_level") == "logical"


def test_what_shapes_queries_survives() -> None:
    made = make(search_path='"$user", app', random_page_cost="1.1", work_mem="65536", app__tenant="7")
    assert made.value("search_path") == '"$user", app'
    assert made.value("random_page_cost") == "1.1"
    assert made.value("work_mem") == "65536"
    assert made.value("app.tenant") == "7"


def test_unknown_locale_and_zone_are_replaced_and_told() -> None:
    made = make(support=NOTHING, lc_time="tlh_QO", TimeZone="Mars/Olympus")
    assert made.value("lc_time") == "C"
    assert made.value("TimeZone") == "UTC"
    assert any("tlh_QO" in warning for warning in made.warnings)
    assert any("Mars/Olympus" in warning for warning in made.warnings)


def test_preload_libraries_only_when_asked_for() -> None:
    libraries = 'pg_stat_statements, "pg_cron"'
    left = make(shared_preload_libraries=libraries)
    assert left.value("shared_preload_libraries") == ""
    assert any("pg_stat_statements, pg_cron" in warning for warning in left.warnings)
    asked = make(shared_preload_libraries=libraries, preload=("pg_stat_statements",))
    assert asked.value("shared_preload_libraries") == '"pg_stat_statements"'
    assert asked.value("max_worker_processes") == "8"
    assert any("pg_cron" in w and "pg_stat_statements" not in w for w in asked.warnings)


def test_libraries_with_workers_get_none() -> None:
    """P8: known and unknown schedulers alike: with no worker slots none can register."""
    made = make(preload=("pg_cron",))
    assert made.value("max_worker_processes") == "0"
    assert any("pg_cron" in warning for warning in made.warnings)


def test_conf_quotes_whatever_a_value_holds() -> None:
    conf = format_conf([Setting("search_path", "a'b\\c\nd")], heading="h")
    assert conf == b"# h\nsearch_path = 'a''b\\\\c\\nd'\n"


def test_tcp_is_by_password_only() -> None:
    assert b"host" not in format_hba(listens=False)
    assert b"host all all all scram-sha-256\n" in format_hba(listens=True)
    assert b"host replication" not in format_hba(listens=True)
