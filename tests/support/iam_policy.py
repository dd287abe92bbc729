"""IAM's verdict on a request, by the text of policy documents: deny by default, an explicit deny wins.

Knows what the documents of terraform/ need, and refuses the rest by name, so that nothing is taken for enforced that
is not evaluated: Allow and Deny; Action and Resource with ``*`` and ``?``; the conditions of ``_OPERATORS`` and their
``IfExists`` forms; Principal ``*`` only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

_MEMBERS = {"Sid", "Effect", "Principal", "Action", "Resource", "Condition"}


@dataclass(frozen=True, slots=True)
class Access:
    """One thing that a request needs permission for."""

    action: str
    resource: str
    context: tuple[tuple[str, str], ...] = ()
    """Condition keys and their values, as the request has them."""


@dataclass(frozen=True, slots=True)
class Condition:
    """One key of one operator."""

    operator: str
    key: str
    values: tuple[str, ...]

    def holds(self, context: Sequence[tuple[str, str]]) -> bool:
        """Whether a request with this context meets it."""
        found = [value for key, value in context if key.lower() == self.key.lower()]
        if self.operator == "Null":
            return self.values == (("false" if found else "true"),)
        if not found and self.operator.endswith("IfExists"):
            return True
        meets = _OPERATORS[self.operator.removesuffix("IfExists")]
        return any(meets(wanted, value) for wanted in self.values for value in found)


@dataclass(frozen=True, slots=True)
class Statement:
    """One statement of a document."""

    sid: str
    allow: bool
    actions: tuple[str, ...]
    resources: tuple[str, ...]
    conditions: tuple[Condition, ...]

    def covers(self, access: Access) -> bool:
        """Whether it speaks of this access."""
        return (
            any(_like(pattern.lower(), access.action.lower()) for pattern in self.actions)
            and any(_like(pattern, access.resource) for pattern in self.resources)
            and all(condition.holds(access.context) for condition in self.conditions)
        )

    def narrower(self) -> Iterator[tuple[str, Statement]]:
        """Every statement that lacks one action or one resource of this one, and the name of what is missing."""
        for action in self.actions:
            rest = tuple(other for other in self.actions if other != action)
            yield f"{self.sid} {action}", replace(self, actions=rest)
        for resource in self.resources:
            rest = tuple(other for other in self.resources if other != resource)
            yield f"{self.sid} on {resource}", replace(self, resources=rest)

    def without_condition(self, key: str) -> Statement:
        """The statement less its conditions on ``key``."""
        return replace(self, conditions=tuple(each for each in self.conditions if each.key != key))


Policy = tuple[Statement, ...]


def parse_policy(document: str) -> Policy:
    """The statements of a JSON document; raises ValueError for what is not evaluated here."""
    policy = json.loads(document)
    if set(policy) != {"Version", "Statement"} or policy["Version"] != "2012-10-17":
        raise ValueError("not a document of version 2012-10-17")
    return tuple(_statement(each) for each in policy["Statement"])


def is_allowed(access: Access, policy: Policy, bucket_policy: Policy = ()) -> bool:
    """The verdict for somebody with ``policy``, in a bucket with ``bucket_policy`` (which may only deny here)."""
    if any(each.allow for each in bucket_policy):
        raise ValueError("a bucket policy that allows is not evaluated here")
    together = policy + bucket_policy
    if any(not each.allow and each.covers(access) for each in together):
        return False
    return any(each.allow and each.covers(access) for each in together)


def _statement(members: dict[str, Any]) -> Statement:
    if unknown := set(members) - _MEMBERS:
        raise ValueError(f"not evaluated here: {sorted(unknown)}")
    if members.get("Principal", "*") != "*" or members["Effect"] not in ("Allow", "Deny"):
        raise ValueError("not evaluated here: principals, other effects")
    conditions = []
    for operator, keys in members.get("Condition", {}).items():
        if operator != "Null" and operator.removesuffix("IfExists") not in _OPERATORS:
            raise ValueError(f"not evaluated here: {operator}")
        conditions += [Condition(operator, key, _texts(values)) for key, values in keys.items()]
    return Statement(
        members["Sid"],
        members["Effect"] == "Allow",
        _texts(members["Action"]),
        _texts(members["Resource"]),
        tuple(conditions),
    )


def _texts(value: Any) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else tuple(value)
    if not texts or not all(isinstance(each, str) for each in texts):
        raise ValueError(f"neither a text nor a list of texts: {value!r}")
    return texts


def _like(pattern: str, value: str) -> bool:
    return _pattern(pattern).fullmatch(value) is not None


@cache
def _pattern(text: str) -> re.Pattern[str]:
    pieces = {"*": ".*", "?": "."}
    return re.compile("".join(pieces.get(each) or re.escape(each) for each in text), re.DOTALL)


def _equal(wanted: str, value: str) -> bool:
    return wanted == value


_OPERATORS: dict[str, Callable[[str, str], bool]] = {
    "StringEquals": _equal,
    "StringLike": _like,
    "Bool": _equal,
}
