"""What a bucket says of itself that endangers a store in it: lifecycle rules above all.

Looks only. What may not be looked at is a note: whoever archives needs no such permission.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from timeline.errors import TimelineError
from timeline.findings import Finding, Severity

_AREA = "store"
_OFFLINE = ("GLACIER", "DEEP_ARCHIVE")
"""Storage classes from which an object must be fetched back before it can be read."""
_SECONDS = 20.0
"""For each question, the connection included."""


async def check_bucket(
    bucket: str, prefix: str, *, endpoint_url: str | None, region: str | None
) -> list[Finding]:
    """Findings about the bucket of the store below ``prefix``."""
    from timeline.store import _s3_client

    try:
        context = _s3_client.client_context(
            endpoint_url=endpoint_url, region=region, connections=2, connect_seconds=5.0, read_seconds=15.0
        )
        async with context as client:
            return [
                *await _lifecycle(client, bucket, prefix),
                *await _versioning(client, bucket),
                *await _object_lock(client, bucket),
            ]
    except TimelineError as error:
        return [Finding(_AREA, Severity.ERROR, "bucket", error.message, error.hint)]


def judge_lifecycle(rules: list[Mapping[str, Any]], prefix: str) -> list[Finding]:
    """What lifecycle rules would do to objects below ``prefix`` (as S3 answers them). Pure."""
    found = []
    for rule in rules:
        if rule.get("Status") != "Enabled" or not _applies(rule, prefix):
            continue
        name = rule.get("ID") or "without a name"
        expiration = rule.get("Expiration") or {}
        if "Days" in expiration or "Date" in expiration:
            when = f"after {expiration['Days']} days" if "Days" in expiration else f"on {expiration['Date']}"
            found.append(
                Finding(
                    _AREA,
                    Severity.ERROR,
                    "lifecycle-expiration",
                    f"lifecycle rule {name!r} deletes objects of the store {when}, whether they are needed or not",
                    "exclude the store's prefix from that rule; only `tl gc` knows what is garbage",
                )
            )
        classes = [str(step.get("StorageClass")) for step in rule.get("Transitions") or ()]
        offline = sorted(set(classes) & set(_OFFLINE))
        if offline:
            found.append(
                Finding(
                    _AREA,
                    Severity.ERROR,
                    "lifecycle-offline",
                    f"lifecycle rule {name!r} moves objects of the store to {', '.join(offline)}, "
                    "from where they cannot be read at once",
                    "exclude the store's prefix from that rule; GLACIER_IR and STANDARD_IA can be read",
                )
            )
        elif classes:
            found.append(
                Finding(
                    _AREA,
                    Severity.NOTE,
                    "lifecycle-transition",
                    f"lifecycle rule {name!r} moves objects of the store to {', '.join(sorted(set(classes)))}: "
                    "each branch and verification then pays for reading them",
                    "none needed, if that is meant",
                )
            )
    return found or [Finding(_AREA, Severity.OK, "lifecycle", "no lifecycle rule touches the store")]


def _applies(rule: Mapping[str, Any], prefix: str) -> bool:
    scope = rule.get("Filter") or {}
    both = scope.get("And") or {}
    if "Tag" in scope or both.get("Tags"):
        # Our objects carry no tags.
        return False
    named = str(scope.get("Prefix") or both.get("Prefix") or rule.get("Prefix") or "")
    return prefix.startswith(named) or named.startswith(prefix)


async def _lifecycle(client: Any, bucket: str, prefix: str) -> list[Finding]:
    answer = await _ask(client.get_bucket_lifecycle_configuration, bucket, "NoSuchLifecycleConfiguration")
    if isinstance(answer, str):
        return [_unseen("lifecycle", "lifecycle rules", answer, "s3:GetLifecycleConfiguration")]
    return judge_lifecycle(answer.get("Rules") or [], prefix)


async def _versioning(client: Any, bucket: str) -> list[Finding]:
    answer = await _ask(client.get_bucket_versioning, bucket)
    if isinstance(answer, str):
        return [_unseen("versioning", "versioning", answer, "s3:GetBucketVersioning")]
    if answer.get("Status") == "Enabled":
        what = (
            "the bucket keeps versions: what is deleted stays, and costs, until a rule removes old versions"
        )
        return [Finding(_AREA, Severity.OK, "versioning", what)]
    return [
        Finding(
            _AREA,
            Severity.NOTE,
            "versioning",
            "the bucket keeps no versions: whoever may delete can delete the history for good",
            "enable versioning, with a rule that removes old versions after some weeks; or Object Lock",
        )
    ]


async def _object_lock(client: Any, bucket: str) -> list[Finding]:
    answer = await _ask(client.get_object_lock_configuration, bucket, "ObjectLockConfigurationNotFoundError")
    if isinstance(answer, str):
        return [_unseen("object-lock", "Object Lock", answer, "s3:GetBucketObjectLockConfiguration")]
    configuration = answer.get("ObjectLockConfiguration") or {}
    if configuration.get("ObjectLockEnabled") != "Enabled":
        return [Finding(_AREA, Severity.OK, "object-lock", "the bucket has no Object Lock")]
    retention = (configuration.get("Rule") or {}).get("DefaultRetention") or {}
    years = f"{retention.get('Years')} years"
    length = f"{retention['Days']} days" if "Days" in retention else years
    held = f", {retention.get('Mode')} for {length}"
    return [
        Finding(
            _AREA,
            Severity.OK,
            "object-lock",
            f"the bucket has Object Lock{held if retention else ''}: garbage stays at least as long",
        )
    ]


async def _ask(question: Any, bucket: str, nothing: str = "") -> Mapping[str, Any] | str:
    """The answer, empty where the bucket has nothing of the kind (error code ``nothing``); or why there is none."""
    from timeline.store import _s3_client

    try:
        async with asyncio.timeout(_SECONDS):
            answer: Mapping[str, Any] = await question(Bucket=bucket)
            return answer
    except _s3_client.FAILURES as error:
        code = _s3_client.code_of(error)
        if nothing and code == nothing:
            return {}
        return code or str(_s3_client.status_of(error) or type(error).__name__)


def _unseen(code: str, what: str, answer: str, action: str) -> Finding:
    return Finding(
        _AREA,
        Severity.NOTE,
        code,
        f"could not look at the bucket's {what}: {answer}",
        f"grant {action}, or look yourself",
    )
