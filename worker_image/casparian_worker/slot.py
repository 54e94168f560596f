"""One slot: a thread that keeps one plugin process at work.

    ReadyJobs ─ take ─> source (copy, hash) ─ submit ─> plugin process
                                                           │ Started, Batch…, Finished | Failed
    Stager <─ finished job, its rows in the writers ── events

While the plugin reads file k + 1, the slot encodes the rows of file k, and the stager's threads
wait for its fsyncs. How many files are sent ahead depends on how long the plugin takes for one:
many tiny ones, no second one behind a long one, as another slot or worker may be free for it.
"""

import logging
from collections import deque
from dataclasses import dataclass
from threading import Condition, Thread
from typing import Protocol

from casparian_flow.domain.clock import Clock
from casparian_flow.domain.errors import CasparianError, OutputRefusedError, SinkError
from casparian_flow.domain.failures import Reason
from casparian_flow.protocol import messages as m
from casparian_worker.conclusions import failure, failure_of
from casparian_worker.job_outputs import JobOutputs
from casparian_worker.plugin_events import Batch, Event, Failed, Finished, RunRequest, Started
from casparian_worker.worker_events import StartJob

log = logging.getLogger(__name__)

WARM_MAX = 4
"""Plugin versions with a warm process, per slot."""
WARM_IDLE_S = 300.0
"""A process without work for this long is ended."""
AHEAD_S = 0.25
"""Work sent ahead to the plugin, in seconds of its own pace."""
AHEAD_MAX = 16
PASSED_OVER_MAX = 64
"""Times the oldest job may be passed over for jobs whose plugin is at work already."""
WAIT_S = 0.2
PACE_SMOOTHING = 0.3
DOOMED_BATCHES_MAX = 16
"""Batches of a failed job that are thrown away before its plugin is stopped."""


class Source(Protocol):
    """The bytes of one file version, as the plugin gets them."""

    @property
    def path(self) -> str: ...

    @property
    def in_place(self) -> bool: ...

    def verify(self) -> None: ...

    def close(self) -> None: ...


class Host(Protocol):
    """One plugin version's process; see plugin_events.py."""

    def submit(self, request: RunRequest) -> None: ...

    def next_event(self, timeout_s: float) -> Event | None: ...

    def cancel(self, key: str) -> None: ...

    def stop(self) -> None: ...


class ReadyJobs:
    """Jobs that no slot has taken yet, in order of arrival."""

    def __init__(self) -> None:
        self._jobs: deque[StartJob] = deque()
        self._changed = Condition()
        self._passed_over = 0
        self._closed = False

    def put(self, job: StartJob) -> None:
        with self._changed:
            self._jobs.append(job)
            self._changed.notify()

    def take(self, spec_id: str | None, timeout_s: float) -> StartJob | None:
        """The next job, or None if none came in time.

        Args:
            spec_id: take only a job of this plugin spec; None takes any.
        """
        with self._changed:
            if not self._jobs and timeout_s > 0 and not self._closed:
                self._changed.wait(timeout_s)
            if not self._jobs or self._closed:
                return None
            if spec_id is None or self._jobs[0].plugin.spec_id == spec_id:
                self._passed_over = 0
                return self._jobs.popleft()
            return self._take_matching(spec_id)

    def _take_matching(self, spec_id: str) -> StartJob | None:
        if self._passed_over >= PASSED_OVER_MAX:
            return None
        for position, job in enumerate(self._jobs):
            if job.plugin.spec_id == spec_id:
                del self._jobs[position]
                self._passed_over += 1
                return job
        return None

    def remove(self, token: str) -> bool:
        """Take one job out; False if a slot has it already, or it never was here."""
        with self._changed:
            for position, job in enumerate(self._jobs):
                if job.token == token:
                    del self._jobs[position]
                    return True
        return False

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()


@dataclass(slots=True)
class Flight:
    """A job between the slot and the plugin's process.

    Attributes:
        began: when the plugin began on it, monotonic; None before.
        doom: why it has failed although the plugin still runs.
    """

    job: StartJob
    source: Source
    outputs: JobOutputs
    began: float | None = None
    doom: m.Conclude | None = None
    doomed_batches: int = 0


