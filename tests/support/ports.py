"""Free TCP ports on loopback, and who listens there."""

from __future__ import annotations

import contextlib
import os
import random
import socket


def free_ports(count: int, *, companion: int = 0) -> list[int]:
    """So many different ports free right now; with ``companion``, the port that much higher is free as well.

    Below the range that the kernel hands out, so that no outgoing connection takes one in the meantime.
    """
    found: list[int] = []
    with contextlib.ExitStack() as held:
        for _ in range(10_000):
            port = random.randint(10_100, 21_900)
            try:
                for each in (port, port + companion) if companion else (port,):
                    sock = held.enter_context(socket.socket())
                    sock.bind(("127.0.0.1", each))
            except OSError:
                continue
            found.append(port)
            if len(found) == count:
                return found
    raise RuntimeError("no free ports")


def owns_port(pid: int, port: int) -> bool:
    """Whether that process itself listens there on 127.0.0.1 (a server that died leaves it to another)."""
    wanted = f"0100007F:{port:04X}"
    inodes = set()
    with open("/proc/net/tcp") as table:
        for line in table:
            columns = line.split()
            if columns[1] == wanted and columns[3] == "0A":
                inodes.add(f"socket:[{columns[9]}]")
    try:
        for file in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{pid}/fd/{file}") in inodes:
                    return True
    except FileNotFoundError:
        return False
    return False
