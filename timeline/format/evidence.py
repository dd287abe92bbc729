"""What a recovery drill found out, as values and as the object ``drills/<id>/evidence.json`` (SPEC.md, chapter 2).

Durations are whole microseconds, LSNs and instants as everywhere in the format. Lists are bounded where they
are made: ``MAX_FINDINGS`` a check, ``MAX_DAMAGES`` in all; the totals say what was left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from timeline.clock import Micros
from timeline.errors import DamagedStore
from timeline.format import sealed_json, value_json
from timeline.lsn import Lsn

MAX_FINDINGS = 50
"""Findings kept of one check."""
MAX_CHECKS = 2_000
"""Checks kept of one drill; a drill with more of them fails."""
MAX_DAMAGES = 20
"""Damaged places kept of one drill."""
_MAGIC = "timeline drill"
_LAST_MICROS = 10**16 - 1

PASSED = "passed"
FAILED = "failed"
"""A check did not pass, an objective was missed, or recovery itself did not work."""
SKIPPED = "skipped"
"""A check that could not run: it proves nothing."""
DAMAGED = "damaged"
"""The store does not hold what was written to it."""
UNREACHABLE = "unreachable"
"""The moment asked for is not in the recorded history."""
UNAVAILABLE = "unavailable"
"""Store or host did not answer in time: nothing is proved either way."""


@dataclass(frozen=True, slots=True)
class DrillTarget:
    """The moment that was recovered."""

    asked: str
    """In the words of whoever asked; ``random`` for one that was drawn."""
    tli: int
    lsn: Lsn
    time: Micros | None
    last_commit_time: Micros | None
    snapshot_id: str
    snapshot_lsn: Lsn
    replayed_bytes: int


@dataclass(frozen=True, slots=True)
class Step:
    """One stage of the drill."""

    name: str
    offset_micros: int
    """From the start of the drill."""
    elapsed_micros: int
    requests: int
    """To the store."""
    fetched_bytes: int
    outcome: str
    message: str = ""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at."""

    group: str
    """``history``, ``catalog``, ``assertion``, ``amcheck``, ``full`` or ``objective``."""
    name: str
    """Unique within its group and database."""
    database: str | None
    outcome: str
    """``passed``, ``failed`` or ``skipped``."""
    message: str
    elapsed_micros: int
    findings: tuple[str, ...] = ()
    """Details, at most MAX_FINDINGS; of a check that passed: remarks."""
    findings_total: int = 0


@dataclass(frozen=True, slots=True)
class Damage:
    """A place in the store that does not hold what it should."""

    key: str
    offset: int
    """First byte of the range inside the object."""
    length: int | None
    """Bytes of the range; ``None``: to the end of the object, or not known."""
    expectation: str
    holds: tuple[str, ...] = ()
    """What lies there: blocks of files, or WAL, as far as found out."""


@dataclass(frozen=True, slots=True)
class RecoveryTime:
    """How long recovery took (RTO)."""

    first_query_micros: int | None
    """From the start of the drill to the first answer of a branch; ``None``: there was none."""
    mode: str | None
    """``lazy`` or ``copy``."""
    full_micros: int | None
    """From the start of the restore to the first answer of a complete copy under stock Postgres; ``None``: not
    tried, or it failed."""
    objective_micros: int | None
    full_objective_micros: int | None


@dataclass(frozen=True, slots=True)
class RecoveryPoint:
    """What a loss of the source would have cost (RPO), at one moment."""

    head: Lsn
    """End of what can be recovered."""
    head_time: Micros | None
    """Source's clock: up to then the recoverable history is complete."""
    head_commit_time: Micros | None
    """Of the newest commit that can be recovered."""
    source_reachable: bool
    source_lsn: Lsn | None
    """End of the source's flushed WAL, asked after the store."""
    source_commit_time: Micros | None
    rpo_bytes: int | None
    """WAL on the source that the store does not have; ``None``: the source was not asked."""
    rpo_micros: int | None
    """``None``: nothing is known."""
    method: str
    """How both were found out."""
    objective_micros: int | None


@dataclass(frozen=True, slots=True)
class Evidence:
    """One drill."""

    id: str
    store_id: str | None
    """``None``: the store could not be read that far."""
    store_url: str
    version: str
    """Of this program."""
    host: str
    account: str
    """Operating system user that ran the drill."""
    started: Micros
    finished: Micros
    seed: int | None
    """Of a random target: the same seed over the same history draws the same moment."""
    asked: str
    target: DrillTarget | None
    server_version: str | None
    result: str
    exit_code: int
    message: str
    """One line: why it did not pass, or what it proved."""
    recovery_time: RecoveryTime
    recovery_point: RecoveryPoint | None
    steps: tuple[Step, ...]
    checks: tuple[Check, ...]
    damages: tuple[Damage, ...]
    warnings: tuple[str, ...]

    def checks_with(self, outcome: str) -> tuple[Check, ...]:
        """The checks of that outcome."""
        return tuple(check for check in self.checks if check.outcome == outcome)


def drill_id(started: Micros, token: str) -> str:
    """The id of a drill that started then: the newest comes first in a listing. ``token``: 8 hex digits."""
    return f"{_LAST_MICROS - started:016d}-{token}"


def encode_evidence(evidence: Evidence) -> bytes:
    """``evidence.json``."""
    return sealed_json.encode({"magic": _MAGIC, **value_json.to_json(evidence)})


def decode_evidence(data: bytes, key: str) -> Evidence:
    """Verified evidence; raises DamagedStore."""
    members = sealed_json.decode(data, key)
    if members.get("magic") != _MAGIC:
        raise DamagedStore(key, 0, f"expected the member magic to be {_MAGIC!r}")
    try:
        return value_json.from_json(Evidence, members)
    except ValueError as error:
        raise DamagedStore(key, 0, str(error)) from error
