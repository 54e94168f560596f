"""The bridge between worker (host) and plugin process (guest): frames over a socketpair.

A frame is a 16-byte header and two parts:

    kind: u8 | reserved: u8 = 0 | name length: u16 | job: u32 | body length: u64     network order
    name: UTF-8, a topic; only in BATCH
    body: an Arrow IPC stream with one record batch (BATCH), JSON (the others)

    host → guest    HELLO {plugin …}   RUN(job) {path …}
    guest → host    CONFINED {report}   READY {}   BEGIN(job)   BATCH(job, topic)*   END(job) {…}
                    ERROR(job) {kind, message, transient}, instead of READY or END

Jobs run in the order of their RUNs, and several RUNs may be ahead of the job at work. The end of
the socket is no end of a job: without END or ERROR the job has failed.

The guest runs foreign code, so the host trusts nothing it reads: lengths are bounded before
memory is taken, and a frame out of order ends the process. Standard library only; the Arrow part
is arrow_ipc.py.
"""

import json
import socket
import struct
from enum import IntEnum
from typing import Any, NamedTuple

HEADER = struct.Struct("!BBHIQ")
NAME_BYTES_MAX = 256
BODY_BYTES_MAX = 256 * 1024 * 1024
"""One batch; the SDK aims at 8 MiB and exceeds it only for single large rows."""
JSON_BYTES_MAX = 32 * 1024 * 1024
"""A HELLO holds a plugin's source and parameters."""
MESSAGE_BYTES_MAX = 64 * 1024
"""An error's text, cut by the guest."""
SOCKET_BUFFER_BYTES = 1024 * 1024
_CHUNK = 256 * 1024
_FIRST_BODY_BYTES = 16 * 1024 * 1024
"""Memory taken for a large body at once; more than the SDK's batches have."""


class Kind(IntEnum):
    HELLO = 1
    RUN = 2
    CONFINED = 3
    READY = 4
    BEGIN = 5
    BATCH = 6
    END = 7
    ERROR = 8


_KINDS: dict[int, Kind] = {int(kind): kind for kind in Kind}


class ErrorKind:
    """What went wrong in the guest, as ERROR's `kind` says it."""

    SANDBOX = "sandbox"
    ENVIRONMENT = "environment"
    INVALID = "invalid"
    RAISED = "raised"
    MEMORY = "memory"
    PROCESSES = "processes"
    EXITED = "exited"


class BridgeError(Exception):
    """The other side broke the grammar above."""


class Frame(NamedTuple):
    kind: Kind
    job: int
    name: str
    body: bytes | bytearray

    def json(self) -> dict[str, Any]:
        """The body as a JSON object.

        Raises:
            BridgeError: it is none.
        """
        try:
            value = json.loads(self.body or b"{}")
        except (ValueError, RecursionError) as error:
            raise BridgeError(f"{self.kind.name} is not JSON") from error
        if not isinstance(value, dict):
            raise BridgeError(f"{self.kind.name} is no JSON object")
        return value


def pack(kind: Kind, job: int = 0, *, name: str = "", body: bytes = b"") -> bytes:
    """A small frame as one piece."""
    raw = name.encode()
    return HEADER.pack(kind, 0, len(raw), job, len(body)) + raw + body


def pack_json(kind: Kind, job: int, value: dict[str, Any]) -> bytes:
    """A frame with a JSON body; ASCII, so that names that are no UTF-8 survive."""
    return pack(kind, job, body=json.dumps(value, separators=(",", ":")).encode("ascii"))


def send_batch(sock: socket.socket, job: int, topic: str, body: memoryview) -> None:
    """Send a BATCH from a blocking socket without copying its body.

    Raises:
        BridgeError: the body exceeds BODY_BYTES_MAX.
    """
    raw = topic.encode()
    if len(body) > BODY_BYTES_MAX:
        raise BridgeError(f"a batch of {len(body)} bytes exceeds {BODY_BYTES_MAX}")
    head = HEADER.pack(Kind.BATCH, 0, len(raw), job, len(body)) + raw
    sent = sock.sendmsg([head, body])
    if sent < len(head):
        sock.sendall(head[sent:])
        sent = len(head)
    if sent < len(head) + len(body):
        sock.sendall(body[sent - len(head) :])


def bridge_pair() -> tuple[socket.socket, socket.socket]:
    """(host's end, guest's end), both blocking, with room for small frames."""
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    for end in ends:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER_BYTES)
    return ends


class FrameReader:
    """Cuts a socket's bytes into frames.

    `fill` makes one read, `pop` gives the next complete frame. Held are at most one frame and one
    chunk beyond it.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._buffer = bytearray()
        self._start = 0
        self._head: tuple[Kind, int, str] | None = None
        self._body: bytearray | None = None
        self._filled = self._length = 0

    @property
    def partial(self) -> bool:
        """Whether a frame has begun and not ended."""
        return self._body is not None or len(self._buffer) > self._start

    def fill(self) -> bool:
        """Read once; False at the end of the socket.

        Raises:
            BlockingIOError: nothing is there, on a non-blocking socket.
        """
        body = self._body
        if body is not None and self._filled < self._length:
            if self._filled == len(body):
                body += bytes(min(len(body), self._length - len(body)))
            count = self._sock.recv_into(memoryview(body)[self._filled :])
            self._filled += count
            return count > 0
        chunk = self._sock.recv(_CHUNK)
        if self._start:
            del self._buffer[: self._start]
            self._start = 0
        self._buffer += chunk
        return bool(chunk)

    def pop(self) -> Frame | None:
        """The next frame that is complete, or None.

        Raises:
            BridgeError: unknown kind, reserved bits, a length beyond its bound, a bad name.
        """
        if self._body is not None:
            if self._filled < self._length:
                return None
            kind, job, name = self._head or (Kind.ERROR, 0, "")
            body, self._body, self._head = self._body, None, None
            return Frame(kind, job, name, body)
        buffer, start = self._buffer, self._start
        if len(buffer) - start < HEADER.size:
            return None
        kind, name_bytes, job, length = _header(buffer, start)
        body_start = start + HEADER.size + name_bytes
        if len(buffer) < body_start:
            return None
        name = _name(kind, bytes(buffer[start + HEADER.size : body_start]))
        end = body_start + length
        if len(buffer) >= end:
            self._start = end
            return Frame(kind, job, name, bytes(buffer[body_start:end]))
        if length <= _CHUNK:
            return None
        # A large body gets memory of its own, filled straight from the socket.
        self._head = (kind, job, name)
        self._filled = len(buffer) - body_start
        # It grows with what arrives: a length alone is cheap to write.
        self._length = length
        self._body = bytearray(min(length, _FIRST_BODY_BYTES))
        self._body[: self._filled] = buffer[body_start:]
        buffer.clear()
        self._start = 0
        return None


def _header(buffer: bytearray, start: int) -> tuple[Kind, int, int, int]:
    code, reserved, name_bytes, job, length = HEADER.unpack_from(buffer, start)
    kind = _KINDS.get(code)
    if kind is None or reserved:
        raise BridgeError(f"no frame begins with {code}, {reserved}")
    if name_bytes > (NAME_BYTES_MAX if kind is Kind.BATCH else 0):
        raise BridgeError(f"{kind.name} has a name of {name_bytes} bytes")
    limit = BODY_BYTES_MAX if kind is Kind.BATCH else JSON_BYTES_MAX
    if length > limit:
        raise BridgeError(f"{kind.name} of {length} bytes exceeds {limit}")
    return kind, name_bytes, job, length


def _name(kind: Kind, raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise BridgeError(f"{kind.name} has a name that is not UTF-8") from error
