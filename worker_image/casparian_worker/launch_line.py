"""The line between a worker and the launcher of its pod's plugin container: packets and bounds.

A UNIX socket of packets in sequence. A packet is a JSON object whose `op` names its kind:

    worker → launcher   start {family, launch}, with the descriptors of guest_family.Lines
                        look {family}       kill {family}
    launcher → worker   hello {…}, first
                        started {family, pid}, or refused {family, message}
                        usage {family, …}*   verdict {family, reason, message}   ended {family}

The plugins run as the launcher's user, so a worker takes what it reads here for hostile: packets
are bounded and fit one of these kinds, or the line is cut.
"""

import array
import json
import socket
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any, get_args, get_origin

PACKET_BYTES_MAX = 64 * 1024
_LINES = 4


class LineError(Exception):
    """The other side broke the grammar above."""


@dataclass(frozen=True, slots=True)
class Start:
    """Start a family.

    Attributes:
        family: a number that this line has not had.
        launch: guest_family.Launch as JSON.
    """

    family: int
    launch: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Look:
    """Tell what the family uses now."""

    family: int


@dataclass(frozen=True, slots=True)
class Kill:
    """End the family, whatever it takes."""

    family: int


@dataclass(frozen=True, slots=True)
class Hello:
    """What a worker has to know of the container.

    Attributes:
        version: of Casparian Flow.
        python: the base interpreter.
        kit: folder of the guest's modules, named by their content.
        scratch: folder in which every family may have one of its own to write to.
        user: that plugins run as.
        groups: that it belongs to.
    """

    version: str
    python: str
    kit: str
    scratch: str
    user: int
    groups: list[int]


@dataclass(frozen=True, slots=True)
class Started:
    family: int
    pid: int


@dataclass(frozen=True, slots=True)
class Refused:
    family: int
    message: str


@dataclass(frozen=True, slots=True)
class Used:
    """guest_family.Usage of a family."""

    family: int
    memory_bytes: int
    tasks: int
    processes: int


@dataclass(frozen=True, slots=True)
class Judged:
    """The family broke a limit and is being ended; see guest_family.Verdict."""

    family: int
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Ended:
    """Its processes are gone, and so is what they wrote."""

    family: int


Request = Start | Look | Kill
Report = Hello | Started | Refused | Used | Judged | Ended
_KINDS: dict[str, type[Any]] = {
    kind.__name__.lower(): kind for kind in (*get_args(Request), *get_args(Report))
}


def pack(message: Request | Report) -> bytes:
    """A message as one packet.

    Raises:
        LineError: it is too large for one.
    """
    raw = json.dumps({"op": type(message).__name__.lower(), **asdict(message)}).encode("ascii")
    if len(raw) > PACKET_BYTES_MAX:
        raise LineError(f"{type(message).__name__} of {len(raw)} bytes is too large")
    return raw


def send_start(sock: socket.socket, start: Start, lines: tuple[int, ...]) -> None:
    """Raises:
    OSError: the other end is gone.
    LineError: the launch is too large.
    """
    socket.send_fds(sock, [pack(start)], list(lines))


def receive(sock: socket.socket) -> Report | None:
    """The launcher's next packet; None at the end. Descriptors that come with it are not taken.

    Raises:
        LineError: it is none of Report.
    """
    raw = sock.recv(PACKET_BYTES_MAX + 1)
    message = _unpacked(raw) if raw else None
    if isinstance(message, Request):
        raise LineError(f"sent {type(message).__name__}, which is not its to send")
    return message


def receive_request(sock: socket.socket) -> tuple[Request | None, list[int]]:
    """The worker's next packet with its descriptors, which are the caller's then; None at the end.

    Raises:
        LineError: it is none of Request, or has other descriptors than it should.
    """
    lines = array.array("i")
    # Not socket.recv_fds, which passes its flags over: a forked plugin would inherit them.
    raw, parts, flags, _ = sock.recvmsg(
        PACKET_BYTES_MAX + 1,
        socket.CMSG_SPACE(_LINES * lines.itemsize),
        socket.MSG_CMSG_CLOEXEC,
    )
    for level, kind, data in parts:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            lines.frombytes(data[: len(data) - len(data) % lines.itemsize])
    try:
        message = _unpacked(raw) if raw else None
        if not isinstance(message, Request | None):
            raise LineError(f"sent {type(message).__name__}, which is not its to send")
        cut = flags & socket.MSG_CTRUNC
        if cut or len(lines) != (_LINES if isinstance(message, Start) else 0):
            raise LineError(f"sent {len(lines)} descriptors{' and more' if cut else ''}")
    except LineError:
        close_all(lines)
        raise
    return message, list(lines)


def close_all(descriptors: Iterable[int]) -> None:
    """Close descriptors that were received."""
    for descriptor in descriptors:
        socket.close(descriptor)


def _unpacked(raw: bytes) -> Request | Report:
    if len(raw) > PACKET_BYTES_MAX:
        raise LineError("sent a packet that is too large")
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        value = None
    op = value.pop("op", None) if isinstance(value, dict) else None
    kind = _KINDS.get(op) if isinstance(op, str) else None
    if kind is None:
        raise LineError("sent a packet of no known kind")
    wanted = {field.name: field.type for field in fields(kind)}
    if set(value) != set(wanted) or not all(_fits(value[n], t) for n, t in wanted.items()):
        raise LineError(f"sent {kind.__name__} without its fields")
    message: Request | Report = kind(**value)
    return message


def _fits(value: object, kind: Any) -> bool:
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_fits(v, get_args(kind)[0]) for v in value)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, get_origin(kind) or kind)
