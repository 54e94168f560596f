"""Rules of API jobs, events and approvals, on a ledger in memory."""

from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
from ledger_kit import ManualClock

from casparian_flow.db.api_storage import ApiStorage
from casparian_flow.db.ledger import Ledger
from casparian_flow.domain.errors import (
    ConflictError,
    NotFoundError,
    NotPermittedError,
    UsageError,
)
from casparian_flow.protocol import (
    ApprovalBinding,
    ApprovalOperation,
    ApprovalStatus,
    EventType,
    HttpJobStatus,
    HttpJobType,
    OutputInfo,
    ViolationSummary,
    ViolationType,
)
from casparian_flow.protocol.http_types import EVENT_TYPES, decode_event, encode_payload

HOUR = timedelta(hours=1)
RUN = ApprovalOperation.Run(plugin_name="p", input_dir="/in", file_count=3, output="parquet://out")
BINDING = ApprovalBinding(
    artifact_hash="a1", files_digest="f1", file_count=3, sink="parquet://out", parameters_hash="{}"
)
FINAL = [HttpJobStatus.COMPLETED, HttpJobStatus.FAILED, HttpJobStatus.CANCELLED]


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def storage(clock: ManualClock) -> Iterator[ApiStorage]:
    with Ledger.in_memory(clock=clock) as ledger:
        yield ApiStorage(ledger, clock=clock)


def new_job(storage: ApiStorage, status: HttpJobStatus = HttpJobStatus.QUEUED) -> int:
    job_id = storage.create_job(HttpJobType.RUN, "p", "1.0", "/in", "parquet://out")
    storage.update_job_status(job_id, status)
    return job_id


def new_approval(storage: ApiStorage, *, expires_in: timedelta = HOUR, **more: Any) -> str:
    approval_id = storage.generate_approval_id()
    storage.create_approval(approval_id, RUN, "Run p on 3 files", expires_in, **more)
    return approval_id


def status_of(storage: ApiStorage, approval_id: str) -> ApprovalStatus:
    approval = storage.get_approval(approval_id)
    assert approval is not None
    return approval.status


# -- jobs -----------------------------------------------------------------------------------------


def test_a_job_goes_from_queued_over_running_to_its_end(
    storage: ApiStorage, clock: ManualClock
) -> None:
    job_id = new_job(storage)
    clock.seconds = 1
    assert storage.update_job_status(job_id, HttpJobStatus.RUNNING)
    clock.seconds = 2
    assert storage.update_job_status(job_id, HttpJobStatus.RUNNING)
    clock.seconds = 3
    assert storage.update_job_status(job_id, HttpJobStatus.FAILED, "it broke")
    job = storage.get_job(job_id)
    assert job is not None
    assert job.started_at == job.created_at + timedelta(seconds=1)
    assert job.finished_at == job.created_at + timedelta(seconds=3)
    assert (job.status, job.error_message) == (HttpJobStatus.FAILED, "it broke")


def test_progress_and_result_are_there_once_they_are_set(storage: ApiStorage) -> None:
    job_id = new_job(storage, HttpJobStatus.RUNNING)
    job = storage.get_job(job_id)
    assert job is not None
    assert job.progress is None
    assert job.result is None
    assert storage.update_job_progress(job_id, "read", 1, 5, "one of five")
    assert storage.update_job_progress(job_id, "write", 2)
    out = OutputInfo(name="t", sink_uri="parquet://out/t.parquet", rows=7)
    assert storage.update_job_result(job_id, 7, 900, [out], {"files": 2})
    job = storage.get_job(job_id)
    assert job is not None
    assert job.progress is not None
    assert (job.progress.phase, job.progress.items_total, job.progress.message) == (
        "write",
        None,
        None,
    )
    assert job.result is not None
    assert (job.result.outputs, job.result.metrics) == ([out], {"files": 2})


@pytest.mark.parametrize("final", FINAL)
def test_a_finished_job_is_changed_by_no_method(storage: ApiStorage, final: HttpJobStatus) -> None:
    job_id = new_job(storage, HttpJobStatus.RUNNING)
    assert storage.finish_job(job_id, final)
    before = storage.get_job(job_id), storage.list_events(job_id)
    for status in HttpJobStatus:
        assert not storage.update_job_status(job_id, status, "again")
        if status.is_terminal:
            assert not storage.finish_job(job_id, status, "again")
    assert not storage.update_job_progress(job_id, "x", 1)
    assert not storage.update_job_result(job_id, 1)
    assert not storage.cancel_job(job_id)
    for event in (EventType.JobStarted(), EventType.JobFinished(HttpJobStatus.FAILED)):
        with pytest.raises(ConflictError):
            storage.insert_event(job_id, event)
    assert (storage.get_job(job_id), storage.list_events(job_id)) == before


