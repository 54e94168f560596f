"""What principals of other machines may ask of the control plane: what their work needs.

scout     its own source root: scans, inventory, and what is to be looked at again
backup    copies of the ledger
mcp       looking, and asking: whatever writes rows waits for a person, who decides elsewhere
worker    nothing; it has a socket of its own
"""

from typing import Any, Final

from casparian_flow.db import sources
from casparian_flow.domain.errors import NotFoundError, NotPermittedError
from casparian_flow.protocol.http_types import HttpJobType
from casparian_flow.sentinel.admission import Principal
from casparian_flow.sentinel.caller import Caller
from casparian_flow.sentinel.control_codec import Operation
from casparian_flow.sentinel.control_plane import ControlPlane

_COPIES: Final = frozenset({"snapshot", "snapshot_part", "remove_snapshot"})
_OF_ONE_ROOT: Final = frozenset(
    {"begin_scan", "inventory", "commit_chunk", "finish_scan", "next_rescans"}
)
MAY: Final[dict[str, frozenset[str]]] = {
    "worker": frozenset({"ping"}),
    "scout": _OF_ONE_ROOT | {"ping", "list_sources"},
    "backup": _COPIES | {"ping"},
    "mcp": _COPIES
    | {
        "ping", "status", "list_plugins", "list_topics", "list_sources", "api.get_job",
        "api.list_jobs", "api.next_event_id", "api.list_events", "api.wait_events",
        "api.start_job", "api.cancel_job", "api.get_approval", "api.list_approvals",
        "api.request_run",
    },
}  # fmt: skip
"""By kind of principal."""


class RemoteCalls:
    """Carries out what a principal may ask, and refuses the rest.

    Args:
        plane: carries it out.
    """

    def __init__(self, plane: ControlPlane) -> None:
        self._plane = plane

    def carry_out(self, operation: Operation, arguments: dict[str, Any], caller: Caller) -> object:
        """As `ControlPlane.carry_out`.

        Raises:
            NotPermittedError: it is not for this principal.
            NotFoundError: a Scout's source root is not there (any more).
        """
        principal = caller.principal
        if principal is None or operation.name not in MAY[principal.kind]:
            raise NotPermittedError(
                f"{operation.name} is not for {principal or 'a stranger'}",
                hint="People use 'casparian --context', which reaches the Sentinel by Kubernetes' "
                "own permissions.",
            )
        if principal.kind == "scout":
            return self._of_root(principal, operation, arguments, caller)
        if operation.name == "api.start_job" and arguments["job_type"] == HttpJobType.RUN:
            raise NotPermittedError(
                "a run needs a person's approval", hint="Ask for one with request_run."
            )
        return self._plane.carry_out(operation, arguments, caller)

    def _of_root(
        self, principal: Principal, operation: Operation, arguments: dict[str, Any], caller: Caller
    ) -> object:
        if operation.name == "list_sources":
            rows = self._plane.list_sources()
            return [row for row in rows if row["active"] and row["name"] == principal.root]
        if operation.name not in _OF_ONE_ROOT:
            return self._plane.carry_out(operation, arguments, caller)
        own = self._plane.on_ledger(
            lambda ledger: ledger.read(lambda c: sources.root_id_of(c, principal.root))
        )
        if own is None:
            raise NotFoundError(f"there is no source root {principal.root} (any more)")
        if operation.name == "next_rescans":
            arguments = arguments | {"root_id": own}
        elif arguments["root_id"] != own:
            raise NotPermittedError(f"source root {arguments['root_id']} is not {principal.root}")
        return self._plane.carry_out(operation, arguments, caller)
