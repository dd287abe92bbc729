"""What speaks against archiving a server, found before anything is made on it (`tl init`).

Looks only: nothing is created, changed or dropped on the source (P11).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from timeline.archive.receiver import ReplicationConnection
from timeline.archive.source import NEWEST_MAJOR, OLDEST_MAJOR, IncarnationFacts, Source, is_synchronous
from timeline.errors import TimelineError

CUSTOM_RMGR_SINCE = 15
IDLE_TIMEOUT_SINCE = 18
_BLOCK_BYTES = 8192


class Severity(StrEnum):
    """How bad it is."""

    REFUSE = "refuse"
    """Archiving cannot work, or would harm the source."""
    WARN = "warn"
    """It works, and somebody should know."""
    NOTE = "note"
    """Worth saying."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing found."""

    severity: Severity
    code: str
    """Stable name, for programs."""
    what: str
    cure: str


@dataclass(frozen=True, slots=True)
class Preflight:
    """Everything `tl init` wants to know about a source."""

    facts: IncarnationFacts
    in_recovery: bool
    findings: tuple[Finding, ...]

    @property
    def refused(self) -> tuple[Finding, ...]:
        """The findings that forbid archiving."""
        return tuple(finding for finding in self.findings if finding.severity is Severity.REFUSE)


@dataclass(frozen=True, slots=True)
class _Service:
    name: str
    settings: str
    """Regular expression over names of settings."""
    roles: tuple[str, ...]


_SERVICES = (
    _Service("Amazon RDS or Aurora", r"rds\.", ("rdsadmin", "rds_superuser")),
    _Service("Google AlloyDB", r"alloydb\.", ("alloydbsuperuser",)),
    _Service("Google Cloud SQL", r"cloudsql\.", ("cloudsqlsuperuser", "cloudsqladmin")),
    _Service("Azure Database for PostgreSQL", r"azure\.", ("azure_pg_admin", "azuresu")),
    _Service("Neon", r"neon\.", ("neon_superuser",)),
    _Service("Supabase", r"supautils\.", ("supabase_admin",)),
    _Service("Aiven", r"aiven\.", ("_aiven", "avnadmin")),
    _Service("Timescale Cloud", r"tsdb_admin\.", ("tsdbadmin",)),
    _Service("DigitalOcean", r"(?!)", ("_dodb", "doadmin")),
)


async def check_source(
    conninfo: str, *, application_name: str, slotless: bool = False, allow_unbounded: bool = False
) -> Preflight:
    """Look at a source; raises UsageError or Unavailable only when it cannot be looked at."""
    source = await Source.open(conninfo)
    try:
        facts = await source.facts()
        in_recovery = await source.in_recovery()
        settings = {
            str(name): str(value)
            for name, value in await source.rows("select name, setting from pg_catalog.pg_settings")
        }
        findings = [
            *_of_version(facts),
            *_of_settings(settings, facts, slotless=slotless, allow_unbounded=allow_unbounded),
            *_of_synchronous(settings, application_name),
            *await _of_capacity(source, settings, slotless=slotless),
            *await _of_rights(source),
            *await _of_resource_managers(source, facts),
        ]
        streaming = await _of_replication(conninfo, application_name)
        service = await _managed_service(source, settings)
    finally:
        await source.aclose()
    if in_recovery:
        findings.append(
            Finding(
                Severity.NOTE,
                "standby",
                "the source is a standby: what it has not received yet is not archived, and after a "
                "promotion "
                "elsewhere the archiver must be pointed there",
                "archive the primary where its load allows",
            )
        )
    if service is not None and streaming:
        findings.append(
            Finding(
                Severity.REFUSE,
                "managed-service",
                f"the source runs on {service}, which does not offer physical replication to its users",
                "archive a server you run yourself; this one can feed it by logical replication",
            )
        )
    elif service is not None:
        findings.append(
            Finding(Severity.NOTE, "managed-service", f"the source seems to run on {service}", "none needed")
        )
    return Preflight(facts, in_recovery, tuple(findings + streaming))