def test_the_end_of_a_job_may_be_told_after_it_once(storage: ApiStorage) -> None:
    job_id = new_job(storage, HttpJobStatus.COMPLETED)
    finished = EventType.JobFinished(HttpJobStatus.COMPLETED)
    with pytest.raises(ConflictError):
        storage.insert_event(job_id, EventType.JobFinished(HttpJobStatus.FAILED))
    assert storage.insert_event(job_id, finished) == 1
    with pytest.raises(ConflictError):
        storage.insert_event(job_id, finished)


def test_cancelling_ends_the_job_and_tells_so_once(storage: ApiStorage) -> None:
    job_id = new_job(storage, HttpJobStatus.RUNNING)
    storage.insert_event(job_id, EventType.JobStarted())
    assert storage.cancel_job(job_id)
    assert not storage.cancel_job(job_id)
    assert not storage.cancel_job(999)
    (told,) = storage.list_events(job_id, 1)
    assert told.payload == EventType.JobFinished(HttpJobStatus.CANCELLED, "Cancelled by user")
    job = storage.get_job(job_id)
    assert job is not None
    assert job.status is HttpJobStatus.CANCELLED
    assert job.finished_at is not None


def test_jobs_are_listed_newest_first_and_by_status(
    storage: ApiStorage, clock: ManualClock
) -> None:
    ids = []
    for second in range(3):
        clock.seconds = second
        ids.append(new_job(storage))
    storage.update_job_status(ids[1], HttpJobStatus.RUNNING)
    assert [j.job_id for j in storage.list_jobs()] == ids[::-1]
    assert [j.job_id for j in storage.list_jobs(HttpJobStatus.RUNNING)] == [ids[1]]
    assert [j.job_id for j in storage.list_jobs(limit=1, offset=1)] == [ids[1]]


# -- what does not fit ----------------------------------------------------------------------------

Call = Callable[[ApiStorage], object]


@pytest.mark.parametrize(
    "call",
    [
        lambda s: s.create_job("walk", "p", None, "/in"),
        lambda s: s.create_job(HttpJobType.RUN, "", None, "/in"),
        lambda s: s.create_job(HttpJobType.RUN, "p" * 256, None, "/in"),
        lambda s: s.create_job(HttpJobType.RUN, "p", None, None),
        lambda s: s.create_job(HttpJobType.RUN, "p\ud800", None, "/in"),
        lambda s: s.update_job_status(1, "done"),
        lambda s: s.update_job_status(-1, HttpJobStatus.RUNNING),
        lambda s: s.update_job_status("1", HttpJobStatus.RUNNING),
        lambda s: s.update_job_status(True, HttpJobStatus.RUNNING),
        lambda s: s.update_job_progress(1, "x", -1),
        lambda s: s.update_job_progress(1, "x", 1, -5),
        lambda s: s.update_job_progress(1, "x", 2**63),
        lambda s: s.update_job_result(1, -1),
        lambda s: s.update_job_result(1, 1, -1),
        lambda s: s.update_job_result(1, 1, 1, [OutputInfo(name="o", sink_uri="", rows=-1)]),
        lambda s: s.update_job_result(1, 1, 1, [], {"x": "y"}),
        lambda s: s.finish_job(1, HttpJobStatus.RUNNING),
        lambda s: s.list_jobs("done"),
        lambda s: s.list_jobs(limit=0),
        lambda s: s.list_jobs(limit=5, offset=-1),
        lambda s: s.insert_event(1, EventType.JobStarted),
        lambda s: s.insert_event(1, "job_started"),
        lambda s: s.insert_event(1, EventType.Progress(items_done=-1)),
        lambda s: s.insert_event(1, EventType.JobFinished("running")),
        lambda s: s.insert_event(1, EventType.JobFinished("gone")),
        lambda s: s.insert_event(1, EventType.Phase("x" * 2_000_000)),
        lambda s: s.list_events(1, -1),
        lambda s: s.list_events(1, 0, 0),
        lambda s: s.wait_events(1, 0, -1),
        lambda s: s.wait_events(1, 0, 1e9),
        lambda s: s.wait_events(1, 0, float("nan")),
        lambda s: s.create_approval("", RUN, "x", HOUR),
        lambda s: s.create_approval("a", "run", "x", HOUR),
        lambda s: s.create_approval("a", RUN, "x", 3600),
        lambda s: s.create_approval("a", RUN, "x", timedelta.max),
        lambda s: s.create_approval("a", RUN, "x" * 20_000, HOUR),
        lambda s: s.list_approvals("maybe"),
        lambda s: s.cleanup_old_data(-1, 1),
        lambda s: s.cleanup_old_data(1, float("nan")),
    ],
)
def test_what_does_not_fit_is_a_usage_error(storage: ApiStorage, call: Call) -> None:
    job_id = new_job(storage)
    assert job_id == 1
    before = storage.get_job(1), storage.list_events(1), storage.list_approvals()
    with pytest.raises(UsageError):
        call(storage)
    assert (storage.get_job(1), storage.list_events(1), storage.list_approvals()) == before


