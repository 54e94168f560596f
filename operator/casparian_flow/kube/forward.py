"""Ways from this machine to a port in a pod, through the API server.

    ZeroMQ ── socket in a folder of ours ── pods/portforward ── loopback in the pod

A socket in a private folder and no port, so that nobody else on this machine can come along.
Whoever may forward ports to the pod gets through; the API server judges that.
"""

import contextlib
import logging
import re
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path
from typing import Any, Protocol

from kubernetes import client as kubernetes_client
from kubernetes.stream import portforward

from casparian_flow.kube.client import KubeClient, KubeError, KubeUnreachableError

CHUNK_BYTES = 1 << 16
BACKLOG = 16

_HANDSHAKE = re.compile(r"Handshake status (\d{3})( [A-Za-z ]+)?")

log = logging.getLogger(__name__)


class Stream(Protocol):
    """What is used of a socket."""

    def recv(self, size: int, /) -> bytes: ...
    def sendall(self, data: bytes, /) -> None: ...
    def shutdown(self, how: int, /) -> None: ...
    def close(self) -> None: ...


Dial = Callable[[], Stream]
"""Opens another connection."""


def dial_pod(client: KubeClient, namespace: str, pod: str, port: int) -> Stream:
    """A connection to a port of a pod, on its loopback.

    Raises:
        KubeError: the API server refuses, or there is no such pod.
    """
    # A client of its own: while it connects, the library bends it to websockets.
    api = kubernetes_client.CoreV1Api(kubernetes_client.ApiClient(client.configuration))
    try:
        forwarded = portforward(
            api.connect_get_namespaced_pod_portforward, pod, namespace, ports=str(port)
        )
    except kubernetes_client.ApiException as error:
        raise _refusal(f"{namespace}/{pod}", str(error.reason or error), namespace) from error
    stream: Stream = forwarded.socket(port)
    return stream


def _refusal(pod: str, reason: str, namespace: str) -> KubeError:
    """What a failed handshake means; the library tells the answer as one long text."""
    answered = _HANDSHAKE.search(reason)
    if answered is None:
        return KubeUnreachableError(f"no connection to the pod {pod}: {reason[:200]}")
    status = int(answered[1])
    needed = f"It needs the verbs get and create on pods/portforward in {namespace}."
    return KubeError(
        f"no port of the pod {pod} can be reached: the API server answers {answered[0][17:]}",
        status=status,
        hint=needed if status == HTTPStatus.FORBIDDEN else "",
    )


class Forward:
    """Carries every connection to a socket of its own on to a new connection of `dial`.

    Attributes:
        address: of the socket, for ZeroMQ.
    """

    def __init__(self, dial: Dial) -> None:
        """Begin to listen.

        The first connection is made at once, so that a refusal is told and not waited for.

        Raises:
            KubeError: as `dial` does.
        """
        self._dial = dial
        self._ready: Stream | None = dial()
        self._lock = threading.Lock()
        self._open: set[Stream] = set()
        self._closed = False
        self._folder = Path(tempfile.mkdtemp(prefix="casparian-"))  # for this user alone
        path = self._folder / "control.sock"
        self.address = f"ipc://{path}"
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(BACKLOG)
        self._thread = threading.Thread(target=self._accept, name="forward", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End all connections; the socket is gone afterwards."""
        with self._lock:
            self._closed = True
            streams = [*self._open, *([self._ready] if self._ready else [])]
            self._ready = None
        _end(self._listener)
        self._thread.join(5)
        for stream in streams:
            _end(stream)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _accept(self) -> None:
        while not self._closed:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return  # closed
            try:
                far = self._next()
            except KubeError as error:
                log.warning("%s", error.with_hint())
                near.close()
                continue
            self._join(near, far)

    def _next(self) -> Stream:
        with self._lock:
            ready, self._ready = self._ready, None
        return ready if ready is not None else self._dial()

    def _join(self, near: Stream, far: Stream) -> None:
        with self._lock:
            self._open |= {near, far}
        for source, target in ((near, far), (far, near)):
            pump = threading.Thread(target=self._pump, args=(source, target), daemon=True)
            pump.start()

    def _pump(self, source: Stream, target: Stream) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(CHUNK_BYTES):
                target.sendall(data)
        for stream in (source, target):
            _end(stream)
        with self._lock:
            self._open -= {source, target}


def _end(stream: Any) -> None:
    with contextlib.suppress(OSError):
        stream.shutdown(socket.SHUT_RDWR)
    with contextlib.suppress(OSError):
        stream.close()
