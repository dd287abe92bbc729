"""A branch's configuration, entirely ours (P8).

Nothing that makes the source reach out, listen, archive or run code of its own survives. What shapes the
meaning and the plans of SQL (time zone, locale, search path, planner costs) does, so that a query behaves
as on the source. Recovery's own limits come from pg_control as of the target, not from the source's files
(EDGE 45, 46).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from timeline.format.branch_state import Setting
from timeline.pg.control import Parameters

AUTO_CONF = b""
"""``postgresql.auto.conf``: empty, whatever the source's ALTER SYSTEM said."""
IDENT = b"# No user name maps on a branch.\n"

_WAL_LEVELS = ("minimal", "replica", "logical")

_KEPT = frozenset(
    """
    array_nulls backslash_quote bytea_output check_function_bodies client_encoding
    constraint_exclusion cpu_index_tuple_cost cpu_operator_cost cpu_tuple_cost createrole_self_grant
    cursor_tuple_fraction DateStyle deadlock_timeout default_statistics_target
    default_table_access_method default_tablespace default_text_search_config
    default_toast_compression default_transaction_deferrable default_transaction_isolation
    effective_cache_size escape_string_warning extra_float_digits from_collapse_limit geqo
    geqo_effort geqo_generations geqo_pool_size geqo_seed geqo_selection_bias geqo_threshold
    gin_fuzzy_search_limit gin_pending_list_limit hash_mem_multiplier icu_validation_level
    IntervalStyle jit jit_above_cost jit_inline_above_cost jit_optimize_above_cost
    join_collapse_limit lo_compat_privileges lock_timeout logical_decoding_work_mem
    max_parallel_workers_per_gather min_parallel_index_scan_size min_parallel_table_scan_size
    parallel_leader_participation parallel_setup_cost parallel_tuple_cost password_encryption
    plan_cache_mode quote_all_identifiers random_page_cost recursive_worktable_factor row_security
    search_path seq_page_cost standard_conforming_strings statement_timeout synchronize_seqscans
    temp_tablespaces transaction_timeout transform_null_equals work_mem xmlbinary xmloption
    """.split()  # noqa: SIM905
)
"""The source's value holds: none of these can stop a start, reach out or run code."""

_REACHES_OUT = (
    "archive_command",
    "archive_library",
    "local_preload_libraries",
    "primary_conninfo",
    "primary_slot_name",
    "recovery_end_command",
    "session_preload_libraries",
    "shared_preload_libraries",
    "ssl",
    "synchronous_standby_names",
)
"""Left out, and said so when the source had them."""

_LOCALES = ("lc_messages", "lc_monetary", "lc_numeric", "lc_time")

_ORIGINS = 256
"""Of the limits only this one is not in WAL: the source may have more by now than at its base backup. 64 bytes each, and up to
Postgres 17 a slot's besides."""
_WORKERLESS_LIBRARIES = frozenset(
    """
    anon auth_delay auto_explain passwordcheck pg_hint_plan pg_qualstats pg_stat_kcache pg_stat_statements
    pgaudit plpgsql_check plprofiler set_user supautils
    """.split()  # noqa: SIM905
)
"""Preload libraries known to bring no background workers."""


@dataclass(frozen=True, slots=True)
class HostSupport:
    """What the branch's host can do with names that the source uses."""

    has_locale: Callable[[str], bool]
    has_time_zone: Callable[[str], bool]


@dataclass(frozen=True, slots=True)
class BranchSettings:
    """A complete configuration."""

    settings: tuple[Setting, ...]
    warnings: tuple[str, ...]
    """What the source has and the branch has not."""

    def value(self, name: str) -> str | None:
        """The value of one setting, ``None`` when Postgres's own default holds."""
        return next((setting.value for setting in self.settings if setting.name == name), None)

    def replacing(self, **values: str) -> BranchSettings:
        """The same with other values for settings that it has."""
        changed = (Setting(each.name, values.get(each.name, each.value)) for each in self.settings)
        return BranchSettings(tuple(changed), self.warnings)


def branch_settings(
    major: int,
    source: Sequence[Setting],
    bounds: Parameters,
    support: HostSupport,
    *,
    name: str,
    sockets: str,
    port: int,
    preload: Sequence[str] = (),
) -> BranchSettings:
    """The configuration of a branch called ``name`` of a source of that major version, without TCP.

    ``preload``: libraries asked for by name; unless they are known to bring none, background workers of every
    kind are off with them, parallel query included (P8).
    """
    told = {setting.name: setting.value for setting in source}
    chosen: dict[str, str] = {}
    warnings: list[str] = []
    for setting_name in sorted(_KEPT & told.keys()):
        chosen[setting_name] = told[setting_name]
    # A dotted name is text that only a loaded library, or the application itself, ever looks at.
    chosen.update({key: value for key, value in told.items() if "." in key})
    _choose_names(chosen, warnings, told, support)
    chosen.update(_fixed(major))
    chosen.update(_bounded(major, told, bounds))
    chosen.update(
        cluster_name=f"tl-{name}"[:63], unix_socket_directories=_list_element(sockets), port=str(port)
    )
    if preload:
        chosen["shared_preload_libraries"] = ", ".join(_list_element(library) for library in preload)
        risky = sorted(set(preload) - _WORKERLESS_LIBRARIES)
        if risky:
            chosen["max_worker_processes"] = "0"
            warnings.append(f"no background workers and no parallel query, because of {', '.join(risky)}")
    left_out = _left_out(told, preload)
    if left_out:
        warnings.append(f"settings of the source left out: {'; '.join(left_out)}")
    return BranchSettings(tuple(Setting(key, value) for key, value in chosen.items()), tuple(warnings))