def _of_version(facts: IncarnationFacts) -> list[Finding]:
    found = []
    if not OLDEST_MAJOR <= facts.major <= NEWEST_MAJOR:
        found.append(
            Finding(
                Severity.REFUSE,
                "major-version",
                f"the source is Postgres {facts.major}; supported are {OLDEST_MAJOR} to {NEWEST_MAJOR}",
                "upgrade the source, or tl",
            )
        )
    if (facts.block_bytes, facts.wal_block_bytes) != (_BLOCK_BYTES, _BLOCK_BYTES):
        found.append(
            Finding(
                Severity.REFUSE,
                "block-size",
                f"the source was built with blocks of {facts.block_bytes} bytes and WAL blocks of "
                f"{facts.wal_block_bytes}; only {_BLOCK_BYTES} is supported",
                "none: rebuild the cluster with standard binaries",
            )
        )
    if facts.data_checksums not in ("on", "off"):
        found.append(
            Finding(
                Severity.REFUSE,
                "checksums-changing",
                f"page checksums are being switched on or off at this moment ({facts.data_checksums})",
                "wait until that is over",
            )
        )
    return found


def _of_settings(
    settings: dict[str, str], facts: IncarnationFacts, *, slotless: bool, allow_unbounded: bool
) -> list[Finding]:
    found = []
    if settings.get("wal_level") == "minimal":
        found.append(
            Finding(
                Severity.REFUSE,
                "wal-level",
                "wal_level is minimal: the WAL does not hold everything",
                "set wal_level = replica on the source and restart it",
            )
        )
    if settings.get("full_page_writes") == "off":
        found.append(
            Finding(
                Severity.REFUSE,
                "full-page-writes",
                "full_page_writes is off: a base backup taken while the source runs could not be repaired",
                "set full_page_writes = on on the source and reload it",
            )
        )
    keep_mebibytes = int(settings.get("max_slot_wal_keep_size", "-1"))
    if slotless:
        kept = int(settings.get("wal_keep_size", "0"))
        found.append(
            Finding(
                Severity.WARN,
                "slotless",
                f"without a slot the source keeps only {kept} MiB of WAL (wal_keep_size): an archiver that "
                "is "
                "further behind loses history",
                "raise wal_keep_size, or let tl make a slot",
            )
        )
    elif keep_mebibytes < 0:
        found.append(
            Finding(
                Severity.WARN if allow_unbounded else Severity.REFUSE,
                "unbounded-slot",
                "max_slot_wal_keep_size is unlimited: while the archiver is down, its slot could fill the "
                "source's disk",
                "set it, e.g. to half of the free space of pg_wal; or accept the risk with --unbounded-slot",
            )
        )
    idle = int(settings.get("idle_replication_slot_timeout", "0"))
    if idle > 0 and not slotless and facts.major >= IDLE_TIMEOUT_SINCE:
        found.append(
            Finding(
                Severity.WARN,
                "idle-slot-timeout",
                f"idle_replication_slot_timeout is {idle} s: an archiver that is down longer loses its slot",
                "set it to 0, or well above the longest outage you expect",
            )
        )
    timeout = int(settings.get("wal_sender_timeout", "60000"))
    if 0 < timeout < 2000:
        found.append(
            Finding(
                Severity.WARN,
                "sender-timeout",
                f"wal_sender_timeout is {timeout} ms: short hiccups of the network end the stream",
                "set it to 10 s or more",
            )
        )
    return found


