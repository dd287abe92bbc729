"""The policies of terraform/ are enough for each role's real work, and for nothing else (P2, P4, P10; EDGE 43).

The work is done once, by ``tl`` itself with each role's credentials, on SeaweedFS behind a gate that evaluates the
rendered policy files; what it took is recorded, and the tests look at that.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.fix_stores import BUCKET, fresh_prefix
from tests.support.iam_policy import Policy, is_allowed
from tests.support.policy_gate import PolicyGate, Seen, running_gate
from tests.support.postgres import PostgresServer, scratch
from tests.support.s3_access import object_arn
from tests.support.seaweed import Seaweed
from tests.support.store_roles import ENCRYPTION, ROLES, policy_of
from tests.support.tl_host import Host, make_host
from timeline.catalog.branch_log import BranchLog, read_head
from timeline.clock import Micros, SystemClock
from timeline.errors import NotFound, UsageError
from timeline.format import keys
from timeline.format.pin import Pin, encode_pin
from timeline.ids import MAIN
from timeline.maintain.seal import seal
from timeline.store.base import Refused
from timeline.store.s3 import S3Store

pytestmark = [pytest.mark.fuse, pytest.mark.xdist_group("store-policies")]

CLOCK = SystemClock()
ROWS = 300
CREATE_ONLY = "s3:if-none-match"


@dataclass(frozen=True, slots=True)
class Stage:
    """A store, the gate before it, and what the roles' work took."""

    gate: PolicyGate
    server: Seaweed
    prefix: str
    seen: dict[str, tuple[Seen, ...]]

    def store(self) -> S3Store:
        """The store, for ``acting_as``."""
        return S3Store(BUCKET, self.prefix, endpoint_url=self.gate.endpoint_url)

    def objects(self) -> dict[str, str]:
        """Everything in the bucket, with ETags."""
        pages = self.server.client().get_paginator("list_objects_v2").paginate(Bucket=BUCKET)
        return {each["Key"]: each["ETag"] for page in pages for each in page.get("Contents", ())}

    def some(self, kind: str) -> str:
        """A key that exists, prefix included."""
        return next(key for key in self.objects() if key.startswith(f"{self.prefix}/{kind}"))


@pytest.fixture(scope="module")
def stage(seaweed: Seaweed, make_postgres_session: Callable[..., PostgresServer]) -> Iterator[Stage]:
    """All roles at work, one after the other."""
    with ExitStack() as stack:
        gate = stack.enter_context(running_gate(seaweed.endpoint_url, ENCRYPTION))
        place = scratch("tl-roles-")
        stack.callback(shutil.rmtree, place, ignore_errors=True)
        prefix = fresh_prefix()
        for role in ROLES:
            gate.users[role] = policy_of(role, BUCKET, prefix, ENCRYPTION)
        gate.bucket_policy = policy_of("bucket", BUCKET, prefix)
        work = _Work(gate, prefix, place, make_postgres_session(15))
        seen = {}
        # The maintainer last: it deletes what the others leave behind.
        for role in sorted(ROLES, key=lambda role: role == "maintainer"):
            gate.seen.clear()
            getattr(work, role)()
            seen[role] = tuple(gate.seen)
            assert {each.user for each in seen[role]} == {role}
        gate.bucket_policy = ()
        # The collector has taken all chunks that there were.
        seaweed.client().put_object(
            Bucket=BUCKET, Key=f"{prefix}/wal/main/1/0000000000000001", Body=b"a chunk"
        )
        yield Stage(gate, seaweed, prefix, seen)


