"""What a decision asks for, and how conditions and status are written. Pure."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal

from casparian_flow.kube.kinds import Body, Manifest, Ref
from casparian_flow.kube.reasons import ConditionType

ConditionStatus = Literal["True", "False", "Unknown"]
MESSAGE_CHARS_MAX = 2_000
"""Of a condition; what a tool says can be long."""


# -- conditions -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Condition:
    """One judgement.

    Attributes:
        reason: for machines, one of kube/reasons.py.
        message: for people: what is so, and what to do about it.
    """

    type: ConditionType
    status: ConditionStatus
    reason: str
    message: str

    @property
    def holds(self) -> bool:
        return self.status == "True"


def yes(type_: ConditionType, reason: str, message: str) -> Condition:
    return Condition(type_, "True", reason, message)


def no(type_: ConditionType, reason: str, message: str) -> Condition:
    return Condition(type_, "False", reason, message)


def unknown(type_: ConditionType, reason: str, message: str) -> Condition:
    return Condition(type_, "Unknown", reason, message)


def written(conditions: Iterable[Condition], before: Body, *, at: str) -> list[dict[str, Any]]:
    """Conditions as a status has them.

    Args:
        before: the object with the status that it has now: where a condition's `status` is as it
            was, so is its time.
        at: the time of the others, RFC 3339.
    """
    old = {c.get("type"): c for c in before.get("status", {}).get("conditions", ())}
    generation = before["metadata"].get("generation", 0)
    rows = []
    for condition in conditions:
        was = old.get(condition.type.value, {})
        same = was.get("status") == condition.status and was.get("lastTransitionTime")
        rows.append(
            {
                "type": condition.type.value,
                "status": condition.status,
                "reason": str(condition.reason),
                "message": shortened(condition.message),
                "observedGeneration": generation,
                "lastTransitionTime": was["lastTransitionTime"] if same else at,
            }
        )
    return rows


def shortened(text: str) -> str:
    """A text of unknown length as a message may hold it; its end is kept, where tools say why."""
    if len(text) <= MESSAGE_CHARS_MAX:
        return text
    return "… " + text[-MESSAGE_CHARS_MAX + 2 :]


# -- what is asked for ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Note:
    """An Event to be recorded once the rest is done."""

    reason: str
    message: str
    warning: bool = False

    @property
    def type(self) -> str:
        return "Warning" if self.warning else "Normal"


@dataclass(frozen=True, slots=True)
class Deploy:
    """Record a bundle in the ledger."""

    bundle: bytes = field(repr=False)
    namespace: str


@dataclass(frozen=True, slots=True)
class Rollback:
    """Make an earlier version active again."""

    plugin: str
    version: str


@dataclass(frozen=True, slots=True)
class Pause:
    plugin: str
    reason: str


@dataclass(frozen=True, slots=True)
class Resume:
    plugin: str


@dataclass(frozen=True, slots=True)
class SetTopic:
    """Send a topic where the object says."""

    plugin: str
    topic: str
    uri: str
    schema_json: str = ""


@dataclass(frozen=True, slots=True)
class ChooseRoots:
    """Give a plugin the files of these roots only; of all if there are none."""

    plugin: str
    roots: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class AddSource:
    """Record a source root, or what has changed about it."""

    path: str
    namespace: str
    name: str
    settle_seconds: float | None
    include: tuple[str, ...]
    ignore: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Approve:
    approval_id: str
    decided_by: str


@dataclass(frozen=True, slots=True)
class Reject:
    approval_id: str
    decided_by: str
    reason: str


Command = Deploy | Rollback | Pause | Resume | SetTopic | ChooseRoots | AddSource | Approve | Reject


@dataclass(frozen=True, slots=True)
class Scale:
    """Change how many pods an object has, and nothing else of it."""

    ref: Ref
    replicas: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What one object needs now; an empty one leaves the world as it is.

    Attributes:
        commands: for the ledger, carried out first, in order; what they change is looked at in
            the next round, which follows at once.
        apply: objects that are missing or not as they should be, in order.
        scale: objects of earlier versions whose pods are to go.
        delete: objects that are not needed any more.
        status: all of the object's status; written if it differs from what is there.
        again_s: look again after this many seconds though nothing has changed, None for never.
    """

    commands: Sequence[Command] = ()
    apply: Sequence[Manifest] = ()
    scale: Sequence[Scale] = ()
    delete: Sequence[Ref] = ()
    status: Mapping[str, Any] | None = None
    notes: Sequence[Note] = ()
    again_s: float | None = None


