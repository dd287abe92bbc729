"""What an S3 request needs permission for: IAM's actions, resources and condition keys of HTTP requests."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Mapping
from dataclasses import dataclass

from tests.support.iam_policy import Access

_BUCKET_READS = {
    "lifecycle": "s3:GetLifecycleConfiguration",
    "location": "s3:GetBucketLocation",
    "object-lock": "s3:GetBucketObjectLockConfiguration",
    "policy": "s3:GetBucketPolicy",
    "uploads": "s3:ListBucketMultipartUploads",
    "versioning": "s3:GetBucketVersioning",
    "versions": "s3:ListBucketVersions",
}
_BUCKET_WRITES = {
    "acl": "s3:PutBucketAcl",
    "encryption": "s3:PutEncryptionConfiguration",
    "lifecycle": "s3:PutLifecycleConfiguration",
    "object-lock": "s3:PutBucketObjectLockConfiguration",
    "ownershipControls": "s3:PutBucketOwnershipControls",
    "policy": "s3:PutBucketPolicy",
    "publicAccessBlock": "s3:PutBucketPublicAccessBlock",
    "versioning": "s3:PutBucketVersioning",
}
_OBJECT_WRITES = {
    "acl": "s3:PutObjectAcl",
    "legal-hold": "s3:PutObjectLegalHold",
    "retention": "s3:PutObjectRetention",
    "tagging": "s3:PutObjectTagging",
}


@dataclass(frozen=True, slots=True)
class Encryption:
    """A bucket's default encryption with a key of KMS."""

    key_arn: str
    via: str
    """What KMS sees as the service that asks: ``s3.REGION.amazonaws.com``."""

    def access(self, action: str) -> Access:
        """Use of the key by S3."""
        return Access(action, self.key_arn, (("kms:ViaService", self.via),))


@dataclass(frozen=True, slots=True)
class S3Request:
    """A request in path style, names in plain ASCII."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    """Names in lower case."""
    body: bytes

    @property
    def bucket(self) -> str:
        """Name of the bucket."""
        return self.path.strip("/").partition("/")[0]

    @property
    def key(self) -> str:
        """Key of the object; "" when the bucket itself is meant."""
        return self.path.lstrip("/").partition("/")[2]

    @property
    def is_deletion_of_many(self) -> bool:
        """DeleteObjects, which is answered key by key."""
        return self.method == "POST" and not self.key and "delete" in self.query

    @property
    def is_read(self) -> bool:
        """GetObject or HeadObject."""
        return self.method in ("GET", "HEAD") and bool(self.key)

    def listing_of_all(self) -> Access:
        """What S3 asks before it says that an object does not exist."""
        return Access("s3:ListBucket", bucket_arn(self.bucket))

    def deletions(self) -> tuple[tuple[str, Access], ...]:
        """Keys of a deletion of many, and what each takes."""
        root = ET.fromstring(self.body)
        found = []
        for item in root:
            if not item.tag.endswith("Object"):
                continue
            texts = {child.tag.rpartition("}")[2]: child.text or "" for child in item}
            action = "s3:DeleteObjectVersion" if "VersionId" in texts else "s3:DeleteObject"
            found.append((texts["Key"], Access(action, object_arn(self.bucket, texts["Key"]))))
        return tuple(found)

    def accesses(self, encryption: Encryption | None) -> tuple[Access, ...]:
        """Everything it takes; raises ValueError for a request that is not known here."""
        if not self.key:
            return (self._of_bucket(),)
        action = self._of_object()
        context = [
            (f"s3:{name}", self.headers[name])
            for name in ("if-none-match", "if-match")
            if name in self.headers
        ]
        found = [Access(action, object_arn(self.bucket, self.key), tuple(context))]
        if "x-amz-bypass-governance-retention" in self.headers:
            found.append(Access("s3:BypassGovernanceRetention", object_arn(self.bucket, self.key)))
        if source := self.headers.get("x-amz-copy-source"):
            found.append(Access("s3:GetObject", f"arn:aws:s3:::{source.lstrip('/')}"))
        if encryption is not None and action == "s3:PutObject":
            found.append(encryption.access("kms:GenerateDataKey"))
        if encryption is not None and action == "s3:GetObject" and self.method == "GET":
            found.append(encryption.access("kms:Decrypt"))
        return tuple(found)

    def _of_bucket(self) -> Access:
        arn = bucket_arn(self.bucket)
        listing = self.method == "GET" and ("list-type" in self.query or not self.query)
        if self.method == "HEAD" or listing:
            context = [
                (f"s3:{name}", self.query[name]) for name in ("prefix", "max-keys") if name in self.query
            ]
            return Access("s3:ListBucket", arn, tuple(context))
        names = {"GET": _BUCKET_READS, "PUT": _BUCKET_WRITES, "DELETE": _BUCKET_WRITES}.get(self.method, {})
        for name, action in names.items():
            if name in self.query:
                return Access(action, arn)
        if not self.query and self.method in ("PUT", "DELETE"):
            return Access("s3:CreateBucket" if self.method == "PUT" else "s3:DeleteBucket", arn)
        raise ValueError(f"not known here: {self.method} {self.path} {dict(self.query)}")

    def _of_object(self) -> str:
        version = "Version" if "versionId" in self.query else ""
        if self.method in ("GET", "HEAD") and self.query.keys() <= {"versionId", "x-id"}:
            return f"s3:GetObject{version}"
        if self.method == "DELETE":
            return "s3:AbortMultipartUpload" if "uploadId" in self.query else f"s3:DeleteObject{version}"
        if self.method == "PUT":
            for name, action in _OBJECT_WRITES.items():
                if name in self.query:
                    return action
            return "s3:PutObject"
        if self.method == "POST" and self.query.keys() & {"uploads", "uploadId"}:
            return "s3:PutObject"
        raise ValueError(f"not known here: {self.method} {self.path} {dict(self.query)}")


def bucket_arn(bucket: str) -> str:
    """ARN of a bucket."""
    return f"arn:aws:s3:::{bucket}"


def object_arn(bucket: str, key: str) -> str:
    """ARN of an object."""
    return f"arn:aws:s3:::{bucket}/{key}"
