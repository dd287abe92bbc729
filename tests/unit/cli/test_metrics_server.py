"""The HTTP server of the metrics: three pages, few requests at a time, nobody waited for."""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from cli.metrics_server import (
    MOST_REQUESTS,
    Address,
    MetricsServer,
    Pages,
    Verdict,
    parse_address,
)
from timeline.errors import TimelineError, UsageError

GOOD = Verdict(True, ("ok",))


@contextlib.contextmanager
def serving(
    *,
    metrics: Callable[[], bytes] = lambda: b"a 1\n",
    health: Callable[[], Verdict] = lambda: GOOD,
    readiness: Callable[[], Verdict] = lambda: GOOD,
) -> Iterator[MetricsServer]:
    server = MetricsServer(
        Address("127.0.0.1", 0), Pages(metrics, health, readiness), content_type="text/plain; version=0.0.4"
    )
    server.start()
    try:
        yield server
    finally:
        server.stop()


def ask(server: MetricsServer, path: str, method: str = "GET") -> tuple[int, str, str]:
    """(status, content type, body)."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    try:
        connection.request(method, path)
        answer = connection.getresponse()
        return answer.status, answer.headers.get("Content-Type", ""), answer.read().decode()
    finally:
        connection.close()


def test_the_three_pages() -> None:
    with serving(readiness=lambda: Verdict(False, ("prod: 90 s behind", "test: stopped"))) as server:
        assert ask(server, "/metrics") == (200, "text/plain; version=0.0.4", "a 1\n")
        assert ask(server, "/metrics?x=1")[0] == 200
        assert ask(server, "/metrics", "HEAD") == (200, "text/plain; version=0.0.4", "")
        assert ask(server, "/healthz")[::2] == (200, "ok\n")
        assert ask(server, "/readyz")[::2] == (503, "prod: 90 s behind\ntest: stopped\n")
        assert ask(server, "/")[0] == 404
        assert ask(server, "/metrics", "POST")[0] == 501


def test_a_page_that_fails_is_told_and_the_next_one_is_served(caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> bytes:
        raise KeyError("lost")

    with serving(metrics=broken) as server:
        status, _, body = ask(server, "/metrics")
        assert (status, body) == (500, "KeyError('lost')\n")
        assert ask(server, "/healthz")[0] == 200
    assert "/metrics failed" in caplog.text


def test_more_requests_than_are_served_at_a_time_are_refused_at_once() -> None:
    """P9."""
    going_on, inside = threading.Event(), threading.Semaphore(0)

    def slow() -> bytes:
        inside.release()
        going_on.wait(60)
        return b"late 1\n"

    with serving(metrics=slow) as server:
        answers: list[int] = []
        askers = [
            threading.Thread(target=lambda: answers.append(ask(server, "/metrics")[0]))
            for _ in range(MOST_REQUESTS)
        ]
        for asker in askers:
            asker.start()
        for _ in askers:
            assert inside.acquire(timeout=30)
        assert ask(server, "/healthz")[0] == 503
        going_on.set()
        for asker in askers:
            asker.join(30)
        assert answers == [200] * MOST_REQUESTS
        # A place is given back just after the answer.
        statuses = [ask(server, "/healthz")[0] for _ in range(50)]
        assert statuses[-1] == 200


def test_a_client_that_says_nothing_keeps_nobody_from_being_served() -> None:
    with serving() as server:
        with socket.create_connection(("127.0.0.1", server.port)):
            assert ask(server, "/healthz")[0] == 200
        # One that goes away in the middle of its sentence is no error either.
        with socket.create_connection(("127.0.0.1", server.port)) as rude:
            rude.sendall(b"GET /metr")
        assert ask(server, "/healthz")[0] == 200


def test_stopping_frees_the_port() -> None:
    with serving() as server:
        port = server.port
        taken = MetricsServer(
            Address("127.0.0.1", port), Pages(bytes, lambda: GOOD, lambda: GOOD), content_type="text/plain"
        )
        with pytest.raises(TimelineError, match=f"cannot listen on 127.0.0.1:{port}"):
            taken.start()
    again = MetricsServer(
        Address("127.0.0.1", port), Pages(lambda: b"", lambda: GOOD, lambda: GOOD), content_type="text/plain"
    )
    again.start()
    again.stop()
    again.stop()


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:9187", Address("127.0.0.1", 9187)),
        ("[::1]:0", Address("::1", 0)),
        ("host.example:80", Address("host.example", 80)),
    ],
)
def test_addresses(text: str, address: Address) -> None:
    assert parse_address(text) == address


@pytest.mark.parametrize("text", ["", "9187", ":9187", "host:", "host:port", "host:99999", "::1:80"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="not an address"):
        parse_address(text)


def test_ipv6_loopback() -> None:
    pages = Pages(lambda: b"", lambda: GOOD, lambda: GOOD)
    server = MetricsServer(Address("::1", 0), pages, content_type="text/plain")
    try:
        server.start()
    except TimelineError as error:
        pytest.skip(f"no IPv6 here: {error.message}")
    try:
        connection = http.client.HTTPConnection("::1", server.port, timeout=10)
        connection.request("GET", "/healthz")
        assert connection.getresponse().status == 200
        connection.close()
    finally:
        server.stop()