class _Work:
    """What each role is there for."""

    def __init__(self, gate: PolicyGate, prefix: str, place: Path, source: PostgresServer) -> None:
        self.gate = gate
        self.prefix = prefix
        self.place = place
        self.source = source

    def host(self, role: str) -> Host:
        url = f"s3://{BUCKET}/{self.prefix}"
        source = self.source.conninfo if role == "archiver" else None
        host = make_host(self.place / role, url, source=source, endpoint_url=self.gate.endpoint_url)
        return replace(host, environment=host.environment | {"AWS_ACCESS_KEY_ID": role})

    def as_store(self, role: str, work: Callable[[S3Store], Any]) -> None:
        """Work on the store itself."""
        acting_as(role, lambda: S3Store(BUCKET, self.prefix, endpoint_url=self.gate.endpoint_url), work)

    def archiver(self) -> None:
        """Makes the store; streams, with a base backup first."""
        host = self.host("archiver")
        host.tl("init", host.store, "--source", self.source.conninfo)
        host.tl("archive", "--once")
        self.source.sql(f"create table t as select generate_series(1, {ROWS}) n")
        host.tl("archive", "--once")

        async def be_killed(store: S3Store) -> None:
            await store.create(keys.pack("f" * 64), b"what a killed archiver leaves behind")
            await store.create(keys.manifest("f" * 64), b"what a killed archiver leaves behind")

        self.as_store("archiver", be_killed)

    def brancher(self) -> None:
        """Makes a branch, which is pinned."""
        host = self.host("brancher")
        try:
            result = host.tl("branch", "look")
            with psycopg.connect(result["dsn"], autocommit=True) as conn:
                assert conn.execute("select count(*) from t").fetchone() == (ROWS,)
            self._wait_for_pin()
            host.tl("delete", "look", "--yes")
        finally:
            host.end_agent()

        async def have_branched(store: S3Store) -> None:
            head = await read_head(store, MAIN)
            assert head is not None
            pin = Pin("0" * 32, MAIN, head.state.snapshots[-1], Micros(2), Micros(1), "a branch that is gone")
            await store.create(keys.pin(pin.id), encode_pin(pin))

        self.as_store("brancher", have_branched)

    def _wait_for_pin(self) -> None:
        """The mount pins in the background."""
        pins = object_arn(BUCKET, f"{self.prefix}/{keys.PINS}")
        for _ in range(600):
            if any(each.access.resource.startswith(pins) for each in tuple(self.gate.seen)):
                return
            time.sleep(0.05)
        raise AssertionError("the branch was not pinned")

    def reader(self) -> None:
        """Restores."""
        home = self.place / "home"
        self.source.make_directory(home)
        self.host("reader").tl("restore", str(home / "data"))
        assert (home / "data" / "global" / "pg_control").exists()

    def drill(self) -> None:
        """Recovers from the store alone, and leaves its evidence."""
        result = self.host("drill").tl("drill", "--mode", "copy", "--assert", "select count(*) = 300 from t")
        assert result["result"] == "passed"

    def maintainer(self) -> None:
        """Builds a snapshot, looks at store and bucket, seals, collects."""
        host = self.host("maintainer")
        assert host.tl("snapshot")
        found = {each["code"]: each for each in host.tl("doctor")["findings"]}
        for code in ("store-create", "conditional-create", "store-delete"):
            assert found[code]["severity"] == "ok", found[code]
        for code in ("lifecycle", "versioning", "object-lock"):
            assert "could not look" not in found[code]["what"], found[code]

        async def seal_all(store: S3Store) -> None:
            await seal(store, BranchLog(store, MAIN, CLOCK, CLOCK.token(8)), CLOCK, force=True)

        self.as_store("maintainer", seal_all)
        for _ in range(2):
            host.tl("gc", "--yes", "--grace", "0.01s")

        async def forget(store: S3Store) -> None:
            # The collector deletes entries from the hundredth on; nobody reads this one any more.
            log = await store.list(keys.log_prefix(MAIN))
            await store.delete([log[-1].key])

        self.as_store("maintainer", forget)


def acting_as(role: str, opened: Callable[[], S3Store], work: Callable[[S3Store], Any]) -> None:
    """Work on a store with the credentials of this role."""

    async def run() -> None:
        store = opened()
        try:
            await work(store)
        finally:
            await store.aclose()

    kept = os.environ["AWS_ACCESS_KEY_ID"]
    os.environ["AWS_ACCESS_KEY_ID"] = role
    try:
        asyncio.run(run())
    finally:
        os.environ["AWS_ACCESS_KEY_ID"] = kept


