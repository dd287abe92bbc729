"""S3Store before a real server and a proxy that fails on demand (EDGE 41), and refusals in one clear line."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import time
import traceback
from collections.abc import Awaitable, Callable

import pytest

from tests.fix_stores import BUCKET, fresh_prefix
from tests.support.manual_clock import ManualClock
from tests.support.moto_server import MotoServer
from tests.support.s3_proxy import S3Proxy
from tests.support.s3_proxy_state import Fault
from tests.support.seaweed import Seaweed, credentials
from timeline.clock import SystemClock
from timeline.errors import CheckFailed, DamagedStore, NotFound, TimelineError, Unavailable, UsageError
from timeline.store.base import Store
from timeline.store.open import open_store
from timeline.store.probe import check_conditional_create
from timeline.store.retry import RetryingStore, RetryPolicy
from timeline.store.s3 import S3Store

DATA = os.urandom(100_000)


def one_line(error: TimelineError) -> bool:
    """What a person may be shown."""
    return "\n" not in error.message and "Traceback" not in error.message and "botocore" not in error.message


def on(
    url: str,
    scenario: Callable[[Store], Awaitable[None]],
    *,
    retries: RetryPolicy | None = None,
    bucket: str = BUCKET,
    read_seconds: float = 30.0,
    connect_seconds: float = 5.0,
    below: str = "",
) -> None:
    """Run a scenario on an empty store behind that end point; retries take no time."""

    async def run() -> None:
        store: Store = S3Store(
            bucket,
            fresh_prefix() + below,
            endpoint_url=url,
            read_seconds=read_seconds,
            connect_seconds=connect_seconds,
        )
        if retries is not None:
            store = RetryingStore(store, ManualClock(), retries)
        try:
            await scenario(store)
        finally:
            await store.aclose()

    asyncio.run(run())


# -- reads


def test_a_read_is_one_request(s3_proxy: S3Proxy) -> None:
    """Of a whole object and of any range, whatever the prefix holds."""
    key = "a/key"

    async def scenario(store: Store) -> None:
        await store.create(key, DATA)
        s3_proxy.reset()
        assert await store.get(key) == DATA
        assert await store.get(key, 100, 1000) == DATA[100:1100]
        assert await store.get(key, 99_000, 1000) == DATA[99_000:]
        assert await store.get(key, 99_000) == DATA[99_000:]
        assert await store.get(key, -10) == DATA[-10:]
        assert s3_proxy.stats().requests == {"GET": 5}

    on(s3_proxy.endpoint_url, scenario, below="/pre fix+and=signs%20&more/é")


def test_where_presigned_requests_are_refused(s3_proxy: S3Proxy) -> None:
    """As some policies do: read in the ordinary way, and the other one is not tried for ever."""

    async def scenario(store: Store) -> None:
        await store.create("key", DATA)
        s3_proxy.set_faults(
            Fault("status", verb="GET", contains="X-Amz-Signature", status=403, code="AccessDenied")
        )
        for _ in range(5):
            assert await store.get("key", 5, 100) == DATA[5:105]
        assert s3_proxy.stats().faults_injected == 1

    on(s3_proxy.endpoint_url, scenario)


def test_a_busy_server_is_not_asked_twice(s3_proxy: S3Proxy) -> None:
    async def scenario(store: Store) -> None:
        await store.create("key", DATA)
        s3_proxy.set_faults(Fault("status", verb="GET", status=503))
        with pytest.raises(Unavailable) as raised:
            await store.get("key", 5, 100)
        assert one_line(raised.value) and "Signature" not in str(raised.value)
        assert s3_proxy.stats().faults_injected == 1

    on(s3_proxy.endpoint_url, scenario)


def test_what_is_not_http_does_not_make_us_tell_a_signature() -> None:
    """A presigned URL is a right to read: no message and no cause of one names it."""

    async def garbage(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"SSH-2.0-nothing to see here\r\n\r\n")
        writer.close()

    async def run() -> None:
        server = await asyncio.start_server(garbage, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        store = S3Store(BUCKET, endpoint_url=f"http://127.0.0.1:{port}")
        try:
            with pytest.raises(Unavailable) as raised:
                await store.get("key", 0, 10)
        finally:
            await store.aclose()
            server.close()
        told = "".join(traceback.format_exception(raised.value))
        assert "X-Amz" not in told and one_line(raised.value)

    with credentials():
        asyncio.run(run())


def test_a_missing_key_and_a_range_beyond_the_end(s3_proxy: S3Proxy) -> None:
    async def scenario(store: Store) -> None:
        await store.create("key", DATA)
        with pytest.raises(NotFound):
            await store.get("none", 0, 10)
        with pytest.raises(DamagedStore):
            await store.get("key", len(DATA) + 5, 10)
        with pytest.raises(DamagedStore):
            await store.get("key", len(DATA) - 5, 10)

    on(s3_proxy.endpoint_url, scenario)


# -- ambiguous outcomes


def test_a_connection_reset_after_the_commit_is_read_back(s3_proxy: S3Proxy) -> None:
    """P2: the object is there, the answer is lost; reading back says whose it is."""

    async def scenario(store: Store) -> None:
        s3_proxy.set_faults(Fault("reset-after-commit", verb="PUT"))
        assert await store.create("mine", DATA) is True
        assert await store.get("mine") == DATA
        s3_proxy.set_faults()
        await store.create("theirs", DATA)
        s3_proxy.set_faults(Fault("reset-after-commit", verb="PUT"))
        assert await store.create("theirs", DATA[::-1]) is False
        assert await store.get("theirs") == DATA
        assert s3_proxy.stats().faults_injected >= 2
        assert s3_proxy.stats().statuses["412"] >= 1

    on(s3_proxy.endpoint_url, scenario)


def test_a_large_upload_on_a_connection_that_was_closed_while_idle(s3_proxy: S3Proxy) -> None:
    """Servers close idle connections; the whole body must go again, from its beginning, and at once."""

    async def scenario(store: Store) -> None:
        await store.create("small", b"x")
        s3_proxy.set_faults(Fault("reset-before", verb="PUT", times=1))
        began = time.monotonic()
        data = DATA * 30
        assert await store.create("large", data) is True
        assert time.monotonic() - began < 5
        assert await store.get("large") == data
        assert s3_proxy.stats().faults_injected == 1

    on(s3_proxy.endpoint_url, scenario, retries=RetryPolicy())


@pytest.mark.parametrize(
    "fault",
    [
        Fault("status", verb="PUT", status=503, code="SlowDown"),
        Fault("status", verb="PUT", status=500, code="InternalError"),
        Fault("status", verb="PUT", status=409, code="ConditionalRequestConflict"),
        Fault("reset-before", verb="PUT"),
    ],
    ids=lambda fault: f"{fault.kind}-{fault.status}",
)
def test_an_unknown_outcome_is_never_a_guess(s3_proxy: S3Proxy, fault: Fault) -> None:
    """Nothing was written: the plain store says *unavailable*, the retrying one writes."""

    async def unknown(store: Store) -> None:
        s3_proxy.set_faults(fault)
        with pytest.raises(Unavailable) as raised:
            await store.create("key", DATA)
        assert one_line(raised.value)
        s3_proxy.set_faults()
        with pytest.raises(NotFound):
            await store.get("key")

    async def retried(store: Store) -> None:
        s3_proxy.reset()
        s3_proxy.set_faults(dataclasses.replace(fault, times=3))
        assert await store.create("key", DATA) is True
        assert await store.get("key") == DATA
        assert s3_proxy.stats().requests["PUT"] == 4

    async def taken(store: Store) -> None:
        s3_proxy.set_faults()
        await store.create("key", b"somebody else's")
        s3_proxy.set_faults(dataclasses.replace(fault, times=1))
        assert await store.create("key", DATA) is False

    on(s3_proxy.endpoint_url, unknown)
    on(s3_proxy.endpoint_url, retried, retries=RetryPolicy())
    on(s3_proxy.endpoint_url, taken)


def test_a_truncated_body_never_comes_out(s3_proxy: S3Proxy) -> None:
    async def plain(store: Store) -> None:
        await store.create("key", DATA)
        s3_proxy.set_faults(Fault("truncate", verb="GET"))
        for start, length in ((0, None), (1000, 50_000), (-70_000, None)):
            with pytest.raises(Unavailable) as raised:
                await store.get("key", start, length)
            assert one_line(raised.value)

    async def retried(store: Store) -> None:
        s3_proxy.set_faults()
        await store.create("key", DATA)
        s3_proxy.set_faults(Fault("truncate", verb="GET", times=3))
        assert await store.get("key", 1000, 50_000) == DATA[1000:51_000]
        assert s3_proxy.stats().faults_injected >= 3

    on(s3_proxy.endpoint_url, plain)
    on(s3_proxy.endpoint_url, retried, retries=RetryPolicy())


def test_a_truncated_listing_is_no_listing(s3_proxy: S3Proxy) -> None:
    async def scenario(store: Store) -> None:
        for number in range(20):
            await store.create(f"log/{number:02}", b"x")
        s3_proxy.set_faults(Fault("truncate", verb="GET", contains="list-type", times=2))
        assert len(await store.list("log/")) == 20

    on(s3_proxy.endpoint_url, scenario, retries=RetryPolicy())
    assert s3_proxy.stats().faults_injected == 2


@pytest.mark.parametrize("verb", ["GET", "PUT"])
def test_a_stalled_server_is_given_up_in_bounded_time(s3_proxy: S3Proxy, verb: str) -> None:
    async def scenario(store: Store) -> None:
        await store.create("key", DATA)
        s3_proxy.set_faults(Fault("stall"))
        began = time.monotonic()
        with pytest.raises(Unavailable, match="did not answer in time") as raised:
            if verb == "GET":
                await store.get("key")
            else:
                await store.create("other", DATA)
        assert one_line(raised.value)
        assert 0.4 < time.monotonic() - began < 5

    on(s3_proxy.endpoint_url, scenario, read_seconds=0.5)


def test_a_server_that_drips_is_given_up_too(s3_proxy: S3Proxy) -> None:
    """Each byte comes before the read time-out, and so they would come for ever."""

    async def scenario(store: Store) -> None:
        await store.create("key", DATA)
        s3_proxy.configure(bandwidth_mb=0.02)
        began = time.monotonic()
        with pytest.raises(Unavailable, match="did not answer in time"):
            await store.get("key")
        assert time.monotonic() - began < 10

    try:
        on(s3_proxy.endpoint_url, scenario, read_seconds=0.8, connect_seconds=0.2)
    finally:
        s3_proxy.configure(bandwidth_mb=0)


def test_retries_end_and_say_so(s3_proxy: S3Proxy) -> None:
    async def scenario(store: Store) -> None:
        s3_proxy.reset()
        s3_proxy.set_faults(Fault("status", status=503))
        with pytest.raises(Unavailable, match=r"503 SlowDown .*gave up after 4 attempts") as raised:
            await store.list("x")
        assert raised.value.exit_code == 7
        assert s3_proxy.stats().requests["LIST"] == 4

    on(s3_proxy.endpoint_url, scenario, retries=RetryPolicy(attempts=4))


def test_racing_creators_behind_a_bad_network_have_one_winner(s3_proxy: S3Proxy) -> None:
    """P2, P4: answers are lost at random places; still exactly one of two writers has each number."""

    async def run() -> None:
        prefix = fresh_prefix()
        s3_proxy.reset()
        faults = [Fault("reset-after-commit", verb="PUT", skip=n, times=1) for n in (0, 3, 5, 8, 9, 13)]
        s3_proxy.set_faults(*faults, Fault("status", verb="PUT", skip=2, times=2))
        clock = SystemClock()
        stores = [
            RetryingStore(S3Store(BUCKET, prefix, endpoint_url=s3_proxy.endpoint_url), clock)
            for _ in range(2)
        ]
        try:
            for number in range(8):
                contents = [f"{number} {who}".encode() for who in range(2)]
                won = await asyncio.gather(
                    *(
                        store.create(f"log/{number}", data)
                        for store, data in zip(stores, contents, strict=True)
                    )
                )
                assert won.count(True) == 1
                assert await stores[0].get(f"log/{number}") == contents[won.index(True)]
        finally:
            for store in stores:
                await store.aclose()
        assert s3_proxy.stats().faults_injected >= 6

    asyncio.run(run())


def test_a_cancelled_call_leaves_the_store_usable(s3_proxy: S3Proxy) -> None:
    async def scenario(store: Store) -> None:
        await store.create("key", DATA)
        s3_proxy.configure(latency_ms=300)
        calls = [asyncio.create_task(store.get("key")) for _ in range(40)]
        await asyncio.sleep(0.1)
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        s3_proxy.configure(latency_ms=0)
        assert await asyncio.wait_for(store.get("key"), 5) == DATA

    on(s3_proxy.endpoint_url, scenario)


# -- refusals


def test_a_missing_bucket_is_one_clear_line(seaweed: Seaweed, moto: MotoServer) -> None:
    for server in (seaweed, moto):

        async def scenario(store: Store) -> None:
            for call in (
                store.get("tl.json"),
                store.get("tl.json", 0, 0),
                store.list(""),
                store.create("tl.json", b"x"),
                store.delete(["tl.json"]),
            ):
                with pytest.raises(
                    UsageError, match=r"s3://no-such-bucket at http.*: no such bucket"
                ) as raised:
                    await call
                assert one_line(raised.value)
                assert raised.value.hint

        on(server.endpoint_url, scenario, bucket="no-such-bucket")


@pytest.mark.parametrize(
    ("key_id", "secret"),
    [("testkey", "wrong"), ("nobody", "testsecret")],
    ids=["wrong-secret", "unknown-key"],
)
def test_wrong_credentials_are_one_clear_line(
    seaweed: Seaweed, monkeypatch: pytest.MonkeyPatch, key_id: str, secret: str
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key_id)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)

    async def scenario(store: Store) -> None:
        for call in (store.get("tl.json"), store.list(""), store.create("tl.json", b"x")):
            with pytest.raises(UsageError, match="refuses the credentials") as raised:
                await call
            assert one_line(raised.value)
            assert secret not in raised.value.message

    on(seaweed.endpoint_url, scenario)


def test_no_credentials_are_one_clear_line(seaweed: Seaweed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")

    async def scenario(store: Store) -> None:
        with pytest.raises(UsageError, match="no usable AWS credentials") as raised:
            await store.list("")
        assert one_line(raised.value)
        assert "AWS_ACCESS_KEY_ID" in str(raised.value.hint)

    on(seaweed.endpoint_url, scenario)


def test_an_unknown_profile_is_one_clear_line(seaweed: Seaweed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nobody")

    async def scenario(store: Store) -> None:
        with pytest.raises(UsageError, match="nobody") as raised:
            await store.list("")
        assert one_line(raised.value)

    on(seaweed.endpoint_url, scenario)


def test_nobody_listening_is_unavailable() -> None:
    async def scenario(store: Store) -> None:
        with pytest.raises(Unavailable, match="cannot be reached") as raised:
            await store.list("")
        assert one_line(raised.value)

    on("http://127.0.0.1:9", scenario)


def test_a_forbidden_action_names_the_grant(s3_proxy: S3Proxy) -> None:
    async def scenario(store: Store) -> None:
        s3_proxy.set_faults(Fault("status", status=403, code="AccessDenied"))
        for call, grant in (
            (store.get("a"), "s3:GetObject"),
            (store.list(""), "s3:ListBucket"),
            (store.create("a", b"x"), "s3:PutObject"),
            (store.delete(["a"]), "s3:DeleteObject"),
        ):
            with pytest.raises(UsageError, match="not allowed") as raised:
                await call
            assert raised.value.hint == f"grant {grant}"

    on(s3_proxy.endpoint_url, scenario)


def test_another_region_is_named(s3_proxy: S3Proxy) -> None:
    async def scenario(store: Store) -> None:
        s3_proxy.set_faults(Fault("status", verb="PUT", status=301, code="PermanentRedirect"))
        with pytest.raises(UsageError, match="in another region"):
            await store.create("key", b"x")

    on(s3_proxy.endpoint_url, scenario)


# -- the probe


def test_a_server_that_ignores_conditions_is_found_out(
    moto: MotoServer, make_s3_proxy: Callable[..., S3Proxy]
) -> None:
    """Some S3 look-alikes answer 200 and overwrite (moto checks no signature, so the header can be taken out)."""
    proxy = make_s3_proxy(moto.endpoint_url)

    async def scenario(store: Store) -> None:
        assert await check_conditional_create(store, SystemClock()) is None
        proxy.set_faults(Fault("strip-conditional"))
        with pytest.raises(CheckFailed, match="overwrites objects") as raised:
            await check_conditional_create(store, SystemClock())
        assert "If-None-Match" in str(raised.value.hint)
        assert raised.value.exit_code == 6
        assert await store.list("") == []

    on(proxy.endpoint_url, scenario)


def test_a_server_that_does_not_know_conditions_is_found_out(s3_proxy: S3Proxy) -> None:
    async def scenario(store: Store) -> None:
        s3_proxy.set_faults(Fault("status", verb="PUT", status=501, code="NotImplemented"))
        with pytest.raises(CheckFailed, match="conditional writes"):
            await check_conditional_create(store, SystemClock())

    on(s3_proxy.endpoint_url, scenario)


def test_the_probe_tells_what_it_may_not_delete(s3_proxy: S3Proxy) -> None:
    """EDGE 43: under Object Lock nothing can be removed, and that is no reason to refuse the store."""

    async def scenario(store: Store) -> None:
        s3_proxy.set_faults(Fault("status", verb="POST", status=403, code="AccessDenied"))
        told = await check_conditional_create(store, SystemClock())
        assert told is not None
        assert "cannot be deleted" in told
        assert all(item.key in told for item in await store.list("probe/"))

    on(s3_proxy.endpoint_url, scenario)


# -- ways of working


def test_open_store_takes_the_end_point_from_the_environment(
    seaweed: Seaweed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", seaweed.endpoint_url)
    prefix = fresh_prefix()

    async def run() -> None:
        store = await open_store(f"s3://{BUCKET}/{prefix}/")
        assert store.url == f"s3://{BUCKET}/{prefix}"
        assert await store.create("key", DATA) is True
        await store.aclose()
        again = await open_store(store.url, endpoint_url=seaweed.endpoint_url, region="eu-central-1")
        assert await again.get("key") == DATA
        await again.aclose()

    asyncio.run(run())
    listed = seaweed.client().list_objects_v2(Bucket=BUCKET, Prefix=prefix)
    assert [item["Key"] for item in listed["Contents"]] == [f"{prefix}/key"]


def test_a_store_may_be_a_whole_bucket(moto: MotoServer) -> None:
    bucket = moto.make_bucket("whole-bucket")

    async def run() -> None:
        store = await open_store(f"s3://{bucket}", endpoint_url=moto.endpoint_url)
        await store.create("tl.json", DATA)
        assert store.url == "s3://whole-bucket"
        assert [item.key for item in await store.list("")] == ["tl.json"]
        await store.aclose()

    asyncio.run(run())


@pytest.mark.parametrize(
    "url",
    ["", "memory://x", "http://x/y", "s3://", "s3:///key", "s3://k:s@bucket/x", "file://host/x", "file:x"],
)
def test_what_is_no_store_is_a_usage_error(url: str) -> None:
    with pytest.raises(UsageError) as raised:
        asyncio.run(open_store(url))
    assert one_line(raised.value)


def test_an_end_point_must_be_a_url() -> None:
    with pytest.raises(UsageError, match="end point"):
        asyncio.run(open_store("s3://bucket", endpoint_url="localhost:9000"))
    with pytest.raises(UsageError, match="end point"):
        asyncio.run(open_store("/tmp/x", endpoint_url="http://localhost:9000"))


def test_connections_are_bounded(s3_proxy: S3Proxy) -> None:
    """P9."""

    async def run() -> None:
        s3_proxy.reset()
        s3_proxy.configure(latency_ms=20)
        store = S3Store(BUCKET, fresh_prefix(), endpoint_url=s3_proxy.endpoint_url, connections=4)
        await asyncio.gather(*(store.create(f"k/{n}", b"x") for n in range(20)))
        assert s3_proxy.stats().most_in_flight == 4
        await store.aclose()

    asyncio.run(run())
    s3_proxy.configure(latency_ms=0)


def test_requests_cost_what_they_should(s3_proxy: S3Proxy) -> None:
    """Requests cost money: a create is one PUT, a get one GET, the newest log entry one LIST."""

    async def scenario(store: Store) -> None:
        s3_proxy.reset()
        await store.create("log/1", DATA)
        await store.get("log/1", 10, 20)
        await store.list("log/", limit=1)
        stats = s3_proxy.stats()
        assert stats.requests == {"PUT": 1, "GET": 1, "LIST": 1}
        assert stats.bytes_up == len(DATA)

    on(s3_proxy.endpoint_url, scenario)


def test_acknowledged_objects_survive_a_killed_server(aws_environment: None) -> None:
    """P1 rests on the server; this one is killed without a farewell while clients write."""
    from tests.support.seaweed import running_seaweed

    with running_seaweed() as server:
        server.make_bucket(BUCKET)
        acknowledged: list[str] = []

        async def write() -> None:
            store = S3Store(BUCKET, "x", endpoint_url=server.endpoint_url)

            async def one(number: int) -> None:
                await store.create(f"k/{number}", DATA + bytes([number]))
                acknowledged.append(f"k/{number}")
                if len(acknowledged) == 60:
                    server.kill()

            await asyncio.gather(*(one(number) for number in range(100)), return_exceptions=True)
            await store.aclose()

        async def read() -> None:
            store = S3Store(BUCKET, "x", endpoint_url=server.endpoint_url)
            for key in acknowledged:
                assert await store.get(key) == DATA + bytes([int(key[2:])])
            await store.aclose()

        asyncio.run(write())
        assert 60 <= len(acknowledged) < 100
        server.start()
        asyncio.run(read())


def test_a_stopped_server_is_unavailable_and_then_back(moto: MotoServer) -> None:
    assert moto.pid is not None

    async def scenario(store: Store) -> None:
        await store.create("key", DATA)
        os.kill(moto.pid or 0, signal.SIGSTOP)
        try:
            with pytest.raises(Unavailable):
                await store.get("key")
        finally:
            os.kill(moto.pid or 0, signal.SIGCONT)
        assert await store.get("key") == DATA

    on(moto.endpoint_url, scenario, read_seconds=0.5)
