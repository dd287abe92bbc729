"""An aiobotocore client for S3, made fast, and its failures in our words.

Making a client the ordinary way costs 0.1 s, most of it for reading JSON that S3 needs nothing of: a list of
every service, and the end points of every service in every region. Both are replaced here (see ``_Models``).
Importing aiobotocore costs 0.2 s more, so nobody imports this module before a store is used; ``preload`` lets
a process that forks others pay once for all of them.
"""

from __future__ import annotations

import functools
import io
import os
import re
import ssl
from collections.abc import AsyncIterator, Mapping
from typing import Any

from timeline.errors import CheckFailed, NotFound, TimelineError, Unavailable, UsageError
from timeline.store.user_agent import user_agent

_load_default_certs = ssl.SSLContext.load_default_certs
# aiohttp reads the system's certificates when it is imported, twice (70 ms and more), for clients that bring no TLS
# context. botocore's always bring one; anybody else's would trust nobody.
ssl.SSLContext.load_default_certs = lambda *_: None  # type: ignore[method-assign]
ssl.SSLContext.set_default_verify_paths = lambda *_: None  # type: ignore[method-assign]
try:
    import aiobotocore.session
    import aiohttp
    import botocore.exceptions
    import botocore.loaders
    from aiobotocore.config import AioConfig
finally:
    ssl.SSLContext.load_default_certs = _load_default_certs  # type: ignore[method-assign]
    # Inherited from the C class.
    del ssl.SSLContext.set_default_verify_paths

_UPLOAD_PIECE_BYTES = 256 << 10

_COMMON_REGION = re.compile(r"(us|eu|ap|sa|ca|me|af|il|mx)-[a-z]+-\d+")
_COMMON_PARTITION: Mapping[str, object] = {
    "version": 3,
    "partitions": [
        {
            "partition": "aws",
            "dnsSuffix": "amazonaws.com",
            "regionRegex": rf"^{_COMMON_REGION.pattern}$",
            "regions": {},
            "defaults": {
                "hostname": "{service}.{region}.{dnsSuffix}",
                "protocols": ["https"],
                "signatureVersions": ["v4"],
                "variants": [],
            },
            "services": {
                "s3": {
                    "defaults": {"protocols": ["http", "https"], "signatureVersions": ["s3v4"]},
                    "partitionEndpoint": "aws-global",
                    "endpoints": {
                        "aws-global": {
                            "hostname": "s3.amazonaws.com",
                            "credentialScope": {"region": "us-east-1"},
                        }
                    },
                }
            },
        }
    ],
}


class _Models(botocore.loaders.Loader):  # type: ignore[misc,unused-ignore]
    """botocore's data, less what S3 in the ordinary regions does not need.

    ``sts``, ``sso`` and the like are what the credential chain may call.
    """

    def __init__(self, *, common_region: bool) -> None:
        super().__init__()
        self._common_region = common_region

    def list_available_services(self, type_name: str) -> list[str]:
        return ["s3", "signin", "sso", "sso-oidc", "sts"]

    def load_data_with_path(self, name: str) -> Any:
        if name == "endpoints" and self._common_region:
            return _COMMON_PARTITION, ""
        return super().load_data_with_path(name)


@functools.cache
def _models(common_region: bool) -> _Models:
    return _Models(common_region=common_region)


def preload() -> None:
    """Parse what the first client of a process would parse (about 20 ms)."""
    models = _models(True)
    for kind in ("service-2", "endpoint-rule-set-1"):
        models.load_service_model("s3", kind)
    for name in ("partitions", "sdk-default-configuration", "_retry"):
        models.load_data(name)


def client_context(
    *,
    endpoint_url: str | None,
    region: str | None,
    connections: int,
    connect_seconds: float,
    read_seconds: float,
) -> Any:
    """An async context manager that gives a client: credentials by the usual AWS chain, no retries.

    Raises UsageError for an unknown profile and the like.
    """
    endpoint = endpoint_url or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    try:
        session = aiobotocore.session.AioSession()
        where = (
            region
            or os.environ.get("AWS_REGION")
            or session.get_config_variable("region")  # AWS_DEFAULT_REGION, then the profile
            or "us-east-1"
        )
        special = any(map(session.get_config_variable, ("use_fips_endpoint", "use_dualstack_endpoint")))
        common = not special and (bool(endpoint) or _COMMON_REGION.fullmatch(where) is not None)
        if not os.environ.get("AWS_DATA_PATH"):
            session.register_component("data_loader", _models(common))
        # Nobody here looks at times, and parsing them takes a tenth of a get and most of a listing.
        session.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=str)
        return session.create_client(
            "s3",
            region_name=where,
            endpoint_url=endpoint,
            # A TLS context costs 20 ms, of no use without TLS.
            verify=False if endpoint and endpoint.startswith("http://") else None,
            config=AioConfig(
                signature_version="s3v4",
                user_agent=user_agent(),  # else built anew, twice, for each request
                max_pool_connections=connections,
                connect_timeout=connect_seconds,
                read_timeout=read_seconds,
                retries={"total_max_attempts": 1, "mode": "standard"},
                parameter_validation=False,
                # We send a checksum ourselves, without the copies that botocore makes for it.
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            ),
        )
    except (botocore.exceptions.BotoCoreError, ValueError) as error:
        raise translate(error, "reach", "", endpoint or "AWS") from error


def tune(client: Any) -> None:
    """Make the client's uploads cost one round trip, and hold the event loop for no longer than a piece."""
    client.meta.events.register("before-call.s3.PutObject", _without_file)
    client.meta.events.register("before-send.s3.PutObject", _in_pieces)


