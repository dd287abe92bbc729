"""A drill's evidence as objects of the store and as files; and the drills that the store remembers.

``evidence.json`` is created last: a drill without it is none (SPEC.md, [DRL-1]). Bounds: at most as many past
drills as asked for, READS of them read at once.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from restore.drill_junit import junit
from restore.drill_page import page
from restore.host import told_plainly
from timeline.catalog.meta import read_meta
from timeline.catalog.parallel import in_parallel
from timeline.errors import DamagedStore, NotFound
from timeline.format import keys
from timeline.format.evidence import Evidence, decode_evidence, encode_evidence
from timeline.store.base import Store

READS = 8
_FORMS = 3
"""Objects of one drill."""


@dataclass(frozen=True, slots=True)
class EvidenceFile:
    """One of the forms of the evidence."""

    form: str
    """End of the name: ``json``, ``html`` or ``junit.xml``."""
    data: bytes


def evidence_files(evidence: Evidence, past: Sequence[Evidence]) -> tuple[EvidenceFile, ...]:
    """All forms, in the order in which they are to be written. ``past``: earlier drills, newest first."""
    return (
        EvidenceFile("junit.xml", junit(evidence)),
        EvidenceFile("html", page(evidence, past)),
        EvidenceFile("json", encode_evidence(evidence)),
    )


async def store_evidence(store: Store, evidence: Evidence, files: Sequence[EvidenceFile]) -> str:
    """Write them to the store; the key of ``evidence.json``. Raises what writing raises: UsageError without
    the permission, UnknownFeature, Unavailable."""
    await read_meta(store, writing=True)
    key = ""
    for file in files:
        key = keys.drill_evidence(evidence.id, file.form)
        await store.create(key, file.data)
    return key


def save_evidence(directory: Path, evidence: Evidence, files: Sequence[EvidenceFile]) -> Path:
    """Write them to ``directory/<id>/``, made if need be; that directory. Raises TimelineError."""
    with told_plainly():
        place = directory / evidence.id
        place.mkdir(parents=True, exist_ok=True)
        for file in files:
            path = place / f"evidence.{file.form}"
            temporary = path.with_name(f".{path.name}")
            with open(temporary, "wb") as out:
                out.write(file.data)
                out.flush()
                os.fsync(out.fileno())
            temporary.replace(path)
    return place


@dataclass(frozen=True, slots=True)
class PastDrills:
    """What the store remembers."""

    drills: tuple[Evidence, ...]
    """Newest first."""
    warnings: tuple[str, ...]
    """Evidence that cannot be read, named."""


async def past_drills(store: Store, *, limit: int) -> PastDrills:
    """The newest drills, at most ``limit``; raises what listing and reading raise, but not for damaged evidence."""
    listed = await store.list(keys.DRILLS, limit=limit * _FORMS)
    found = [each.key for each in listed]
    wanted = [key for key in found if (parsed := keys.parse_drill_evidence(key)) and parsed[1] == "json"]
    warnings: list[str] = []

    async def read(key: str) -> Evidence | None:
        try:
            return decode_evidence(await store.get(key), key)
        except DamagedStore as error:
            warnings.append(error.message)
        except NotFound:
            warnings.append(f"{key} has gone since it was listed")
        return None

    read_all = await in_parallel(sorted(wanted)[:limit], read, limit=READS)
    return PastDrills(tuple(each for each in read_all if each is not None), tuple(warnings))
