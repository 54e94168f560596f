"""Source roots, approvals, scaling, differences and trust: pure parts of the operator."""

from datetime import UTC, datetime
from typing import Any

import pytest
from kube_states import NOW, SITE, root_body
from signing_kit import rules, signed

from casparian_flow.kube.bundles import inlined
from casparian_flow.kube.judgement import judge
from casparian_flow.kube.kinds import ref_of
from casparian_flow.kube.model_workers import Workers
from casparian_flow.kube.models import approval_of, plugin_of, source_of
from casparian_flow.kube.names import API_VERSION
from casparian_flow.kube.plan import AddSource, Approve, Plan, Reject, differs
from casparian_flow.kube.pod_health import problem_of
from casparian_flow.kube.reasons import VerifiedReason
from casparian_flow.kube.reconcile_approval import (
    ApprovalState,
    approval_object,
    reconcile_approval,
)
from casparian_flow.kube.reconcile_plugin import Counts
from casparian_flow.kube.reconcile_source import LedgerSource, SourceState, reconcile_source
from casparian_flow.kube.scaling import QUIET_S, Scaled, wanted
from casparian_flow.kube.token_review import pod_identity
from casparian_flow.protocol.http_types import Approval as Request
from casparian_flow.protocol.http_types import ApprovalOperation, ApprovalStatus
from casparian_flow.trust.bundle import pack
from casparian_flow.trust.rules import TrustRules


def reason(plan: Plan, kind: str) -> tuple[str, str]:
    assert plan.status is not None
    found = next(c for c in plan.status["conditions"] if c["type"] == kind)
    return found["status"], found["reason"]


@pytest.mark.parametrize(
    ("written", "kept"),
    [(2, "2"), (".5", "500m"), ("0.5", "500m"), ("1.", "1"), ("+1", "1"), ("1000m", "1"),
     ("1024Mi", "1Gi"), ("1000P", "1E")],
)  # fmt: skip
def test_a_quantity_is_the_same_however_the_api_server_writes_it(
    written: str | int, kept: str
) -> None:
    assert not differs({"cpu": written}, {"cpu": kept})
    assert differs({"cpu": written}, {"cpu": "3"})


# -- source roots


def claim(*modes: str) -> dict[str, Any]:
    return {"spec": {"accessModes": list(modes)}, "status": {"phase": "Bound"}}


def source(body: dict[str, Any] | None = None, **rest: Any) -> SourceState:
    body = body or root_body()
    return SourceState(
        body, source_of(body), SITE, NOW, **{"claim": claim("ReadWriteMany"), **rest}
    )


KNOWN = LedgerSource(1, True, 2.0)


def test_a_new_root_is_recorded_and_gets_a_scout() -> None:
    plan = reconcile_source(source())
    assert plan.commands == [AddSource("/sources/flow/inbox", "flow", "inbox", 2.0, (), ())]
    assert [m["kind"] for m in plan.apply] == [
        "ServiceAccount", "Secret", "ConfigMap", "NetworkPolicy", "CronJob"
    ]  # fmt: skip


def test_a_recorded_root_that_is_as_it_should_be_costs_nothing() -> None:
    first = reconcile_source(source(ledger=KNOWN))
    objects = {ref_of(m): m for m in first.apply}
    body = {**root_body(), "status": first.status}
    again = reconcile_source(source(body, ledger=KNOWN, objects=objects))
    assert (again.commands, again.apply, again.notes) == ([], [], [])
    assert again.status == first.status


def test_changed_patterns_go_into_the_ledger() -> None:
    plan = reconcile_source(source(root_body(ignore=["*.tmp"]), ledger=KNOWN))
    assert [type(c) for c in plan.commands] == [AddSource]


def test_a_scan_is_made_once_for_each_value_of_the_annotation() -> None:
    asked = root_body(annotations={"casparian.io/scan": "now"})
    plan = reconcile_source(source(asked, ledger=KNOWN))
    assert [m["kind"] for m in plan.apply][-1] == "Job"
    assert plan.status is not None
    done = {**asked, "status": plan.status}
    again = reconcile_source(source(done, ledger=KNOWN))
    assert "Job" not in [m["kind"] for m in again.apply]
    later = {**done, "metadata": {**done["metadata"], "annotations": {"casparian.io/scan": "2"}}}
    assert [m["kind"] for m in reconcile_source(source(later)).apply][-1] == "Job"