@pytest.mark.parametrize(
    "call",
    [
        lambda s: s.update_job_status(7, HttpJobStatus.RUNNING),
        lambda s: s.update_job_progress(7, "x", 1),
        lambda s: s.update_job_result(7, 1),
        lambda s: s.finish_job(7, HttpJobStatus.FAILED),
        lambda s: s.insert_event(7, EventType.JobStarted()),
        lambda s: s.next_event_id(7),
        lambda s: s.create_job(HttpJobType.RUN, "p", None, "/in", None, "nobody"),
        lambda s: s.link_approval_to_job("nobody", 1),
        lambda s: s.start_approved("nobody"),
        lambda s: s.mark_stale("nobody", ["x"]),
    ],
)
def test_what_is_not_there_is_a_typed_error(storage: ApiStorage, call: Call) -> None:
    with pytest.raises(NotFoundError):
        call(storage)


def test_what_is_not_there_is_nothing_where_that_is_documented(storage: ApiStorage) -> None:
    assert storage.get_job(7) is None
    assert storage.list_events(7) == []
    assert storage.get_approval("nobody") is None
    assert not storage.approve("nobody")
    assert not storage.reject("nobody")


def test_a_running_job_does_not_go_back_to_the_queue(storage: ApiStorage) -> None:
    job_id = new_job(storage, HttpJobStatus.RUNNING)
    with pytest.raises(ConflictError):
        storage.update_job_status(job_id, HttpJobStatus.QUEUED)


# -- events ---------------------------------------------------------------------------------------

EVENTS = [
    (EventType.JobStarted(), '{"type":"job_started"}'),
    (EventType.Phase("scan"), '{"type":"phase","name":"scan"}'),
    (
        EventType.Progress(items_done=1),
        '{"type":"progress","items_done":1,"items_total":null,"message":null}',
    ),
    (
        EventType.Violation(
            [
                ViolationSummary(
                    violation_type=ViolationType.TYPE_MISMATCH,
                    column_name="a",
                    count=2,
                    samples=["x"],
                )
            ]
        ),
        (
            '{"type":"violation","violations":[{"violation_type":"type_mismatch",'
            '"column_name":"a","count":2,"samples":["x"]}]}'
        ),
    ),
    (
        EventType.Output("t", "parquet://out", 5),
        '{"type":"output","output_name":"t","sink_uri":"parquet://out","rows":5,"bytes":null}',
    ),
    (
        EventType.JobFinished(HttpJobStatus.FAILED, "no"),
        '{"type":"job_finished","status":"failed","error_message":"no"}',
    ),
    (
        EventType.ApprovalRequired("abc"),
        '{"type":"approval_required","approval_id":"abc"}',
    ),
]


def test_events_have_their_json(storage: ApiStorage) -> None:
    assert [type(event) for event, _ in EVENTS] == list(EVENT_TYPES.values())
    job_id = new_job(storage, HttpJobStatus.RUNNING)
    assert storage.insert_events(job_id, [event for event, _ in EVENTS]) == list(range(1, 8))
    assert [event.payload for event in storage.list_events(job_id)] == [e for e, _ in EVENTS]
    for event, json in EVENTS:
        assert encode_payload(event) == json
        assert decode_event(json) == event
    flat = storage.list_events(job_id, 1)[0].flattened()
    assert (flat["event_id"], flat["job_id"], flat["type"], flat["name"]) == (
        2,
        job_id,
        "phase",
        "scan",
    )
    assert str(flat["timestamp"]).endswith("Z")


def test_event_ids_of_interleaved_jobs_have_no_gaps(storage: ApiStorage) -> None:
    jobs = [new_job(storage) for _ in range(3)]
    for n in range(30):
        storage.insert_event(jobs[n % 3], EventType.Phase(str(n)))
    for job_id in jobs:
        assert [e.event_id for e in storage.list_events(job_id)] == list(range(1, 11))
        assert [e.event_id for e in storage.list_events(job_id, 7)] == [8, 9, 10]
        assert [e.event_id for e in storage.list_events(job_id, 4, 2)] == [5, 6]
        assert storage.list_events(job_id, 10) == []
        assert storage.next_event_id(job_id) == 11


