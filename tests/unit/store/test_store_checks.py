"""What `tl doctor` finds out about a store: verbs, buckets, directories."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections import namedtuple
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.fix_stores import StoreFactory
from tests.support.moto_server import MotoServer
from timeline.errors import Unavailable, UsageError
from timeline.findings import Finding, Severity
from timeline.store.base import Refused
from timeline.store.bucket_checks import check_bucket, judge_lifecycle
from timeline.store.directory_checks import LITTLE_BYTES, SCARCE_BYTES, check_directory
from timeline.store.memory import MemoryStore
from timeline.store.verb_checks import PROBE_KEY, check_verbs

KNOWN = "tl.json"
_numbers = iter(range(1, 1000))


def verdicts(found: Sequence[Finding]) -> dict[str, Severity]:
    return {one.code: one.severity for one in found}


# --- verbs ---------------------------------------------------------------------------------------------------


def test_every_store_grants_all_and_keeps_nothing(each_store: StoreFactory) -> None:
    async def work() -> None:
        async with each_store() as store:
            await store.create(KNOWN, b"{}")
            found = verdicts(await check_verbs(store, known_key=KNOWN, read_only=False))
            assert found == dict.fromkeys(
                ("store-list", "store-read", "store-create", "conditional-create", "store-delete"),
                Severity.OK,
            )
            assert [item.key for item in await store.list("")] == [KNOWN]

    asyncio.run(work())


def test_read_only_writes_nothing() -> None:
    class NoWriting(MemoryStore):
        async def create(self, key: str, data: bytes | memoryview) -> bool:
            raise AssertionError("a write")

    found = verdicts(asyncio.run(check_verbs(NoWriting(), known_key=KNOWN, read_only=True)))
    assert found == {"store-list": Severity.OK, "store-empty": Severity.NOTE}


@pytest.mark.parametrize("whole", [True, False])
def test_where_nothing_can_be_deleted_one_object_stays(whole: bool) -> None:
    """EDGE 43: archivers need no delete, so its refusal is a note, however often it is met."""

    class Worm(MemoryStore):
        async def delete(self, keys: Sequence[str]) -> Sequence[Refused]:
            if whole:
                raise UsageError("not allowed to delete", hint="grant s3:DeleteObject")
            return tuple(Refused(key, "AccessDenied") for key in keys)

    async def work() -> None:
        store = Worm()
        for _ in range(3):
            found = await check_verbs(store, known_key=KNOWN, read_only=False)
            assert verdicts(found)["store-delete"] is Severity.NOTE
            assert verdicts(found)["conditional-create"] is Severity.OK
        assert [item.key for item in await store.list("")] == [PROBE_KEY]

    asyncio.run(work())


def test_a_store_that_overwrites_is_an_error() -> None:
    class Overwriting(MemoryStore):
        async def create(self, key: str, data: bytes | memoryview) -> bool:
            await self.delete([key])
            return await super().create(key, data)

    async def work() -> None:
        store = Overwriting()
        found = await check_verbs(store, known_key=KNOWN, read_only=False)
        assert verdicts(found)["conditional-create"] is Severity.ERROR
        assert await store.list("") == []

    asyncio.run(work())


def test_refusals_name_their_cure() -> None:
    class Closed(MemoryStore):
        async def create(self, key: str, data: bytes | memoryview) -> bool:
            raise UsageError("not allowed to write", hint="grant s3:PutObject")

        async def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
            raise UsageError("not allowed to read", hint="grant s3:GetObject")

    found = asyncio.run(check_verbs(Closed(), known_key=KNOWN, read_only=False))
    errors = {one.code: one.cure for one in found if one.severity is Severity.ERROR}
    assert errors == {"store-read": "grant s3:GetObject", "store-create": "grant s3:PutObject"}


def test_a_silent_store_is_one_finding() -> None:
    class Silent(MemoryStore):
        async def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
            raise Unavailable("no answer")

    found = asyncio.run(check_verbs(Silent(), known_key=KNOWN, read_only=False))
    assert verdicts(found) == {"store-unreachable": Severity.ERROR}


# --- buckets -------------------------------------------------------------------------------------------------


@pytest.fixture
def bucket(moto: MotoServer) -> str:
    return moto.make_bucket(f"doctor-{next(_numbers)}")


def bucket_findings(moto: MotoServer, bucket: str, prefix: str = "prod/") -> list[Finding]:
    return asyncio.run(check_bucket(bucket, prefix, endpoint_url=moto.endpoint_url, region=None))


def test_a_plain_bucket(moto: MotoServer, bucket: str) -> None:
    assert verdicts(bucket_findings(moto, bucket)) == {
        "lifecycle": Severity.OK,
        "versioning": Severity.NOTE,
        "object-lock": Severity.OK,
    }


def test_a_versioned_bucket(moto: MotoServer, bucket: str) -> None:
    moto.client().put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    assert verdicts(bucket_findings(moto, bucket))["versioning"] is Severity.OK


def test_lifecycle_rules_that_take_live_objects(moto: MotoServer, bucket: str) -> None:
    moto.client().put_bucket_lifecycle_configuration(
        Bucket=bucket,
        LifecycleConfiguration={
            "Rules": [
                {"ID": "old", "Status": "Enabled", "Filter": {"Prefix": ""}, "Expiration": {"Days": 30}},
                {
                    "ID": "cold",
                    "Status": "Enabled",
                    "Filter": {"Prefix": "prod/packs/"},
                    "Transitions": [{"Days": 30, "StorageClass": "GLACIER"}],
                },
            ]
        },
    )
    found = bucket_findings(moto, bucket)
    errors = [one for one in found if one.severity is Severity.ERROR]
    assert [one.code for one in errors] == ["lifecycle-expiration", "lifecycle-offline"]
    assert "'old'" in errors[0].what and "GLACIER" in errors[1].what
    assert all(one.cure for one in errors)


@pytest.mark.parametrize(
    "rule",
    [
        {"Status": "Disabled", "Expiration": {"Days": 1}},
        {"Status": "Enabled", "Filter": {"Prefix": "logs/"}, "Expiration": {"Days": 1}},
        {"Status": "Enabled", "Filter": {"Tag": {"Key": "a", "Value": "b"}}, "Expiration": {"Days": 1}},
        {"Status": "Enabled", "Filter": {"And": {"Prefix": "", "Tags": [{}]}}, "Expiration": {"Days": 1}},
        {"Status": "Enabled", "Expiration": {"ExpiredObjectDeleteMarker": True}},
        {"Status": "Enabled", "NoncurrentVersionExpiration": {"NoncurrentDays": 9}},
        {"Status": "Enabled", "AbortIncompleteMultipartUpload": {"DaysAfterInitiation": 1}},
    ],
)
def test_harmless_rules(rule: dict[str, Any]) -> None:
    assert verdicts(judge_lifecycle([rule], "prod/")) == {"lifecycle": Severity.OK}


@pytest.mark.parametrize("named", ["", "pro", "prod/", "prod/wal/"])
def test_rules_that_reach_the_store(named: str) -> None:
    old_form = {"Status": "Enabled", "Prefix": named, "Expiration": {"Date": "2027-01-01"}}
    assert verdicts(judge_lifecycle([old_form], "prod/")) == {"lifecycle-expiration": Severity.ERROR}
    warm = {
        "Status": "Enabled",
        "Filter": {"Prefix": named},
        "Transitions": [{"StorageClass": "STANDARD_IA"}],
    }
    assert verdicts(judge_lifecycle([warm], "prod/")) == {"lifecycle-transition": Severity.NOTE}


def test_what_may_not_be_looked_at_is_a_note(moto: MotoServer) -> None:
    found = bucket_findings(moto, "no-such-bucket-here")
    assert set(verdicts(found).values()) == {Severity.NOTE}
    assert all("could not look" in one.what and one.cure for one in found)


# --- directories ---------------------------------------------------------------------------------------------


@pytest.fixture
def free_bytes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    usage = namedtuple("usage", "total used free")
    yield lambda free: monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1 << 40, 0, free))


def test_a_directory_that_does_not_exist_yet(tmp_path: Path, free_bytes: Callable[[int], None]) -> None:
    free_bytes(SCARCE_BYTES)
    assert verdicts(check_directory(tmp_path / "a/b", read_only=False)) == {"directory-space": Severity.OK}
    assert not (tmp_path / "a").exists()


def test_little_room(tmp_path: Path, free_bytes: Callable[[int], None]) -> None:
    free_bytes(LITTLE_BYTES)
    assert verdicts(check_directory(tmp_path, read_only=False))["directory-space"] is Severity.WARNING
    free_bytes(LITTLE_BYTES - 1)
    assert verdicts(check_directory(tmp_path, read_only=False))["directory-space"] is Severity.ERROR


def test_a_directory_that_others_can_read(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    assert verdicts(check_directory(tmp_path, read_only=True)) == {"directory-open": Severity.WARNING}
    tmp_path.chmod(0o750)
    assert check_directory(tmp_path, read_only=True) == []


def test_no_permission_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may write everywhere, so there the kernel's answer is made up."""
    tmp_path.chmod(0o550)
    if os.geteuid() == 0:
        monkeypatch.setattr(os, "access", lambda _, mode: not mode & os.W_OK)
    found = verdicts(check_directory(tmp_path, read_only=False))
    assert found["directory-permission"] is Severity.ERROR
    assert "directory-permission" not in verdicts(check_directory(tmp_path, read_only=True))
