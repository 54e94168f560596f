"""An operator as a person with a kubeconfig reaches it: `casparian --context NAME`."""

import threading
from collections.abc import Mapping
from functools import partial
from typing import Any, Self

from casparian_flow.domain.clock import Clock, SystemClock
from casparian_flow.domain.errors import ConflictError, NotFoundError
from casparian_flow.domain.scoped_names import split
from casparian_flow.kube import names
from casparian_flow.kube.client import KubeClient, KubeError
from casparian_flow.kube.forward import Forward, dial_pod
from casparian_flow.kube.kinds import APPROVAL, POD
from casparian_flow.protocol.http_types import Approval, ApprovalStatus
from casparian_flow.sentinel.control import ControlClient, remote

MANAGER = "casparian-cli"
USUAL_NAMESPACE = "casparian"
OPERATOR = f"{names.NAME_LABEL}=casparian,{names.COMPONENT_LABEL}=operator"
"""Selects the operator's pod."""
DECIDED_S = 20.0
"""How long the operator may take until a decision is in its ledger."""
POLL_S = 0.3


class ClusterSession:
    """An operator's control plane, and the API server as its caller knows it.

    Attributes:
        control: as over any socket; it takes no decisions.
    """

    def __init__(self, client: KubeClient, control: ControlClient, forward: Forward) -> None:
        self.client = client
        self.control = control
        self._forward = forward

    @classmethod
    def open(cls, context: str, namespace: str = "") -> Self:
        """Find the operator and connect to it.

        Args:
            context: of the kubeconfig.
            namespace: the operator's; "" looks into the context's own and `casparian`.

        Raises:
            ConfigError: there is no such context.
            NotFoundError: no operator runs there.
            KubeError: the API server refuses or is away.
            SentinelUnreachableError: the operator's Sentinel does not answer.
        """
        found = KubeClient.connect(context=context)
        client = KubeClient(found.configuration, reporter=MANAGER)
        own = KubeClient.namespace_of(context)
        namespaces = [namespace] if namespace else list(dict.fromkeys([own, USUAL_NAMESPACE]))
        place, pod = operator_pod(client, namespaces)
        forward = Forward(partial(dial_pod, client, place, pod, names.LOOPBACK_PORT))
        control = remote(forward.address)
        try:
            control.ping()
        except BaseException:
            control.close()
            forward.close()
            raise
        return cls(client, control, forward)

    def close(self) -> None:
        self.control.close()
        self._forward.close()
        self.client.close()


def operator_pod(client: KubeClient, namespaces: list[str]) -> tuple[str, str]:
    """Namespace and name of the operator's pod, of the first namespace that has one.

    Raises:
        NotFoundError: none does.
        KubeError: none may be looked into.
    """
    refusal: KubeError | None = None
    for namespace in namespaces:
        try:
            pods = client.list(POD, namespace, selector=OPERATOR)
        except KubeError as error:
            refusal = error
            continue
        for pod in pods:
            if pod.get("status", {}).get("phase") == "Running":
                return namespace, pod["metadata"]["name"]
    if refusal is not None:
        raise refusal
    raise NotFoundError(
        f"no operator runs in {' or '.join(namespaces)}",
        hint="Say where it is: CASPARIAN_OPERATOR__NAMESPACE=NAMESPACE casparian --context …",
    )


def decide(
    client: KubeClient,
    control: ControlClient,
    approval: Approval,
    *,
    reason: str | None,
    reject: bool,
    clock: Clock | None = None,
) -> Approval:
    """Write a decision into a request's Approval object, as the caller of the API server.

    Args:
        control: where the request is; it is asked until it knows of the decision.

    Returns:
        The request afterwards.

    Raises:
        ConflictError: the ledger has not taken the decision in time.
        KubeError: the API server refuses it; its message says why.
    """
    namespace, name = object_of(approval)
    decision: Mapping[str, Any] = {"decision": "rejected" if reject else "approved"}
    patch = {"spec": {**decision, **({"reason": reason} if reason else {})}}
    client.merge(APPROVAL, namespace, name, patch)
    clock = clock or SystemClock()
    deadline = clock.now().mono + DECIDED_S
    while clock.now().mono < deadline:
        after = control.api.get_approval(approval.approval_id)
        if after is not None and after.status is not ApprovalStatus.PENDING:
            return after
        threading.Event().wait(POLL_S)
    raise ConflictError(
        f"the decision stands in the Approval {namespace}/{name}, but not in the ledger",
        hint=f"'kubectl describe approval {name} -n {namespace}' tells more.",
    )


def object_of(approval: Approval) -> tuple[str, str]:
    """Namespace and name of a request's Approval object.

    Raises:
        NotFoundError: the plugin belongs to no namespace, so there is none.
    """
    namespace, plugin = split(str(getattr(approval.operation, "plugin_name", "")))
    if not namespace:
        raise NotFoundError(
            f"request {approval.approval_id} is about no namespace's plugin and has no object",
            hint="Decide it in the operator's pod, with 'casparian mcp approve'.",
        )
    kind = approval.operation.operation_type
    return namespace, names.approval_name(kind, plugin, approval.approval_id)
