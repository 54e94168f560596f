"""Row 12: events of API jobs, each durable when its call returns; reading on from one of many."""

import threading
from pathlib import Path

from bench.flow import Flow
from bench.harness import Figure, Plan, Stopwatch, at_least, at_most, check
from bench.workspace import fresh, workspace
from casparian_flow.db.api_storage import ApiStorage
from casparian_flow.db.ledger import Ledger
from casparian_flow.domain.clock import SystemClock
from casparian_flow.protocol import EventType, HttpJobType
from casparian_flow.sentinel.api import ApiStore

BATCHED, QUICK_BATCHED = 100_000, 4_000
BATCH = 1_000
SINGLE, QUICK_SINGLE = 8_000, 400
CALLERS = 8
STORED, QUICK_STORED = 1_000_000, 20_000
JOBS = 10
LOOKS, QUICK_LOOKS = 1_000, 100
PAGE = 100
FILL = 10_000


def measure(plan: Plan) -> list[Figure]:
    batched, single, remote, looks = [], [], [], []
    each = plan.size(SINGLE, QUICK_SINGLE) // CALLERS
    with workspace("row12") as folder:
        for _ in range(plan.rounds):
            with fresh(folder) as inner:
                batched.append(_in_batches(inner, plan.size(BATCHED, QUICK_BATCHED)))
            with fresh(folder) as inner:
                single.append(_one_by_one(inner, each))
            with fresh(folder) as inner:
                remote.append(_one_by_one_over_the_socket(inner, each))
        stored = plan.size(STORED, QUICK_STORED)
        with Ledger.open(folder / "full.duckdb", clock=SystemClock()) as ledger:
            storage = ApiStorage(ledger)
            jobs = _fill(storage, stored)
            count = plan.size(LOOKS, QUICK_LOOKS)
            looks = [_slow_look_ms(storage, jobs, stored, count) for _ in range(plan.rounds)]
    one_by_one = f"events inserted one by one by {CALLERS} callers"
    return [
        Figure(
            "12a", f"events inserted {BATCH:,} at a time", "events/s", batched, at_least(20_000)
        ),
        Figure(
            "12b", one_by_one, "events/s", single, at_least(1_000),
            notes=["threads of the process that has the ledger open"],
        ),
        Figure(
            "12c", f"list_events after N, p99, {stored:,} events stored", "ms", looks, at_most(5),
            notes=[f"pages of {PAGE} events, at random places of {JOBS} interleaved jobs"],
        ),
        Figure(
            "12d", f"{one_by_one} over the control socket", "events/s", remote, at_least(1_000),
            notes=["threads of one client; the Sentinel is a process of its own"],
        ),
    ]  # fmt: skip


def _in_batches(folder: Path, events: int) -> float:
    with Ledger.open(folder / "l.duckdb", clock=SystemClock()) as ledger:
        storage = ApiStorage(ledger)
        job_id = _new_job(storage)
        batch = [EventType.Progress(items_done=n, items_total=BATCH) for n in range(BATCH)]
        with Stopwatch() as watch:
            for _ in range(events // BATCH):
                storage.insert_events(job_id, batch)
        check(storage.next_event_id(job_id) == events + 1, "every event is there")
    return events / watch.seconds


def _one_by_one(folder: Path, each: int) -> float:
    with Ledger.open(folder / "l.duckdb", clock=SystemClock()) as ledger:
        return _singles_per_second(ApiStorage(ledger), each)


def _one_by_one_over_the_socket(folder: Path, each: int) -> float:
    with Flow(folder / "l.duckdb", folder).start(workers=0) as flow:
        return _singles_per_second(flow.control.api, each)


def _singles_per_second(storage: ApiStore, each: int) -> float:
    """Events per second of CALLERS threads that insert `each` events, one by one."""
    jobs = [_new_job(storage) for _ in range(CALLERS)]

    def call(job_id: int) -> None:
        for n in range(each):
            storage.insert_event(job_id, EventType.Progress(items_done=n))

    callers = [threading.Thread(target=call, args=(job_id,)) for job_id in jobs]
    with Stopwatch() as watch:
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
    check(all(storage.next_event_id(j) == each + 1 for j in jobs), "every event is there")
    return each * CALLERS / watch.seconds


def _fill(storage: ApiStorage, events: int) -> list[int]:
    jobs = [_new_job(storage) for _ in range(JOBS)]
    batch = [EventType.Progress(items_done=n) for n in range(min(FILL, events // JOBS))]
    while storage.next_event_id(jobs[-1]) <= events // JOBS:
        for job_id in jobs:
            storage.insert_events(job_id, batch)
    return jobs


def _slow_look_ms(storage: ApiStorage, jobs: list[int], stored: int, count: int) -> float:
    """The time that 99 of 100 looks do not exceed."""
    took = []
    last = stored // JOBS - PAGE
    for n in range(count):
        after = n * 7_919 % last
        with Stopwatch() as watch:
            found = storage.list_events(jobs[n % JOBS], after, PAGE)
        check(len(found) == PAGE and found[0].event_id == after + 1, "the page is the next one")
        took.append(1000 * watch.seconds)
    return sorted(took)[int(count * 0.99)]


def _new_job(storage: ApiStore) -> int:
    return storage.create_job(HttpJobType.RUN, "bench", None, "/in")
