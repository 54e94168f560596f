"""What an object's status says where the API server or the ledger refuses what it needs. Pure.

What people may write into an object cannot all be judged beforehand: an affinity or resources that
Kubernetes does not take, a quota, a pattern. That is for the object's own conditions to tell.
"""

from dataclasses import replace
from enum import Enum
from typing import Any, Final

from casparian_flow.kube.client import KubeError, KubeUnreachableError
from casparian_flow.kube.kinds import Body
from casparian_flow.kube.plan import Condition, Plan, no, told, written
from casparian_flow.kube.reasons import (
    ConditionType,
    DecidedReason,
    DeployedReason,
    ReadyReason,
)

_PASSING: Final = frozenset({401, 409})
"""Somebody else wrote at the same time, or a token has just expired."""


class Refuser(Enum):
    """Who refuses, with its reasons for Deployed and Ready."""

    API_SERVER = DeployedReason.OBJECT_REFUSED, ReadyReason.OBJECT_REFUSED
    LEDGER = DeployedReason.LEDGER_REFUSED, ReadyReason.LEDGER_REFUSED


def is_final(error: KubeError) -> bool:
    """Whether the same request would be refused again, so that people have to change something."""
    return not isinstance(error, KubeUnreachableError) and error.status not in _PASSING


def refused(plan: Plan, body: Body, who: Refuser, message: str, *, at: str) -> Plan:
    """The plan with a status, and an Event if that is news, that say what was refused.

    Args:
        at: this moment, RFC 3339.
    """
    if plan.status is None:
        return plan
    given = {ConditionType(row["type"]): row for row in plan.status.get("conditions", ())}
    instead = {c.type: c for c in _instead(given, who, message)}
    conditions = [instead.get(kind) or _read(kind, row) for kind, row in given.items()]
    return replace(
        plan,
        status={**plan.status, "conditions": written(conditions, body, at=at)},
        notes=told(conditions, body, ConditionType.READY),
    )


def _instead(given: dict[ConditionType, Any], who: Refuser, message: str) -> list[Condition]:
    deployed, ready = who.value
    if ConditionType.DEPLOYED in given:
        return [
            no(ConditionType.DEPLOYED, deployed, message),
            no(ConditionType.READY, ReadyReason.NOT_DEPLOYED, message),
        ]
    if ConditionType.READY in given:
        return [no(ConditionType.READY, ready, message)]
    return [no(ConditionType.DECIDED, DecidedReason.LEDGER_REFUSED, message)]


def _read(kind: ConditionType, row: dict[str, Any]) -> Condition:
    return Condition(kind, row["status"], row["reason"], row["message"])
