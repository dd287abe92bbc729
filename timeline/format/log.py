"""Branch log: the numbered entries that say what belongs to a branch (SPEC.md, chapter 6).

An entry is JSON: ``{"format": 1, "number": n, "branch": …, "writer": …, "nonce": …, "epoch": …, "at": micros,
"change": {"kind": …, …}, "state": {…} | absent, "requires": [read features]}``. ``state`` is the complete
state *after* the change (branch_state.py). A writer includes it whenever it is smaller than 64 KiB, in every entry
whose number is a multiple of 10 while it is smaller than 1 MiB, and in any case where that is a multiple of 100; a
reader goes back from the newest entry to the nearest with a state and applies the changes since (log_change.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from timeline.clock import Micros
from timeline.errors import DamagedStore, UnknownFeature
from timeline.format import keys, sealed_json, value_json
from timeline.format.branch_state import BranchState, Collection
from timeline.format.features import COLLECTION, check_readable
from timeline.format.log_change import (
    AddSnapshot,
    Begin,
    Change,
    ClaimEpoch,
    Collect,
    Cover,
    DropSnapshots,
    ForgetWal,
    Mark,
    MergeSealed,
    RecordGap,
    RecordProgress,
    Seal,
    SwitchTli,
)

STATE_EVERY = 100
"""Every entry whose number is a multiple of this holds the state."""
STATE_BYTES = 64 << 10
"""States smaller than this are in every entry."""
STATE_OFTEN = 10
"""States smaller than 16 times that are in every entry whose number is a multiple of this."""
FORMAT = 1


@dataclass(frozen=True, slots=True)
class LogEntry:
    """One object of the log."""

    number: int
    branch: str
    writer: str
    nonce: str
    """Random, so that no two entries are ever equal bytes."""
    epoch: int
    """Epoch of the writer if it is an archiver, else 0 (epochs bind the archiver role only)."""
    at: Micros
    change: Change
    state: BranchState | None
    """The state after the change; ``None`` where the writer left it out."""


def encode_entry(entry: LogEntry) -> bytes:
    """The object; leaves the state out when it is long and the number does not demand it.

    Raises ValueError when the number demands a state and there is none, or the state is another branch's.
    """
    if entry.state is not None and entry.state.branch != entry.branch:
        raise ValueError(f"an entry of {entry.branch} cannot hold the state of {entry.state.branch}")
    if entry.state is None and entry.number % STATE_EVERY == 0:
        raise ValueError(f"entry {entry.number} must hold the state")
    members: dict[str, object] = {
        "format": FORMAT,
        "number": entry.number,
        "branch": entry.branch,
        "writer": entry.writer,
        "nonce": entry.nonce,
        "epoch": entry.epoch,
        "at": entry.at,
        "requires": _required(entry),
        "change": {"kind": _KIND_OF[type(entry.change)], **value_json.to_json(entry.change)},
    }
    if entry.state is not None:
        state = value_json.to_json(entry.state)
        if _is_told(entry.number, len(sealed_json.compact(state))):
            members["state"] = state
    return sealed_json.encode(members)


def _is_told(number: int, state_bytes: int) -> bool:
    """Whether an entry tells its state: the longer that is, the more rarely."""
    if number % STATE_EVERY == 0:
        return True
    return state_bytes < (16 * STATE_BYTES if number % STATE_OFTEN == 0 else STATE_BYTES)


def _required(entry: LogEntry) -> list[str]:
    collecting = entry.state is not None and entry.state.collection != Collection()
    return [COLLECTION] if collecting or isinstance(entry.change, Mark | Collect) else []


def decode_entry(data: bytes, key: str) -> LogEntry:
    """The verified entry, which must be the one its key names; raises DamagedStore, UnknownFeature."""
    members = sealed_json.decode(data, key)
    if members.get("format") != FORMAT:
        raise UnknownFeature(key, f"log format {members.get('format')}")
    try:
        check_readable(key, value_json.from_json(_Requires, members).requires)
        plain = value_json.from_json(_Plain, members)
        state = members.get("state")
        entry = LogEntry(
            number=plain.number,
            branch=plain.branch,
            writer=plain.writer,
            nonce=plain.nonce,
            epoch=plain.epoch,
            at=plain.at,
            change=_decode_change(members.get("change"), key),
            state=None if state is None else value_json.from_json(BranchState, state),
        )
    except ValueError as error:
        raise DamagedStore(key, 0, str(error)) from error
    named = keys.parse_log_entry(key)
    if named is not None and named != (entry.branch, entry.number):
        raise DamagedStore(
            key, 0, f"expected this key's entry, found number {entry.number} of {entry.branch}"
        )
    return entry


@dataclass(frozen=True, slots=True)
class _Requires:
    requires: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Plain:
    """The members of an entry whose types do not depend on its change."""

    number: int
    branch: str
    writer: str
    nonce: str
    epoch: int
    at: Micros


_CHANGES: dict[str, type[Change]] = {
    "claim_epoch": ClaimEpoch,
    "begin": Begin,
    "switch_tli": SwitchTli,
    "seal": Seal,
    "add_snapshot": AddSnapshot,
    "record_progress": RecordProgress,
    "cover": Cover,
    "record_gap": RecordGap,
    "drop_snapshots": DropSnapshots,
    "forget_wal": ForgetWal,
    "merge_sealed": MergeSealed,
    "mark": Mark,
    "collect": Collect,
}


_KIND_OF: dict[type[Change], str] = {change: kind for kind, change in _CHANGES.items()}


def _decode_change(value: object, key: str) -> Change:
    if not isinstance(value, dict) or not isinstance(value.get("kind"), str):
        raise ValueError("change: expected an object with a kind")
    kind = _CHANGES.get(value["kind"])
    if kind is None:
        raise UnknownFeature(key, f"change {value['kind']}")
    return value_json.from_json(kind, value)
