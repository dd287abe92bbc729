"""An HTTP proxy before an S3 server: adds distance, counts, and fails on demand.

Runs as a process of its own (``python -m tests.support.s3_proxy --upstream http://127.0.0.1:PORT``) or
through the class ``S3Proxy``. Every client connection has one upstream connection of its own. Requests pass
unchanged, ``Host`` included, so that their signatures hold.

- Latency: the first byte of every answer is held back by ``latency_ms``.
- Bandwidth: each connection and direction passes ``bandwidth_mb`` million bytes per second at most.
- ``GET /__stats`` gives JSON; ``POST /__reset`` zeroes it and clears the faults; ``POST /__faults`` replaces
  the faults by a JSON list of ``Fault``; ``POST /__settings`` changes ``latency_ms`` and ``bandwidth_mb``.
  With ``--control-port`` these are answered there as well.

Buffers are bounded: at most 256 KiB read ahead of each direction of a connection.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import http.client
import json
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any
from urllib.parse import urlsplit

from tests.support.child import die_with_parent
from tests.support.ports import free_ports, owns_port
from tests.support.s3_proxy_http import Body, Head
from tests.support.s3_proxy_state import Fault, ProxyState, Stats

_HEAD_BYTES = 64 << 10
_AHEAD_BYTES = 256 << 10
_PACE_SECONDS = 0.002
"""Grain of the bandwidth: bytes that are due sooner than a quarter of this go at once."""


class _Side(asyncio.Protocol):
    """One socket of a pair."""

    def __init__(self, state: ProxyState) -> None:
        self.state = state
        self.loop = asyncio.get_running_loop()
        self.transport: asyncio.Transport | None = None
        self.peer: _Side | None = None
        self._queue: collections.deque[tuple[float, memoryview]] = collections.deque()
        self._free_at = 0.0
        self._drain_timer: asyncio.TimerHandle | None = None
        self._closing = False
        self._paused_by: set[str] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.set_write_buffer_limits(high=_AHEAD_BYTES)
        sock = transport.get_extra_info("socket")
        if sock is not None:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def pause(self, reason: str) -> None:
        if not self._paused_by and self.transport is not None and not self.transport.is_closing():
            self.transport.pause_reading()
        self._paused_by.add(reason)

    def resume(self, reason: str) -> None:
        self._paused_by.discard(reason)
        if not self._paused_by and self.transport is not None and not self.transport.is_closing():
            self.transport.resume_reading()

    def pause_writing(self) -> None:
        if self.peer is not None:
            self.peer.pause("peer")

    def resume_writing(self) -> None:
        if self.peer is not None:
            self.peer.resume("peer")

    def write(self, data: bytes | memoryview) -> None:
        """Send, no faster than the bandwidth; what must wait is queued, and the peer is not read meanwhile."""
        rate = self.state.bytes_per_second
        if rate <= 0 and not self._queue:
            self._send(data)
            return
        step = int(min(max(rate * _PACE_SECONDS, 1 << 10), 64 << 10)) if rate > 0 else len(data)
        view = memoryview(data)
        now = self.loop.time()
        for at in range(0, len(view), step):
            piece = view[at : at + step]
            self._free_at = max(self._free_at, now) + (len(piece) / rate if rate > 0 else 0.0)
            if not self._queue and self._free_at - now < _PACE_SECONDS / 4:
                self._send(piece)
            else:
                self._queue.append((self._free_at, piece))
        if self._queue and self._drain_timer is None:
            self._drain_timer = self.loop.call_at(self._queue[0][0], self._drain)
            if self.peer is not None:
                self.peer.pause("pace")

    def _drain(self) -> None:
        self._drain_timer = None
        now = self.loop.time()
        while self._queue and self._queue[0][0] <= now + _PACE_SECONDS / 4:
            self._send(self._queue.popleft()[1])
        if self._queue:
            self._drain_timer = self.loop.call_at(self._queue[0][0], self._drain)
            return
        if self.peer is not None:
            self.peer.resume("pace")
        if self._closing:
            self.close()

    def _send(self, data: bytes | memoryview) -> None:
        if self.transport is not None and not self.transport.is_closing():
            self.transport.write(data)

    def close(self) -> None:
        """End when everything queued is sent."""
        self._closing = True
        if not self._queue and self.transport is not None and not self.transport.is_closing():
            self.transport.close()

    def drop_queue(self) -> None:
        """Forget what is queued, for nobody will take it."""
        self._queue.clear()
        if self._drain_timer is not None:
            self._drain_timer.cancel()
            self._drain_timer = None

    def reset(self) -> None:
        """End with RST instead of FIN."""
        self.drop_queue()
        if self.transport is not None:
            sock = self.transport.get_extra_info("socket")
            if sock is not None:
                with contextlib.suppress(OSError):
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.transport.abort()


class _Server(_Side):
    """The connection to the S3 server."""

    def __init__(self, state: ProxyState, client: _Client) -> None:
        super().__init__(state)
        self.peer: _Side | None = client
        self.client = client

    def data_received(self, data: bytes) -> None:
        self.client.answer_received(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self.drop_queue()
        self.client.server_gone()


class _Client(_Side):
    """The connection of a client, and the exchange under way on it."""

    def __init__(self, state: ProxyState) -> None:
        super().__init__(state)
        self.server: _Server | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._unsent: list[bytes] = []
        self._head = b""
        self._body: Body | None = None
        self._control: tuple[str, str] | None = None
        self._control_body = b""
        self._verb = ""
        self._fault: Fault | None = None
        self._under_way = False
        self._answer_head = b""
        self._answer_body: Body | None = None
        self._answer_left = 0
        self._held: list[bytes] | None = None
        self._held_size = 0
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.state.connections += 1
        self.state.open_connections += 1

    def connection_lost(self, exc: Exception | None) -> None:
        self.drop_queue()
        self.state.open_connections -= 1
        self._exchange_ended()
        if self._timer is not None:
            self._timer.cancel()
        if self._connecting is not None:
            self._connecting.cancel()
        if self.server is not None:
            self.server.drop_queue()
            self.server.close()

    # -- requests

    def data_received(self, data: bytes) -> None:
        while data:
            if self._body is None:
                self._head += data
                end = self._head.find(b"\r\n\r\n")
                if end < 0:
                    if len(self._head) > _HEAD_BYTES:
                        self.reset()
                    return
                data, head = self._head[end + 4 :], Head(self._head[: end + 4])
                self._head = b""
                self._begin(head)
            assert self._body is not None
            taken = self._body.take(data)
            if taken:
                self._pass_body(data[:taken])
                data = data[taken:]
            if self._body.ended:
                self._body = None
                self._request_ended()

    def _begin(self, head: Head) -> None:
        self._body = Body(head)
        verb, target = head.words[0], head.words[1]
        if target.startswith("/__"):
            self._control, self._control_body = (verb, target), b""
            return
        self._verb = verb
        self._fault = self.state.fault_for(verb, target)
        self.state.began(verb, target)
        if self._fault is None or self._fault.kind not in ("status", "stall", "reset-before"):
            self.state.passed(verb, target, head.value(b"user-agent").decode("latin-1").partition(" ")[0])
        self._under_way = True
        self._answer_head, self._answer_body = b"", None
        kind = self._fault.kind if self._fault else ""
        if kind == "reset-before":
            self.reset()
        elif kind == "strip-conditional":
            self._to_server(head.without(b"if-none-match", b"if-match"))
        elif kind not in ("status", "stall"):
            self._to_server(head.raw)
        elif head.value(b"expect"):
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _pass_body(self, data: bytes) -> None:
        if self._control is not None:
            self._control_body += data
            return
        self.state.bytes_up += len(data)
        if self._fault is None or self._fault.kind not in ("status", "stall", "reset-before"):
            self._to_server(data)

    def _request_ended(self) -> None:
        if self._control is not None:
            (verb, target), self._control = self._control, None
            status, answer = _control(self.state, verb, target, self._control_body)
            self.write(_message(status, "application/json", answer))
        elif self._fault is not None and self._fault.kind == "status":
            code = self._fault.code
            body = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>injected</Message></Error>'
            self._timer = self.loop.call_later(
                self.state.latency_seconds,
                self._answer_status,
                _message(
                    self._fault.status, "application/xml", b"" if self._verb == "HEAD" else body.encode()
                ),
            )

    def _answer_status(self, message: bytes) -> None:
        self.write(message)
        self._exchange_ended()

    def _to_server(self, data: bytes) -> None:
        if self.server is not None and not self._unsent:
            self.server.write(data)
            return
        self._unsent.append(data)
        if self._connecting is None:
            self.pause("connecting")
            self._connecting = self.loop.create_task(self._connect())

    async def _connect(self) -> None:
        host, port = self.state.upstream
        try:
            _, server = await self.loop.create_connection(lambda: _Server(self.state, self), host, port)
        except OSError:
            self.reset()
            return
        self.server = server
        self.peer = server
        for data in self._unsent:
            server.write(data)
        self._unsent.clear()
        self.resume("connecting")

    # -- answers

    def answer_received(self, data: bytes) -> None:
        while data:
            if self._answer_body is None:
                self._answer_head += data
                end = self._answer_head.find(b"\r\n\r\n")
                if end < 0:
                    return
                head = Head(self._answer_head[: end + 4])
                data, self._answer_head = self._answer_head[end + 4 :], b""
                if 100 <= head.status < 200:
                    self.write(head.raw)
                    continue
                self._begin_answer(head)
            assert self._answer_body is not None
            taken = self._answer_body.take(data)
            if taken:
                self.state.bytes_down += taken
                self._to_client(data[:taken] if taken < len(data) else data)
                data = data[taken:]
            if self._answer_body.ended:
                self._answer_ended()
                if data:  # nobody asked for it
                    self.reset()
                    return

    def _begin_answer(self, head: Head) -> None:
        self._answer_body = Body(head, answer_to=self._verb)
        self.state.statuses[str(head.status)] += 1
        fault = self._fault
        kind = fault.kind if fault else ""
        length = head.value(b"content-length")
        self._answer_left = int(length) // 2 if kind == "truncate" and length else -1
        wait = self.state.latency_seconds + (fault.seconds if fault and kind == "delay" else 0.0)
        if wait > 0:
            self._held, self._held_size = [], 0
            self._timer = self.loop.call_later(wait, self._release)
        self._to_client(head.raw, is_head=True)

    def _to_client(self, data: bytes, *, is_head: bool = False) -> None:
        if self._fault is not None:
            if self._fault.kind == "reset-after-commit":
                return
            if self._answer_left >= 0 and not is_head:
                data = data[: self._answer_left]
                self._answer_left -= len(data)
        if self._held is None:
            self.write(data)
            return
        self._held.append(data)
        self._held_size += len(data)
        if self._held_size > _AHEAD_BYTES and self.server is not None:
            self.server.pause("held")

    def _release(self) -> None:
        held, self._held = self._held, None
        self._timer = None
        for data in held or ():
            self.write(data)
        if self.server is not None:
            self.server.resume("held")
        if self._answer_body is not None and self._answer_body.ended:
            self._answer_ended()

    def _answer_ended(self) -> None:
        if self._held is not None:
            return
        kind = self._fault.kind if self._fault else ""
        self._exchange_ended()
        if kind == "reset-after-commit":
            self.reset()
        elif kind == "truncate":
            self.close()

    def _exchange_ended(self) -> None:
        if self._under_way:
            self._under_way = False
            self.state.in_flight -= 1
        self._fault = None

    def server_gone(self) -> None:
        self.server = None
        self.peer = None
        self._connecting = None
        if self._held is not None:
            self._release()
        if self._under_way or self._answer_body is None or not self._answer_body.ended:
            self.close()


def _message(status: int, content_type: str, body: bytes) -> bytes:
    head = f"HTTP/1.1 {status} Answer\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def _control(state: ProxyState, verb: str, target: str, body: bytes) -> tuple[int, bytes]:
    try:
        if (verb, target) == ("GET", "/__stats"):
            return 200, json.dumps(asdict(state.stats())).encode()
        if (verb, target) == ("POST", "/__reset"):
            state.reset()
        elif (verb, target) == ("POST", "/__faults"):
            state.set_faults([Fault(**each) for each in json.loads(body)])
        elif (verb, target) == ("POST", "/__settings"):
            settings = json.loads(body)
            state.latency_seconds = settings.get("latency_ms", state.latency_seconds * 1e3) / 1e3
            state.bytes_per_second = settings.get("bandwidth_mb", state.bytes_per_second / 1e6) * 1e6
        else:
            return 404, b"{}"
    except (ValueError, TypeError) as error:
        return 400, json.dumps({"error": str(error)}).encode()
    return 200, b"{}"


async def serve(
    upstream: str, port: int, *, latency_ms: float, bandwidth_mb: float, control_port: int | None = None
) -> None:
    """Serve until cancelled. ``bandwidth_mb`` of 0: no limit."""
    parts = urlsplit(upstream)
    if parts.hostname is None or parts.port is None:
        raise ValueError(f"not an upstream: {upstream}")
    state = ProxyState((parts.hostname, parts.port), latency_ms / 1e3, bandwidth_mb * 1e6)
    loop = asyncio.get_running_loop()
    async with contextlib.AsyncExitStack() as stack:
        for each in (port,) if control_port is None else (port, control_port):
            server = await loop.create_server(lambda: _Client(state), "127.0.0.1", each, backlog=512)
            await stack.enter_async_context(server)
        await asyncio.Event().wait()


class S3Proxy:
    """The proxy as a process of its own."""

    def __init__(self, upstream: str, *, latency_ms: float = 0.0, bandwidth_mb: float = 0.0) -> None:
        self._upstream = upstream
        self._latency_ms = latency_ms
        self._bandwidth_mb = bandwidth_mb
        self.port, self._control_port = free_ports(2)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Run it and wait until it listens."""
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tests.support.s3_proxy",
                f"--upstream={self._upstream}",
                f"--port={self.port}",
                f"--control-port={self._control_port}",
                f"--latency-ms={self._latency_ms}",
                f"--bandwidth-mb={self._bandwidth_mb}",
            ],
            stdin=subprocess.DEVNULL,
            preexec_fn=die_with_parent,
        )
        deadline = time.monotonic() + 30
        while not owns_port(self._process.pid, self._control_port):
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError("the proxy did not come up")
            time.sleep(0.02)

    def stop(self) -> None:
        """End it."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def stats(self) -> Stats:
        return Stats(**self._ask("GET", "/__stats"))

    def reset(self) -> None:
        """Zero the counters, clear the faults."""
        self._ask("POST", "/__reset")

    def set_faults(self, *faults: Fault) -> None:
        """Replace the faults; none clears them."""
        self._ask("POST", "/__faults", [asdict(fault) for fault in faults])

    def configure(self, *, latency_ms: float | None = None, bandwidth_mb: float | None = None) -> None:
        """Change distance and bandwidth from now on."""
        given = {"latency_ms": latency_ms, "bandwidth_mb": bandwidth_mb}
        self._ask("POST", "/__settings", {name: value for name, value in given.items() if value is not None})

    def _ask(self, verb: str, target: str, body: object = None) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self._control_port, timeout=10)
        try:
            connection.request(verb, target, None if body is None else json.dumps(body))
            answer = connection.getresponse()
            content = json.loads(answer.read())
            if answer.status != 200:
                raise RuntimeError(f"{verb} {target}: {answer.status} {content}")
            return content
        finally:
            connection.close()


@contextlib.contextmanager
def running_proxy(upstream: str, *, latency_ms: float = 0.0, bandwidth_mb: float = 0.0) -> Iterator[S3Proxy]:
    """A proxy before that server, stopped at the end."""
    proxy = S3Proxy(upstream, latency_ms=latency_ms, bandwidth_mb=bandwidth_mb)
    try:
        proxy.start()
        yield proxy
    finally:
        proxy.stop()


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the process."""
    parser = argparse.ArgumentParser(
        description="An HTTP proxy before an S3 server, with distance and faults"
    )
    parser.add_argument("--upstream", required=True, help="http://host:port of the S3 server")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--control-port", type=int)
    parser.add_argument(
        "--latency-ms", type=float, default=20.0, help="added to the first byte of each answer"
    )
    parser.add_argument(
        "--bandwidth-mb", type=float, default=100.0, help="MB/s of each connection, 0: no limit"
    )
    given = parser.parse_args(arguments)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(
            serve(
                given.upstream,
                given.port,
                latency_ms=given.latency_ms,
                bandwidth_mb=given.bandwidth_mb,
                control_port=given.control_port,
            )
        )


if __name__ == "__main__":
    main()
