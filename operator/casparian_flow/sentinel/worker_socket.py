"""The ROUTER that workers connect to: frames in, frames out, and what cannot be read counted.

With keys (`Curve`) it takes connections of admitted clients only, and what they send passes the
gate. Without, it believes whoever reaches it, as processes of one machine do.

Nothing that a peer sends raises out of here. Receiving is bounded by messages and bytes, so that
one loud worker cannot keep the loop from its other work; sending never waits, because the
protocol repeats whatever a full or vanished peer misses.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import zmq

from casparian_flow.domain.errors import ProtocolError
from casparian_flow.domain.ids import Identity
from casparian_flow.protocol import messages as m
from casparian_flow.protocol.codec import decode_all, encode
from casparian_flow.protocol.curve import CurvePair
from casparian_flow.protocol.frames import (
    BATCH_ITEMS_MAX,
    HEADER_BYTES,
    PAYLOAD_BYTES_MAX,
    Frame,
    pack,
    pack_batch,
)
from casparian_flow.protocol.limits import CREDIT_MAX
from casparian_flow.sentinel.admission import Admission
from casparian_flow.sentinel.control_server import bind_or_explain
from casparian_flow.sentinel.events import BadFrame, Send, WorkerMessage
from casparian_flow.sentinel.gate import Gate
from casparian_flow.sentinel.metrics import SentinelMetrics
from casparian_flow.sentinel.zap import ZapHandler, key_of, serve_curve

log = logging.getLogger(__name__)

MESSAGES_PER_TURN = 2048
"""Items of a BATCH count each; one BATCH more may go beyond it."""
BYTES_PER_TURN = 8 * 1024 * 1024
SOCKET_BYTES_MAX = 2 * PAYLOAD_BYTES_MAX
"""Above this libzmq cuts the connection unread; between it and PAYLOAD_BYTES_MAX we answer ERR."""
SEND_HWM = 4 * CREDIT_MAX
"""Messages that may wait for one peer: its whole credit in single DISPATCHes, and room."""
RECEIVE_HWM = 1000
BATCH_BYTES = 1024 * 1024
"""A BATCH is closed when it has this many bytes, so that big plugins do not pile up in one."""
LOOPBACK_PREFIXES = ("tcp://127.", "tcp://localhost:", "tcp://[::1]:", "ipc://", "inproc://")


class Curve(NamedTuple):
    """How a socket with CURVE knows its clients."""

    pair: CurvePair
    admission: Admission
    gate: Gate


class WorkerSocket:
    """Bound at construction.

    Args:
        address: `tcp://host:port` (`*` for any port) or `ipc://path`.
        metrics: counts messages and errors.
        batches: whether a peer reads BATCH.
        curve: whose connections are taken; None for a socket without encryption.

    Raises:
        ConflictError, ConfigError: the address cannot be bound.
    """

    def __init__(
        self,
        address: str,
        metrics: SentinelMetrics,
        batches: Callable[[Identity], bool],
        curve: Curve | None = None,
    ) -> None:
        self._metrics = metrics
        self._batches = batches
        self._gate = curve.gate if curve else None
        self._zap: ZapHandler | None = None
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = self._context.socket(zmq.ROUTER)
        self.socket.linger = 500
        self.socket.sndhwm = SEND_HWM
        self.socket.rcvhwm = RECEIVE_HWM
        self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        # A worker that was cut off and comes back under its routing id gets its place back. Where
        # peers are told apart nobody may take another one's place, not even with its routing id.
        self.socket.setsockopt(zmq.ROUTER_HANDOVER, 0 if curve else 1)
        self.socket.setsockopt(zmq.MAXMSGSIZE, SOCKET_BYTES_MAX)
        self.socket.setsockopt(zmq.BACKLOG, 1024)
        self.socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
        try:
            if curve:
                self._zap = ZapHandler(self._context, curve.admission, metrics)
                serve_curve(self.socket, curve.pair)
            bind_or_explain(self.socket, address, "bind_address")
        except BaseException:
            self.close()
            raise
        self.address = self.socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self.exhausted = True
        """Whether the last `receive` took all that had arrived."""

    @property
    def is_local(self) -> bool:
        """Whether only this machine reaches it."""
        return self.address.startswith(LOOPBACK_PREFIXES)

    def close(self) -> None:
        self.socket.close()
        if self._zap is not None:
            self._zap.close()
        self._context.term()

    # -- receiving --------------------------------------------------------------------------

    def receive(self) -> Iterator[WorkerMessage | BadFrame]:
        """What has arrived, up to the bounds of one turn."""
        size = count = 0
        self.exhausted = False
        while count < MESSAGES_PER_TURN and size < BYTES_PER_TURN:
            try:
                frames, key = self._frames()
            except zmq.Again:
                self.exhausted = True
                return
            identity = Identity(frames[0])
            count += 1
            size += sum(map(len, frames))
            try:
                items = decode_all(frames[1:])
            except ProtocolError as error:
                self._metrics.count("messages_received")
                log.debug("malformed message from %s: %s", _shown(identity), error)
                if self._gate is None or self._gate.speaks(identity, key):
                    yield BadFrame(identity, str(error))
                continue
            count += len(items)
            self._metrics.count("messages_received", len(items))
            for job_id, message in items:
                if self._gate is None:
                    yield WorkerMessage(identity, job_id, message)
                elif (event := self._gate.take(identity, key, job_id, message)) is not None:
                    yield event

    def _frames(self) -> tuple[list[bytes], str]:
        """The next message's frames, and its sender's key."""
        if self._gate is None:
            return self.socket.recv_multipart(zmq.NOBLOCK), ""
        parts = self.socket.recv_multipart(zmq.NOBLOCK, copy=False)
        return [part.bytes for part in parts], key_of(parts[-1])

    # -- sending ----------------------------------------------------------------------------

    def send(self, sends: Sequence[Send], *, to_anybody: bool = False) -> None:
        """Send in order per peer, together where the peer reads BATCH.

        Args:
            to_anybody: also to peers that the gate has not admitted.
        """
        queues: dict[Identity, list[Frame]] = {}
        acks: dict[Identity, list[str]] = {}
        for item in sends:
            if isinstance(item.message, m.ConcludeAck):
                # Acknowledgements are cumulative: one message for all of this turn.
                acks.setdefault(item.identity, []).extend(item.message.tokens)
                continue
            queue = queues.get(item.identity)
            if queue is None:
                queue = queues[item.identity] = []
            queue.append(encode(item.job_id, item.message))
        for identity, tokens in acks.items():
            queues.setdefault(identity, []).append(encode(0, m.ConcludeAck(tokens)))
        for identity, queue in queues.items():
            if self._gate is None or to_anybody or self._gate.hears(identity):
                self._send_to(identity, queue)
            else:
                self._metrics.count("messages_dropped", len(queue))

    def _send_to(self, identity: Identity, frames: Sequence[Frame]) -> None:
        sent = 0
        try:
            if len(frames) == 1 or not self._batches(identity):
                for frame in frames:
                    self.socket.send_multipart([identity, *pack(*frame)], zmq.NOBLOCK)
                    sent += 1
            else:
                for group in _groups(frames):
                    message = pack_batch(group) if len(group) > 1 else pack(*group[0])
                    self.socket.send_multipart([identity, *message], zmq.NOBLOCK)
                    sent += len(group)
        except zmq.ZMQError as error:
            # Gone (EHOSTUNREACH) or not reading (EAGAIN): everything that matters is repeated.
            self._metrics.count("messages_dropped", len(frames) - sent)
            left = len(frames) - sent
            log.debug("%d messages to %s dropped: %s", left, _shown(identity), error)
        self._metrics.count("messages_sent", sent)


def _shown(identity: Identity) -> str:
    """Enough of a routing id to tell peers apart, and not enough to pass for one of them."""
    return identity.hex()[:8]


def _groups(frames: Sequence[Frame]) -> Iterator[list[Frame]]:
    """Frames in runs that fit into one BATCH each."""
    group: list[Frame] = []
    size = 0
    for frame in frames:
        cost = HEADER_BYTES + len(frame.payload)
        if group and (size + cost > BATCH_BYTES or len(group) == BATCH_ITEMS_MAX):
            yield group
            group, size = [], 0
        group.append(frame)
        size += cost
    if group:
        yield group
