"""A slot answers for every job it takes, whatever goes wrong around it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from casparian_flow.domain.clock import SystemClock
from casparian_flow.domain.records import Limits
from casparian_flow.protocol import messages as m
from casparian_worker.job_outputs import JobOutputs
from casparian_worker.lineage import Lineage
from casparian_worker.plugin_events import Event, Finished, RunRequest
from casparian_worker.sinks.base import JobRun
from casparian_worker.slot import Flight, Host, ReadyJobs, Slot, Source
from casparian_worker.worker_events import StartJob

PLUGIN = m.Plugin("spec", "sales", "1.0.0", "", "", "", "", (), "{}", "", Limits())


def job(number: int) -> StartJob:
    token = f"1edeadbe-1-{number}-1"
    dispatch = m.Dispatch(
        token, 1, "spec", "sales", f"/data/{number}.csv", number, number, "ab" * 32,
        (1, 1, 1, 1, 1), (1, 1, 0),
    )  # fmt: skip
    return StartJob(token, number, dispatch, PLUGIN)


class Input:
    path = "copy.csv"
    in_place = False
    closed = False

    def verify(self) -> None: ...

    def close(self) -> None:
        self.closed = True


class Obedient:
    """A plugin process that has done every job as soon as it is asked."""

    def __init__(self) -> None:
        self.requests: list[RunRequest] = []
        self._events: list[Event] = []

    def submit(self, request: RunRequest) -> None:
        self.requests.append(request)
        self._events.append(Finished(request.key, 0, 0))

    def next_event(self, timeout_s: float) -> Event | None:
        return self._events.pop(0) if self._events else None

    def cancel(self, key: str) -> None: ...

    def stop(self) -> None: ...


class Shop:
    """What a slot needs, with a fault where the test wants one."""

    def __init__(self, fail_source: bool = False, fail_host: bool = False) -> None:
        self.fail_source, self.fail_host = fail_source, fail_host
        self.host_made = Obedient()
        self.inputs: list[Input] = []
        self.answers: dict[str, m.Conclude | None] = {}

    def source(self, bay: int, job: StartJob) -> Source | m.Conclude:
        if self.fail_source:
            raise OSError(28, "No space left on device")
        self.inputs.append(Input())
        return self.inputs[-1]

    def host(self, bay: int, plugin: m.Plugin) -> Host:
        if self.fail_host:
            raise OSError(28, "No space left on device")
        return self.host_made

    def outputs(self, job: StartJob) -> JobOutputs:
        run = JobRun(job.token, 1, 1, "sales", "", "", (1, 1, 0))

        def no_sink(uri: str) -> object:
            raise AssertionError(uri)

        return JobOutputs(run, Lineage("", "", "", ""), (), no_sink)  # type: ignore[arg-type]

    def is_stopped(self, token: str) -> bool:
        return False

    def began(self, token: str) -> None: ...

    def ended(self, flight: Flight, conclusion: m.Conclude) -> None:
        self.answers[flight.job.token] = conclusion

    def refused(self, token: str, conclusion: m.Conclude) -> None:
        self.answers[token] = conclusion

    def finished(self, flight: Flight, log_tail: str) -> None:
        self.answers[flight.job.token] = None


@contextmanager
def working(shop: Shop) -> Iterator[Callable[[StartJob], m.Conclude | None]]:
    """A slot at work; calling what this gives runs one job and returns how it was answered."""
    ready, clock = ReadyJobs(), SystemClock()
    slot = Slot(0, ready, shop, clock)
    slot.start()

    def run(start: StartJob) -> m.Conclude | None:
        ready.put(start)
        deadline = clock.now().mono + 5
        while start.token not in shop.answers:
            assert clock.now().mono < deadline, "the job was never answered"
            slot.join(0.01)
        return shop.answers[start.token]

    try:
        yield run
    finally:
        slot.close()
        ready.close()
        slot.join(5)


@pytest.mark.parametrize("fault", ["fail_source", "fail_host"])
def test_a_job_that_cannot_begin_is_answered_and_the_next_one_runs(fault: str) -> None:
    shop = Shop(**{fault: True})
    with working(shop) as run:
        failed = run(job(1))
        assert failed is not None
        assert (failed.status, failed.reason) == ("FAILED", "worker_error")
        assert "No space left on device" in failed.error_message
        assert all(each.closed for each in shop.inputs)
        setattr(shop, fault, False)
        assert run(job(2)) is None


def test_the_plugin_is_told_where_its_file_was_found_and_which_bytes_it_has() -> None:
    shop = Shop()
    with working(shop) as run:
        run(job(7))
    (request,) = shop.host_made.requests
    assert request.file_version_id == 7
    assert request.metadata == {"content_hash": "ab" * 32, "source_path": "/data/7.csv"}