# --- enough --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ROLES)
def test_a_role_may_do_its_work(stage: Stage, role: str) -> None:
    """P10. That the work was done is asserted where it is done; here: nothing was refused on the way.

    One thing is: `tl init` removes the objects with which it tried the server, where it may.
    """
    refused = {
        (each.access.action, each.access.resource.partition(stage.prefix)[2].split("/")[1])
        for each in stage.seen[role]
        if not each.allowed
    }
    assert refused == ({("s3:DeleteObject", "probe")} if role == "archiver" else set())


# --- nothing else --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ROLES)
def test_nothing_can_be_taken_from_a_policy(stage: Stage, role: str) -> None:
    """Without any one action, or any one resource of a statement, some step of the role's work is refused."""
    policy = policy_of(role, BUCKET, stage.prefix, ENCRYPTION)
    needed = [each.access for each in stage.seen[role] if each.allowed]
    assert all(is_allowed(access, policy) for access in needed)
    superfluous = [
        name
        for at, statement in enumerate(policy)
        for name, narrower in statement.narrower()
        if all(is_allowed(access, (*policy[:at], narrower, *policy[at + 1 :])) for access in needed)
    ]
    assert superfluous == []


Attempt = Callable[[Any, Stage], Any]
_CONFIGURATION: dict[str, Attempt] = {
    "versioning": lambda s3, _: s3.put_bucket_versioning(
        Bucket=BUCKET, VersioningConfiguration={"Status": "Suspended"}
    ),
    "lifecycle": lambda s3, _: s3.put_bucket_lifecycle_configuration(
        Bucket=BUCKET,
        LifecycleConfiguration={
            "Rules": [{"Status": "Enabled", "Filter": {"Prefix": ""}, "Expiration": {"Days": 1}}]
        },
    ),
    "no lifecycle": lambda s3, _: s3.delete_bucket_lifecycle(Bucket=BUCKET),
    "policy": lambda s3, _: s3.put_bucket_policy(Bucket=BUCKET, Policy="{}"),
    "no policy": lambda s3, _: s3.delete_bucket_policy(Bucket=BUCKET),
    "encryption": lambda s3, _: s3.delete_bucket_encryption(Bucket=BUCKET),
    "public": lambda s3, _: s3.delete_public_access_block(Bucket=BUCKET),
    "lock": lambda s3, _: s3.put_object_lock_configuration(
        Bucket=BUCKET, ObjectLockConfiguration={"ObjectLockEnabled": "Enabled"}
    ),
    "bucket": lambda s3, _: s3.delete_bucket(Bucket=BUCKET),
}


def _put(kind: str, **more: Any) -> Attempt:
    return lambda s3, stage: s3.put_object(Bucket=BUCKET, Key=f"{stage.prefix}/{kind}", Body=b"new", **more)


def _overwrite(kind: str) -> Attempt:
    return lambda s3, stage: s3.put_object(Bucket=BUCKET, Key=stage.some(kind), Body=b"other")


def _delete(kind: str, **more: Any) -> Attempt:
    return lambda s3, stage: s3.delete_object(Bucket=BUCKET, Key=stage.some(kind), **more)


