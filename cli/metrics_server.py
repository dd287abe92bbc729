"""Serves ``/metrics``, ``/healthz`` and ``/readyz`` over plain HTTP, on loopback unless told otherwise.

Nothing here waits for a store, a source or the disk: pages are made from what is known already. Bounds:
MOST_REQUESTS at a time, the others are told 503 at once; REQUEST_SECONDS for a client to say what it wants and to
take the answer.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import socketserver
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from timeline.errors import TimelineError, UsageError

_log = logging.getLogger(__name__)

DEFAULT_ADDRESS = "127.0.0.1:9187"
MOST_REQUESTS = 8
REQUEST_SECONDS = 5.0
_PLAIN = "text/plain; charset=utf-8"


@dataclass(frozen=True, slots=True)
class Address:
    """Where to listen."""

    host: str
    port: int
    """0: any free one."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The answer to ``/healthz`` or ``/readyz``."""

    good: bool
    lines: tuple[str, ...]
    """What is wrong, or ``ok``."""


@dataclass(frozen=True, slots=True)
class Pages:
    """What is served. Each must return at once, and is called from several threads."""

    metrics: Callable[[], bytes]
    health: Callable[[], Verdict]
    readiness: Callable[[], Verdict]


def parse_address(text: str) -> Address:
    """``ADDR:PORT`` or ``[ADDR]:PORT``; raises UsageError."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise UsageError(
            f"not an address to listen on: {text!r}", hint=f"write ADDR:PORT, as in {DEFAULT_ADDRESS}"
        )
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise UsageError(f"not an address to listen on: {text!r}", hint="write IPv6 addresses as [::1]:9187")
    return Address(host, int(port))


class MetricsServer:
    """``start`` and ``stop``, once each; serves in threads of its own."""

    def __init__(self, address: Address, pages: Pages, *, content_type: str) -> None:
        """``content_type``: of the metrics page."""
        self._address = address
        self._pages = pages
        self._content_type = content_type
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None

    @property
    def port(self) -> int:
        """The port it listens on; only after ``start``."""
        if self._server is None:
            raise RuntimeError("the server was not started")
        return int(self._server.server_address[1])

    def start(self) -> None:
        """Listen; raises TimelineError when the address cannot be had."""
        where = self._address
        try:
            self._server = _Server(where, self._pages, self._content_type)
        except OSError as error:
            raise TimelineError(
                f"cannot listen on {where.host}:{where.port}: {error.strerror or error}",
                hint="another process has the port, or the address is none of this host's",
            ) from error
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.2}, name="metrics", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Stop listening; requests under way end by themselves, within REQUEST_SECONDS."""
        if self._server is None or self._thread is None:
            return
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        self._server = None
        self._thread = None


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 16

    def __init__(self, address: Address, pages: Pages, content_type: str) -> None:
        if ":" in address.host:
            self.address_family = socket.AF_INET6
        self.pages = pages
        self.content_type = content_type
        self._free = threading.BoundedSemaphore(MOST_REQUESTS)
        super().__init__((address.host, address.port), _Handler)

    def server_bind(self) -> None:
        # HTTPServer's own asks the name service for this host's name, which may take seconds.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
            return
        with contextlib.suppress(OSError):
            request.sendall(b"HTTP/1.0 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n")
        self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        # A client that goes away or says nothing is its own affair; anything else is ours.
        if not isinstance(sys.exception(), OSError):
            _log.exception("metrics: a request failed")


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = REQUEST_SECONDS
    server_version = "tl"
    sys_version = ""

    def do_GET(self) -> None:
        pages = self.server.pages
        path = self.path.partition("?")[0]
        try:
            if path == "/metrics":
                self._answer(HTTPStatus.OK, pages.metrics(), self.server.content_type)
            elif path == "/healthz":
                self._judge(pages.health())
            elif path == "/readyz":
                self._judge(pages.readiness())
            else:
                self._answer(HTTPStatus.NOT_FOUND, b"there are /metrics, /healthz and /readyz\n", _PLAIN)
        except OSError:
            raise
        except Exception as error:  # noqa: BLE001 - told to the client, and logged
            _log.exception("metrics: %s failed", path)
            self._answer(HTTPStatus.INTERNAL_SERVER_ERROR, f"{error!r}\n".encode(), _PLAIN)

    do_HEAD = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        """A scrape every few seconds is no news."""

    def _judge(self, verdict: Verdict) -> None:
        status = HTTPStatus.OK if verdict.good else HTTPStatus.SERVICE_UNAVAILABLE
        self._answer(status, "".join(f"{line}\n" for line in verdict.lines).encode(), _PLAIN)

    def _answer(self, status: HTTPStatus, body: bytes, content_type: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
