"""One suite over the ledger and its in-memory twin: what the broker may rely on."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from builders import WALL_US, make_job
from ledger_kit import (
    AnyLedger,
    ManualClock,
    completed,
    failed,
    granted,
    insert_jobs,
    leased,
    output,
    record,
    retried,
    run_to_grant,
    started,
    token_of,
)

from casparian_flow.db.ledger import Ledger
from casparian_flow.db.memory import MemoryLedger
from casparian_flow.domain.errors import InvalidTransitionError, InvariantError
from casparian_flow.domain.ids import JobId
from casparian_flow.domain.jobs import JobStatus, JournalKind
from casparian_flow.domain.outputs import SinkMode
from casparian_flow.domain.records import Health, HealthRecord, NewJob


@pytest.fixture(params=["twin", "memory", "file"])
def ledger(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[AnyLedger]:
    if request.param == "twin":
        twin = MemoryLedger()
        twin.begin_epoch()
        yield twin
        return
    if request.param == "memory":
        real = Ledger.in_memory(clock=ManualClock())
    else:
        real = Ledger.open(tmp_path / "ledger.duckdb", clock=ManualClock())
    real.begin_epoch()
    yield real
    assert real.check() == []
    real.close()


def only_job(ledger: AnyLedger) -> object:
    state = ledger.load(10)
    (job,) = [*state.active, *state.queued]
    return job


def test_a_queued_job_comes_back_whole(ledger: AnyLedger) -> None:
    (job,) = insert_jobs(ledger, 1, priority=70, generation=2, not_before_us=WALL_US + 5)
    state = ledger.load(10)
    assert state.queued == [job]
    assert state.active == []
    assert state.counts[JobStatus.QUEUED] == 1
    assert state.next_job_id == job.job_id + 1
    assert (state.ledger_id, state.epoch) == (ledger.ledger_id, 1)


def test_epochs_only_rise(ledger: AnyLedger) -> None:
    assert [ledger.begin_epoch(), ledger.begin_epoch()] == [2, 3]
    assert ledger.load(1).epoch == 3


def test_pages_go_by_priority_then_age(ledger: AnyLedger) -> None:
    low = insert_jobs(ledger, 4, priority=10)
    high = insert_jobs(ledger, 3, priority=90)
    state = ledger.load(2)
    assert [j.job_id for j in state.queued] == [j.job_id for j in high[:2]]
    assert state.more_queued
    first, more = ledger.hydrate((90, high[1].job_id), 3)
    assert [j.job_id for j in first] == [high[2].job_id, low[0].job_id, low[1].job_id]
    assert more
    rest, more = ledger.hydrate((10, low[1].job_id), 3)
    assert [j.job_id for j in rest] == [low[2].job_id, low[3].job_id]
    assert not more


def test_a_lease_is_active_under_its_token(ledger: AnyLedger) -> None:
    (job,) = insert_jobs(ledger, 1)
    ledger.commit([leased(ledger, job.job_id)])
    expected = replace(
        job,
        status=JobStatus.DISPATCHING,
        attempt=1,
        token=token_of(ledger, job.job_id),
        owner="aabb",
        manifest_id=7,
    )
    assert only_job(ledger) == expected
    ledger.commit([started(job.job_id)])
    assert only_job(ledger) == replace(expected, status=JobStatus.RUNNING)


def test_a_retried_job_waits_without_a_token(ledger: AnyLedger) -> None:
    (job,) = insert_jobs(ledger, 1)
    ledger.commit([leased(ledger, job.job_id), started(job.job_id), retried(job.job_id)])
    assert only_job(ledger) == replace(
        job, attempt=1, retry_count=1, not_before_us=WALL_US + 4_000_000, manifest_id=7
    )


def test_a_returned_job_is_queued_as_before(ledger: AnyLedger) -> None:
    (job,) = insert_jobs(ledger, 1)
    ledger.commit([leased(ledger, 1), record(1, JournalKind.RETURNED, reason="lease_lost")])
    assert only_job(ledger) == replace(job, attempt=1, manifest_id=7)


def test_a_granted_job_keeps_its_manifest(ledger: AnyLedger) -> None:
    (job,) = insert_jobs(ledger, 1)
    entries = (output(1, n=0), output(1, n=1))
    (outcome,) = run_to_grant(ledger, 1, *entries)
    assert (outcome.refused, outcome.token) == ("", token_of(ledger, 1))
    (staged,) = ledger.load(10).active
    assert staged.status is JobStatus.STAGED
    assert staged.manifest == entries
    assert staged.job_id == job.job_id


def test_a_completed_job_is_gone_from_the_state_but_counted(ledger: AnyLedger) -> None:
    insert_jobs(ledger, 1)
    run_to_grant(ledger, 1)
    ledger.commit([completed(1)])
    state = ledger.load(10)
    assert (state.active, state.queued) == ([], [])
    assert state.counts[JobStatus.COMPLETED] == 1


def test_a_job_without_outputs_completes_from_running(ledger: AnyLedger) -> None:
    insert_jobs(ledger, 1)
    ledger.commit([leased(ledger, 1), started(1), completed(1)])
    assert ledger.status_of(1) is JobStatus.COMPLETED


@pytest.mark.parametrize("kind", [JournalKind.ABORTED, JournalKind.SKIPPED, JournalKind.FAILED])
def test_a_terminal_status_is_final(ledger: AnyLedger, kind: JournalKind) -> None:
    insert_jobs(ledger, 1)
    ledger.commit([record(1, kind, 0, reason="cancelled")])
    for late in (leased(ledger, 1), started(1), completed(1), record(1, kind)):
        with pytest.raises(InvalidTransitionError, match="job 1"):
            ledger.commit([late])
    assert ledger.status_of(1) == KIND_TO_STATUS[kind]


KIND_TO_STATUS = {
    JournalKind.ABORTED: JobStatus.ABORTED,
    JournalKind.SKIPPED: JobStatus.SKIPPED,
    JournalKind.FAILED: JobStatus.FAILED,
}


def test_an_illegal_move_tells_the_story_and_undoes_its_whole_batch(ledger: AnyLedger) -> None:
    insert_jobs(ledger, 2)
    ledger.commit([leased(ledger, 1)])
    with pytest.raises(InvalidTransitionError) as caught:
        ledger.commit([leased(ledger, 2), completed(1)])
    assert "DISPATCHING -> COMPLETED" in str(caught.value)
    assert any("LEASED" in line for line in caught.value.history)
    assert ledger.status_of(2) is JobStatus.QUEUED
    ledger.commit([leased(ledger, 2)])
    assert ledger.status_of(2) is JobStatus.DISPATCHING


def test_a_record_of_an_unknown_job_is_refused(ledger: AnyLedger) -> None:
    with pytest.raises(InvalidTransitionError):
        ledger.commit([leased(ledger, 99)])


def test_a_granted_job_cannot_be_cancelled_or_retried(ledger: AnyLedger) -> None:
    insert_jobs(ledger, 1)
    run_to_grant(ledger, 1)
    for late in (record(1, JournalKind.ABORTED), retried(1), granted(1, output(1, key="other"))):
        with pytest.raises(InvalidTransitionError):
            ledger.commit([late])


def test_an_output_key_is_granted_once_for_ever(ledger: AnyLedger) -> None:
    insert_jobs(ledger, 3)
    run_to_grant(ledger, 1, output(1, key="k"))
    ledger.commit([completed(1)])
    outcomes = ledger.commit(
        [
            *(leased(ledger, 2), started(2), granted(2, output(2, key="k"))),
            *(leased(ledger, 3), started(3), granted(3, output(3, key="mine"))),
        ]
    )
    assert [(o.job_id, o.refused) for o in outcomes] == [(2, "duplicate_output"), (3, "")]
    assert ledger.status_of(2) is JobStatus.RUNNING
    assert ledger.status_of(3) is JobStatus.STAGED


def test_two_jobs_of_one_batch_cannot_take_one_key(ledger: AnyLedger) -> None:
    insert_jobs(ledger, 2)
    ledger.commit([leased(ledger, 1), started(1), leased(ledger, 2), started(2)])
    outcomes = ledger.commit(
        [granted(1, output(1, key="k")), granted(2, output(2, n=0), output(2, n=1, key="k"))]
    )
    assert [o.refused for o in outcomes] == ["", "duplicate_output"]
    # All or nothing: the other output of the refused job is still free.
    insert_jobs(ledger, 1)
    (outcome,) = run_to_grant(ledger, 3, output(2, n=0))
    assert outcome.refused == ""


def test_a_grant_for_an_attempt_that_is_over_is_refused(ledger: AnyLedger) -> None:
    insert_jobs(ledger, 1)
    ledger.commit([leased(ledger, 1), started(1), retried(1), leased(ledger, 1, 2)])
    ledger.commit([started(1, 2)])
    (outcome,) = ledger.commit([granted(1, attempt=1)])
    assert outcome.refused == "stale_token"
    assert ledger.status_of(1) is JobStatus.RUNNING


def replacing(job_id: int, seq: int) -> object:
    return output(
        job_id,
        key=f"v{seq} of job {job_id}",
        slice_name="s",
        mode=SinkMode.REPLACE,
        order_no=(seq, 7, 0),
    )


def test_replace_refuses_an_older_version(ledger: AnyLedger) -> None:
    insert_jobs(ledger, 3)
    run_to_grant(ledger, 1, replacing(1, 2))
    ledger.commit([completed(1)])
    (older,) = run_to_grant(ledger, 2, replacing(2, 1))
    assert older.refused == "superseded"
    (newer,) = run_to_grant(ledger, 3, replacing(3, 3))
    assert newer.refused == ""


def test_replace_grants_one_job_of_a_slice_at_a_time(ledger: AnyLedger) -> None:
    insert_jobs(ledger, 2)
    run_to_grant(ledger, 1, replacing(1, 1))
    (meanwhile,) = run_to_grant(ledger, 2, replacing(2, 2))
    assert meanwhile.refused == "busy"
    ledger.commit([completed(1)])
    (after,) = ledger.commit([granted(2, replacing(2, 2))])
    assert after.refused == ""


def test_replace_orders_within_one_batch(ledger: AnyLedger) -> None:
    insert_jobs(ledger, 2)
    ledger.commit([leased(ledger, 1), started(1), leased(ledger, 2), started(2)])
    outcomes = ledger.commit([granted(1, replacing(1, 2)), granted(2, replacing(2, 1))])
    assert [o.refused for o in outcomes] == ["", "superseded"]


def test_mode_error_refuses_a_second_result_of_the_slice(ledger: AnyLedger) -> None:
    insert_jobs(ledger, 3)
    first = output(1, slice_name="s", mode=SinkMode.ERROR)
    second = output(2, slice_name="s", mode=SinkMode.ERROR, order_no=(2, 7, 0))
    run_to_grant(ledger, 1, first)
    (refused,) = run_to_grant(ledger, 2, second)
    assert refused.refused == "sink_conflict"
    assert "job 1" in refused.message


def test_an_abandoned_job_frees_its_slice_but_not_its_key(ledger: AnyLedger) -> None:
    insert_jobs(ledger, 3)
    first = output(1, slice_name="s", mode=SinkMode.ERROR)
    run_to_grant(ledger, 1, first)
    ledger.commit([failed(1)])
    (same_key,) = run_to_grant(ledger, 2, first)
    assert same_key.refused == "duplicate_output"
    (other,) = run_to_grant(ledger, 3, output(3, slice_name="s", mode=SinkMode.ERROR))
    assert other.refused == ""


def test_a_new_job_and_its_first_record_share_a_commit(ledger: AnyLedger) -> None:
    (old,) = insert_jobs(ledger, 1)
    job = make_job(
        2,
        version_id=old.version_id,
        location_id=old.location_id,
        rel_path=old.rel_path,
        content_hash=old.content_hash,
        signature=old.signature,
        retry_of=JobId(1),
        generation=1,
        created_us=WALL_US,
    )
    ledger.commit([NewJob(job), leased(ledger, 2)])
    state = ledger.load(10)
    assert [(j.job_id, j.retry_of, j.generation) for j in state.active] == [(2, 1, 1)]
    assert state.next_job_id == 3


def test_a_job_id_cannot_be_taken_twice(ledger: AnyLedger) -> None:
    (job,) = insert_jobs(ledger, 1)
    with pytest.raises(InvariantError, match="job id 1"):
        ledger.commit([NewJob(job)])


def test_health_is_kept_as_it_was_last_written(ledger: AnyLedger) -> None:
    ledger.commit([HealthRecord(Health("b", 1), 1), HealthRecord(Health("a", 5, True, "bad"), 2)])
    ledger.commit([HealthRecord(Health("b", 0), 3)])
    assert ledger.load(0).health == [Health("a", 5, True, "bad"), Health("b", 0)]


def test_an_empty_batch_is_harmless(ledger: AnyLedger) -> None:
    assert ledger.commit([]) == []


def test_recover_on_a_sound_ledger_changes_nothing(ledger: AnyLedger) -> None:
    (job,) = insert_jobs(ledger, 1)
    ledger.recover()
    assert ledger.load(10).queued == [job]
