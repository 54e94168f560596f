"""The Sentinel's end of the control socket: who may ask, and who answers in which thread.

One thread owns the ROUTER socket. Requests are carried out by a small pool, so that a long one
(an export) holds up no short one; what waits for nothing itself is begun at once. Over ipc the
kernel says who is at the other end: only the Sentinel's own user and root are served, and every
change is logged with its caller. TCP has no such proof and is bound only where it was configured;
with CURVE its clients are known by their keys, and what each may ask is for `handle` to say.
"""

import contextlib
import errno
import logging
import os
import socket
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import zmq

from casparian_flow.domain.errors import (
    CasparianError,
    ConfigError,
    ConflictError,
    NotPermittedError,
    UsageError,
)
from casparian_flow.sentinel.caller import Caller
from casparian_flow.sentinel.control_codec import (
    REQUEST_BYTES_MAX,
    Operation,
    Request,
    decode_arguments,
    decode_request,
    encode_error,
    encode_result,
)
from casparian_flow.sentinel.paths import private_folder
from casparian_flow.sentinel.waker import Waker
from casparian_flow.sentinel.zap import CurveAccess, ZapHandler, key_of, serve_curve

log = logging.getLogger(__name__)

PENDING_MAX = 256
"""Requests taken and not yet answered; more are refused."""
RECEIVE_MAX = 64
"""Requests read before finished ones are answered."""
THREADS = 4
PROMPT_BYTES_MAX = 65_536
"""Arguments of an operation that is carried out in the socket's thread."""
LAST_ANSWERS_S = 0.05
IPC = "ipc://"


Handler = Callable[[Operation, dict[str, object], Caller], object]
"""Gives the result, or a future of it."""


