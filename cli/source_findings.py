"""What the source says of itself, as findings of `tl doctor`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from timeline.findings import Finding, Severity

if TYPE_CHECKING:
    from timeline.archive.inventory import Inventory
    from timeline.archive.preflight import Preflight

SKEW_SECONDS = 5.0
_AREA = "source"
_SEVERITIES = {"refuse": Severity.ERROR, "warn": Severity.WARNING, "note": Severity.NOTE}


def of_preflight(preflight: Preflight) -> list[Finding]:
    """What `tl init` would say, too; everything at once that it found nothing against."""
    found = [
        Finding(_AREA, _SEVERITIES[str(one.severity)], one.code, one.what, one.cure)
        for one in preflight.findings
    ]
    if not preflight.refused:
        facts = preflight.facts
        what = f"PostgreSQL {facts.major}.{facts.version_num % 10000} can be archived by this user"
        found.insert(0, Finding(_AREA, Severity.OK, "source", what))
    return found


def of_inventory(inventory: Inventory) -> list[Finding]:
    """What is not wrong with archiving, and matters to those who restore."""
    return [*_of_cluster(inventory), *_of_slots(inventory), _of_clock(inventory)]


def _of_cluster(inventory: Inventory) -> list[Finding]:
    found = []
    if inventory.facts.data_checksums == "off":
        what = "the source has no page checksums: what its disks damage is archived as it is, unnoticed"
        cure = "pg_checksums --enable on the stopped source"
        found.append(Finding(_AREA, Severity.NOTE, "checksums", what, cure))
    if inventory.tablespaces:
        what = f"tablespaces {', '.join(inventory.tablespaces)} become directories inside each branch"
        found.append(Finding(_AREA, Severity.NOTE, "tablespaces", what, "none needed"))
    for stale in inventory.stale_collations:
        found.append(
            Finding(
                _AREA,
                Severity.WARNING,
                "stale-collation",
                f"database {stale.database!r} was made under collation version {stale.recorded}, the source now has "
                f"{stale.here}: its indexes on text may be out of order",
                f'on the source: REINDEX its indexes on text, then ALTER DATABASE "{stale.database}" REFRESH COLLATION VERSION',
            )
        )
    if inventory.preload_libraries is None:
        what = "this user may not see shared_preload_libraries, so what branches' hosts need of them is not known"
        found.append(Finding(_AREA, Severity.NOTE, "preload-unseen", what, "on the source: GRANT pg_monitor"))
    return found


def _of_slots(inventory: Inventory) -> list[Finding]:
    found = []
    for slot in inventory.slots:
        if slot.lost:
            what = f"slot {slot.name} has lost WAL that the store does not have"
            cure = "run `tl archive --allow-gap`: it records the gap and takes a new base backup"
            found.append(Finding(_AREA, Severity.ERROR, "slot", what, cure))
        elif slot.warning is not None:
            cure = "let `tl archive` catch up, or raise max_slot_wal_keep_size"
            found.append(Finding(_AREA, Severity.WARNING, "slot", slot.warning, cure))
        elif slot.active_pid is None:
            what = f"no archiver is connected to slot {slot.name}, which keeps the source's WAL"
            found.append(
                Finding(
                    _AREA, Severity.WARNING, "slot", what, "start `tl archive`, or drop the slot: `tl detach`"
                )
            )
        else:
            found.append(Finding(_AREA, Severity.OK, "slot", f"slot {slot.name} is served by an archiver"))
    return found


def _of_clock(inventory: Inventory) -> Finding:
    ahead = inventory.ahead_seconds
    if abs(ahead) < SKEW_SECONDS:
        return Finding("host", Severity.OK, "clock", "the clocks of source and host agree")
    return Finding(
        "host",
        Severity.WARNING,
        "clock",
        f"the source's clock is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} this host's; times of branches "
        "are the source's",
        "set both by NTP",
    )
