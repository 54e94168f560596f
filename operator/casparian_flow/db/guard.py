"""The ledger's own check of the transition table: the status of every job, one byte each.

Job ids are dense, so an array indexed by id answers "may this job make this move?" without a
query: 1 MB for a million jobs. It always shows what the committed journal says, also while the
queue table lags behind it.
"""

from collections.abc import Callable

from casparian_flow.domain.errors import InvalidTransitionError, InvariantError
from casparian_flow.domain.jobs import TRANSITIONS, JobStatus

_STATUSES = tuple(JobStatus)
CODE: dict[JobStatus, int] = {status: i for i, status in enumerate(_STATUSES, 1)}
"""0 is no job."""
_ALLOWED: tuple[frozenset[int], ...] = (
    frozenset(),
    *(frozenset(CODE[finish] for finish in TRANSITIONS[start]) for start in _STATUSES),
)
_GROWTH = 65_536


class StatusMap:
    """Statuses by job id, with moves that can be undone until they are committed."""

    def __init__(self) -> None:
        self._codes = bytearray(_GROWTH)
        self._undo: list[tuple[int, int]] = []
        self._added: list[range] = []

    def get(self, job_id: int) -> JobStatus | None:
        """None for a job that does not exist."""
        code = self._codes[job_id] if 0 < job_id < len(self._codes) else 0
        return _STATUSES[code - 1] if code else None

    def fill(self, first_id: int, codes: bytes) -> None:
        """Take over the codes of consecutive ids as committed facts."""
        if codes:
            self._reach(first_id + len(codes) - 1)
            self._codes[first_id : first_id + len(codes)] = codes

    def add(self, job_id: int, status: JobStatus) -> None:
        """A new job.

        Raises:
            InvariantError: the id is taken.
        """
        if self.get(job_id) is not None:
            raise InvariantError(f"job id {job_id} is already in the ledger")
        self._reach(job_id)
        self._set(job_id, CODE[status])

    def add_all(self, ids: range, status: JobStatus) -> None:
        """New jobs with consecutive ids, none of them taken.

        Raises:
            InvariantError: an id is taken.
        """
        if not ids:
            return
        self._reach(ids.stop - 1)
        if any(self._codes[ids.start : ids.stop]):
            raise InvariantError(f"a job id from {ids.start} to {ids.stop - 1} is taken")
        self._codes[ids.start : ids.stop] = bytes((CODE[status],)) * len(ids)
        self._added.append(ids)

    def move(self, job_id: int, finish: JobStatus, history: Callable[[int], list[str]]) -> None:
        """Move a job.

        Args:
            history: asked for the job's story if the move is illegal.

        Raises:
            InvalidTransitionError: the table does not allow it, or there is no such job.
        """
        start = self._codes[job_id] if 0 < job_id < len(self._codes) else 0
        code = CODE[finish]
        if code not in _ALLOWED[start]:
            name = _STATUSES[start - 1].value if start else "(no such job)"
            raise InvalidTransitionError(job_id, name, finish, history(job_id))
        self._set(job_id, code)

    def commit(self) -> None:
        """The moves since the last commit stand."""
        self._undo.clear()
        self._added.clear()

    def rollback(self) -> None:
        """Forget the moves since the last commit."""
        for ids in self._added:
            self._codes[ids.start : ids.stop] = bytes(len(ids))
        self._added.clear()
        for job_id, code in reversed(self._undo):
            self._codes[job_id] = code
        self._undo.clear()

    def _set(self, job_id: int, code: int) -> None:
        self._undo.append((job_id, self._codes[job_id]))
        self._codes[job_id] = code

    def _reach(self, job_id: int) -> None:
        missing = job_id + 1 - len(self._codes)
        if missing > 0:
            self._codes.extend(bytes(max(missing, len(self._codes), _GROWTH)))
