"""HTTP messages in a stream of bytes, as far as one must know them to pass them on untouched."""

from __future__ import annotations


class Body:
    """Finds the end of a message's body in a stream of bytes; passes the bytes themselves untouched."""

    def __init__(self, head: Head, *, answer_to: str | None = None) -> None:
        self._chunked = False
        self._line = b""
        self._left: int | None = 0
        status = head.status
        if answer_to == "HEAD" or status in (204, 304) or 100 <= status < 200:
            return
        if b"chunked" in head.value(b"transfer-encoding").lower():
            self._chunked = True
            self._step = "size"
        elif length := head.value(b"content-length"):
            self._left = int(length)
        elif answer_to is not None:
            self._left = None  # until end of file

    @property
    def ended(self) -> bool:
        return not self._chunked and self._left == 0

    def take(self, data: bytes) -> int:
        """How many of these bytes belong to the body."""
        if not self._chunked:
            if self._left is None:
                return len(data)
            taken = min(self._left, len(data))
            self._left -= taken
            return taken
        at = 0
        while at < len(data) and self._chunked:
            if self._step == "data":
                assert self._left is not None
                step = min(self._left, len(data) - at)
                at += step
                self._left -= step
                if self._left == 0:
                    self._step = "size"
                continue
            end = data.find(b"\n", at)
            if end < 0:
                self._line += data[at:]
                return len(data)
            line, self._line = (self._line + data[at:end]).strip(), b""
            at = end + 1
            if self._step == "trailer":
                self._chunked = bool(line)
            elif line:
                size = int(line.split(b";")[0], 16)
                self._step, self._left = ("data", size + 2) if size else ("trailer", 0)
        return at


class Head:
    """Start line and header of a message."""

    def __init__(self, raw: bytes) -> None:
        self.raw = raw
        self._lower = raw.lower()
        first = raw.split(b"\r\n", 1)[0].split(b" ")
        self.words = [word.decode("latin-1") for word in first]
        self.status = int(first[1]) if first[0].startswith(b"HTTP/") else 0

    def value(self, name: bytes) -> bytes:
        at = self._lower.find(b"\r\n" + name + b":")
        if at < 0:
            return b""
        at += len(name) + 3
        return self.raw[at : self.raw.find(b"\r\n", at)].strip()

    def without(self, *names: bytes) -> bytes:
        lines = self.raw.split(b"\r\n")
        return b"\r\n".join(
            line for line in lines if not line.lower().startswith(tuple(name + b":" for name in names))
        )