class Workshop(Protocol):
    """What a slot needs of the runner."""

    def source(self, bay: int, job: StartJob) -> Source | m.Conclude:
        """The job's bytes, or why there are none."""

    def host(self, bay: int, plugin: m.Plugin) -> Host: ...

    def outputs(self, job: StartJob) -> JobOutputs: ...

    def is_stopped(self, token: str) -> bool: ...

    def began(self, token: str) -> None: ...

    def ended(self, flight: Flight, conclusion: m.Conclude) -> None:
        """The job failed: what it staged has to go."""

    def refused(self, token: str, conclusion: m.Conclude) -> None:
        """The job failed before the plugin was asked."""

    def finished(self, flight: Flight, log_tail: str) -> None:
        """The plugin is done; the rows are with the writers."""


class Slot(Thread):
    """See the module's text."""

    def __init__(self, number: int, ready: ReadyJobs, shop: Workshop, clock: Clock) -> None:
        super().__init__(name=f"slot-{number}", daemon=True)
        self._number = number
        self._ready = ready
        self._shop = shop
        self._clock = clock
        self._flights: dict[str, Flight] = {}
        self._warm = WarmHosts(number, shop)
        self._host: Host | None = None
        self._spec_id = ""
        self._pace: dict[str, float] = {}
        self._closing = False
        self._forget_idle = False

    # -- from other threads ---------------------------------------------------------------------

    def cancel(self, token: str) -> None:
        """Stop the job if it is here."""
        host = self._host
        if host is not None and token in self._flights:
            host.cancel(token)

    def forget_plugins(self) -> None:
        """Replace the warm processes once nothing is under way."""
        self._forget_idle = True

    def close(self) -> None:
        """Stop whatever runs; the thread ends soon after."""
        self._closing = True
        for token in list(self._flights):
            self.cancel(token)

    # -- the thread -----------------------------------------------------------------------------

    def run(self) -> None:
        while not self._closing:
            try:
                self._top_up()
                if self._flights:
                    self._pump()
            except Exception as error:  # the slot outlives a bug; its jobs do not
                log.exception("slot %d failed", self._number)
                self._fail_all(error)
        self._fail_all(RuntimeError("the worker stops"))
        self._warm.close()

    def _top_up(self) -> None:
        while len(self._flights) < self._depth():
            if not self._flights and self._forget_idle:
                self._forget_idle = False
                self._host = None
                self._warm.close()
            spec_id = self._spec_id if self._flights else None
            job = self._ready.take(spec_id, 0.0 if self._flights else WAIT_S)
            if job is None:
                if not self._flights:
                    self._warm.end_idle(self._clock.now().mono)
                return
            self._begin(job)

    def _depth(self) -> int:
        """Files that may be under way at once at the plugin's present pace."""
        pace = self._pace.get(self._spec_id)
        if pace is None or not self._flights:
            return 1
        return max(1, min(AHEAD_MAX, int(AHEAD_S / max(pace, 1e-6))))

    def _begin(self, job: StartJob) -> None:
        try:
            self._take_on(job)
        except Exception as error:
            if job.token in self._flights:
                raise
            # Not under way yet, so nobody else would answer for it.
            log.exception("slot %d could not begin on %s", self._number, job.token)
            self._shop.refused(job.token, failure_of(job.token, error))

    def _take_on(self, job: StartJob) -> None:
        if self._shop.is_stopped(job.token):
            self._shop.refused(job.token, failure(job.token, Reason.CANCELLED, "stopped"))
            return
        bay = self._warm.bay(job.plugin.spec_id, self._clock.now().mono)
        source = self._shop.source(bay.number, job)
        if isinstance(source, m.Conclude):
            self._shop.refused(job.token, source)
            return
        try:
            self._host = self._warm.host(bay, job.plugin)
        except Exception as error:
            source.close()
            if not isinstance(error, CasparianError):
                raise
            self._shop.refused(job.token, failure_of(job.token, error))
            return
        self._spec_id = job.plugin.spec_id
        self._flights[job.token] = Flight(job, source, self._shop.outputs(job))
        self._host.submit(_request(job, source))
        if self._shop.is_stopped(job.token):
            self._host.cancel(job.token)

    def _pump(self) -> None:
        assert self._host is not None
        event = self._host.next_event(WAIT_S)
        if event is None:
            return
        flight = self._flights.get(event.key)
        if flight is None:
            return
        match event:
            case Batch():
                self._take_rows(flight, event)
            case Started():
                flight.began = self._clock.now().mono
                self._shop.began(event.key)
            case Finished():
                self._finished(flight, event)
            case Failed():
                self._failed(flight, event)

    def _take_rows(self, flight: Flight, event: Batch) -> None:
        if flight.doom is not None:
            flight.doomed_batches += 1
            if flight.doomed_batches == DOOMED_BATCHES_MAX and self._host is not None:
                self._host.cancel(event.key)
            return
        try:
            flight.outputs.write(event.topic, event.batch)
        except (OutputRefusedError, SinkError) as error:
            flight.doom = failure_of(event.key, error)

    def _finished(self, flight: Flight, event: Finished) -> None:
        token = event.key
        del self._flights[token]
        self._note_pace(flight)
        if flight.doom is not None:
            flight.doom.log = event.log_tail
            self._shop.ended(flight, flight.doom)
        else:
            self._shop.finished(flight, event.log_tail)

    def _failed(self, flight: Flight, event: Failed) -> None:
        token = event.key
        del self._flights[token]
        # The next one may be as slow: nothing is sent ahead until it is known.
        self._pace.pop(self._spec_id, None)
        conclusion = flight.doom or failure(token, event.reason, event.message, event.transient)
        conclusion.log = event.log_tail
        self._shop.ended(flight, conclusion)

    def _note_pace(self, flight: Flight) -> None:
        if flight.began is None:
            return
        took = self._clock.now().mono - flight.began
        before = self._pace.pop(self._spec_id, took)
        self._pace[self._spec_id] = before + PACE_SMOOTHING * (took - before)
        while len(self._pace) > 2 * WARM_MAX:
            del self._pace[next(iter(self._pace))]

    def _fail_all(self, error: Exception) -> None:
        flights, self._flights = self._flights, {}
        for token, flight in flights.items():
            self._shop.ended(flight, failure_of(token, error))
        if flights:
            self._host = None
            self._warm.close()


