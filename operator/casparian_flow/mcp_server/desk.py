"""The way to the control plane, for one call at a time, on behalf of one caller.

Each call connects anew: to the Sentinel that runs now, or, if none does, to the ledger opened in
this process and closed again afterwards. A server that kept the ledger open would keep everybody
else out of it, first of all the person who is to approve what was asked for.
"""

import copy
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Self

from casparian_flow.config import Settings
from casparian_flow.domain.clock import Clock
from casparian_flow.domain.errors import LedgerError, NotFoundError
from casparian_flow.domain.paths import text_to_path
from casparian_flow.mcp_server.allow_list import AllowList
from casparian_flow.mcp_server.query import QueryLimits
from casparian_flow.mcp_server.redaction import RedactionMode, Redactor, stricter
from casparian_flow.sentinel.caller import user_name
from casparian_flow.sentinel.control import ControlClient
from casparian_flow.services.backup import COPY_NAME, fetch_copy

Connector = Callable[[Settings], ControlClient]


class Desk:
    """What tools work with.

    Args:
        connector: how the control plane is reached.

    Attributes:
        caller: in whose name requests are made; by default this process's user.
        elsewhere: whether the Sentinel is on another machine, with ledger and files.
    """

    def __init__(self, settings: Settings, connector: Connector, clock: Clock) -> None:
        self.settings = settings
        self.clock = clock
        self._connector = connector
        self._key = os.urandom(32)
        # One ledger is opened at most once in a process.
        self._turn = threading.Lock()
        self.caller = user_name(os.geteuid())
        address = settings.sentinel.control_address
        self.elsewhere = settings.wire.curve_dir is not None and address.startswith("tcp://")

    def on_behalf_of(self, caller: str) -> Self:
        """The same desk, for somebody else."""
        other = copy.copy(self)
        other.caller = caller
        return other

    @contextmanager
    def control(self) -> Iterator[ControlClient]:
        """The control plane, while the block runs; keep it short, others wait.

        Raises:
            NotFoundError: there is no ledger; none is made by a client's call.
            LedgerError: the ledger cannot be used.
        """
        location = self.settings.database.db_location
        if not self.settings.sentinel.control_address and not location.exists():
            raise NotFoundError(
                f"there is no ledger {location} yet",
                hint="A person makes it: casparian source add FOLDER, then casparian start.",
            )
        turn = nullcontext() if self.elsewhere else self._turn
        with turn, self._connector(self.settings) as control:
            yield control

    def allowed(self, control: ControlClient) -> AllowList:
        """The configured folders, by default the active source roots."""
        configured = self.settings.mcp.allowed_paths
        if configured:
            return AllowList(configured)
        rows = control.list_sources()
        return AllowList(text_to_path(str(row["path"])) for row in rows if row["active"])

    @contextmanager
    def folder(self, control: ControlClient, text: str) -> Iterator[str]:
        """A folder in reach, by its path, while the block runs: as `AllowList.open`.

        Of files elsewhere the ledger knows what Scouts have found, and a path counts as it is
        spelled: nothing is opened here.

        Raises:
            UsageError: it is not in reach.
        """
        allowed = self.allowed(control)
        if self.elsewhere:
            yield allowed.named(text)
            return
        with allowed.open(text) as folder:
            yield folder.path

    def redactor(self, asked: RedactionMode | None) -> Redactor:
        """Raises:
        NotPermittedError: less is asked for than the configuration allows.
        """
        return Redactor(stricter(RedactionMode(self.settings.mcp.redaction), asked), self._key)

    def snapshot(self) -> str:
        """Path of a copy of the ledger, which the caller deletes."""
        with self.control() as control:
            return self._fetched(control) if self.elsewhere else control.snapshot()

    @staticmethod
    def _fetched(control: ControlClient) -> str:
        descriptor, path = tempfile.mkstemp(prefix="casparian-", suffix=f"-{COPY_NAME}")
        os.close(descriptor)
        try:
            fetch_copy(control, Path(path))
        except BaseException as error:
            for left in (Path(path), Path(path + ".wal")):
                left.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise LedgerError(f"no copy of the ledger here: {error.strerror}") from error
            raise
        return path

    def query_limits(self) -> QueryLimits:
        mcp = self.settings.mcp
        root = Path(self.settings.worker.output_root)
        return QueryLimits(mcp.query_timeout_seconds, mcp.query_memory_mb, root)
