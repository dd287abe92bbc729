"""What is left of a branch when its store is an incomplete copy (EDGE 63).

A copy made object by object, in any order and not yet finished, may hold a log that names what is not there. A reader
that meets such a name, also in a log read anew, goes on with what is whole: sealed ranges whose manifest is
missing are holes in the history, snapshots that miss a manifest are none, and of the log the newest entry that can be
understood counts. Nothing replays across a hole, so every moment is either what it would be with all of the store, or
refused; the latest moment is always refused, for nobody can tell it (P7).

Packs are not looked for: whoever reads one that is missing is told its name.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from timeline.format import keys
from timeline.format.branch_state import BranchState, Snapshot
from timeline.store.base import Store

_TOLD = 3
"""So many missing objects are named; of the rest the number."""


@dataclass(frozen=True, slots=True)
class WholePart:
    """What a reader can use."""

    state: BranchState
    missing: tuple[str, ...]
    """Keys that the log names and the store does not hold."""


async def find_whole_part(store: Store, state: BranchState) -> WholePart:
    """The part of a state whose manifests are all there. Costs one listing of the manifests."""
    held = {listed.key for listed in await store.list(keys.MANIFESTS)}
    return whole_part(state, held)


def whole_part(state: BranchState, held: Collection[str]) -> WholePart:
    """The same, told which keys of manifests there are. Pure."""
    sealed = tuple(one for one in state.sealed if keys.manifest(one.manifest.digest) in held)
    snapshots = tuple(one for one in state.snapshots if _named(one) <= set(held))
    named = {keys.manifest(one.manifest.digest) for one in state.sealed}
    for snapshot in state.snapshots:
        named |= _named(snapshot)
    return WholePart(
        replace(state, sealed=sealed, snapshots=snapshots), tuple(sorted(named.difference(held)))
    )


def describe_missing(missing: tuple[str, ...]) -> str:
    """For people: what is missing."""
    more = len(missing) - _TOLD
    told = ", ".join(missing[:_TOLD]) + (f" and {more} more" if more > 0 else "")
    return f"the log names {told}, which the store does not hold (an incomplete copy of the store?)"


def _named(snapshot: Snapshot) -> set[str]:
    refs = [snapshot.files, *snapshot.pages, *([snapshot.boot] if snapshot.boot is not None else [])]
    return {keys.manifest(ref.digest) for ref in refs}
