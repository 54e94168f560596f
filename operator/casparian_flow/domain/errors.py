"""Errors that people meet. Each says what happened; `hint` says what to do next."""

from collections.abc import Mapping, Sequence


class CasparianError(Exception):
    """Base of all errors with a message meant for people.

    Attributes:
        hint: one sentence that tells the reader what to do next; empty if nothing can be done.
        exit_code: what a command ends with when this error stops it.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint

    def with_hint(self) -> str:
        """Message and hint in one line.

        >>> CasparianError("the disk is full", hint="Make room.").with_hint()
        'the disk is full. Make room.'
        """
        end = "" if not self.hint or str(self).endswith((".", "!", "?", ":")) else "."
        return f"{self}{end} {self.hint}".rstrip()


class UsageError(CasparianError):
    """The request itself is wrong; repeating it cannot help."""

    exit_code = 2


class ConfigError(UsageError):
    """The configuration file cannot be used as it is."""


class NotFoundError(CasparianError):
    """Nothing by that name or id is in the ledger."""

    exit_code = 4


class ConflictError(CasparianError):
    """What was asked contradicts what is already recorded."""

    exit_code = 5


class NotPermittedError(CasparianError):
    """Who asks may not do this; somebody else may."""

    exit_code = 9


class LedgerError(CasparianError):
    """The ledger cannot be used; nothing was overwritten."""

    exit_code = 6


class LedgerLockedError(LedgerError):
    """Another process has the ledger open."""


class LedgerCorruptError(LedgerError):
    """The ledger's file or its write-ahead log is damaged, or older than what was acknowledged."""


class LedgerUnavailableError(LedgerError):
    """The ledger cannot do this now (no space, I/O error, busy); later it may."""


class CommitFailedError(LedgerUnavailableError):
    """A commit failed (disk full, read-only, I/O error); its outcome is not acknowledged."""


class SchemaMismatchError(LedgerError):
    """The ledger was made by another version: export it there, import it here."""


class SentinelUnreachableError(CasparianError):
    """No Sentinel answers on the control socket."""

    exit_code = 7


class ProtocolError(CasparianError):
    """A frame or message breaks the grammar of docs/protocol.md."""


class SinkError(CasparianError):
    """A sink refused or failed.

    Attributes:
        transient: whether the same call may succeed later.
    """

    def __init__(self, message: str, *, hint: str = "", transient: bool = False) -> None:
        super().__init__(message, hint=hint)
        self.transient = transient


class SinkConflictError(SinkError):
    """The target holds something else under this output's name; publishing would overwrite it."""


class DiskFullError(SinkError):
    """No space (or quota, or file size) is left where an output goes."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message, hint=hint, transient=True)


class OutputLostError(SinkError):
    """Neither the stage nor the published data of a granted output is there any more."""


class OutputRefusedError(CasparianError):
    """What a plugin published cannot become an output; the same bytes will be refused again.

    Attributes:
        reason: a domain.failures.Reason value.
        diagnostics: JSON-able details for machines.
    """

    def __init__(
        self,
        message: str,
        *,
        reason: str,
        hint: str = "",
        diagnostics: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.reason = reason
        self.diagnostics = dict(diagnostics or {})


class InvalidTransitionError(RuntimeError):
    """A job was asked to make a move that its state does not allow: a bug, with its history."""

    def __init__(self, job_id: int, start: str, finish: str, history: Sequence[str] = ()) -> None:
        story = "".join(f"\n  {line}" for line in history)
        super().__init__(f"job {job_id}: {start} -> {finish} is not a legal move{story}")
        self.job_id = job_id
        self.start = start
        self.finish = finish
        self.history = tuple(history)


class InvariantError(RuntimeError):
    """A rule of the system does not hold: a bug. Kept alive under `python -O`."""


def require(condition: object, message: str) -> None:
    """Raise InvariantError unless `condition` holds.

    Raises:
        InvariantError: with `message`.
    """
    if not condition:
        raise InvariantError(message)
