"""When `casparian start --exit-when-idle` may end: everything seen, nothing left to do. Pure."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from casparian_flow.domain.jobs import JobStatus

ACTIVE = (JobStatus.QUEUED, JobStatus.DISPATCHING, JobStatus.RUNNING, JobStatus.STAGED)
PATIENCE_SCANS = 5
"""Scans after which a file that never stands still no longer keeps the run alive."""


def active(counts: dict[str, int]) -> int:
    """Jobs that still have something ahead of them."""
    return sum(counts.get(status.value, 0) for status in ACTIVE)


@dataclass
class IdleJudge:
    """Collects scans and counts; times are seconds on one monotonic clock."""

    _scans: dict[int, int] = field(default_factory=dict)
    _unsettled: dict[int, int] = field(default_factory=dict)
    _last_scan: float = 0.0
    _skipped: int = 0
    _rescan_after: float = -1.0

    def scanned(self, root_id: int, unsettled: int, at: float) -> None:
        """A scan of a root has ended, and its jobs are in the ledger."""
        self._scans[root_id] = self._scans.get(root_id, 0) + 1
        self._unsettled[root_id] = unsettled
        self._last_scan = at

    def counted(self, counts: dict[str, int], at: float) -> None:
        """Counts of jobs by status, asked for at `at`.

        A skipped job may mean that its file changed meanwhile: another scan has to look.
        """
        skipped = counts.get(JobStatus.SKIPPED.value, 0)
        if skipped > self._skipped and self._scans:
            self._rescan_after = at
        self._skipped = skipped

    def idle(self, roots: Iterable[int], counts: dict[str, int], at: float) -> bool:
        """Whether nothing is left to do for these roots, by counts asked for at `at`."""
        seen = all(
            self._scans.get(root, 0) >= 1
            and (not self._unsettled.get(root) or self._scans[root] >= PATIENCE_SCANS)
            for root in roots
        )
        fresh = at > self._last_scan >= self._rescan_after
        return seen and fresh and active(counts) == 0
