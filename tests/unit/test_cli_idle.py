"""When a run with --exit-when-idle may end."""

import pytest

from casparian_flow.cli.idle import PATIENCE_SCANS, IdleJudge
from casparian_flow.domain.jobs import JobStatus


def test_nothing_is_idle_before_every_root_was_scanned() -> None:
    judge = IdleJudge()
    judge.scanned(1, 0, at=1.0)
    assert not judge.idle([1, 2], {}, at=2.0)
    judge.scanned(2, 0, at=3.0)
    assert judge.idle([1, 2], {}, at=4.0)


def test_counts_that_are_older_than_the_last_scan_prove_nothing() -> None:
    judge = IdleJudge()
    judge.scanned(1, 0, at=5.0)
    assert not judge.idle([1], {}, at=4.9)
    assert judge.idle([1], {}, at=5.1)


@pytest.mark.parametrize("status", ["QUEUED", "DISPATCHING", "RUNNING", "STAGED"])
def test_a_job_with_something_ahead_of_it_keeps_the_run_alive(status: str) -> None:
    judge = IdleJudge()
    judge.scanned(1, 0, at=1.0)
    assert not judge.idle([1], {status: 1}, at=2.0)


def test_ended_jobs_do_not_keep_the_run_alive() -> None:
    judge = IdleJudge()
    judge.scanned(1, 0, at=1.0)
    counts = {s.value: 3 for s in (JobStatus.COMPLETED, JobStatus.FAILED, JobStatus.ABORTED)}
    assert judge.idle([1], counts, at=2.0)


def test_a_file_still_being_written_is_waited_for_but_not_for_ever() -> None:
    judge = IdleJudge()
    judge.scanned(1, 2, at=1.0)
    assert not judge.idle([1], {}, at=2.0)
    judge.scanned(1, 0, at=3.0)
    assert judge.idle([1], {}, at=4.0)
    for scan in range(PATIENCE_SCANS):
        judge.scanned(1, 1, at=5.0 + scan)
    assert judge.idle([1], {}, at=100.0)


def test_a_skipped_job_asks_for_another_scan_since_its_file_may_have_changed() -> None:
    judge = IdleJudge()
    judge.counted({"SKIPPED": 4}, at=0.5)
    judge.scanned(1, 0, at=1.0)
    judge.counted({"SKIPPED": 4}, at=2.0)
    assert judge.idle([1], {"SKIPPED": 4}, at=2.0)
    judge.counted({"SKIPPED": 5}, at=3.0)
    assert not judge.idle([1], {"SKIPPED": 5}, at=3.0)
    judge.scanned(1, 0, at=4.0)
    assert judge.idle([1], {"SKIPPED": 5}, at=5.0)


def test_without_any_root_there_is_nothing_to_wait_for() -> None:
    assert IdleJudge().idle([], {}, at=1.0)
