"""Damage of the store that a mount met: what it told its log, for whoever only saw an I/O error.

Postgres gets EIO for a page whose extent does not verify. The mount, a process of its own, names object and
offset in its log (``mount._answers`` logs the error's message, and so does a mount that cannot begin), and here
they are read back.
"""

from __future__ import annotations

import re
from pathlib import Path

from timeline.errors import DamagedStore

MAX_DAMAGES = 20
"""Places told of one log."""
_LOG_BYTES = 4 << 20
"""Of a longer log the beginning is read: the first damage is what matters."""
_DAMAGE = re.compile(
    r" ERROR \S+: (?:\w+: )?((?:tl\.json|(?:packs|manifests|branches|wal)/[A-Za-z0-9._/-]+)): at byte (\d+): (.+)$",
    re.MULTILINE,
)


def met_damage(log: Path) -> tuple[DamagedStore, ...]:
    """The distinct damaged places in a mount's log, in the order they were met, at most MAX_DAMAGES; none
    where there is no log."""
    try:
        with log.open("rb") as file:
            text = file.read(_LOG_BYTES).decode("utf-8", "replace")
    except FileNotFoundError:
        return ()
    found: dict[tuple[str, int], DamagedStore] = {}
    for key, offset, expectation in _DAMAGE.findall(text):
        found.setdefault((key, int(offset)), DamagedStore(key, int(offset), expectation))
        if len(found) == MAX_DAMAGES:
            break
    return tuple(found.values())