def told(conditions: Iterable[Condition], before: Body, final: ConditionType) -> list[Note]:
    """An Event for what has gone wrong since the status was written, or for the end of all steps.

    One: steps on the way are for the status to tell.

    Args:
        final: the condition that holds at the end.
    """
    old = {c.get("type"): c for c in before.get("status", {}).get("conditions", ())}
    changed = [
        c
        for c in conditions
        if (was := old.get(c.type.value)) is None
        or (was.get("status"), was.get("reason")) != (c.status, str(c.reason))
    ]
    wrong = [c for c in changed if c.status == "False" and not _waits(c)]
    chosen = wrong[:1] or [c for c in changed if c.holds and c.type is final]
    return [Note(str(c.reason), shortened(c.message), warning=not c.holds) for c in chosen]


_WAITING = frozenset(
    {
        "Waiting", "Provisioning", "OnTrial", "RollingOver", "NotVerified", "NotProvisioned",
        "NotDeployed", "Pending", "NotApproved", "Starting", "Suspended", "NeverScanned",
        "VolumePending",
    }
)  # fmt: skip
"""Reasons of conditions that do not hold yet, with nothing wrong."""


def _waits(condition: Condition) -> bool:
    return str(condition.reason) in _WAITING


# -- differences ------------------------------------------------------------------------------

_QUANTITY = re.compile(r"\+?(\d+\.?\d*|\.\d+)([numkMGTPE]|[KMGTPE]i)?")
_FACTORS = {
    **{unit: Fraction(1, 1000**n) for n, unit in enumerate("mun", 1)}, "": Fraction(1),
    **{unit: Fraction(1000**n) for n, unit in enumerate("kMGTPE", 1)},
    **{f"{unit}i": Fraction(1024**n) for n, unit in enumerate("KMGTPE", 1)},
}  # fmt: skip
_KEYS = ("mountPath", "containerPort", "name")
"""By one of these, the first that all have, the API server tells elements of a list apart."""


def differs(wanted: object, found: object) -> bool:
    """Whether applying `wanted` would change `found`: a field that it names is another.

    Fields and named elements of lists that `wanted` does not name are defaults or other managers'.

    >>> differs({"a": 1, "l": [{"n": "x"}]}, {"a": 1, "b": 2, "l": [{"n": "x", "d": True}]})
    False
    >>> differs({"readOnly": False}, {})
    False
    >>> differs({"l": []}, {}), differs({"l": [1]}, {"l": [1, 2]})
    (False, True)
    >>> differs({"cpu": "1000m"}, {"cpu": "1"})
    False
    """
    if isinstance(wanted, Mapping):
        if not isinstance(found, Mapping):
            return bool(wanted) or found is not None
        return any(differs(value, found.get(key)) for key, value in wanted.items())
    if isinstance(wanted, (list, tuple)):
        return _list_differs(wanted, found)
    if found is None and not wanted:
        return False  # the API server leaves out what is false, empty or zero
    return wanted != found and not _same_quantity(wanted, found)


def _list_differs(wanted: Sequence[Any], found: object) -> bool:
    if not isinstance(found, (list, tuple)):
        return bool(wanted) or found is not None
    everything = (*wanted, *found)
    if wanted and all(isinstance(element, Mapping) for element in everything):
        for key in _KEYS:
            if all(key in element for element in everything):
                there = {element[key]: element for element in found}
                return any(differs(w, there.get(w[key])) for w in wanted)
    if len(found) != len(wanted):
        return True
    return any(differs(w, f) for w, f in zip(wanted, found, strict=True))


def _same_quantity(one: object, other: object) -> bool:
    """Whether two are the same amount: the API server writes `1000m` as `1`, and 1 likewise."""
    if not isinstance(one, (str, int)) or not isinstance(other, str):
        return False
    first, second = amount_of(str(one)), amount_of(other)
    return first is not None and first == second


def amount_of(quantity: str) -> Fraction | None:
    """How much a quantity is, None for one in a form that only the API server reads.

    >>> amount_of("2Gi") == 2 * 1024**3, amount_of("250m") == Fraction(1, 4), amount_of("1e3")
    (True, True, None)
    """
    match = _QUANTITY.fullmatch(quantity)
    return Fraction(match[1]) * _FACTORS[match[2] or ""] if match else None