class ControlServer:
    """Serves `handle` at `address` until closed.

    Args:
        address: `ipc://path` or `tcp://host:port`.
        handle: carries one operation out; called in several threads.
        prompt: operations for which it gives a future without waiting for anything; they need
            no other thread, which spares them two changes of threads.
        curve: whose connections are taken; None for a socket without CURVE.

    Raises:
        ConflictError: somebody else answers at the address.
        ConfigError: the address cannot be bound.
    """

    def __init__(
        self,
        address: str,
        handle: Handler,
        prompt: frozenset[str] = frozenset({"ping"}),
        curve: CurveAccess | None = None,
    ) -> None:
        self.address = address
        self._curve = curve
        self._zap: ZapHandler | None = None
        self._handle = handle
        self._prompt = prompt
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.linger = 1000
        self._socket.setsockopt(zmq.MAXMSGSIZE, REQUEST_BYTES_MAX)
        self._socket.rcvhwm = PENDING_MAX
        try:
            self._bind()
        except BaseException:
            self._socket.close(0)
            self._end()
            raise
        self._waker = Waker()
        self._done: deque[list[bytes]] = deque()
        self._pending = 0
        self._stopping = threading.Event()
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="control-call")
        self._thread = threading.Thread(target=self._run, name="control", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Answer what is being carried out, refuse the rest, and remove the socket."""
        self._stopping.set()
        self._waker.wake()
        self._thread.join()
        if self.address.startswith(IPC):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.address.removeprefix(IPC))
        self._end()
        self._waker.close()

    def _end(self) -> None:
        if self._zap is not None:
            self._zap.close()
        self._context.term()

    # -- binding ----------------------------------------------------------------------------

    def _bind(self) -> None:
        if self.address.startswith(IPC):
            path = Path(self.address.removeprefix(IPC))
            private_folder(path.parent)
            remove_stale_socket(path)
        if self._curve is not None:
            self._zap = ZapHandler(self._context, self._curve.admission, self._curve.metrics)
            serve_curve(self._socket, self._curve.pair)
        bind_or_explain(self._socket, self.address, "control_address")
        if self.address.startswith(IPC):
            os.chmod(self.address.removeprefix(IPC), 0o600)
        else:
            self.address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        if not self.address.startswith(IPC) and self._curve is None:
            log.warning("control socket on %s: whoever reaches it may command", self.address)

    # -- the socket's thread ----------------------------------------------------------------

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._waker.fileno(), zmq.POLLIN)
        try:
            while not self._stopping.is_set():
                poller.poll()
                self._waker.clear()
                self._answer()
                self._receive()
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._answer()
            # Closing at once loses the last answers now and then, linger or not.
            threading.Event().wait(LAST_ANSWERS_S)
        finally:
            self._socket.close()

    def _receive(self) -> None:
        for _ in range(RECEIVE_MAX):
            try:
                identity, *frames = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            if frames:
                self._take(identity.bytes, frames)
        self._waker.wake()

    def _take(self, identity: bytes, frames: list[zmq.Frame]) -> None:
        number = 0
        try:
            caller = self._caller(frames[0])
            request = decode_request([frame.bytes for frame in frames])
            number = request.id
            if self._pending >= PENDING_MAX:
                raise CasparianError(
                    f"the Sentinel is busy with {PENDING_MAX} requests",
                    hint="Wait a moment and repeat the command.",
                )
        except CasparianError as error:
            log.warning("control request refused: %s", error)
            self._send(identity, encode_error(number, error))
            return
        self._pending += 1
        if request.op in self._prompt and len(memoryview(request.args)) <= PROMPT_BYTES_MAX:
            self._carry_out(identity, request, caller)
        else:
            self._pool.submit(self._carry_out, identity, request, caller)

    def _caller(self, frame: zmq.Frame) -> Caller:
        if self._curve is not None:
            principal = self._curve.admission.principal(key_of(frame))
            if principal is None:
                raise NotPermittedError("this key is not admitted any more")
            return Caller("curve", principal=principal)
        if not self.address.startswith(IPC):
            return Caller("tcp")
        caller = parse_peer(_property(frame, "Peer-Address"))
        if caller is None or caller.uid not in {os.geteuid(), 0}:
            raise UsageError(
                f"{caller or 'an unknown caller'} may not command this Sentinel",
                hint=f"Ask as its own user (uid {os.geteuid()}) or as root.",
            )
        return caller

    def _answer(self) -> None:
        while self._done:
            identity, *frames = self._done.popleft()
            self._pending -= 1
            self._send(identity, frames)

    def _send(self, identity: bytes, frames: list[bytes]) -> None:
        try:
            self._socket.send_multipart([identity, *frames], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            # The client is gone; nobody else waits for this.
            log.debug("control reply dropped: %s", error)

    # -- the pool's threads -----------------------------------------------------------------

    def _carry_out(self, identity: bytes, request: Request, caller: Caller) -> None:
        def encoded(result: object) -> list[bytes]:
            return encode_result(request.id, operation, result)

        try:
            operation, arguments = decode_arguments(request)
            result = self._handle(operation, arguments, caller)
        except Exception as error:  # noqa: BLE001 - raised again in _reply
            self._reply(identity, request, partial(_raise, error))
            return
        if isinstance(result, Future):
            # It waits for something to happen, and must not hold one of a few threads meanwhile.
            result.add_done_callback(
                lambda done: self._reply(identity, request, lambda: encoded(done.result()))
            )
        else:
            self._reply(identity, request, lambda: encoded(result))

    def _reply(
        self, identity: bytes, request: Request, frames_of: Callable[[], list[bytes]]
    ) -> None:
        try:
            frames = frames_of()
        except CasparianError as error:
            frames = encode_error(request.id, error)
        except Exception as error:
            log.exception("control request %s failed", request.op[:80])
            wrapped = CasparianError(
                f"the Sentinel failed at {request.op[:80]}: {type(error).__name__}: {error}",
                hint="This is a bug; the Sentinel's log has the details.",
            )
            frames = encode_error(request.id, wrapped)
        self._done.append([identity, *frames])
        self._waker.wake()


def _raise(error: Exception) -> list[bytes]:
    raise error


def parse_peer(text: str) -> Caller | None:
    """The credentials that libzmq reads from the kernel for an ipc peer: `host:uid:gid:pid`.

    >>> str(parse_peer("localhost:1000:1000:4711"))
    'uid 1000 (pid 4711)'
    """
    parts = text.rsplit(":", 3)
    if len(parts) != 4 or not all(p.isascii() and p.isdigit() for p in parts[1:]):
        return None
    return Caller("ipc", int(parts[1]), int(parts[3]))


def _property(frame: zmq.Frame, name: str) -> str:
    try:
        return str(frame.get(name))
    except zmq.ZMQError:
        return ""


def remove_stale_socket(path: Path) -> None:
    """Remove a socket that a killed process left, and nothing else.

    Raises:
        ConflictError: somebody answers on it, or it is no socket.
    """
    if not path.exists() and not path.is_symlink():
        return
    if not path.is_socket():
        raise ConflictError(
            f"{path} is in the way of the control socket and is no socket",
            hint="Move it away, or set control_address.",
        )
    probe = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        probe.settimeout(1.0)
        probe.connect(str(path))
    except (ConnectionRefusedError, FileNotFoundError):
        path.unlink(missing_ok=True)
        return
    except OSError as error:
        log.debug("probing %s: %s", path, error)
    finally:
        probe.close()
    raise ConflictError(
        f"another process answers on {path}",
        hint="A Sentinel runs already: see `casparian status`.",
    )


def bind_or_explain(target: zmq.Socket[bytes], address: str, setting: str) -> None:
    """Bind, or say what is wrong with the address.

    Raises:
        ConflictError: the address is in use.
        ConfigError: it cannot be bound at all.
    """
    try:
        target.bind(address)
    except zmq.ZMQError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConflictError(
                f"{address} is in use",
                hint=f"Another Sentinel may run there; stop it, or change {setting}.",
            ) from error
        raise ConfigError(
            f"cannot bind {address!r}: {error.strerror}",
            hint=f"Set {setting} to an address of this machine, like tcp://127.0.0.1:5555.",
        ) from error