def _fixed(major: int) -> dict[str, str]:
    """What holds on every branch."""
    fixed = {
        # Never reach out, never archive (P8).
        "listen_addresses": "",
        "archive_mode": "off",
        "archive_command": "",
        "primary_conninfo": "",
        "primary_slot_name": "",
        "synchronous_standby_names": "",
        "max_logical_replication_workers": "0",
        "shared_preload_libraries": "",
        "session_preload_libraries": "",
        "local_preload_libraries": "",
        "dynamic_library_path": "$libdir",
        "ssl": "off",
        "bonjour": "off",
        "unix_socket_permissions": "0700",
        # Recovery.
        "hot_standby": "off",
        "restart_after_crash": "on",
        "recovery_init_sync_method": "syncfs",
        "allow_in_place_tablespaces": "on",
        # Without fsync the kernel would never hand its dirty pages to the mount.
        "fsync": "on",
        "synchronous_commit": "off",
        "full_page_writes": "on",
        "wal_recycle": "off",
        "wal_init_zero": "off",
        "wal_keep_size": "0",
        # A laptop runs several branches.
        "shared_buffers": "128MB",
        "huge_pages": "off",
        "effective_io_concurrency": "32",
        "autovacuum": "on",
        # Otherwise a branch of an old database would read all of it, unasked, to freeze it.
        "autovacuum_freeze_max_age": "2000000000",
        "autovacuum_multixact_freeze_max_age": "2000000000",
        "logging_collector": "off",
        "log_destination": "stderr",
        "log_line_prefix": "%m [%p] ",
        "log_timezone": "UTC",
        # The start-up reads its own log for the reason of a failure.
        "lc_messages": "C",
    }
    if major >= 15:
        fixed |= {"archive_library": "", "recovery_prefetch": "off"}
    if major >= 17:
        fixed |= {"sync_replication_slots": "off", "synchronized_standby_slots": "", "summarize_wal": "off"}
    if major >= 18:
        fixed |= {"idle_replication_slot_timeout": "0"}
    return fixed


def _bounded(major: int, told: dict[str, str], bounds: Parameters) -> dict[str, str]:
    """Limits that replay may need: too low ones end it."""
    origins = max(
        _ORIGINS, _number(told, "max_replication_slots"), _number(told, "max_active_replication_origins")
    )
    bounded = {
        "wal_level": _WAL_LEVELS[max(1, bounds.wal_level)],
        "wal_log_hints": _switch(bounds.wal_log_hints),
        "track_commit_timestamp": _switch(bounds.track_commit_timestamp),
        "max_connections": str(max(100, bounds.max_connections)),
        "max_worker_processes": str(max(8, bounds.max_worker_processes)),
        "max_wal_senders": str(max(10, bounds.max_wal_senders)),
        "max_prepared_transactions": str(bounds.max_prepared_transactions),
        "max_locks_per_transaction": str(max(64, bounds.max_locks_per_transaction)),
        # Up to Postgres 17 this also bounds replication origins, which replay advances.
        "max_replication_slots": str(origins),
    }
    if major >= 18:
        bounded["max_active_replication_origins"] = str(origins)
    return bounded


def _choose_names(
    chosen: dict[str, str], warnings: list[str], told: dict[str, str], support: HostSupport
) -> None:
    """Locales and time zone: a name this host does not know would stop the start."""
    for setting_name in _LOCALES:
        locale = told.get(setting_name, "C")
        if support.has_locale(locale):
            chosen[setting_name] = locale
        elif setting_name != "lc_messages":
            chosen[setting_name] = "C"
            warnings.append(f"this host has no locale {locale!r}: {setting_name} is C")
    zone = told.get("TimeZone", "UTC")
    if support.has_time_zone(zone):
        chosen["TimeZone"] = zone
    else:
        chosen["TimeZone"] = "UTC"
        warnings.append(f"this host has no time zone {zone!r}: TimeZone is UTC")


def _left_out(told: dict[str, str], preload: Sequence[str]) -> list[str]:
    left_out = []
    for name in _REACHES_OUT:
        value = told.get(name, "")
        if value in ("", "off", "(disabled)"):
            continue
        if name.endswith("_libraries"):
            libraries = [part.strip(' "') for part in value.split(",")]
            missing = [library for library in libraries if library and library not in preload]
            if missing:
                left_out.append(f"{name} ({', '.join(missing)}; --preload brings one in)")
        else:
            left_out.append(name)
    return left_out


def _number(told: dict[str, str], name: str) -> int:
    text = told.get(name, "")
    return int(text) if text.isdecimal() else 0


def _switch(value: bool) -> str:
    return "on" if value else "off"


def _list_element(text: str) -> str:
    """One element of a setting that holds a list."""
    return '"' + text.replace('"', '""') + '"'


def format_conf(settings: Iterable[Setting], *, heading: str = "") -> bytes:
    """The settings as a configuration file (quoting: src/backend/utils/misc/guc-file.l)."""
    lines = [f"# {heading}"] if heading else []
    for setting in settings:
        value = setting.value.replace("\\", "\\\\").replace("'", "''").replace("\n", "\\n")
        lines.append(f"{setting.name} = '{value}'")
    return ("\n".join(lines) + "\n").encode()


def format_hba(*, listens: bool) -> bytes:
    """``pg_hba.conf``: the socket's directory is private, so trust; TCP, where asked for, by password."""
    lines = ["local all all trust", "local replication all trust"]
    if listens:
        lines.append("host all all all scram-sha-256")
    return ("\n".join(lines) + "\n").encode()