def _without_file(params: dict[str, Any], **_: Any) -> None:
    """botocore turns bytes into a file, and asks the server's leave (100 Continue) for every file."""
    if isinstance(params["body"], io.BytesIO):
        params["body"] = params["body"].getvalue()
    params["headers"].pop("Expect", None)


def _in_pieces(request: Any, **_: Any) -> None:
    body = request.body
    if isinstance(body, (bytes, bytearray)) and len(body) > _UPLOAD_PIECE_BYTES:
        request.body = _Pieces(body)


class _Pieces:
    """A body in pieces, from its beginning for each attempt: aiohttp sends it again when an idle connection turns
    out to be closed."""

    def __init__(self, body: bytes | bytearray) -> None:
        self._body = memoryview(body)

    async def __aiter__(self) -> AsyncIterator[memoryview]:
        for at in range(0, len(self._body), _UPLOAD_PIECE_BYTES):
            yield self._body[at : at + _UPLOAD_PIECE_BYTES]


FAILURES = (
    botocore.exceptions.BotoCoreError,
    botocore.exceptions.ClientError,
    botocore.exceptions.HTTPClientError,
    aiohttp.ClientError,
    OSError,
)
"""What a call of the client may raise (TimeoutError is an OSError)."""

_NO_CREDENTIALS = (
    botocore.exceptions.NoCredentialsError,
    botocore.exceptions.PartialCredentialsError,
    botocore.exceptions.CredentialRetrievalError,
    botocore.exceptions.ProfileNotFound,
    botocore.exceptions.UnauthorizedSSOTokenError,
    botocore.exceptions.SSOError,
    botocore.exceptions.TokenRetrievalError,
)
_BROKEN_CONNECTIONS = (
    botocore.exceptions.ConnectionError,
    botocore.exceptions.HTTPClientError,
    botocore.exceptions.IncompleteReadError,
    aiohttp.ClientError,
    OSError,
)
_REFUSED_CREDENTIALS = {
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "InvalidToken",
    "ExpiredToken",
    "ExpiredTokenException",
    "TokenRefreshRequired",
    "AuthFailure",
    "InvalidSecurity",
    "NotSignedUp",
}
_OTHER_REGION = {
    "PermanentRedirect",
    "AuthorizationHeaderMalformed",
    "IllegalLocationConstraintException",
    "301",
}
_PASSING = {
    "BadDigest",
    "ConditionalRequestConflict",
    "IncompleteBody",
    "InternalError",
    "OperationAborted",
    "RequestTimeout",
    "ServiceUnavailable",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "TooManyRequests",
    "XAmzContentSHA256Mismatch",
}
_ACTIONS = {
    "write": "s3:PutObject",
    "read": "s3:GetObject",
    "list": "s3:ListBucket",
    "delete": "s3:DeleteObject",
}


def code_of(error: BaseException) -> str:
    """The S3 error code of a refused call, "" for every other failure."""
    if isinstance(error, botocore.exceptions.ClientError):
        return str(error.response.get("Error", {}).get("Code", ""))
    return ""


def status_of(error: BaseException) -> int:
    """The HTTP status of a refused call, 0 for every other failure."""
    if isinstance(error, botocore.exceptions.ClientError):
        return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    return 0


def translate(error: BaseException, verb: str, key: str, where: str) -> TimelineError:
    """The failure of ``verb`` ("read", "write", "list", "delete", "reach") at ``where``, in one line."""
    if isinstance(error, botocore.exceptions.ClientError):
        return _translate_refusal(error, verb, key, where)
    if isinstance(error, _NO_CREDENTIALS):
        return UsageError(
            f"no usable AWS credentials for {where}: {error}",
            hint="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or give this host a role",
        )
    if isinstance(error, botocore.exceptions.SSLError):
        return Unavailable(
            f"no TLS connection to {where}: {error}",
            hint="AWS_CA_BUNDLE names the file of a private authority",
        )
    if isinstance(error, TimeoutError | botocore.exceptions.ReadTimeoutError):
        return Unavailable(f"{where} did not answer in time ({verb} {key})")
    if isinstance(error, _BROKEN_CONNECTIONS):
        return Unavailable(f"{where} cannot be reached or broke off ({verb} {key}): {_first_line(error)}")
    return UsageError(f"cannot {verb} {key} at {where}: {_first_line(error)}")


def _translate_refusal(error: Any, verb: str, key: str, where: str) -> TimelineError:
    code, status = code_of(error), status_of(error)
    if code == "NoSuchBucket":
        return UsageError(
            f"{where}: no such bucket", hint="create the bucket, or correct the URL of the store"
        )
    if code in ("NoSuchKey", "404") or status == 404:
        return NotFound(key)
    if code in _REFUSED_CREDENTIALS:
        return UsageError(
            f"{where} refuses the credentials: {code}",
            hint="check the access key, its secret and session token",
        )
    if code == "RequestTimeTooSkewed":
        return UsageError(f"{where}: the clock of this host is off by minutes", hint="set the clock (NTP)")
    if code in _OTHER_REGION:
        return UsageError(f"{where}: the bucket is in another region: {code}", hint="name it with --region")
    if status == 403:
        action = _ACTIONS.get(verb, verb)
        return UsageError(f"{where}: not allowed to {verb} {key}: {code}", hint=f"grant {action}")
    if code in _PASSING or status in (409, 429) or (status >= 500 and status != 501):
        return Unavailable(f"{where} cannot {verb} {key} just now: {status} {code}")
    message = error.response.get("Error", {}).get("Message", "")
    if status == 501 and verb == "write":
        return CheckFailed(
            f"{where} does not know conditional writes: {code}",
            hint="use a server that honours If-None-Match on PutObject",
        )
    return TimelineError(f"{where}: cannot {verb} {key}: {status} {code} {message}".rstrip())


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
