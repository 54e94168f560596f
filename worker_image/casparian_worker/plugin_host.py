"""Runs one plugin version over many files in a warm, sandboxed process.

How to use it stands at the top of plugin_events.py. The process starts with the first job, serves
many, and is replaced after an error, after `limits.recycle_after` files, and when it has grown to
half its memory limit. Jobs that had not begun when a process ended are run in the next one.

Every job ends with one named outcome:

    exception              PLUGIN_ERROR, transient as TransientError/PermanentError say
    no usable Handler      PLUGIN_INVALID, at once for every further job too
    too long               TIMEOUT: the plugin's own time, without the caller's between two events
    too much memory        OUT_OF_MEMORY: watched ten times a second, or ended by the kernel
    a signal               CRASHED, with its name
    sys.exit, os._exit     EXITED
    too many processes     SANDBOX, as for required measures that do not apply
    bridge closed early    TRUNCATED
    nonsense on the bridge PROTOCOL
    cancel                 CANCELLED

A process that left others behind is replaced after the job, and they end with it.
"""

import contextlib
import json
import os
import select
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from casparian_flow.domain.clock import Clock
from casparian_flow.domain.errors import require
from casparian_flow.domain.failures import Reason
from casparian_flow.domain.outputs import TOPIC_PATTERN
from casparian_flow.domain.scoped_names import plain
from casparian_flow.protocol.messages import Plugin
from casparian_worker.arrow_ipc import HostileBatchError, decode
from casparian_worker.bridge import (
    MESSAGE_BYTES_MAX,
    BridgeError,
    ErrorKind,
    Frame,
    Kind,
    pack_json,
)
from casparian_worker.guest_family import Launch, StartFamily, Verdict, too_many_processes
from casparian_worker.guest_process import GuestProcess
from casparian_worker.plugin_events import (
    Batch,
    Event,
    Failed,
    Finished,
    LaunchError,
    RunRequest,
    Started,
)
from casparian_worker.sandbox import APPLIED, Report
from casparian_worker.scratch import SlotScratch

PIPELINE_DEPTH = 16
"""RUNs that may be ahead of the plugin, the running one included."""
START_TIMEOUT_S = 120.0
"""For the interpreter, the plugin's imports and `configure`."""
BEGIN_TIMEOUT_S = 60.0
"""For a process that is done with one file to take up the next."""
TOPICS_MAX = 256
"""Topics one job may publish to."""
_IDLE_DEATHS_MAX = 3
"""Processes that may die without a job to blame before the next job is."""

_REASONS = {
    ErrorKind.SANDBOX: Reason.SANDBOX,
    ErrorKind.ENVIRONMENT: Reason.ENVIRONMENT,
    ErrorKind.INVALID: Reason.PLUGIN_INVALID,
    ErrorKind.RAISED: Reason.PLUGIN_ERROR,
    ErrorKind.MEMORY: Reason.OUT_OF_MEMORY,
    ErrorKind.PROCESSES: Reason.SANDBOX,
    ErrorKind.EXITED: Reason.EXITED,
}


@dataclass(slots=True)
class _Job:
    number: int
    request: RunRequest
    started: bool = False
    cancelled: bool = False
    deadline: float = 0.0
    rows: int = 0
    batches: int = 0
    topics: set[str] = field(default_factory=set)


@dataclass(slots=True)
class _Warm:
    """A live process and what is known of it."""

    process: GuestProcess
    in_place: str
    deadline: float
    ready: bool = False
    confined: bool = False
    served: int = 0
    retiring: bool = False
    outgoing: bytearray = field(default_factory=bytearray)


