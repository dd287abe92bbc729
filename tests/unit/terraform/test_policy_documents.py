"""The policies of terraform/ as IAM reads them: conditions, prefixes, keys of KMS (P2, P4; EDGE 43).

The evaluator that says so is tested beside them, and against the one in moto, which knows actions and resources only.
"""

from __future__ import annotations

import json
import urllib.request
from dataclasses import replace
from typing import Any

import boto3
import pytest

from tests.support.iam_policy import Access, Condition, Policy, is_allowed, parse_policy
from tests.support.moto_server import running_moto
from tests.support.policy_template import render
from tests.support.s3_access import bucket_arn, object_arn
from tests.support.seaweed import boto3_client
from tests.support.store_roles import ENCRYPTION, ROLES, policy_of, template, values_of

BUCKET = "some-bucket"
CREATE = (("s3:if-none-match", "*"),)
KINDS = (
    "tl.json",
    "branches/main/log/1.json",
    "drills/1",
    "manifests/1",
    "marks/1",
    "packs/00/1",
    "pins/1",
    "wal/main/1/0",
)
CREATES = {
    "archiver": {"tl.json", "branches", "manifests", "packs", "wal"},
    "maintainer": {"branches", "manifests", "marks", "packs"},
    "brancher": {"pins"},
    "reader": set(),
    "drill": {"drills"},
}
DELETES = {"branches", "manifests", "marks", "packs", "pins", "wal"}


def kind_of(key: str) -> str:
    return key.partition("/")[0]


@pytest.mark.parametrize("prefix", ["", "prod", "a/b"])
@pytest.mark.parametrize("role", ROLES)
def test_what_a_role_may_do_to_each_kind_of_object(role: str, prefix: str) -> None:
    policy = policy_of(role, BUCKET, prefix)

    def may(action: str, key: str, context: tuple[tuple[str, str], ...] = ()) -> bool:
        below = f"{prefix}/{key}" if prefix else key
        return is_allowed(Access(action, object_arn(BUCKET, below), context), policy)

    for key in KINDS:
        assert may("s3:GetObject", key)
        assert may("s3:PutObject", key, CREATE) == (kind_of(key) in CREATES[role])
        assert not may("s3:PutObject", key)
        assert not may("s3:PutObject", key, (("s3:if-match", '"etag"'),))
        assert may("s3:DeleteObject", key) == (role == "maintainer" and kind_of(key) in DELETES)
        for action in (
            "DeleteObjectVersion",
            "BypassGovernanceRetention",
            "PutObjectRetention",
            "PutObjectAcl",
        ):
            assert not may(f"s3:{action}", key, CREATE)


@pytest.mark.parametrize("role", ROLES)
def test_a_role_sees_nothing_beside_its_prefix(role: str) -> None:
    policy = policy_of(role, BUCKET, "prod")
    for key in ("tl.json", "prod", "production/tl.json", "other/prod/tl.json"):
        assert not is_allowed(Access("s3:GetObject", object_arn(BUCKET, key)), policy)
        assert not is_allowed(Access("s3:PutObject", object_arn(BUCKET, key), CREATE), policy)
        assert not is_allowed(Access("s3:DeleteObject", object_arn(BUCKET, key)), policy)
        assert not is_allowed(Access("s3:ListBucket", bucket_arn(BUCKET), (("s3:prefix", key),)), policy)
    assert is_allowed(Access("s3:ListBucket", bucket_arn(BUCKET), (("s3:prefix", "prod/wal/"),)), policy)
    assert not is_allowed(Access("s3:GetObject", object_arn(f"{BUCKET}2", "prod/tl.json")), policy)


@pytest.mark.parametrize("role", ROLES)
def test_a_key_of_kms_is_used_through_s3_only(role: str) -> None:
    policy = policy_of(role, BUCKET, "", ENCRYPTION)
    writes = role != "reader"
    for action, wanted in (
        ("kms:Decrypt", True),
        ("kms:GenerateDataKey", writes),
        ("kms:ScheduleKeyDeletion", False),
    ):
        assert is_allowed(ENCRYPTION.access(action), policy) == wanted
        assert not is_allowed(Access(action, ENCRYPTION.key_arn), policy)
        assert not is_allowed(replace(ENCRYPTION.access(action), resource=ENCRYPTION.key_arn + "0"), policy)
        assert not is_allowed(ENCRYPTION.access(action), policy_of(role, BUCKET))


def test_the_bucket_refuses_plain_http_and_unconditional_writes() -> None:
    everything = parse_policy(
        '{"Version":"2012-10-17","Statement":[{"Sid":"","Effect":"Allow","Action":"*","Resource":"*"}]}'
    )
    strict = policy_of("bucket", BUCKET, "prod")
    lax = parse_policy(render(template("bucket"), values_of(BUCKET, "prod", create_only=False)))
    put = Access("s3:PutObject", object_arn(BUCKET, "prod/x"))
    assert not is_allowed(put, everything, strict)
    assert is_allowed(put, everything, lax)
    assert is_allowed(replace(put, context=CREATE), everything, strict)
    assert is_allowed(replace(put, resource=object_arn(BUCKET, "production/x")), everything, strict)
    for secure in ("true", "false"):
        for resource in (bucket_arn(BUCKET), object_arn(BUCKET, "x")):
            access = Access("s3:GetObject", resource, (("aws:SecureTransport", secure),))
            assert is_allowed(access, everything, lax) == (secure == "true")


