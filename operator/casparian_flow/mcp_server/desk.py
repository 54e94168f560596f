"""The way to the control plane, for one call at a time.

Each call connects anew: to the Sentinel that runs now, or, if none does, to the ledger opened in
this process and closed again afterwards. A server that kept the ledger open would keep everybody
else out of it, first of all the person who is to approve what was asked for.
"""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from casparian_flow.config import Settings
from casparian_flow.domain.clock import Clock
from casparian_flow.domain.errors import NotFoundError
from casparian_flow.domain.paths import text_to_path
from casparian_flow.mcp_server.allow_list import AllowList
from casparian_flow.mcp_server.query import QueryLimits
from casparian_flow.mcp_server.redaction import RedactionMode, Redactor, stricter
from casparian_flow.sentinel.control import ControlClient

Connector = Callable[[Settings], ControlClient]


class Desk:
    """What tools work with.

    Args:
        connector: how the control plane is reached.
    """

    def __init__(self, settings: Settings, connector: Connector, clock: Clock) -> None:
        self.settings = settings
        self.clock = clock
        self._connector = connector
        self._key = os.urandom(32)
        # One ledger is opened at most once in a process.
        self._turn = threading.Lock()

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
        with self._turn, self._connector(self.settings) as control:
            yield control

    def allowed(self, control: ControlClient) -> AllowList:
        """The configured folders, by default the active source roots."""
        configured = self.settings.mcp.allowed_paths
        if configured:
            return AllowList(configured)
        rows = control.list_sources()
        return AllowList(text_to_path(str(row["path"])) for row in rows if row["active"])

    def redactor(self, asked: RedactionMode | None) -> Redactor:
        """Raises:
        NotPermittedError: less is asked for than the configuration allows.
        """
        return Redactor(stricter(RedactionMode(self.settings.mcp.redaction), asked), self._key)

    def snapshot(self) -> str:
        """Path of a copy of the ledger, which the caller deletes."""
        with self.control() as control:
            return control.snapshot()

    def query_limits(self) -> QueryLimits:
        mcp = self.settings.mcp
        root = Path(self.settings.worker.output_root)
        return QueryLimits(mcp.query_timeout_seconds, mcp.query_memory_mb, root)
