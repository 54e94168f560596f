"""What the sinks into database files (SQLite, DuckDB) share: paths, stages, the ledger's safety."""

import os
from collections.abc import Set as AbstractSet

from casparian_flow.domain.errors import SinkError, require
from casparian_flow.domain.outputs import OutputEntry, SinkAddress
from casparian_worker.sinks.base import SinkEnvironment, stage_name
from casparian_worker.sinks.durable import sink_error, unlink_if_present
from casparian_worker.sinks.files import delete_stage_files, list_stage_files
from casparian_worker.sinks.root import STAGE_FOLDER


class EmbeddedSink:
    """Base of both: the database is a file, stages lie in the output root.

    Rows are copied into the database, not linked, so the stage need not share its file system;
    one staging folder for all sinks keeps finding garbage a matter of one directory.
    """

    def __init__(self, address: SinkAddress, env: SinkEnvironment) -> None:
        self._address = address
        self._env = env
        self._root = env.root

    @property
    def address(self) -> SinkAddress:
        return self._address

    def unstage(self, entry: OutputEntry, token: str) -> None:
        if not entry.rows:
            return
        path = self._stage_path(entry, token)
        try:
            unlink_if_present(path)
        except OSError as error:
            raise sink_error(error, "delete", path) from error
        self._root.directories.sync(self._root.stage_folder)

    def list_stages(self) -> AbstractSet[str]:
        return list_stage_files(self._root)

    def delete_stages(self, tokens: AbstractSet[str]) -> int:
        return delete_stage_files(self._root, tokens)

    def database_path(self) -> str:
        """Absolute path of the database; its folder exists afterwards.

        Raises:
            SinkError: it leaves the output root, cannot be made, or is the ledger.
        """
        path = self._address.path
        if path.startswith("/"):
            self._make_folder(os.path.dirname(path))
        else:
            self._root.folder(os.path.dirname(path))
            path = self._root.resolve(path)
        self._refuse_ledger(path)
        return path

    def _make_folder(self, folder: str) -> None:
        """Make a folder outside of the output root, durably, with those above it."""
        missing = []
        while not os.path.isdir(folder):
            missing.append(folder)
            folder = os.path.dirname(folder)
        for path in reversed(missing):
            try:
                os.makedirs(path, exist_ok=True)  # another worker may make it, too
            except OSError as error:
                raise sink_error(error, "make the folder", path) from error
            self._root.directories.sync(os.path.dirname(path))

    def _refuse_ledger(self, path: str) -> None:
        ledger = self._env.ledger_path
        same = bool(ledger) and (
            os.path.realpath(path) == os.path.realpath(ledger)
            or (os.path.exists(path) and os.path.exists(ledger) and os.path.samefile(path, ledger))
        )
        if same:
            raise SinkError(
                f"{path} is Casparian's own ledger; no topic may be written into it",
                hint="Give the sink URI another database file.",
            )

    def _stage_path(self, entry: OutputEntry, token: str) -> str:
        """Where the entry's stage is; insists that the manifest says the same."""
        if entry.root_id != self._root.root_id:
            raise SinkError(
                f"output {entry.output_key[:12]} was staged under output root {entry.root_id}, "
                f"this is {self._root.root_id}",
                hint="Start a worker with that output folder.",
            )
        expected = f"{STAGE_FOLDER}/{stage_name(token, entry.n)}"
        require(entry.stage == expected, f"manifest names stage {entry.stage!r}, not {expected!r}")
        return self._root.resolve(entry.stage)
