"""Identifiers with types of their own, and the fencing token made from them."""

from typing import NamedTuple, NewType

JobId = NewType("JobId", int)
"""Positive, unique within one ledger, never reused."""
RootId = NewType("RootId", int)
LocationId = NewType("LocationId", int)
VersionId = NewType("VersionId", int)
ManifestId = NewType("ManifestId", int)
"""Row id of a deployed plugin version; grows with every deploy, so it orders deploys too."""
Identity = NewType("Identity", bytes)
"""ZeroMQ routing id of one worker process."""
Token = NewType("Token", str)
"""Fencing token of one attempt: see `fencing_token`."""


class TokenParts(NamedTuple):
    ledger_id: str
    epoch: int
    job_id: JobId
    attempt: int


def fencing_token(ledger_id: str, epoch: int, job_id: int, attempt: int) -> Token:
    """Name one attempt of one job, uniquely across ledgers and Sentinel restarts.

    A token is stale if and only if it is not the job's token in the ledger; the epoch only
    keeps two Sentinels from ever making the same one.

    >>> fencing_token("7f3ac91e", 4, 1042, 2)
    '7f3ac91e-4-1042-2'
    """
    return Token(f"{ledger_id}-{epoch}-{job_id}-{attempt}")


def parse_token(token: str) -> TokenParts | None:
    """Read a token back; None for text that no Sentinel could have made.

    >>> parse_token("7f3ac91e-4-1042-2")
    TokenParts(ledger_id='7f3ac91e', epoch=4, job_id=1042, attempt=2)
    >>> parse_token("../../etc/passwd") is None
    True
    """
    parts = token.split("-")
    if len(parts) != 4 or not parts[0].isalnum() or not parts[0].isascii():
        return None
    numbers = parts[1:]
    if not all(n.isascii() and n.isdigit() and len(n) < 20 for n in numbers):
        return None
    epoch, job_id, attempt = (int(n) for n in numbers)
    return TokenParts(parts[0], epoch, JobId(job_id), attempt)