class PluginHost:
    """One slot's process of one plugin version.

    `submit`, `cancel` and `stop` may be called from any thread; `next_event` and `run` from one at
    a time.
    """

    def __init__(
        self,
        plugin: Plugin,
        *,
        launch: Callable[[], Launch],
        start: StartFamily,
        scratch: SlotScratch,
        clock: Clock,
        depth: int = PIPELINE_DEPTH,
    ) -> None:
        """Nothing is started yet.

        Args:
            launch: how to start a process; asked before each start; may take long (it makes the
                environment) and may raise LaunchError.
            start: starts it, here or elsewhere.
            depth: jobs handed to the process ahead of time.
        """
        self.plugin = plugin
        self.depth = depth
        self.sandbox_report: Report = {}
        self._launch = launch
        self._start = start
        self._scratch = scratch
        self._clock = clock
        self._lock = threading.Lock()  # over the three below
        self._waiting: deque[_Job] = deque()
        self._cancels: set[str] = set()
        self._stopping = False
        self._pumping = threading.RLock()
        self._sent: deque[_Job] = deque()
        self._events: deque[Event] = deque()
        self._warm: _Warm | None = None
        self._invalid: Failed | None = None
        self._idle_deaths = 0
        self._number = 0
        self._left_at: float | None = None
        self._wakes, self._wake_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    # -- asked from outside

    @property
    def in_flight(self) -> int:
        """Jobs submitted whose outcome has not been handed out."""
        with self._lock:
            waiting = len(self._waiting)
        outcomes = sum(isinstance(event, (Finished, Failed)) for event in list(self._events))
        return waiting + len(self._sent) + outcomes

    def submit(self, request: RunRequest) -> None:
        """Queue a job behind the others."""
        with self._lock:
            self._number += 1
            self._waiting.append(_Job(self._number, request))
        self._wake()

    def cancel(self, key: str) -> None:
        """End a job at once with Failed(CANCELLED); unknown and finished ones are passed over."""
        # Carried out by the thread in next_event: only it knows which job runs at that moment.
        with self._lock:
            self._cancels.add(key)
        self._wake()

    def stop(self) -> None:
        """End the process and forget every job; the host is of no use afterwards."""
        with self._lock:
            self._stopping = True
        warm = self._warm
        if warm is not None:
            warm.process.kill()
        self._wake()
        with self._pumping:
            self._retire()
            self._scratch.remove_tmp()
            self._sent.clear()
            with self._lock:
                self._waiting.clear()
                if self._wakes >= 0:
                    os.close(self._wakes)
                    os.close(self._wake_end)
                    self._wakes = self._wake_end = -1

    def run(self, request: RunRequest) -> Iterator[Event]:
        """Submit one job and follow it to its outcome. For use while nothing else is in flight.

        Leaving the iterator early ends the process.
        """
        require(self.in_flight == 0, "run() while other jobs are in flight")
        self.submit(request)
        done = False
        try:
            while not done:
                event = self.next_event()
                if event is None:
                    return
                done = isinstance(event, (Finished, Failed))
                yield event
        finally:
            if not done:
                self._abandon()

    def next_event(self, timeout_s: float | None = None) -> Event | None:
        """Drive the process until something happens.

        Returns:
            The next event, or None after `timeout_s`, after `stop`, or when nothing is in flight.
        """
        with self._pumping:
            now = self._clock.now().mono
            until = None if timeout_s is None else now + timeout_s
            self._credit(now)
            try:
                while not self._stopping:
                    if self._events:
                        return self._events.popleft()
                    if not self._advance(until):
                        return None
                return None
            finally:
                self._left_at = self._clock.now().mono

    # -- one step at a time

    def _advance(self, until: float | None) -> bool:
        """Do one thing; False if there is nothing to wait for, or the wait was in vain."""
        self._take_cancels()
        if self._events:
            return True
        if self._invalid is not None:
            self._refuse_waiting()
        if not self._start_if_needed():
            return bool(self._events)
        warm = self._warm
        if warm is None:
            return bool(self._events)
        self._hand_out(warm)
        try:
            frame = warm.process.frames.pop()
            if frame is not None:
                self._take(warm, frame)
                return True
        except (BridgeError, HostileBatchError) as error:
            self._died(warm, Verdict(Reason.PROTOCOL, f"the plugin process {_breach(error)}"))
            return True
        if not self._sent and not self._waiting and warm.ready:
            return bool(self._events)
        return self._wait(warm, until)

    def _start_if_needed(self) -> bool:
        """Have a process if there is work; False if there is none to do."""
        if self._warm is not None:
            return True
        with self._lock:
            head = self._waiting[0] if self._waiting else None
        if head is None:
            return False
        path = head.request.path if head.request.in_place else ""
        try:
            hello = _hello(self.plugin)
            launch = self._launch()
            if path:
                rules = replace(launch.confinement, reads=(*launch.confinement.reads, path))
                launch = replace(launch, confinement=rules)
            process = GuestProcess(launch, self._start, self._clock)
        except LaunchError as error:
            self._fail_waiting(error.reason, error.with_hint(), error.transient)
            return False
        except OSError as error:
            self._fail_waiting(Reason.ENVIRONMENT, f"cannot start the plugin: {error}", None)
            return False
        deadline = self._clock.now().mono + START_TIMEOUT_S
        self._warm = _Warm(process, path, deadline)
        self._warm.outgoing += hello
        return True

    def _hand_out(self, warm: _Warm) -> None:
        """Send RUNs ahead, as far as this process may serve them."""
        while warm.ready and not warm.retiring and len(self._sent) < self.depth:
            with self._lock:
                head = self._waiting[0] if self._waiting else None
                if head is None:
                    break
                if not head.request.path:
                    # Loaded is all that it should be.
                    self._events.append(Finished(self._waiting.popleft().request.key, 0, 0))
                    continue
                wanted = head.request.path if head.request.in_place else ""
                if wanted != warm.in_place or (wanted and self._sent):
                    warm.retiring = True
                    break
                self._sent.append(self._waiting.popleft())
            self._await_begin()
            run = {
                "path": head.request.path,
                "file_version_id": head.request.file_version_id,
                "metadata": head.request.metadata,
            }
            warm.outgoing += pack_json(Kind.RUN, head.number, run)
            warm.served += 1
            if warm.in_place or warm.served >= self.plugin.limits.recycle_after:
                warm.retiring = True
        if warm.retiring and warm.ready and not self._sent:
            self._retire()

    def _wait(self, warm: _Warm, until: float | None) -> bool:
        """Wait for the bridge, a call from another thread, or a deadline."""
        if self._warm is None:
            return True
        self._flush(warm)
        now = self._clock.now().mono
        due = self._deadline(warm)
        if now >= due:
            self._died(warm, self._timed_out(warm))
            return True
        if until is not None and now >= until:
            return False
        wait = min(due if until is None else min(due, until), now + 60.0) - now
        poll = select.poll()
        events = select.POLLIN | (select.POLLOUT if warm.outgoing else 0)
        poll.register(warm.process.sock, events)
        poll.register(self._wakes, select.POLLIN)
        for descriptor, happened in poll.poll(int(wait * 1000) + 1):
            if descriptor == self._wakes:
                _swallow(self._wakes)
            elif happened & ~select.POLLOUT:
                self._read(warm)
        return True

    def _read(self, warm: _Warm) -> None:
        try:
            open_ = warm.process.frames.fill()
        except BlockingIOError:
            return
        except OSError:
            open_ = False
        if not open_:
            self._died(warm, None)

    def _flush(self, warm: _Warm) -> None:
        try:
            while warm.outgoing:
                sent = warm.process.sock.send(memoryview(warm.outgoing)[:1_048_576])
                del warm.outgoing[:sent]
        except BlockingIOError:
            return
        except OSError:
            warm.outgoing.clear()  # its end shows in the next read, behind what it still said

    def _deadline(self, warm: _Warm) -> float:
        if not warm.ready:
            return warm.deadline
        return self._sent[0].deadline if self._sent else float("inf")

    def _await_begin(self) -> None:
        """Give the job that is next in line its time to begin."""
        head = self._sent[0] if self._sent else None
        if head is not None and not head.deadline:
            head.deadline = self._clock.now().mono + BEGIN_TIMEOUT_S

    def _timed_out(self, warm: _Warm) -> Verdict:
        if not warm.ready:
            return Verdict(Reason.TIMEOUT, f"the plugin did not load within {START_TIMEOUT_S:g} s")
        if not self._sent[0].started:
            return Verdict(
                Reason.TIMEOUT, f"the plugin did not take up a file within {BEGIN_TIMEOUT_S:g} s"
            )
        limit = self._timeout(self._sent[0])
        return Verdict(Reason.TIMEOUT, f"the plugin ran longer than {limit:g} s")

    def _timeout(self, job: _Job) -> float:
        own = job.request.timeout_s
        return self.plugin.limits.timeout_s if own is None else own

    def _credit(self, now: float) -> None:
        """The caller's time between two events is not the plugin's."""
        if self._left_at is not None and self._sent:
            self._sent[0].deadline += now - self._left_at
        self._left_at = None

    # -- what the process says

    def _take(self, warm: _Warm, frame: Frame) -> None:
        if frame.kind is Kind.BATCH:
            self._take_batch(frame)
        elif frame.kind is Kind.BEGIN:
            self._begin(warm, frame)
        elif frame.kind is Kind.END:
            self._end(warm, frame)
        elif frame.kind is Kind.ERROR:
            self._error(warm, frame)
        elif frame.kind is Kind.CONFINED and not warm.confined:
            warm.confined = True
            self.sandbox_report = _report(frame)
        elif frame.kind is Kind.READY and warm.confined and not warm.ready:
            warm.ready = True
        else:
            raise BridgeError(f"sent {frame.kind.name} out of order")

    def _begin(self, warm: _Warm, frame: Frame) -> None:
        head = self._sent[0] if self._sent else None
        if head is None or head.started or head.number != frame.job:
            raise BridgeError("began a job out of order")
        head.started = True
        head.deadline = self._clock.now().mono + self._timeout(head)
        if head.cancelled:
            self._died(warm, Verdict(Reason.CANCELLED, "cancelled on request"))
            return
        self._idle_deaths = 0
        self._events.append(Started(head.request.key))

    def _take_batch(self, frame: Frame) -> None:
        head = self._running(frame)
        if frame.name not in head.topics:
            if not TOPIC_PATTERN.fullmatch(frame.name):
                raise BridgeError("published to a topic with an impossible name")
            if len(head.topics) >= TOPICS_MAX:
                raise BridgeError(f"published to more than {TOPICS_MAX} topics")
            head.topics.add(frame.name)
        batch = decode(frame.body)
        head.rows += batch.num_rows
        head.batches += 1
        self._events.append(Batch(head.request.key, frame.name, batch))

    def _end(self, warm: _Warm, frame: Frame) -> None:
        head = self._running(frame)
        self._sent.popleft()
        log = warm.process.log.take(head.number)
        self._events.append(Finished(head.request.key, head.rows, head.batches, log))
        grown = warm.process.usage.memory_bytes > self.plugin.limits.memory_mb << 19
        if grown or warm.process.left_behind(self._own_processes()):
            warm.retiring = True
        if warm.retiring and not self._sent:
            self._retire()  # not with the next job: what it left behind would run until then
        self._await_begin()

    def _own_processes(self) -> int:
        """The guest, and where there is a process namespace its first process."""
        return 2 if self.sandbox_report.get("pid_namespace", "").startswith(APPLIED) else 1

    def _error(self, warm: _Warm, frame: Frame) -> None:
        told = frame.json()
        kind = told.get("kind")
        reason = _REASONS.get(kind) if isinstance(kind, str) else None
        text = told.get("message")
        transient = told.get("transient")
        if reason is None or not isinstance(text, str) or not isinstance(transient, bool | None):
            raise BridgeError("reported an error of no known kind")
        message = _clean(text)
        if warm.ready:
            self._running(frame)
        if kind == ErrorKind.PROCESSES:
            message = f"{too_many_processes(self.plugin.limits.pids).message}: {message}"
        self._died(warm, Verdict(reason, message, transient))

    def _running(self, frame: Frame) -> _Job:
        head = self._sent[0] if self._sent else None
        if head is None or not head.started or head.number != frame.job:
            raise BridgeError(f"sent {frame.kind.name} for a job that is not running")
        return head

    # -- endings

    def _died(self, warm: _Warm, verdict: Verdict | None) -> None:
        """The process is gone or has to go: charge it to a job, put the others back."""
        truncated = verdict is None and warm.process.frames.partial
        if verdict is not None:
            warm.process.kill(verdict)
        found = warm.process.end()
        if truncated and found.reason is Reason.EXITED:
            found = Verdict(Reason.TRUNCATED, "the plugin's output broke off within a batch")
        self._warm = None
        blamed = self._blamed(warm, found)
        if blamed is not None:
            job = blamed.number if warm.ready else 0
            log = warm.process.log.take(job)
            self._fail(blamed, self._explained(warm, found), log)
        warm.process.log.drain()
        self._put_back()
        self._scratch.clear_tmp()

    def _blamed(self, warm: _Warm, verdict: Verdict) -> _Job | None:
        """Whose fault it was: the running job's, or the first one's if loading failed."""
        if self._sent and self._sent[0].started:
            return self._sent.popleft()
        self._idle_deaths += 1
        if warm.ready and self._idle_deaths < _IDLE_DEATHS_MAX:
            return None
        if verdict.reason is Reason.CANCELLED:
            return None
        if self._sent:
            return self._sent.popleft()
        with self._lock:
            return self._waiting.popleft() if self._waiting else None

    def _explained(self, warm: _Warm, verdict: Verdict) -> Verdict:
        if warm.confined or verdict.transient is True:
            return verdict
        if verdict.reason in {Reason.EXITED, Reason.CRASHED}:
            return Verdict(Reason.SANDBOX, f"the sandbox could not be set up: {verdict.message}")
        return verdict

    def _fail(self, job: _Job, verdict: Verdict, log: str) -> None:
        if job.cancelled:
            return  # its outcome has been handed out
        key = job.request.key
        failed = Failed(key, verdict.reason, verdict.message, verdict.transient, log)
        if verdict.reason is Reason.PLUGIN_INVALID and verdict.transient is not True:
            self._invalid = failed
        self._events.append(failed)

    def _put_back(self) -> None:
        with self._lock:
            while self._sent:
                job = self._sent.pop()
                job.deadline = 0.0
                if not job.cancelled:
                    self._waiting.appendleft(job)

    def _fail_waiting(self, reason: Reason, message: str, transient: bool | None) -> None:
        with self._lock:
            job = self._waiting.popleft()
        self._events.append(Failed(job.request.key, reason, message, transient))

    def _refuse_waiting(self) -> None:
        """A plugin that cannot be loaded will not be loadable for the next file either."""
        with self._lock:
            jobs, self._waiting = self._waiting, deque()
        if self._invalid is not None:
            self._events.extend(replace(self._invalid, key=job.request.key) for job in jobs)

    def _take_cancels(self) -> None:
        if not self._cancels:
            return
        with self._lock:
            cancels, self._cancels = self._cancels, set()
            kept = [job for job in self._waiting if job.request.key not in cancels]
            dropped = [job.request.key for job in self._waiting if job.request.key in cancels]
            if dropped:
                self._waiting = deque(kept)
        for key in dropped:
            self._events.append(Failed(key, Reason.CANCELLED, "cancelled on request"))
        for job in [job for job in self._sent if job.request.key in cancels]:
            self._cancel_sent(job)

    def _cancel_sent(self, job: _Job) -> None:
        warm = self._warm
        if job.started and warm is not None:
            self._died(warm, Verdict(Reason.CANCELLED, "cancelled on request"))
        elif not job.cancelled:
            job.cancelled = True
            failed = Failed(job.request.key, Reason.CANCELLED, "cancelled on request")
            self._events.append(failed)

    def _retire(self) -> None:
        """End the process, which serves nobody any more."""
        warm, self._warm = self._warm, None
        if warm is not None:
            warm.process.kill()
            warm.process.end()
            warm.process.log.drain()
            self._scratch.clear_tmp()

    def _abandon(self) -> None:
        with self._pumping:
            self._retire()
            self._sent.clear()
            self._events.clear()
            with self._lock:
                self._waiting.clear()

    def _wake(self) -> None:
        with self._lock:
            if self._wake_end >= 0:
                with contextlib.suppress(BlockingIOError):  # full: it will wake anyway
                    os.write(self._wake_end, b"\0")