@pytest.mark.parametrize(
    ("condition", "value", "holds"),
    [
        (Condition("Null", "k", ("true",)), None, True),
        (Condition("Null", "k", ("true",)), "x", False),
        (Condition("Null", "k", ("false",)), "", True),
        (Condition("Null", "k", ("false",)), None, False),
        (Condition("StringEquals", "K", ("a", "b")), "b", True),
        (Condition("StringEquals", "k", ("a*",)), "ab", False),
        (Condition("StringEquals", "k", ("a",)), None, False),
        (Condition("StringLike", "k", ("a?c*",)), "abcd", True),
        (Condition("StringLike", "k", ("a?c",)), "abcd", False),
        (Condition("StringLike", "k", ("[a]*",)), "ab", False),
        (Condition("StringLike", "k", ("*",)), None, False),
        (Condition("StringLikeIfExists", "k", ("a",)), None, True),
        (Condition("StringLikeIfExists", "k", ("a",)), "b", False),
    ],
)
def test_conditions(condition: Condition, value: str | None, holds: bool) -> None:
    assert condition.holds(() if value is None else (("k", value),)) == holds


@pytest.mark.parametrize(
    "members",
    [
        {"NotAction": "s3:*"},
        {"Condition": {"IpAddress": {"aws:SourceIp": "10.0.0.0/8"}}},
        {"Principal": {"AWS": "*"}},
        {"Action": []},
        {"Effect": "Maybe"},
    ],
)
def test_what_is_not_evaluated_is_refused(members: dict[str, Any]) -> None:
    statement = {"Sid": "", "Effect": "Allow", "Action": "s3:*", "Resource": "*"} | members
    with pytest.raises(ValueError):
        parse_policy(json.dumps({"Version": "2012-10-17", "Statement": [statement]}))


def test_another_evaluator_agrees_on_actions_and_resources(
    aws_environment: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """moto's, which takes real users with real policies, but refuses every statement with a condition."""
    monkeypatch.setenv("INITIAL_NO_AUTH_ACTION_COUNT", "1000")
    with running_moto() as server:
        server.make_bucket(BUCKET)
        for key in KINDS:
            server.client().put_object(Bucket=BUCKET, Key=f"prod/{key}", Body=b"")
        iam = boto3.client("iam", endpoint_url=server.endpoint_url, region_name="us-east-1")
        clients = {}
        for role in ROLES:
            iam.create_user(UserName=role)
            document = json.loads(render(template(role), values_of(BUCKET, "prod")))
            for statement in document["Statement"]:
                statement.pop("Condition", None)
            iam.put_user_policy(UserName=role, PolicyName=role, PolicyDocument=json.dumps(document))
            key = iam.create_access_key(UserName=role)["AccessKey"]
            clients[role] = boto3_client(server.endpoint_url, key["AccessKeyId"], key["SecretAccessKey"])
        enforce = urllib.request.Request(
            f"{server.endpoint_url}/moto-api/reset-auth", b"0", {"Content-Type": "text/plain"}
        )
        urllib.request.urlopen(enforce, timeout=30).close()
        # The maintainer last, for what is deleted is not there to be read.
        for role, client in sorted(clients.items(), key=lambda item: item[0] == "maintainer"):
            policy = tuple(replace(each, conditions=()) for each in policy_of(role, BUCKET, "prod"))
            assert _verdicts_of(client) == _verdicts_by(policy), role


def _verdicts_by(policy: Policy) -> dict[str, bool]:
    found = {"list": is_allowed(Access("s3:ListBucket", bucket_arn(BUCKET)), policy)}
    for key in KINDS:
        for verb, action in (("get", "s3:GetObject"), ("put", "s3:PutObject"), ("delete", "s3:DeleteObject")):
            found[f"{verb} {key}"] = is_allowed(Access(action, object_arn(BUCKET, f"prod/{key}")), policy)
    return found


def _verdicts_of(client: Any) -> dict[str, bool]:
    def granted(call: Any, **arguments: Any) -> bool:
        try:
            call(Bucket=BUCKET, **arguments)
        except client.exceptions.ClientError as error:
            assert error.response["Error"]["Code"] in ("AccessDenied", "403"), error
            return False
        return True

    found = {"list": granted(client.list_objects_v2)}
    for key in KINDS:
        found[f"get {key}"] = granted(client.get_object, Key=f"prod/{key}")
        found[f"put {key}"] = granted(client.put_object, Key=f"prod/{key}", Body=b"")
        found[f"delete {key}"] = granted(client.delete_object, Key=f"prod/{key}")
    return found
