"""A runner that does nothing at once: for measuring wire, broker and ledger alone.

Chosen by programs (bench/) only; no option of a command leads here.
"""

from casparian_flow.domain.outputs import OutputEntry
from casparian_flow.domain.wiring import TrialOutcome
from casparian_flow.protocol import messages as m
from casparian_worker.mailbox import Mailbox
from casparian_worker.worker_events import (
    Began,
    Ended,
    Published,
    StageListing,
    StartJob,
    TrialNews,
)


class NoopRunner:
    """Ends every job with SUCCESS and without outputs; every trial is passed."""

    def __init__(self, mailbox: Mailbox) -> None:
        self._post = mailbox.post

    def start_job(self, job: StartJob) -> None:
        self._post(Began(job.token))
        self._post(Ended(job.token, m.Conclude(job.token, "SUCCESS")))

    def stop_job(self, token: str) -> None:
        """Every job has ended before it could be stopped."""

    def publish(self, token: str, entries: tuple[OutputEntry, ...]) -> None:
        self._post(Published(token))

    def delete_stages(self, token: str, entries: tuple[OutputEntry, ...]) -> None:
        """There are none."""

    def list_stages(self) -> None:
        self._post(StageListing(()))

    def forget_plugins(self) -> None:
        """None is kept."""

    def start_trial(self, trial: m.Trial) -> None:
        self._post(TrialNews(m.TrialResult(trial.trial_id, TrialOutcome.PASSED)))

    def close(self) -> None:
        """Nothing is open."""
