"""The API's calls as they come over the control socket: who decides, and how one waits.

A decision counts as that of the user whom the kernel names; over a socket where nobody is named
there is none. Requests about the plugins of a namespace, which there are on Kubernetes only, are
decided on their Approval object, where the API server judges who may, and by no call. A call that
waits for news holds no thread: it is answered later.
"""

from typing import Any, Final

from casparian_flow.db.api_storage import ApiStorage
from casparian_flow.domain.errors import NotPermittedError
from casparian_flow.domain.scoped_names import namespace_of
from casparian_flow.sentinel.caller import Caller
from casparian_flow.sentinel.control_codec import API_PREFIX

QUIET: Final = frozenset(
    API_PREFIX + name
    for name in (
        "init_schema", "get_job", "list_jobs", "update_job_progress", "next_event_id",
        "insert_event", "insert_events", "list_events", "wait_events", "get_approval",
        "list_approvals", "expire_approvals",
    )
)  # fmt: skip
"""Calls that change nothing, or come in great numbers; not logged."""
REQUESTS: Final = frozenset({"create_approval", "request_run"})
LATER: Final = {"wait_events": "events_later", "insert_event": "insert_later"}
"""Calls that would hold one of few threads for long or very often, and how they do without."""
PROMPT: Final = frozenset(API_PREFIX + name for name in LATER)
"""Calls that come back at once, with a future."""
DECISIONS: Final = frozenset({"approve", "reject"})


def carry_out(
    storage: ApiStorage, method: str, arguments: dict[str, Any], caller: Caller
) -> object:
    """One call by its name.

    Returns:
        The result, or a future of it for a call that waits.

    Raises:
        NotPermittedError: a decision by nobody, or one that is to be made elsewhere.
    """
    if method in DECISIONS:
        _require_decided_here(storage, arguments)
        arguments = arguments | {"decided_by": _decider(caller)}
    elif method in REQUESTS and arguments.get("requester") is None:
        arguments = arguments | {"requester": caller.user}
    elif method in LATER:
        return getattr(storage, LATER[method])(**arguments)
    return getattr(storage, method)(**arguments)


def _require_decided_here(storage: ApiStorage, arguments: dict[str, Any]) -> None:
    approval = storage.get_approval(arguments["approval_id"])
    namespace = namespace_of(getattr(approval and approval.operation, "plugin_name", ""))
    if namespace:
        raise NotPermittedError(
            f"this request is decided on its Approval object in the namespace {namespace}",
            hint=f"'kubectl get approvals -n {namespace}' lists them; then 'kubectl patch approval "
            f"NAME -n {namespace} --type=merge -p "
            '{"spec":{"decision":"approved"}}\'.',
        )


def _decider(caller: Caller) -> str:
    if caller.user is None:
        raise NotPermittedError(
            "nobody vouches for who decides over this socket",
            hint="Decide on the Sentinel's machine, over its ipc control socket.",
        )
    return caller.user
