"""What a SourceRoot needs: gathered state in, `Plan` out. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from casparian_flow.domain.scoped_names import scoped
from casparian_flow.domain.wording import counted
from casparian_flow.kube import names
from casparian_flow.kube.kinds import JOB, Body, Manifest, Ref, ref_of
from casparian_flow.kube.manifests_common import Site, claim_of, single_node
from casparian_flow.kube.manifests_scout import ScoutJob, scan_now, scout_objects
from casparian_flow.kube.models import SourceRoot
from casparian_flow.kube.plan import (
    AddSource,
    Condition,
    Note,
    Plan,
    differs,
    no,
    told,
    unknown,
    written,
    yes,
)
from casparian_flow.kube.reasons import (
    ConditionType,
    EventReason,
    ReadyReason,
    ScannedReason,
)

PROBLEMS_TOLD: Final = 3


@dataclass(frozen=True, slots=True)
class LedgerSource:
    """A source root as the ledger has it, with its last scan."""

    root_id: int
    active: bool
    settle_seconds: float | None = None
    include: Sequence[str] = ()
    ignore: Sequence[str] = ()
    files: int = 0
    versions: int = 0
    queued: int = 0
    last_scan: str = ""
    last_scan_seconds: float | None = None
    complete: bool = True
    problems: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class SourceState:
    """All that decides what one SourceRoot needs.

    Attributes:
        body: the object as it is; `root` the same, read.
        ledger: None while the ledger has no root of this name.
        claim: the PersistentVolumeClaim it names, None if there is none.
        nodes: where pods that mount the claim are.
        failed: what the last scan's pod said if it failed, "" else.
        objects: what is there of the object's own.
        client_key: the Scout's CURVE key file.
        at: this moment, RFC 3339.
    """

    body: Body
    root: SourceRoot
    site: Site
    at: str
    ledger: LedgerSource | None = None
    claim: Body | None = None
    nodes: Sequence[str] = ()
    failed: str = ""
    objects: Mapping[Ref, Body] = field(default_factory=dict)
    client_key: str = field(default="", repr=False)


def reconcile_source(state: SourceState) -> Plan:
    """What is to be done for the object now, and what its status has to say."""
    scout = _scout(state)
    command = _command(state)
    asked = _asked(state)
    needed = scout_objects(scout, state.site)
    if asked:
        needed.append(scan_now(scout, state.site, asked))
    apply = [m for m in needed if _wants(m, state.objects.get(ref_of(m)))]
    conditions = [_ready(state), _scanned(state)]
    notes = told(conditions, state.body, ConditionType.READY)
    if asked:
        notes = [*notes, Note(EventReason.SCAN_REQUESTED, f"a scan was asked for ({asked})")]
    return Plan(
        commands=[command] if command is not None else [],
        apply=apply,
        status=_status(state, conditions, asked),
        notes=notes or _repairs(state, apply),
        again_s=0.0 if command is not None else None,
    )


def _scout(state: SourceState) -> ScoutJob:
    claim = claim_of(state.root.spec.volume)
    pinned = claim if single_node(state.claim) else ""
    return ScoutJob(state.root, state.client_key, pinned)


def _command(state: SourceState) -> AddSource | None:
    meta, spec, known = state.root.metadata, state.root.spec, state.ledger
    wanted = (float(spec.settle_seconds), tuple(spec.include), tuple(spec.ignore))
    if known is not None and known.active:
        has = (known.settle_seconds, tuple(known.include), tuple(known.ignore))
        if has == wanted:
            return None
    path = names.source_path(meta.namespace, meta.name)
    return AddSource(path, meta.namespace, meta.name, *wanted)


def _asked(state: SourceState) -> str:
    """The scan that the annotation asks for and that no Job was made for yet, "" for none."""
    asked = state.root.metadata.annotations.get(names.SCAN, "")[:253]
    return asked if asked and asked != state.root.status.last_scan_request else ""


def _wants(manifest: Manifest, found: Body | None) -> bool:
    if found is None:
        return True
    return manifest["kind"] != JOB.name and differs(manifest, found)


# -- conditions -------------------------------------------------------------------------------


def _ready(state: SourceState) -> Condition:
    kind, claim = ConditionType.READY, claim_of(state.root.spec.volume)
    if state.root.spec.suspend:
        return no(kind, ReadyReason.SUSPENDED, "spec.suspend is set; no scan takes place")
    if claim and state.claim is None:
        return no(
            kind,
            ReadyReason.VOLUME_MISSING,
            f"there is no PersistentVolumeClaim {claim} in this namespace. Apply it, or correct "
            "spec.volume.",
        )
    nodes = sorted(set(state.nodes))
    if single_node(state.claim):
        if len(nodes) > 1:
            return no(
                kind,
                ReadyReason.VOLUME_ON_TWO_NODES,
                f"claim {claim} can be on one node only, and pods on {nodes[0]} and {nodes[1]} "
                "want it. Use a claim with ReadWriteMany or ReadOnlyMany, or stop the others.",
            )
        where = f"node {nodes[0]}" if nodes else "the node where it is mounted first"
        return yes(
            kind, ReadyReason.PINNED, f"claim {claim} is for one node: pods are held to {where}"
        )
    phase = "" if state.claim is None else state.claim.get("status", {}).get("phase", "")
    if state.claim is not None and phase not in {"Bound", "Pending"}:
        return no(kind, ReadyReason.VOLUME_MISSING, f"claim {claim} is {phase or 'of no phase'}")
    return yes(kind, ReadyReason.READY, f"scanned by schedule {state.root.spec.schedule!r}")


def _scanned(state: SourceState) -> Condition:
    kind, known = ConditionType.SCANNED, state.ledger
    if state.failed:
        return no(kind, ScannedReason.SCAN_FAILED, state.failed)
    if known is None or not known.last_scan:
        return unknown(kind, ScannedReason.NEVER_SCANNED, "no scan has ended yet")
    if not known.complete or known.problems:
        shown = "; ".join(known.problems[:PROBLEMS_TOLD])
        return no(
            kind,
            ScannedReason.INCOMPLETE,
            f"{counted(len(known.problems), 'problem')} in the last scan: {shown}".rstrip(": "),
        )
    return yes(kind, ScannedReason.SCANNED, f"{counted(known.files, 'file')} in the last scan")


def _status(state: SourceState, conditions: Sequence[Condition], asked: str) -> dict[str, Any]:
    known = state.ledger
    nodes = sorted(set(state.nodes))
    status: dict[str, Any] = {
        "observedGeneration": state.root.metadata.generation,
        "conditions": written(conditions, state.body, at=state.at),
        "files": known.files if known else 0,
        "versions": known.versions if known else 0,
        "queued": known.queued if known else 0,
        "errors": len(known.problems) if known else 0,
        "nodeName": nodes[0] if single_node(state.claim) and nodes else "",
        "lastScanRequest": asked or state.root.status.last_scan_request,
    }
    if known is not None and known.last_scan:
        status["lastScanTime"] = known.last_scan
    if known is not None and known.last_scan_seconds is not None:
        status["lastScanSeconds"] = known.last_scan_seconds
    return status


def _repairs(state: SourceState, apply: Sequence[Manifest]) -> list[Note]:
    observed = state.root.status.observed_generation == state.root.metadata.generation
    if not apply or not observed:
        return []
    named = ", ".join(f"{m['kind']} {m['metadata']['name']}" for m in apply[:3])
    return [Note(EventReason.REPAIRED, f"put right: {named}")]


def source_name(root: SourceRoot) -> str:
    """What the ledger calls the root."""
    return scoped(root.metadata.namespace, root.metadata.name)
