"""One line for each call, in a file that only its owner reads.

A call whose line cannot be written is not answered: without a record nothing is handed out.
"""

import json
import os
import stat
from pathlib import Path
from typing import Any, Final

from casparian_flow.domain.errors import CasparianError

LINE_BYTES_MAX: Final = 16_384
_OPEN: Final = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class AuditError(CasparianError):
    """The audit log cannot be written."""


class AuditLog:
    """Appends to a file of lines of JSON; it is opened anew for each, so that it may be moved.

    Args:
        path: made with mode 0600 where there is none; its folder must exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def require(self) -> None:
        """Raises:
        AuditError: a line could not be written now.
        """
        os.close(self._open())

    def write(self, record: dict[str, Any]) -> None:
        """Append one line; arguments that would make it too long are cut.

        Raises:
            AuditError: it is not written.
        """
        line = _line(record)
        if len(line) > LINE_BYTES_MAX:
            arguments = json.dumps(record.get("arguments"), default=str)
            line = _line(record | {"arguments": arguments[: LINE_BYTES_MAX // 8], "cut": True})
        descriptor = self._open()
        try:
            if os.write(descriptor, line) != len(line):
                raise AuditError(f"the audit log {self.path} took a part of a line only")
        except OSError as error:
            raise self._unwritable(error) from error
        finally:
            os.close(descriptor)

    def _open(self) -> int:
        try:
            descriptor = os.open(self.path, _OPEN, 0o600)
        except OSError as error:
            raise self._unwritable(error) from error
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_mode & 0o077:
            os.close(descriptor)
            raise AuditError(
                f"the audit log {self.path} is no file that only its owner may read",
                hint=f"Move it away, or run: chmod 600 {self.path}",
            )
        return descriptor

    def _unwritable(self, error: OSError) -> AuditError:
        return AuditError(
            f"the audit log {self.path} cannot be written: {error.strerror}",
            hint="Make room, or name another file as [mcp] audit_log.",
        )


def _line(record: dict[str, Any]) -> bytes:
    # ASCII: whatever a client sends, a line stays a line.
    return json.dumps(record, default=str).encode("ascii") + b"\n"
