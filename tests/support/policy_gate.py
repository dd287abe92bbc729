"""A gate before an S3 server: lets pass what policy documents allow, and answers the rest as AWS does.

No S3 server at hand evaluates conditions such as ``s3:if-none-match``, so the gate does (``iam_policy``). Who asks is
known by the access key; what passes goes on with the server's own credentials. Like S3, the gate says 403 and not 404 for
a missing object to whoever may not list, and answers a deletion of many key by key. Where the bucket has a key of KMS,
its use takes permission as well, though nothing is encrypted.

Runs in a thread of its own. One request holds at most ``_BODY_BYTES``.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from xml.sax.saxutils import escape

import aiohttp
import yarl
from aiohttp import web
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from tests.support.iam_policy import Access, Policy, is_allowed
from tests.support.s3_access import Encryption, S3Request
from tests.support.seaweed import ACCESS_KEY, SECRET_KEY, boto3_client

_BODY_BYTES = 80 << 20
_SECONDS = 60.0
_PASSED_ON = ("content-type", "content-md5", "if-match", "if-none-match", "range")
_NOT_PASSED_BACK = {"connection", "content-encoding", "date", "keep-alive", "server", "transfer-encoding"}


@dataclass(frozen=True, slots=True)
class Seen:
    """One access that somebody needed."""

    user: str
    access: Access
    allowed: bool


class PolicyGate:
    """One gate. Users and the bucket's policy may be changed between requests."""

    def __init__(self, upstream: str, encryption: Encryption | None = None) -> None:
        self.users: dict[str, Policy] = {}
        """By access key; somebody else may do nothing."""
        self.bucket_policy: Policy = ()
        self.seen: list[Seen] = []
        self.failures: list[Exception] = []
        """What went wrong in the gate itself; clients see a 500, and may hide it by trying again."""
        self._upstream = upstream
        self._encryption = encryption
        self._port = 0
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="policy-gate", daemon=True)

    @property
    def endpoint_url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def client(self, user: str) -> Any:
        """A boto3 client of this user; any secret will do."""
        return boto3_client(self.endpoint_url, user, "any secret")

    def start(self) -> None:
        """Begin to listen."""
        self._thread.start()
        if not self._ready.wait(_SECONDS):
            raise RuntimeError("the gate did not open")

    def stop(self) -> None:
        """End it."""
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(_SECONDS)

    def _run(self) -> None:
        with contextlib.closing(self._loop):
            self._loop.run_until_complete(self._serve())

    async def _serve(self) -> None:
        app = web.Application(client_max_size=_BODY_BYTES)
        app.router.add_route("*", "/{path:.*}", self._answer)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        async with aiohttp.ClientSession(auto_decompress=False) as self._session:
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            self._port = runner.addresses[0][1]
            self._ready.set()
            await self._stop.wait()
            await runner.cleanup()

    async def _answer(self, asked: web.Request) -> web.Response:
        try:
            return await self._judge(asked)
        except Exception as error:
            self.failures.append(error)
            raise

    async def _judge(self, asked: web.Request) -> web.Response:
        headers = {name.lower(): value for name, value in asked.headers.items()}
        # A presigned request carries in its query what others have in their headers.
        signed = {name: value for name, value in asked.query.items() if name.startswith("X-Amz-")}
        url = asked.rel_url.without_query_params(*signed)
        request = S3Request(asked.method, asked.path, dict(url.query), headers, await asked.read())
        credential = headers.get("authorization", "").partition("Credential=")[2]
        user = (signed.get("X-Amz-Credential") or credential).partition("/")[0]
        if request.is_deletion_of_many:
            return await self._delete_many(user, request, url)
        # All of them are looked at, so that what is recorded is complete.
        verdicts = [self._may(user, access) for access in request.accesses(self._encryption)]
        if not all(verdicts):
            return _denied(request)
        answer = await self._pass_on(request, url)
        if answer.status == 404 and request.is_read and not self._may(user, request.listing_of_all()):
            return _denied(request)
        return answer

    def _may(self, user: str, access: Access) -> bool:
        allowed = is_allowed(access, self.users.get(user, ()), self.bucket_policy)
        self.seen.append(Seen(user, access, allowed))
        return allowed

    async def _delete_many(self, user: str, request: S3Request, url: yarl.URL) -> web.Response:
        refused = [key for key, access in request.deletions() if not self._may(user, access)]
        if not refused:
            return await self._pass_on(request, url)
        if len(refused) < len(request.deletions()):
            raise ValueError("a deletion of some keys that are allowed and some that are not: not known here")
        errors = "".join(
            f"<Error><Key>{escape(key)}</Key><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
            for key in refused
        )
        return web.Response(text=f"<DeleteResult>{errors}</DeleteResult>", content_type="application/xml")

    async def _pass_on(self, request: S3Request, url: yarl.URL) -> web.Response:
        target = f"{self._upstream}{url}"
        kept = {
            name: value
            for name, value in request.headers.items()
            if name in _PASSED_ON or name.startswith(("x-amz-checksum", "x-amz-copy", "x-amz-sdk"))
        }
        signed = AWSRequest(request.method, target, headers=kept, data=request.body)
        S3SigV4Auth(Credentials(ACCESS_KEY, SECRET_KEY), "s3", "us-east-1").add_auth(signed)
        async with self._session.request(
            request.method,
            yarl.URL(target, encoded=True),
            data=io.BytesIO(request.body) if request.body else None,
            headers=dict(signed.headers.items()),
            skip_auto_headers=["Content-Type"],
        ) as answer:
            body = await answer.read()
            passed = {
                name: value for name, value in answer.headers.items() if name.lower() not in _NOT_PASSED_BACK
            }
            if request.method != "HEAD":
                passed.pop("Content-Length", None)
            return web.Response(status=answer.status, headers=passed, body=body or None)


def _denied(request: S3Request) -> web.Response:
    body = "<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
    text = None if request.method == "HEAD" else body
    return web.Response(status=403, text=text, content_type="application/xml")


@contextlib.contextmanager
def running_gate(upstream: str, encryption: Encryption | None = None) -> Iterator[PolicyGate]:
    """A gate that lets nobody pass yet, closed at the end. Raises then what went wrong in the gate itself."""
    gate = PolicyGate(upstream, encryption)
    gate.start()
    try:
        yield gate
    finally:
        gate.stop()
    if gate.failures:
        raise ExceptionGroup("the gate failed", gate.failures)