def _request(job: StartJob, source: Source) -> RunRequest:
    dispatch = job.dispatch
    told = {"content_hash": dispatch.content_hash, "source_path": dispatch.file_path}
    return RunRequest(job.token, source.path, dispatch.file_version_id, source.in_place, told)


@dataclass(slots=True)
class Bay:
    """A place for one warm process: scratch folders and, for a worker that is root, a user.

    Processes of different plugins never share one, so that none sees what another left behind.
    """

    number: int
    spec_id: str = ""
    host: Host | None = None
    used: float = 0.0


class WarmHosts:
    """A slot's plugin processes, in a fixed number of bays."""

    def __init__(self, slot: int, shop: Workshop) -> None:
        self._shop = shop
        self._bays = [Bay(slot * WARM_MAX + n) for n in range(WARM_MAX)]

    def bay(self, spec_id: str, mono: float) -> Bay:
        """The bay with this plugin's process, or else one that is empty."""
        bay = next((bay for bay in self._bays if bay.spec_id == spec_id), None)
        if bay is None:
            bay = min(self._bays, key=lambda bay: bay.used if bay.host is not None else -1.0)
            _vacate(bay)
            bay.spec_id = spec_id
        bay.used = mono
        return bay

    def host(self, bay: Bay, plugin: m.Plugin) -> Host:
        """The bay's host, made if there is none.

        Raises:
            CasparianError: the plugin cannot be run at all.
        """
        if bay.host is None:
            bay.host = self._shop.host(bay.number, plugin)
        return bay.host

    def end_idle(self, mono: float) -> None:
        for bay in self._bays:
            if bay.host is not None and mono - bay.used > WARM_IDLE_S:
                _vacate(bay)

    def close(self) -> None:
        for bay in self._bays:
            _vacate(bay)


def _vacate(bay: Bay) -> None:
    host, bay.host, bay.spec_id = bay.host, None, ""
    if host is not None:
        host.stop()