def test_a_batch_of_events_is_taken_whole_or_not_at_all(storage: ApiStorage) -> None:
    job_id = new_job(storage)
    with pytest.raises(UsageError):
        storage.insert_events(job_id, [EventType.JobStarted(), EventType.Progress(items_done=-1)])
    assert storage.list_events(job_id) == []


# -- approvals ------------------------------------------------------------------------------------


def test_of_two_decisions_the_first_counts(storage: ApiStorage) -> None:
    approval_id = new_approval(storage)
    assert storage.reject(approval_id, "ann", "too much")
    assert not storage.approve(approval_id, "bob")
    assert not storage.reject(approval_id, "bob")
    approval = storage.get_approval(approval_id)
    assert approval is not None
    assert (approval.status, approval.decided_by, approval.rejection_reason) == (
        ApprovalStatus.REJECTED,
        "ann",
        "too much",
    )
    assert storage.start_approved(approval_id) is None


@pytest.mark.parametrize("swept", [False, True])
def test_an_expired_request_cannot_be_decided(
    storage: ApiStorage, clock: ManualClock, swept: bool
) -> None:
    approval_id = new_approval(storage)
    clock.seconds = 3600
    if swept:
        assert storage.expire_approvals() == 1
    assert status_of(storage, approval_id) is ApprovalStatus.EXPIRED
    assert not storage.approve(approval_id, "ann")
    assert not storage.reject(approval_id, "ann")
    assert storage.start_approved(approval_id) is None
    assert [a.approval_id for a in storage.list_approvals(ApprovalStatus.EXPIRED)] == [approval_id]
    assert storage.list_approvals(ApprovalStatus.PENDING) == []
    assert storage.expire_approvals() == (0 if swept else 1)
    assert storage.list_jobs() == []


def test_a_request_may_be_over_from_the_start(storage: ApiStorage) -> None:
    approval_id = new_approval(storage, expires_in=timedelta(0))
    assert status_of(storage, approval_id) is ApprovalStatus.EXPIRED


def test_an_approval_starts_one_job_however_often_it_is_asked(storage: ApiStorage) -> None:
    approval_id = new_approval(storage)
    assert storage.start_approved(approval_id) is None
    assert storage.approve(approval_id, "ann")
    job_id = storage.start_approved(approval_id, spec_json='{"a": 1}')
    assert job_id is not None
    assert storage.start_approved(approval_id) == job_id
    (job,) = storage.list_jobs()
    assert (job.plugin_name, job.input_dir, job.output_sink, job.spec_json) == (
        "p",
        "/in",
        "parquet://out",
        '{"a": 1}',
    )
    assert job.approval_id == approval_id
    with pytest.raises(ConflictError):
        storage.create_job(HttpJobType.RUN, "p", None, "/in", None, approval_id)
    assert storage.link_approval_to_job(approval_id, job_id)


def test_a_job_is_linked_with_an_approved_request_only(storage: ApiStorage) -> None:
    first, second = new_approval(storage), new_approval(storage)
    job_id = new_job(storage)
    with pytest.raises(ConflictError):
        storage.link_approval_to_job(first, job_id)
    with pytest.raises(ConflictError):
        storage.create_job(HttpJobType.RUN, "p", None, "/in", None, first)
    storage.approve(first)
    storage.approve(second)
    assert storage.link_approval_to_job(first, job_id)
    with pytest.raises(ConflictError):
        storage.link_approval_to_job(second, job_id)
    with pytest.raises(ConflictError):
        storage.link_approval_to_job(first, new_job(storage))
    job = storage.get_job(job_id)
    assert job is not None
    assert job.approval_id == first


def test_what_has_changed_since_the_request_voids_it(storage: ApiStorage) -> None:
    approval_id = new_approval(storage, binding=BINDING)
    grown = ApprovalBinding(
        artifact_hash="a1",
        files_digest="f2",
        file_count=4,
        sink="parquet://out",
        parameters_hash="{}",
    )
    assert not storage.approve(approval_id, "ann", binding=grown)
    approval = storage.get_approval(approval_id)
    assert approval is not None
    assert approval.status is ApprovalStatus.STALE
    assert "number of files changed from 3 to 4" in str(approval.stale_reason)
    assert not storage.approve(approval_id, "ann", binding=BINDING)
    assert storage.start_approved(approval_id, binding=BINDING) is None


