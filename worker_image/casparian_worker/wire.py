"""The ZeroMQ shell around the worker's state machine: one DEALER, one loop, no decisions.

    Sentinel ~frames~> Wire ─ events ─> WorkerState ─ instructions ─> Wire ~frames~> Sentinel
                        ^                                              |
                        +── Mailbox <── threads of the runner <── Work-+

Nothing here waits for the runner, and the runner never touches the socket: the worker answers
heartbeats whatever its plugins do. A Sentinel that is away is waited for without end.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import zmq
from zmq.utils.monitor import recv_monitor_message

from casparian_flow.domain.clock import Clock, Now
from casparian_flow.domain.errors import ConfigError, ProtocolError, UsageError
from casparian_flow.domain.outputs import OutputEntry
from casparian_flow.protocol import messages as m
from casparian_flow.protocol.codec import decode_all, encode
from casparian_flow.protocol.curve import ClientKeys, client_keys, read_token
from casparian_flow.protocol.frames import (
    BATCH_ITEMS_MAX,
    HEADER_BYTES,
    PAYLOAD_BYTES_MAX,
    Frame,
    pack,
    pack_batch,
)
from casparian_worker import worker_events as e
from casparian_worker.mailbox import Mailbox
from casparian_worker.worker_state import WorkerState

log = logging.getLogger(__name__)

TICK_S = 0.1
RECEIVE_MAX = 1000
"""ZeroMQ messages taken in per turn, so that the runner's news never wait long."""
BATCH_BYTES_MAX = 4 * 1024 * 1024
HWM = 10_000
"""Above credit times messages per job; beyond it sends are dropped and repeated later."""
FRAME_BYTES_MAX = 2 * PAYLOAD_BYTES_MAX
LINGER_MS = 1000
RECONNECT_MS, RECONNECT_MS_MAX = 50, 2000
PING_MS, PING_TIMEOUT_MS = 5000, 15_000
ROUTING_ID_BYTES = 16
"""A secret of the worker's: nobody else can pass for it to a Sentinel that lost its connection."""
KEYS_LOOK_S = 2.0
"""Between two looks at the files of keys, and after a refusal before another try."""
REMINDER_S = 60.0
"""How often the log says that there is no Sentinel."""


class Work(Protocol):
    """What the wire asks of a runner. Every call returns at once; answers come by mailbox."""

    def start_job(self, job: e.StartJob) -> None: ...

    def stop_job(self, token: str) -> None: ...

    def publish(self, token: str, entries: tuple[OutputEntry, ...]) -> None: ...

    def delete_stages(self, token: str, entries: tuple[OutputEntry, ...]) -> None: ...

    def list_stages(self) -> None: ...

    def forget_plugins(self) -> None: ...

    def start_trial(self, trial: m.Trial) -> None: ...

    def close(self) -> None:
        """Stop all work and end every thread and process; waits for that."""


@dataclass(slots=True)
class WireCounts:
    """Totals since start and how it stands, for metrics and probes."""

    messages_sent: int = 0
    messages_received: int = 0
    protocol_errors: int = 0
    sends_dropped: int = 0
    turned_at: float = 0.0
    """When the loop began its last turn, on the monotonic clock."""
    contact: bool = False
    """Whether the Sentinel answers."""
    refusal: str = ""
    """Why the Sentinel does not take this worker, "" if it does or has not said."""


@dataclass(frozen=True, slots=True)
class WireFiles:
    """Files by which Sentinel and worker know each other; read anew for each connection.

    Attributes:
        curve_dir: with `client.key_secret` and `server.key`.
        token_file: with the pod's token, which IDENTIFY carries; None where nobody asks for it.
    """

    curve_dir: Path
    token_file: Path | None = None