def _of_synchronous(settings: dict[str, str], application_name: str) -> list[Finding]:
    names = settings.get("synchronous_standby_names", "")
    if not is_synchronous(names, application_name):
        return []
    found = [
        Finding(
            Severity.WARN,
            "synchronous",
            f"the archiver ({application_name}) counts in synchronous_standby_names: each COMMIT may wait "
            "until "
            "the store has its WAL, and a store that stalls stalls every COMMIT",
            "intended for no data loss; otherwise give the archiver another --application-name",
        )
    ]
    if settings.get("synchronous_commit") == "remote_apply":
        found.append(
            Finding(
                Severity.REFUSE,
                "remote-apply",
                "synchronous_commit is remote_apply and the archiver counts in synchronous_standby_names: it "
                "applies nothing, so COMMIT would hang for ever",
                "set synchronous_commit = on, or take the archiver out of synchronous_standby_names",
            )
        )
    return found


async def _of_capacity(source: Source, settings: dict[str, str], *, slotless: bool) -> list[Finding]:
    found = []
    senders = int(settings.get("max_wal_senders", "0"))
    used = int((await source.rows("select count(*) from pg_catalog.pg_stat_replication"))[0][0])
    # The archiver and its base backup stream at the same time.
    if senders - used < 2:
        found.append(
            Finding(
                Severity.REFUSE,
                "wal-senders",
                f"max_wal_senders is {senders} and {used} are in use; the archiver needs one, base backups "
                "another",
                "raise max_wal_senders on the source and restart it",
            )
        )
    slots = int(settings.get("max_replication_slots", "0"))
    taken = int((await source.rows("select count(*) from pg_catalog.pg_replication_slots"))[0][0])
    if not slotless and taken >= slots:
        found.append(
            Finding(
                Severity.REFUSE,
                "replication-slots",
                f"max_replication_slots is {slots} and {taken} are in use",
                "raise it on the source and restart it, or drop an unused slot",
            )
        )
    return found


async def _of_rights(source: Source) -> list[Finding]:
    user, may_stream, may_see = (
        await source.rows(
            "select rolname, rolsuper or rolreplication, "
            "rolsuper or pg_catalog.pg_has_role(oid, 'pg_read_all_stats', 'usage') "
            "from pg_catalog.pg_roles where rolname = current_user"
        )
    )[0]
    found = []
    if not may_stream:
        found.append(
            Finding(
                Severity.REFUSE,
                "replication-privilege",
                f"user {user} may not stream WAL",
                f'on the source: ALTER ROLE "{user}" REPLICATION',
            )
        )
    if not may_see:
        found.append(
            Finding(
                Severity.WARN,
                "statistics-privilege",
                f"user {user} may not read pg_stat_replication: whether the archiver is a synchronous "
                "standby, "
                "and how fresh a standby is, cannot be told",
                f'on the source: GRANT pg_monitor TO "{user}"',
            )
        )
    return found


async def _of_resource_managers(source: Source, facts: IncarnationFacts) -> list[Finding]:
    if facts.major < CUSTOM_RMGR_SINCE:
        return []
    rows = await source.rows(
        "select rm_id, rm_name from pg_catalog.pg_get_wal_resource_managers() where rm_id >= 128 order by 1"
    )
    if not rows:
        return []
    names = ", ".join(f"{name} ({number})" for number, name in rows)
    return [
        Finding(
            Severity.REFUSE,
            "custom-resource-managers",
            f"extensions write WAL of their own kind: {names}; it cannot be replayed without them",
            "take them out of shared_preload_libraries on the source",
        )
    ]


async def _of_replication(conninfo: str, application_name: str) -> list[Finding]:
    try:
        connection = await ReplicationConnection.open(conninfo, application_name=application_name)
    except TimelineError as error:
        return [Finding(Severity.REFUSE, "replication-connection", error.message, error.hint or "none known")]
    try:
        await connection.identify()
    except TimelineError as error:
        return [Finding(Severity.REFUSE, "replication-connection", error.message, error.hint or "none known")]
    finally:
        await connection.aclose()
    return []


async def _managed_service(source: Source, settings: dict[str, str]) -> str | None:
    roles = {str(row[0]) for row in await source.rows("select rolname from pg_catalog.pg_roles")}
    for service in _SERVICES:
        if any(role in roles for role in service.roles):
            return service.name
        if any(re.match(service.settings, name) for name in settings):
            return service.name
    return None