def test_a_change_between_the_decision_and_the_start_voids_it_as_well(storage: ApiStorage) -> None:
    approval_id = new_approval(storage, binding=BINDING)
    assert storage.approve(approval_id, "ann", binding=BINDING)
    with pytest.raises(UsageError):
        storage.start_approved(approval_id)
    other = ApprovalBinding(
        artifact_hash="a2",
        files_digest="f1",
        file_count=3,
        sink="parquet://out",
        parameters_hash="{}",
    )
    assert storage.start_approved(approval_id, binding=other) is None
    assert status_of(storage, approval_id) is ApprovalStatus.STALE
    assert storage.list_jobs() == []


def test_a_job_whose_request_turns_stale_before_it_begins_fails(storage: ApiStorage) -> None:
    approval_id = new_approval(storage, binding=BINDING)
    storage.approve(approval_id, "ann")
    job_id = storage.start_approved(approval_id, binding=BINDING)
    assert job_id is not None
    assert storage.mark_stale(approval_id, ["a file was added"])
    job = storage.get_job(job_id)
    assert job is not None
    assert job.status is HttpJobStatus.FAILED
    assert "a file was added" in str(job.error_message)
    assert [e.event_type for e in storage.list_events(job_id)] == ["job_finished"]
    assert not storage.mark_stale(approval_id, ["once more"])


def test_a_job_that_runs_is_not_voided(storage: ApiStorage) -> None:
    approval_id = new_approval(storage)
    storage.approve(approval_id)
    job_id = storage.start_approved(approval_id)
    assert job_id is not None
    storage.update_job_status(job_id, HttpJobStatus.RUNNING)
    assert not storage.mark_stale(approval_id, ["too late"])
    assert status_of(storage, approval_id) is ApprovalStatus.APPROVED


def test_who_asks_cannot_approve_unless_that_is_allowed(clock: ManualClock) -> None:
    with Ledger.in_memory(clock=clock) as ledger:
        strict = ApiStorage(ledger, clock=clock, allow_self_approval=False)
        approval_id = new_approval(strict, requester="ann")
        with pytest.raises(NotPermittedError):
            strict.approve(approval_id, "ann")
        assert status_of(strict, approval_id) is ApprovalStatus.PENDING
        assert strict.approve(approval_id, "bob")
        lenient = ApiStorage(ledger, clock=clock)
        assert lenient.approve(new_approval(lenient, requester="ann"), "ann")


def test_an_approval_id_is_used_once(storage: ApiStorage) -> None:
    approval_id = new_approval(storage)
    with pytest.raises(ConflictError):
        storage.create_approval(approval_id, RUN, "again", HOUR)
    assert len(approval_id) == 36
    assert approval_id[14] == "4"


# -- clean-up -------------------------------------------------------------------------------------


def test_only_finished_jobs_lose_anything(storage: ApiStorage, clock: ManualClock) -> None:
    old, running = new_job(storage), new_job(storage, HttpJobStatus.RUNNING)
    for job_id in (old, running):
        storage.insert_events(job_id, [EventType.JobStarted(), EventType.Phase("x")])
    storage.cancel_job(old)
    clock.seconds = 2 * 3600
    assert storage.cleanup_old_data(3, 3) == (0, 0)
    assert storage.cleanup_old_data(3, 1) == (0, 3)
    assert storage.list_events(old) == []
    assert storage.next_event_id(old) == 4
    assert len(storage.list_events(running)) == 2
    assert storage.cleanup_old_data(1, 1) == (1, 0)
    assert [job.job_id for job in storage.list_jobs()] == [running]


def test_ids_are_not_given_twice_after_a_clean_up(clock: ManualClock) -> None:
    with Ledger.in_memory(clock=clock) as ledger:
        storage = ApiStorage(ledger, clock=clock)
        job_id = new_job(storage)
        storage.cancel_job(job_id)
        assert storage.cleanup_old_data(0, 0) == (1, 1)
        ledger.resync()  # reads the counters anew from the tables, as an opening does
        assert new_job(storage) == job_id + 1


def test_a_page_begins_behind_what_a_clean_up_has_taken(
    storage: ApiStorage, clock: ManualClock
) -> None:
    job_id = new_job(storage)
    storage.insert_events(job_id, [EventType.Phase(str(n)) for n in range(10)])
    clock.seconds = 3600
    storage.insert_events(job_id, [EventType.Phase("late")])
    storage.cancel_job(job_id)
    assert storage.cleanup_old_data(1, 0.5) == (0, 10)
    assert [e.event_id for e in storage.list_events(job_id, 0, 1)] == [11]
    assert [e.event_id for e in storage.list_events(job_id, 3, 5)] == [11, 12]
