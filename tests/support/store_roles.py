"""The roles of terraform/: their policy files, rendered as Terraform renders them."""

from __future__ import annotations

from pathlib import Path

from tests.support.iam_policy import Policy, parse_policy
from tests.support.policy_template import render
from tests.support.s3_access import Encryption, bucket_arn

MODULE = Path(__file__).parents[2] / "terraform"
ROLES = ("archiver", "maintainer", "brancher", "reader", "drill")
ENCRYPTION = Encryption(
    "arn:aws:kms:us-east-1:111122223333:key/0a1b2c3d-0000-4000-8000-000000000000",
    "s3.us-east-1.amazonaws.com",
)
"""Of a bucket whose objects are encrypted with a key of KMS."""


def template(name: str) -> str:
    """The policy file of a role, or of the ``bucket``."""
    return (MODULE / "policies" / f"{name}.json.tftpl").read_text()


def values_of(
    bucket: str, prefix: str = "", encryption: Encryption | None = None, *, create_only: bool = True
) -> dict[str, str | bool]:
    """What ``local.rendering`` of the module holds for such a store."""
    return {
        "bucket_arn": bucket_arn(bucket),
        "below": f"{prefix}/" if prefix else "",
        "kms_key_arn": encryption.key_arn if encryption else "",
        "kms_via": ENCRYPTION.via,
        "create_only": create_only,
    }


def policy_of(role: str, bucket: str, prefix: str = "", encryption: Encryption | None = None) -> Policy:
    """The policy of a role, or of the ``bucket`` itself."""
    return parse_policy(render(template(role), values_of(bucket, prefix, encryption)))
