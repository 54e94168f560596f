"""Answers libzmq's question whether a client may connect (ZAP, ZeroMQ RFC 27), by its public key.

libzmq asks over an inproc socket of the context that a server socket belongs to, once for each
connection, before it takes any message from it. The answer names the connection's user: its
public key, which then stands in the metadata of each message ("User-Id") and cannot be forged.
"""

import logging
import threading
from typing import NamedTuple

import zmq
from zmq.utils import z85

from casparian_flow.protocol.curve import CurvePair
from casparian_flow.sentinel.admission import Admission
from casparian_flow.sentinel.metrics import SentinelMetrics
from casparian_flow.sentinel.waker import Waker

log = logging.getLogger(__name__)

ENDPOINT = "inproc://zeromq.zap.01"
VERSION = b"1.0"
DOMAIN = b"casparian"
_FRAMES = 7
"""Version, request id, domain, address, identity, mechanism, public key."""


class CurveAccess(NamedTuple):
    """Whose connections a socket with CURVE takes.

    Attributes:
        pair: the socket's own keys.
    """

    pair: CurvePair
    admission: Admission
    metrics: SentinelMetrics


class ZapHandler:
    """Serves one context until closed; make it before the context's server sockets bind.

    Args:
        metrics: counts refusals.
    """

    def __init__(
        self,
        context: "zmq.Context[zmq.Socket[bytes]]",
        admission: Admission,
        metrics: SentinelMetrics,
    ) -> None:
        self._admission = admission
        self._metrics = metrics
        self._socket = context.socket(zmq.REP)
        self._socket.linger = 0
        self._socket.bind(ENDPOINT)
        self._waker = Waker()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="zap", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """To be called when the context's server sockets are closed, before it is terminated."""
        self._closing = True
        self._waker.wake()
        self._thread.join()
        self._waker.close()

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._waker.fileno(), zmq.POLLIN)
        try:
            while not self._closing:
                if self._socket in dict(poller.poll()):
                    self._socket.send_multipart(self._answer(self._socket.recv_multipart()))
        finally:
            self._socket.close()

    def _answer(self, frames: list[bytes]) -> list[bytes]:
        request = frames[1] if len(frames) > 1 else b""
        key = _key_of(frames)
        if key and self._admission.principal(key) is not None:
            return [VERSION, request, b"200", b"OK", key.encode("ascii"), b""]
        self._metrics.count("connections_refused")
        address = frames[3].decode("ascii", "replace")[:100] if len(frames) > 3 else "?"
        log.info("a connection from %s was refused: its key is not admitted", address)
        return [VERSION, request, b"400", b"unknown key", b"", b""]


def _key_of(frames: list[bytes]) -> str:
    """The client's public key in Z85; "" if it shows none."""
    if len(frames) != _FRAMES or frames[0] != VERSION or frames[5] != b"CURVE":
        return ""
    return z85.encode(frames[6]).decode("ascii") if len(frames[6]) == 32 else ""


def serve_curve(socket: "zmq.Socket[bytes]", pair: CurvePair) -> None:
    """Make a socket that is not bound yet take connections with CURVE only."""
    socket.curve_server = True
    socket.curve_publickey = pair.public.encode("ascii")
    socket.curve_secretkey = pair.secret.encode("ascii")
    socket.zap_domain = DOMAIN


def key_of(frame: zmq.Frame) -> str:
    """The public key of whoever sent a frame, as `ZapHandler` has named it; "" without CURVE."""
    try:
        return str(frame.get("User-Id"))
    except zmq.ZMQError:
        return ""