_CHUNK = "wal/main/1/00000000000000ff"
_FORBIDDEN: dict[str, dict[str, Attempt]] = {
    "archiver": {
        "delete a chunk": _delete("wal/"),
        "delete a log entry": _delete("branches/"),
        "delete a pack": _delete("packs/"),
        "write unconditionally": _put(_CHUNK),
        "write where it is": _put(_CHUNK, IfMatch='"0"'),
        "overwrite a pack": _overwrite("packs/"),
        "overwrite tl.json": _overwrite("tl.json"),
        "upload in parts": lambda s3, stage: s3.create_multipart_upload(
            Bucket=BUCKET, Key=f"{stage.prefix}/{_CHUNK}"
        ),
        "copy": lambda s3, stage: s3.copy_object(
            Bucket=BUCKET,
            Key=f"{stage.prefix}/{_CHUNK}",
            CopySource={"Bucket": BUCKET, "Key": stage.some("packs/")},
        ),
        "pin": _put("pins/x", IfNoneMatch="*"),
        "mark": _put("marks/x", IfNoneMatch="*"),
        "give evidence": _put("drills/x", IfNoneMatch="*"),
    },
    "maintainer": {
        "delete tl.json": _delete("tl.json"),
        "delete evidence": _delete("drills/"),
        "delete a version": _delete("packs/", VersionId="1"),
        "lift a retention": _delete("packs/", BypassGovernanceRetention=True),
        "write unconditionally": _put("packs/00/x"),
        "overwrite a manifest": _overwrite("manifests/"),
        "write WAL": _put(_CHUNK, IfNoneMatch="*"),
        "write tl.json": _put("tl.json", IfNoneMatch="*"),
    },
    "brancher": {
        "write WAL": _put(_CHUNK, IfNoneMatch="*"),
        "commit": _put("branches/main/log/00000000000000000001.json", IfNoneMatch="*"),
        "pin unconditionally": _put("pins/x"),
        "delete a pin": _delete("pins/"),
        "give evidence": _put("drills/x", IfNoneMatch="*"),
    },
    "reader": {
        "write": _put("x", IfNoneMatch="*"),
        "pin": _put("pins/x", IfNoneMatch="*"),
        "delete a chunk": _delete("wal/"),
        "overwrite a chunk": _overwrite("wal/"),
    },
    "drill": {
        "write WAL": _put(_CHUNK, IfNoneMatch="*"),
        "pin": _put("pins/x", IfNoneMatch="*"),
        "give evidence unconditionally": _put("drills/x"),
        "change its evidence": _overwrite("drills/"),
        "delete its evidence": _delete("drills/"),
        "delete a pack": _delete("packs/"),
    },
}
_ELSEWHERE: dict[str, Attempt] = {
    "read": lambda s3, _: s3.get_object(Bucket=BUCKET, Key="other/tl.json"),
    "list": lambda s3, _: s3.list_objects_v2(Bucket=BUCKET, Prefix="other/"),
    "write": lambda s3, _: s3.put_object(Bucket=BUCKET, Key="other/wal/x", Body=b"", IfNoneMatch="*"),
    "delete": lambda s3, _: s3.delete_object(Bucket=BUCKET, Key="other/tl.json"),
    "beside": lambda s3, stage: s3.list_objects_v2(Bucket=BUCKET, Prefix=stage.prefix),
}


@pytest.mark.parametrize("role", ROLES)
def test_everything_else_is_refused(stage: Stage, role: str) -> None:
    """P2, P4, EDGE 43: deleting, overwriting, foreign kinds of objects, the bucket itself, other stores in it."""
    client = stage.gate.client(role)
    before = stage.objects()
    granted = []
    for group in (_FORBIDDEN[role], _CONFIGURATION, _ELSEWHERE):
        for name, attempt in group.items():
            try:
                attempt(client, stage)
                granted.append(name)
            except client.exceptions.ClientError as error:
                if error.response["Error"]["Code"] not in ("AccessDenied", "403"):
                    granted.append(f"{name}: {error}")
    assert granted == []
    assert stage.objects() == before


@pytest.mark.parametrize("role", [role for role in ROLES if role != "maintainer"])
def test_a_deletion_of_many_deletes_nothing(stage: Stage, role: str) -> None:
    """S3 answers it with 200, and refuses key by key."""
    before = stage.objects()
    wanted = [stage.some(kind).removeprefix(f"{stage.prefix}/") for kind in ("tl.json", "wal/", "packs/")]
    found: list[Refused] = []

    async def work(store: S3Store) -> None:
        found.extend(await store.delete(wanted))

    acting_as(role, stage.store, work)
    assert stage.objects() == before
    assert [each.key for each in found] == wanted
    assert all("AccessDenied" in each.reason for each in found)


