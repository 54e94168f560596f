"""A Sentinel that does what a test tells it: a bare ROUTER, no broker, no ledger.

It answers IDENTIFY with WELCOME and HEARTBEAT with ALIVE by itself while it waits for what the
test expects; everything else is the test's.
"""

import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self, TypeVar

import zmq

from casparian_flow.domain.ids import fencing_token
from casparian_flow.protocol import messages as m
from casparian_flow.protocol.codec import decode_all, encode
from casparian_flow.protocol.frames import pack, pack_batch

LEDGER = "7f3ac91e"
M = TypeVar("M")


class ScriptedSentinel:
    """One ROUTER on a loopback port; `workers` are the routing ids that identified themselves."""

    def __init__(
        self,
        port: int = 0,
        *,
        epoch: int = 1,
        heartbeat_s: float = 0.3,
        lease_ttl_s: float = 5.0,
        batch: bool = True,
    ) -> None:
        self.welcome = m.Welcome(LEDGER, epoch, heartbeat_s, lease_ttl_s, batch)
        self.epoch = epoch
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        if port:
            self.socket.bind(f"tcp://127.0.0.1:{port}")
            self.port = port
        else:
            self.port = self.socket.bind_to_random_port("tcp://127.0.0.1")
        self.workers: dict[bytes, m.Identify] = {}
        self.seen: list[tuple[bytes, int, m.Message]] = []
        self._pending: list[tuple[bytes, int, m.Message]] = []

    @property
    def address(self) -> str:
        return f"tcp://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self.socket.close()
        self.context.term()

    def token(self, job_id: int, attempt: int = 1) -> str:
        return fencing_token(LEDGER, self.epoch, job_id, attempt)

    def send(self, worker: bytes, job_id: int, message: m.Message) -> None:
        self.socket.send_multipart([worker, *pack(*encode(job_id, message))])

    def send_batch(self, worker: bytes, messages: list[tuple[int, m.Message]]) -> None:
        frames = pack_batch(encode(job_id, message) for job_id, message in messages)
        self.socket.send_multipart([worker, *frames])

    def send_raw(self, worker: bytes, *frames: bytes) -> None:
        self.socket.send_multipart([worker, *frames])

    def next(self, timeout_s: float = 10.0) -> tuple[bytes, int, m.Message]:
        """The next message that is neither IDENTIFY nor HEARTBEAT.

        Raises:
            TimeoutError: none came.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            if self._pending:
                return self._pending.pop(0)
            left = deadline - time.monotonic()
            if left <= 0 or not self.socket.poll(int(left * 1000) + 1):
                raise TimeoutError(f"nothing came in {timeout_s} s; seen: {self.seen[-5:]}")
            self._take()

    def _take(self) -> None:
        identity, *frames = self.socket.recv_multipart()
        for job_id, message in decode_all(frames):
            self.seen.append((identity, job_id, message))
            if isinstance(message, m.Identify):
                self.workers[identity] = message
                self.send(identity, 0, self.welcome)
            elif isinstance(message, m.Heartbeat):
                self.send(identity, 0, m.Heartbeat("ALIVE"))
            else:
                self._pending.append((identity, job_id, message))

    def expect(
        self,
        kind: type[M],
        *,
        timeout_s: float = 10.0,
        where: Callable[[M], Any] = lambda _: True,
    ) -> M:
        """The next message of a kind; others are passed over.

        Raises:
            TimeoutError: it did not come.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            _, _, message = self.next(deadline - time.monotonic())
            if isinstance(message, kind) and where(message):
                return message

    def wait_for_worker(self, timeout_s: float = 15.0) -> bytes:
        """The routing id of the worker that identifies itself next (or has, first of all)."""
        before = set(self.workers)
        if before and not hasattr(self, "_handed_out"):
            self._handed_out = True
            return next(iter(before))
        self._handed_out = True
        deadline = time.monotonic() + timeout_s
        while set(self.workers) == before:
            if not self.socket.poll(int(max(0.0, deadline - time.monotonic()) * 1000)):
                raise TimeoutError("no worker came")
            self._take()
        return next(iter(set(self.workers) - before))

    def serve(self, seconds: float) -> None:
        """Answer IDENTIFY and HEARTBEAT for a while; what else comes is kept for `next`."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            if self.socket.poll(int(left * 1000) + 1):
                self._take()