class Wire:
    """The worker's loop.

    Args:
        address: where the Sentinel is bound, such as `tcp://localhost:5555`.
        state: decides.
        work: carries out; posts to `mailbox`.
        random_bytes: fresh routing ids.
        files: for a Sentinel with CURVE; None for one of this machine.

    Raises:
        UsageError: the address is none that ZeroMQ knows.
        ConfigError: a file of keys is missing, or is none.
    """

    def __init__(
        self,
        address: str,
        state: WorkerState,
        work: Work,
        mailbox: Mailbox,
        clock: Clock,
        random_bytes: Callable[[int], bytes],
        files: WireFiles | None = None,
    ) -> None:
        self.counts = WireCounts(turned_at=clock.now().mono)
        self._address = address
        self._state = state
        self._work = work
        self._mailbox = mailbox
        self._clock = clock
        self._random_bytes = random_bytes
        self._files = files
        self._keys = client_keys(files.curve_dir) if files else None
        self._look_at = 0.0
        self._refused_at: float | None = None
        """When the Sentinel last refused the keys of this connection."""
        self._context = zmq.Context()
        self._poller = zmq.Poller()
        self._poller.register(mailbox.fileno(), zmq.POLLIN)
        try:
            self._socket = self._connect()
        except UsageError:
            self._context.destroy(linger=0)
            raise
        self._outgoing: list[Frame | None] = []
        self._unsent_acks: dict[str, int] = {}
        """Token → place in `_outgoing` of its DISPATCH_ACK."""
        self._exit = False
        self._contact = False
        self._remind_at: float | None = None
        self._carry_out: dict[type[Any], Callable[[Any], None]] = {
            e.Send: self._queue_send,
            e.StartJob: work.start_job,
            e.StopJob: lambda i: work.stop_job(i.token),
            e.PublishOutputs: lambda i: work.publish(i.token, i.entries),
            e.DeleteStages: lambda i: work.delete_stages(i.token, i.entries),
            e.ListStages: lambda _: work.list_stages(),
            e.ForgetPlugins: lambda _: work.forget_plugins(),
            e.StartTrial: lambda i: work.start_trial(i.trial),
            e.Reconnect: lambda _: self._reconnect(),
            e.Exit: lambda _: self._stop(),
        }

    def run(self) -> None:
        """Work until the state machine says Exit, then close the socket."""
        try:
            tick_at = 0.0
            while not self._exit:
                now = self._clock.now()
                self.counts.turned_at = now.mono
                if now.mono >= tick_at:
                    tick_at = now.mono + TICK_S
                    self._handle(e.Tick(), now)
                    self._watch_keys(now)
                    self._watch_contact(now)
                self._turn(max(0.0, tick_at - now.mono))
        finally:
            self.close()

    def close(self) -> None:
        """Send what is left, for a second at most, and give the socket up."""
        if not self._socket.closed:
            self._disconnect(LINGER_MS)
            self._context.term()

    def _turn(self, timeout_s: float) -> None:
        self._flush()
        self._poller.poll(int(timeout_s * 1000) + 1)
        now = self._clock.now()
        for event in self._mailbox.drain():
            self._handle(event, now)
        for frames in self._receive():
            self._take(frames, now)
        self._flush()

    def _handle(self, event: e.Event, now: Now) -> None:
        for instruction in self._state.handle(event, now):
            self._carry_out[type(instruction)](instruction)

    # -- in -------------------------------------------------------------------------------------

    def _receive(self) -> Iterator[list[bytes]]:
        for _ in range(RECEIVE_MAX):
            try:
                yield self._socket.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return

    def _take(self, frames: list[bytes], now: Now) -> None:
        try:
            messages = decode_all(frames)
        except ProtocolError as error:
            self.counts.protocol_errors += 1
            log.warning("a message of the Sentinel is malformed: %s", error)
            self._queue_send(e.Send(0, m.Err(str(error)[:1000], "malformed")))
            return
        self.counts.messages_received += len(messages)
        for job_id, message in messages:
            if isinstance(message, m.Welcome):
                self._accepted()
            elif isinstance(message, m.Err):
                self._complained(job_id, message)
            self._handle(e.FromSentinel(job_id, message), now)

    # -- out ------------------------------------------------------------------------------------

    def _queue_send(self, send: e.Send) -> None:
        if isinstance(send.message, m.Identify):
            send.message.token = self._token()
        frame = encode(send.job_id, send.message)
        if len(frame.payload) > PAYLOAD_BYTES_MAX:
            self.counts.sends_dropped += 1
            log.error("%s of %d bytes is too large to send", frame.op.name, len(frame.payload))
            return
        self._outgoing.append(frame)
        token = getattr(send.message, "token", "")
        if isinstance(send.message, m.DispatchAck):
            self._unsent_acks[token] = len(self._outgoing) - 1
        elif token in self._unsent_acks:
            # What follows says that the plugin has begun; short jobs need no message for that.
            self._outgoing[self._unsent_acks.pop(token)] = None

    def _flush(self) -> None:
        if not self._outgoing:
            return
        outgoing = [frame for frame in self._outgoing if frame is not None]
        self._outgoing.clear()
        self._unsent_acks.clear()
        if self._state.batch and len(outgoing) > 1:
            for group in _batches(outgoing):
                self._transmit(pack_batch(group), len(group))
            return
        for frame in outgoing:
            self._transmit(pack(*frame), 1)

    def _transmit(self, frames: tuple[bytes, bytes], count: int) -> None:
        try:
            self._socket.send_multipart(frames, zmq.DONTWAIT)
        except zmq.Again:
            # Not connected, or the Sentinel is slow. All that matters is repeated.
            self.counts.sends_dropped += count
            self._mailbox.post(e.Unsent())
            return
        self.counts.messages_sent += count

    # -- the connection -------------------------------------------------------------------------

    def _connect(self) -> "zmq.Socket[bytes]":
        s: zmq.Socket[bytes] = self._context.socket(zmq.DEALER)
        s.setsockopt(zmq.ROUTING_ID, b"w" + self._random_bytes(ROUTING_ID_BYTES))
        s.setsockopt(zmq.LINGER, LINGER_MS)
        s.setsockopt(zmq.SNDHWM, HWM)
        s.setsockopt(zmq.RCVHWM, HWM)
        s.setsockopt(zmq.MAXMSGSIZE, FRAME_BYTES_MAX)
        s.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
        s.setsockopt(zmq.RECONNECT_IVL_MAX, RECONNECT_MS_MAX)
        # Without it, what is sent while nobody is there would pile up and arrive stale.
        s.setsockopt(zmq.IMMEDIATE, 1)
        s.setsockopt(zmq.HEARTBEAT_IVL, PING_MS)
        s.setsockopt(zmq.HEARTBEAT_TIMEOUT, PING_TIMEOUT_MS)
        if self._keys is not None:
            # So that the other end gives a dead connection up, and its routing id with it: it hands
            # none over.
            s.setsockopt(zmq.HEARTBEAT_TTL, PING_TIMEOUT_MS)
            s.curve_publickey = self._keys.own.public.encode("ascii")
            s.curve_secretkey = self._keys.own.secret.encode("ascii")
            s.curve_serverkey = self._keys.server.encode("ascii")
        self._monitor = s.get_monitor_socket(zmq.EVENT_HANDSHAKE_FAILED_AUTH)
        try:
            s.connect(self._address)
        except zmq.ZMQError as error:
            s.disable_monitor()
            self._monitor.close(0)
            s.close(linger=0)
            raise UsageError(
                f"cannot connect to {self._address!r}: {error}",
                hint="Give the Sentinel's address as tcp://HOST:PORT, e.g. tcp://localhost:5555.",
            ) from error
        self._poller.register(s, zmq.POLLIN)
        return s

    def _reconnect(self) -> None:
        # A fresh routing id: the Sentinel may still hold the old one for a dead connection.
        self._poller.unregister(self._socket)
        self._disconnect(0)
        self._outgoing.clear()
        self._unsent_acks.clear()
        self._refused_at = None
        self._keys = self._read_keys() or self._keys
        self._socket = self._connect()

    def _disconnect(self, linger_ms: int) -> None:
        self._socket.disable_monitor()
        self._monitor.close(0)
        self._socket.close(linger=linger_ms)

    # -- keys -----------------------------------------------------------------------------------

    def _watch_keys(self, now: Now) -> None:
        """Connect anew when the keys were changed, or have been refused: others may do by now."""
        if self._files is None or now.mono < self._look_at:
            return
        self._look_at = now.mono + KEYS_LOOK_S
        if self._monitor.poll(0):
            recv_monitor_message(self._monitor)
            self._not_taken("its key is not admitted")
            self._refused_at = now.mono
            return
        keys = self._read_keys()
        if keys is not None and keys != self._keys:
            log.info("the keys of this worker were changed: connecting anew")
        elif self._refused_at is None:
            return
        self._reconnect()
        self._handle(e.ConnectionRenewed(), now)

    def _read_keys(self) -> ClientKeys | None:
        """The keys as their files hold them now; None if they cannot be read at the moment."""
        if self._files is None:
            return None
        try:
            return client_keys(self._files.curve_dir)
        except ConfigError as error:
            log.warning("going on with the keys of before: %s", error)
            return None

    def _token(self) -> str:
        """The pod's token as it is now: it is replaced every hour or so."""
        if self._files is None or self._files.token_file is None:
            return ""
        try:
            return read_token(self._files.token_file)
        except ConfigError as error:
            log.warning("%s", error)
            return ""

    # -- contact --------------------------------------------------------------------------------

    def _complained(self, job_id: int, err: m.Err) -> None:
        if job_id == 0 and err.code == "refused":
            self._not_taken(err.message)
        elif err.code != "unknown_worker":
            log.warning("the Sentinel says: %s (%s)", err.message, err.code)

    def _not_taken(self, why: str) -> None:
        """Told once: it is said again with every IDENTIFY, and others may do by then."""
        if why != self.counts.refusal:
            log.warning("the Sentinel at %s refuses this worker: %s", self._address, why)
        self.counts.refusal = why

    def _accepted(self) -> None:
        if self.counts.refusal:
            log.info("the Sentinel at %s takes this worker now", self._address)
        self.counts.refusal = ""

    def _watch_contact(self, now: Now) -> None:
        state = self._state
        contact = state.epoch != 0 and state.silent_s(now) <= state.patience_s
        if contact and not self._contact:
            log.info(
                "connected to the Sentinel at %s (ledger %s, epoch %d)",
                self._address,
                state.ledger_id,
                state.epoch,
            )
            self._remind_at = None
        elif not contact and self._remind_at is None:
            # An answer usually takes milliseconds: give it a second before complaining.
            self._remind_at = now.mono + (REMINDER_S if self._contact else 1.0)
            if self._contact:
                log.warning("lost contact with the Sentinel at %s; waiting for it", self._address)
        elif not contact and self._remind_at is not None and now.mono >= self._remind_at:
            log.warning("no Sentinel answers at %s; waiting for it", self._address)
            self._remind_at = now.mono + REMINDER_S
        self._contact = self.counts.contact = contact

    def _stop(self) -> None:
        self._exit = True


def _batches(frames: list[Frame]) -> Iterator[list[Frame]]:
    """Groups that each fit into one BATCH, in order."""
    group: list[Frame] = []
    size = 0
    for frame in frames:
        item = HEADER_BYTES + len(frame.payload)
        if group and (len(group) >= BATCH_ITEMS_MAX or size + item > BATCH_BYTES_MAX):
            yield group
            group, size = [], 0
        group.append(frame)
        size += item
    if group:
        yield group