def test_a_volume_for_one_node_pins_the_pods_instead_of_letting_them_hang() -> None:
    plan = reconcile_source(source(claim=claim("ReadWriteOnce"), nodes=["n1"], ledger=KNOWN))
    assert reason(plan, "Ready") == ("True", "Pinned")
    cron = next(m for m in plan.apply if m["kind"] == "CronJob")
    pod = cron["spec"]["jobTemplate"]["spec"]["template"]
    (term,) = pod["spec"]["affinity"]["podAffinity"][
        "requiredDuringSchedulingIgnoredDuringExecution"
    ]
    # It finds itself and every other pod with that volume by the same label.
    assert term["labelSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    assert plan.status is not None
    assert plan.status["nodeName"] == "n1"


def test_a_volume_for_one_node_that_is_wanted_on_two_is_told() -> None:
    plan = reconcile_source(source(claim=claim("ReadWriteOnce"), nodes=["n1", "n2"]))
    assert reason(plan, "Ready") == ("False", "VolumeOnTwoNodes")


@pytest.mark.parametrize(
    ("rest", "expected"),
    [
        ({"claim": None}, ("False", "VolumeMissing")),
        ({"body": root_body(suspend=True)}, ("False", "Suspended")),
        ({}, ("True", "Ready")),
    ],
)
def test_ready_tells_why(rest: dict[str, Any], expected: tuple[str, str]) -> None:
    assert reason(reconcile_source(source(**rest)), "Ready") == expected


@pytest.mark.parametrize(
    ("rest", "expected"),
    [
        ({}, ("Unknown", "NeverScanned")),
        ({"last_scan": NOW, "files": 3}, ("True", "Scanned")),
        ({"last_scan": NOW, "problems": ("a: no permission",)}, ("False", "Incomplete")),
    ],
)
def test_scanned_tells_how_the_last_scan_went(
    rest: dict[str, Any], expected: tuple[str, str]
) -> None:
    state = source(ledger=LedgerSource(1, True, 2.0, **rest))
    assert reason(reconcile_source(state), "Scanned") == expected


def test_a_failed_scan_tells_what_its_pod_said() -> None:
    plan = reconcile_source(source(ledger=KNOWN, failed="no Sentinel answers"))
    assert reason(plan, "Scanned") == ("False", "ScanFailed")


# -- approvals


def request(status: ApprovalStatus = ApprovalStatus.PENDING, **rest: Any) -> Request:
    return Request(
        approval_id="a-1",
        status=status,
        operation=ApprovalOperation.Run(plugin_name="flow/sales", input_dir="/in", file_count=3),
        summary="Run sales over 3 files",
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
        expires_at=datetime(2026, 1, 2, tzinfo=UTC),
        requester="rita",
        **rest,
    )


def approval(found: Request | None, **decision: str) -> ApprovalState:
    body = approval_object(found or request(), "flow")
    body["spec"] |= decision
    return ApprovalState(body, approval_of(body), found, NOW)


def test_an_object_for_a_request_has_no_decision() -> None:
    body = approval_object(request(), "flow")
    assert body["metadata"]["name"].startswith("run-sales-")
    assert "decision" not in body["spec"]
    assert body["spec"]["requestedBy"] == "rita"
    assert body["apiVersion"] == API_VERSION


def test_a_decision_counts_only_with_the_name_that_the_api_server_wrote() -> None:
    assert reconcile_approval(approval(request(), decision="approved")).commands == []
    plan = reconcile_approval(approval(request(), decision="approved", decidedBy="ann"))
    assert plan.commands == [Approve("a-1", "ann")]
    plan = reconcile_approval(
        approval(request(), decision="rejected", decidedBy="ann", reason="too early")
    )
    assert plan.commands == [Reject("a-1", "ann", "too early")]


@pytest.mark.parametrize(
    ("status", "phase", "decided"),
    [
        (ApprovalStatus.PENDING, "Pending", ("False", "Pending")),
        (ApprovalStatus.APPROVED, "Approved", ("True", "Approved")),
        (ApprovalStatus.REJECTED, "Rejected", ("True", "Rejected")),
        (ApprovalStatus.EXPIRED, "Expired", ("False", "Expired")),
        (ApprovalStatus.STALE, "Stale", ("False", "Stale")),
    ],
)
def test_the_status_follows_the_ledger(
    status: ApprovalStatus, phase: str, decided: tuple[str, str]
) -> None:
    # A decision that came too late changes nothing.
    late = {} if status is ApprovalStatus.PENDING else {"decision": "approved", "decidedBy": "ann"}
    plan = reconcile_approval(approval(request(status), **late))
    assert plan.commands == []
    assert plan.status is not None
    assert plan.status["phase"] == phase
    assert reason(plan, "Decided") == decided


def test_the_job_that_was_started_is_named() -> None:
    plan = reconcile_approval(approval(request(ApprovalStatus.APPROVED, job_id=7)))
    assert plan.status is not None
    assert plan.status["jobId"] == 7
    assert reason(plan, "Started") == ("True", "Started")


def test_an_object_whose_request_was_cleaned_up_goes_too() -> None:
    state = approval(None)
    assert reconcile_approval(state).delete == [ref_of(state.body)]


@pytest.mark.parametrize("changed", [{"namespace": "mine"}, {"name": "my-own"}])
def test_an_object_that_somebody_made_for_another_s_request_decides_nothing(
    changed: dict[str, str],
) -> None:
    body = approval(request(), decision="approved", decidedBy="ann").body
    forged = {**body, "metadata": {**body["metadata"], **changed}}
    plan = reconcile_approval(ApprovalState(forged, approval_of(forged), request(), NOW))
    assert not plan.commands
    assert plan.delete == [ref_of(forged)]


# -- scaling


def workers(**spec: Any) -> Workers:
    return Workers.model_validate({"minReplicas": 0, "maxReplicas": 5, **spec})


def test_out_at_once_up_to_the_most() -> None:
    assert wanted(workers(), Counts(queued=2), Scaled(), now=0).replicas == 2
    assert wanted(workers(), Counts(queued=99), Scaled(), now=0).replicas == 5
    assert wanted(workers(), Counts(queued=9), Scaled(), now=0, slots=4).replicas == 3


def test_in_after_a_while_of_quiet_and_idle_ones_only() -> None:
    busy = Counts(running=1, workers=4, idle=3)
    first = wanted(workers(), busy, Scaled(4), now=100)
    assert first == Scaled(4, 100)
    assert wanted(workers(), busy, first, now=100 + QUIET_S - 1).replicas == 4
    assert wanted(workers(), busy, first, now=100 + QUIET_S).replicas == 1
    held = Counts(running=0, workers=4, idle=1)
    assert wanted(workers(), held, first, now=100 + QUIET_S).replicas == 3


def test_a_new_wave_ends_the_quiet() -> None:
    quiet = Scaled(4, 100)
    assert wanted(workers(), Counts(queued=4), quiet, now=150) == Scaled(4)


def test_a_trial_has_a_worker_also_where_none_is_kept() -> None:
    assert wanted(workers(), Counts(trial="waiting"), Scaled(), now=0).replicas == 1
    external = workers(scaling="external", replicas=0)
    assert wanted(external, Counts(trial="waiting"), Scaled(), now=0).replicas == 1


def test_external_scaling_is_not_touched() -> None:
    external = workers(scaling="external", replicas=3)
    assert wanted(external, Counts(queued=99), Scaled(7), now=0).replicas == 3


def test_a_lowered_maximum_counts_at_once() -> None:
    counts = Counts(queued=9, workers=5, idle=5)
    assert wanted(workers(maxReplicas=2), counts, Scaled(5), now=0).replicas == 2


# -- differences


@pytest.mark.parametrize(
    ("wanted_", "found", "expected"),
    [
        ({"a": {"b": 1}}, {"a": {"b": 1, "c": 2}}, False),
        ({"a": {"b": 1}}, {"a": {"b": 2}}, True),
        ({"a": 1}, None, True),
        ([{"name": "x", "v": 1}], [{"name": "y"}, {"name": "x", "v": 1, "d": 0}], False),
        ([{"name": "x"}, {"name": "z"}], [{"name": "x"}], True),
        ([{"name": "a", "mountPath": "/1"}, {"name": "a", "mountPath": "/2"}],
         [{"name": "a", "mountPath": "/2"}, {"name": "a", "mountPath": "/1"}], False),
        ({"memory": "1024Mi"}, {"memory": "1Gi"}, False),
        ({"memory": "1Gi"}, {"memory": "2Gi"}, True),
        ([1, 2], [2, 1], True),
    ],
)  # fmt: skip
def test_what_differs(wanted_: Any, found: Any, expected: bool) -> None:
    assert differs(wanted_, found) is expected


# -- pods and tokens


def test_a_pod_that_cannot_start_tells_why() -> None:
    waiting = {"reason": "ImagePullBackOff", "message": "no such image"}
    status = {"containerStatuses": [{"name": "worker", "state": {"waiting": waiting}}]}
    pod = {"metadata": {"name": "p"}, "status": status}
    assert problem_of([pod]) == "pod p, container worker: ImagePullBackOff: no such image"
    starting = {"name": "worker", "state": {"waiting": {"reason": "ContainerCreating"}}}
    assert problem_of([{**pod, "status": {"containerStatuses": [starting]}}]) == ""


def token_status(**changes: Any) -> dict[str, Any]:
    user = {
        "username": "system:serviceaccount:flow:worker-1",
        "extra": {"authentication.kubernetes.io/pod-name": ["worker-1-x"]},
    }
    whole = {"authenticated": True, "audiences": ["casparian-sentinel"], "user": user}
    return {**whole, **changes}


def test_a_pods_token_proves_its_pod() -> None:
    found = pod_identity(token_status())
    assert found is not None
    assert (found.namespace, found.service_account, found.pod) == ("flow", "worker-1", "worker-1-x")


@pytest.mark.parametrize(
    "changes",
    [
        {"authenticated": False},
        {"audiences": ["https://kubernetes.default.svc"]},
        {"user": {"username": "rita", "extra": {}}},
        {"user": {"username": "system:serviceaccount:flow:worker-1"}},
    ],
)
def test_no_other_token_proves_anything(changes: dict[str, Any]) -> None:
    assert pod_identity(token_status(**changes)) is None


# -- bundles

SOURCE = """
    from casparian_flow.sdk import BasePlugin, PluginMetadata

    MANIFEST = PluginMetadata(pattern="*.csv", topic="rows", sinks={{"rows": "parquet://rows"}})


    class Handler(BasePlugin):
        def consume(self, file, context):
            {body}
"""


def judged(source_: str, trust: TrustRules, **spec: Any) -> Any:
    inline = inlined(pack(signed(source_, "sales")))
    body = {
        "metadata": {"name": "sales", "namespace": "flow"},
        "spec": {"version": "1.0.0", "source": {"inline": inline}, **spec},
    }
    return judge(plugin_of(body), None, trust, lambda _: 1_760_000_000_000_000)


def test_a_good_bundle_is_read_whole() -> None:
    found = judged(SOURCE.format(body="pass"), rules())
    assert found.ok, found.message
    assert (found.name, found.version, found.signer) == ("sales", "1.0.0", "tests")
    assert [t.uris for t in found.topics.values()] == [("parquet://rows",)]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({"version": "2.0.0"}, VerifiedReason.VERSION_MISMATCH),
        ({"source": {"inline": "AAAA"}}, VerifiedReason.BUNDLE_UNREADABLE),
        ({"source": {"inline": "!"}}, VerifiedReason.BUNDLE_UNREADABLE),
        (
            {"source": {"configMap": {"name": "b", "key": "k", "digest": "0" * 64}}},
            VerifiedReason.SOURCE_MISSING,
        ),
    ],
)
def test_a_bad_source_says_which_way(spec: dict[str, Any], expected: VerifiedReason) -> None:
    assert judged(SOURCE.format(body="pass"), rules(), **spec).reason is expected


def test_a_signer_whom_nobody_knows_and_a_source_that_is_refused() -> None:
    assert judged(SOURCE.format(body="pass"), TrustRules()).reason is VerifiedReason.UNKNOWN_SIGNER
    evil = SOURCE.format(body="__import__('os').system('id')")
    assert judged(evil, rules()).reason is VerifiedReason.GATEKEEPER_REFUSED


def test_sinks_of_the_object_stand_before_those_of_the_manifest() -> None:
    sinks = [{"topic": "rows", "uri": "parquet://daily", "mode": "replace"}]
    found = judged(SOURCE.format(body="pass"), rules(), sinks=sinks)
    assert found.topics["rows"].uris == ("parquet://daily?mode=replace",)
