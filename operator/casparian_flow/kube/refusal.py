"""What an object's status says where the API server refuses something that it needs. Pure.

What people may write into an object cannot all be judged beforehand: an affinity or resources that
Kubernetes does not take, a quota. That is for the object's own conditions to tell.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from casparian_flow.kube.client import KubeError, KubeUnreachableError
from casparian_flow.kube.kinds import Body
from casparian_flow.kube.plan import Condition, Plan, no, told, written
from casparian_flow.kube.reasons import ConditionType, DeployedReason, ReadyReason

_PASSING: Final = frozenset({401, 409})
"""Somebody else wrote at the same time, or a token has just expired."""


def is_final(error: KubeError) -> bool:
    """Whether the same request would be refused again, so that people have to change something."""
    return not isinstance(error, KubeUnreachableError) and error.status not in _PASSING


def refused(plan: Plan, body: Body, error: KubeError, *, at: str) -> Plan:
    """The plan with a status that says what the API server has refused.

    Args:
        at: this moment, RFC 3339.
    """
    if plan.status is None:
        return plan
    rows: Sequence[dict[str, str]] = plan.status.get("conditions", ())
    given = {ConditionType(row["type"]): row for row in rows}
    conditions = [
        Condition(kind, row["status"], row["reason"], row["message"])  # type: ignore[arg-type]
        for kind, row in given.items()
    ]
    message = f"the API server refuses an object of it: {error}"
    if ConditionType.DEPLOYED in given:
        instead = {
            ConditionType.DEPLOYED: no(
                ConditionType.DEPLOYED, DeployedReason.OBJECT_REFUSED, message
            ),
            ConditionType.READY: no(ConditionType.READY, ReadyReason.NOT_DEPLOYED, message),
        }
    else:
        ready = no(ConditionType.READY, ReadyReason.OBJECT_REFUSED, message)
        instead = {ConditionType.READY: ready}
    conditions = [instead.get(c.type, c) for c in conditions]
    return replace(
        plan,
        status={**plan.status, "conditions": written(conditions, body, at=at)},
        notes=told(conditions, body, ConditionType.READY),
    )
