"""Asking the control plane from another process: `connect`, and the client of the socket.

    with connect("casparian_flow.duckdb") as control:
        control.status()

`connect` asks the Sentinel that owns the ledger. If none runs, it opens the ledger in this
process and carries the same operations out here, so that a command works either way.
"""

import itertools
import threading
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self, cast

import zmq
from zmq.utils.monitor import recv_monitor_message

from casparian_flow.domain.clock import Clock, SystemClock
from casparian_flow.domain.errors import (
    LedgerLockedError,
    ProtocolError,
    SentinelUnreachableError,
    UsageError,
)
from casparian_flow.protocol.curve import ClientKeys, client_keys
from casparian_flow.protocol.http_types import new_approval_id
from casparian_flow.sentinel import paths
from casparian_flow.sentinel.api import ApiClient, ApiStore, ControlApi
from casparian_flow.sentinel.control_codec import (
    API_OPERATIONS,
    API_PREFIX,
    CONTROL_OPERATIONS,
    OPERATIONS,
    REPLY_BYTES_MAX,
    Operation,
    decode_reply,
    encode_request,
    result_of,
)

if TYPE_CHECKING:
    from casparian_flow.config import Settings
    from casparian_flow.trust.rules import TrustRules, TrustSource

CONNECT_TIMEOUT_S = 5.0
TIMEOUT_S = 60.0
LONG_TIMEOUT_S = 3600.0
LONG = frozenset(
    {"snapshot", "export", "check", "inventory", "commit_chunk", "finish_scan", "backfill"}
)
"""Operations whose time grows with the ledger."""
START_WAIT_S = 10.0
"""How long a Sentinel may hold the ledger before it answers on its socket."""
START_POLL_S = 0.1
LAST_WORDS_MS = 100
_UP = zmq.EVENT_HANDSHAKE_SUCCEEDED
_DOWN = (
    zmq.EVENT_DISCONNECTED
    | zmq.EVENT_CLOSED
    | zmq.EVENT_CONNECT_RETRIED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)


class ControlClient(ControlApi, Protocol):
    """ControlApi that can be closed; also a context manager."""

    @property
    def api(self) -> ApiClient:
        """The API's jobs, events and approvals, over the same connections."""

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


class _Channel:
    """One connection, used by one call at a time. It knows when the other end goes away."""

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], address: str, keys: ClientKeys | None
    ) -> None:
        self._address = address
        self.socket = context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.setsockopt(zmq.RECONNECT_IVL, -1)
        self.socket.setsockopt(zmq.MAXMSGSIZE, REPLY_BYTES_MAX)
        if keys is not None:
            self.socket.curve_publickey = keys.own.public.encode("ascii")
            self.socket.curve_secretkey = keys.own.secret.encode("ascii")
            self.socket.curve_serverkey = keys.server.encode("ascii")
        self._monitor = self.socket.get_monitor_socket(_UP | _DOWN)
        self._poller = zmq.Poller()
        self._poller.register(self._monitor, zmq.POLLIN)
        try:
            self.socket.connect(address)
        except zmq.ZMQError as error:
            self.close()
            raise UsageError(
                f"{address!r} is no address of a control socket: {error.strerror}",
                hint="Use ipc://PATH or tcp://HOST:PORT (control_address).",
            ) from error

    def await_connection(self) -> None:
        """Raises:
        SentinelUnreachableError: nobody answers at the address.
        """
        event = self._event() if self._poller.poll(int(CONNECT_TIMEOUT_S * 1000)) else 0
        if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            raise SentinelUnreachableError(
                f"the Sentinel at {self._address} does not admit this key",
                hint="The operator issues keys anew; it is logged there whose key it refuses.",
            )
        if not event & _UP:
            raise SentinelUnreachableError(
                f"no Sentinel answers at {self._address}",
                hint="Start one with `casparian start` or `casparian sentinel`.",
            )
        self._poller.register(self.socket, zmq.POLLIN)

    def receive(self, what: str, timeout_s: float) -> list[bytes]:
        """The next reply's frames.

        Raises:
            SentinelUnreachableError: the connection ended or the time is over.
        """
        ready = dict(self._poller.poll(int(timeout_s * 1000)))
        # A Sentinel that answers and then stops: the answer may show just after the end does.
        if self.socket in ready or (ready and self.socket.poll(LAST_WORDS_MS)):
            return self.socket.recv_multipart()
        unknown = "Whether it was carried out is not known: look with `casparian status`."
        if ready:
            raise SentinelUnreachableError(f"the Sentinel went away during {what}", hint=unknown)
        raise SentinelUnreachableError(
            f"the Sentinel did not answer {what} within {timeout_s:g} seconds", hint=unknown
        )

    def alive(self) -> bool:
        """Whether the other end has not gone away since the last call."""
        return not self._monitor.poll(0)

    def _event(self) -> int:
        return int(recv_monitor_message(self._monitor)["event"])

    def close(self) -> None:
        self.socket.disable_monitor()
        self._monitor.close(0)
        self.socket.close(0)