def test_somebody_without_a_role_may_do_nothing(stage: Stage) -> None:
    client = stage.gate.client("stranger")
    with pytest.raises(client.exceptions.ClientError, match="AccessDenied"):
        client.get_object(Bucket=BUCKET, Key=f"{stage.prefix}/tl.json")


# --- it is the text that decides -----------------------------------------------------------------------------


@pytest.fixture
def changed(stage: Stage) -> Iterator[Callable[[str, Policy], Any]]:
    """Gives a role another policy until the test ends; its client."""
    kept = dict(stage.gate.users)

    def change(role: str, policy: Policy) -> Any:
        stage.gate.users[role] = policy
        return stage.gate.client(role)

    yield change
    stage.gate.users.clear()
    stage.gate.users.update(kept)
    stage.gate.bucket_policy = ()


def test_it_is_the_condition_that_refuses_unconditional_writes(
    stage: Stage, changed: Callable[[str, Policy], Any]
) -> None:
    """P2: without it in the text the very same request overwrites."""
    key = f"{stage.prefix}/probe/overwritten"
    text = stage.gate.users["archiver"]
    client = stage.gate.client("archiver")
    client.put_object(Bucket=BUCKET, Key=key, Body=b"first", IfNoneMatch="*")
    with pytest.raises(client.exceptions.ClientError, match="AccessDenied"):
        client.put_object(Bucket=BUCKET, Key=key, Body=b"second")
    with pytest.raises(client.exceptions.ClientError, match="PreconditionFailed"):
        client.put_object(Bucket=BUCKET, Key=key, Body=b"second", IfNoneMatch="*")
    client = changed("archiver", tuple(each.without_condition(CREATE_ONLY) for each in text))
    client.put_object(Bucket=BUCKET, Key=key, Body=b"second")
    assert stage.server.client().get_object(Bucket=BUCKET, Key=key)["Body"].read() == b"second"


def test_the_bucket_refuses_unconditional_writes_of_anybody(
    stage: Stage, changed: Callable[[str, Policy], Any]
) -> None:
    """P2: also of those to whom another policy grants everything."""
    text = stage.gate.users["archiver"]
    everything = replace(text[0], actions=("*",), resources=("*",), conditions=())
    client = changed("archiver", (everything,))
    client.put_object(Bucket=BUCKET, Key=f"{stage.prefix}/probe/anybody", Body=b"1")
    stage.gate.bucket_policy = policy_of("bucket", BUCKET, stage.prefix)
    with pytest.raises(client.exceptions.ClientError, match="AccessDenied"):
        client.put_object(Bucket=BUCKET, Key=f"{stage.prefix}/probe/anybody", Body=b"2")
    client.put_object(Bucket=BUCKET, Key=f"{stage.prefix}/probe/else", Body=b"2", IfNoneMatch="*")
    client.put_object(Bucket=BUCKET, Key="elsewhere", Body=b"2")
    client.delete_object(Bucket=BUCKET, Key="elsewhere")


def test_what_does_not_exist_is_told_from_what_is_forbidden(
    stage: Stage, changed: Callable[[str, Policy], Any]
) -> None:
    """S3 asks for s3:ListBucket, without any prefix, before it says 404: hence IfExists in the listing's condition."""
    text = stage.gate.users["reader"]
    outcomes: list[str] = []

    async def work(store: S3Store) -> None:
        try:
            await store.get("packs/00/none")
        except (NotFound, UsageError) as error:
            outcomes.append(type(error).__name__)

    acting_as("reader", stage.store, work)
    strict = tuple(
        replace(
            each,
            conditions=tuple(
                replace(one, operator=one.operator.removesuffix("IfExists")) for one in each.conditions
            ),
        )
        for each in text
    )
    changed("reader", strict)
    acting_as("reader", stage.store, work)
    assert outcomes == ["NotFound", "UsageError"]