def _hello(plugin: Plugin) -> bytes:
    return pack_json(
        Kind.HELLO,
        0,
        {
            "plugin_name": plain(plugin.plugin_name),
            "plugin_version": plugin.plugin_version,
            "source_code": plugin.source_code,
            "parameters": _parameters(plugin.parameters_json),
        },
    )


def _parameters(text: str) -> object:
    try:
        value = json.loads(text or "{}")
    except ValueError as error:
        raise LaunchError(
            f"the plugin's parameters are not JSON: {error}",
            reason=Reason.PLUGIN_INVALID,
            hint="Correct them with `casparian publish` or in its MANIFEST.",
        ) from error
    if not isinstance(value, dict):
        raise LaunchError("the plugin's parameters are no object", reason=Reason.PLUGIN_INVALID)
    return value


def _report(frame: Frame) -> Report:
    report = frame.json().get("report")
    if not isinstance(report, dict) or len(report) > 100:
        raise BridgeError("sent no sandbox report")
    return {_clean(name)[:100]: _clean(text)[:500] for name, text in report.items()}


def _clean(text: object) -> str:
    """Foreign text made safe to store: bounded, and encodable."""
    return str(text)[:MESSAGE_BYTES_MAX].encode("utf-8", "replace").decode()


def _breach(error: Exception) -> str:
    return f"broke the bridge protocol: {_clean(error)}"


def _swallow(descriptor: int) -> None:
    try:
        os.read(descriptor, 4096)
    except BlockingIOError:
        return