class RemoteControl:
    """Every method of ControlApi, carried out by the Sentinel at `address`.

    Safe for several threads: each call takes a connection of its own from a pool.

    Args:
        address: `ipc://path` or `tcp://host:port`.
        timeout_s: of every call; None = by operation, 60 seconds or an hour.
        curve_dir: with this client's keys (protocol/curve.py), read for each connection; None for
            a control socket without CURVE.
    """

    def __init__(
        self, address: str, *, timeout_s: float | None = None, curve_dir: Path | None = None
    ) -> None:
        self.address = address
        self._curve_dir = curve_dir
        self._timeout_s = timeout_s
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._context.set(zmq.MAX_SOCKETS, 4096)
        self._idle: list[_Channel] = []
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)

    def call(self, name: str, *args: object, **kwargs: object) -> Any:
        """Ask for one operation.

        Raises:
            CasparianError: the error that the Sentinel answered with, as its own class.
            SentinelUnreachableError: no Sentinel, or no answer in time.
            ProtocolError: an answer that is none.
        """
        operation = OPERATIONS[name]
        arguments = operation.signature.bind(*args, **kwargs).arguments
        number = next(self._numbers)
        request = encode_request(number, operation, arguments)
        channel = self._take()
        try:
            channel.socket.send(request)
            patience_s = self._patience_s(operation) + float(arguments.get("timeout_seconds", 0))
            frames = channel.receive(name, patience_s)
            reply = decode_reply(frames)
            if reply.id not in (number, 0):
                raise ProtocolError(f"{name}: the reply answers another request")
        except BaseException:
            # A reply may still come to this connection; only a fresh one is free of it.
            channel.close()
            raise
        with self._lock:
            self._idle.append(channel)
        return result_of(operation, reply, frames)

    def _patience_s(self, operation: Operation) -> float:
        if self._timeout_s is not None:
            return self._timeout_s
        return LONG_TIMEOUT_S if operation.name in LONG else TIMEOUT_S

    def _take(self) -> _Channel:
        while True:
            with self._lock:
                channel = self._idle.pop() if self._idle else None
            if channel is None:
                break
            if channel.alive():
                return channel
            channel.close()
        keys = client_keys(self._curve_dir) if self._curve_dir is not None else None
        channel = _Channel(self._context, self.address, keys)
        try:
            channel.await_connection()
        except BaseException:
            channel.close()
            raise
        return channel

    @property
    def api(self) -> "RemoteApi":
        """The API's calls, carried out by the same Sentinel."""
        return RemoteApi(self)

    def close(self) -> None:
        with self._lock:
            for channel in self._idle:
                channel.close()
            self._idle.clear()
        self._context.destroy(linger=0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class RemoteApi:
    """Every method of ApiStore, carried out by a Sentinel.

    Args:
        control: asked; closed with this object.
    """

    def __init__(self, control: RemoteControl) -> None:
        self._control = control

    def call(self, name: str, *args: object, **kwargs: object) -> Any:
        """As RemoteControl.call, by the method's own name."""
        return self._control.call(API_PREFIX + name, *args, **kwargs)

    @staticmethod
    def generate_approval_id() -> str:
        return new_approval_id()

    def close(self) -> None:
        self._control.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _add_stub(client: type[RemoteControl] | type[RemoteApi], interface: type, name: str) -> None:
    def method(self: RemoteControl | RemoteApi, *args: object, **kwargs: object) -> Any:
        return self.call(name, *args, **kwargs)

    method.__name__ = name
    method.__doc__ = getattr(interface, name).__doc__
    setattr(client, name, method)


for _name in CONTROL_OPERATIONS:
    _add_stub(RemoteControl, ControlApi, _name)
for _name in API_OPERATIONS:
    _add_stub(RemoteApi, ApiStore, _name.removeprefix(API_PREFIX))


def remote(
    address: str, *, timeout_s: float | None = None, curve_dir: Path | None = None
) -> ControlClient:
    """A RemoteControl under its static type. Connects with the first call."""
    return cast(ControlClient, RemoteControl(address, timeout_s=timeout_s, curve_dir=curve_dir))


def connect(
    target: "str | Path | Settings",
    *,
    control_address: str = "",
    timeout_s: float | None = None,
    clock: Clock | None = None,
    trust: "TrustSource | None" = None,
) -> ControlClient:
    """The control plane of a ledger: the Sentinel that owns it, else the ledger opened here.

    With `[wire] curve_dir` and a `control_address` on another machine that Sentinel is meant and no
    other: no ledger is opened here.

    Args:
        target: the ledger's file, or settings that name it and the control socket.
        control_address: where the Sentinel listens, if not beside the ledger.
        timeout_s: of every call to a Sentinel; None = by operation.
        trust: by which deploys are judged if the ledger is opened here; None = what the settings
            say, and nobody where a file is given.

    Raises:
        LedgerLockedError: some process has the ledger open and answers to nobody.
        LedgerError: the ledger cannot be used.
        SentinelUnreachableError: the Sentinel of another machine does not answer.
    """
    if isinstance(target, str | Path):
        database, address = target, control_address
    else:
        database = target.database.db_location
        address = control_address or target.sentinel.control_address
        trust = trust or partial(_rules_of, target)
        if target.wire.curve_dir is not None and address.startswith("tcp://"):
            elsewhere = remote(address, timeout_s=timeout_s, curve_dir=target.wire.curve_dir)
            try:
                elsewhere.ping()
            except BaseException:
                elsewhere.close()
                raise
            return elsewhere
    clock = clock or SystemClock()
    deadline = clock.now().mono + START_WAIT_S
    while True:
        client = remote(paths.control_address(database, address), timeout_s=timeout_s)
        try:
            client.ping()
            return client
        except SentinelUnreachableError:
            client.close()
        try:
            return _open_here(database, clock, trust)
        except LedgerLockedError:
            # A Sentinel that is just starting or stopping holds the ledger without answering.
            if clock.now().mono >= deadline:
                raise
        threading.Event().wait(START_POLL_S)


def _open_here(database: str | Path, clock: Clock, trust: "TrustSource | None") -> ControlClient:
    # Only here are duckdb and all that comes with it needed.
    from casparian_flow.sentinel.local import LocalControl
    from casparian_flow.trust.rules import nobody

    return LocalControl.open(database, clock=clock, trust=trust or nobody)


def _rules_of(settings: "Settings") -> "TrustRules":
    from casparian_flow.config_trust import rules_of

    return rules_of(settings.trust)
