"""What a CasparianPlugin needs, decided from gathered state: no cluster, no ledger."""

from dataclasses import replace
from typing import Any

import pytest
from kube_states import NOW, OUTPUTS, SITE, judged, ledger, plugin_body, root

from casparian_flow.domain.wiring import PluginStatus as Standing
from casparian_flow.kube import names
from casparian_flow.kube.kinds import Body, Ref, ref_of
from casparian_flow.kube.manifests_common import Site
from casparian_flow.kube.models import plugin_of
from casparian_flow.kube.plan import ChooseRoots, Deploy, Pause, Plan, Resume, Rollback, SetTopic
from casparian_flow.kube.reasons import VerifiedReason
from casparian_flow.kube.reconcile_plugin import (
    RETRY_PROVISION_S,
    SUSPENDED,
    Counts,
    LedgerView,
    PluginState,
    Provision,
    reconcile_plugin,
)
from casparian_flow.kube.verdict import Judgement, TopicWiring

DONE = {"status": {"conditions": [{"type": "Complete", "status": "True"}]}}
FAILED = {"status": {"conditions": [{"type": "Failed", "status": "True"}]}}
SHARED = replace(SITE, storage_class="nfs")


def state_of(
    body: Body | None = None,
    *,
    of: Judgement | None = None,
    **rest: Any,
) -> PluginState:
    body = body or plugin_body()
    return PluginState(
        body=body,
        plugin=plugin_of(body),
        judgement=of or judged(),
        ledger=rest.pop("ledger", LedgerView()),
        site=rest.pop("site", SITE),
        at=NOW,
        **rest,
    )


def condition(plan: Plan, kind: str) -> tuple[str, str]:
    assert plan.status is not None
    found = next(c for c in plan.status["conditions"] if c["type"] == kind)
    return found["status"], found["reason"]


def message(plan: Plan, kind: str) -> str:
    assert plan.status is not None
    return str(next(c for c in plan.status["conditions"] if c["type"] == kind)["message"])


def applied(plan: Plan) -> dict[str, dict[str, Any]]:
    return {m["kind"]: m for m in plan.apply}


def after(state: PluginState, plan: Plan, **status: Any) -> PluginState:
    """The state once the plan is carried out, by a cluster that changes nothing."""
    objects = dict(state.objects)
    for made in plan.apply:
        there = objects.get(ref_of(made), {})
        objects[ref_of(made)] = {**made, "status": {**there.get("status", {}), **status}}
    for scale in plan.scale:
        was = objects[scale.ref]
        objects[scale.ref] = {**was, "spec": {**was["spec"], "replicas": scale.replicas}}
    for ref in plan.delete:
        objects.pop(ref, None)
    body = {**state.body, "status": plan.status}
    return replace(state, body=body, plugin=plugin_of(body), objects=objects)


@pytest.mark.parametrize(
    "reason",
    [r for r in VerifiedReason if r is not VerifiedReason.VERIFIED],
)
def test_for_a_bundle_that_is_not_verified_nothing_is_made(reason: VerifiedReason) -> None:
    plan = reconcile_plugin(state_of(of=Judgement(reason, "because")))
    assert (plan.commands, plan.apply, plan.delete) == ([], [], [])
    assert condition(plan, "Verified") == ("False", reason)
    assert condition(plan, "Ready") == ("False", "NotVerified")
    assert [(n.type, n.reason) for n in plan.notes] == [("Warning", reason)]


def test_a_new_version_is_recorded_in_the_ledger_before_anything_is_made() -> None:
    plan = reconcile_plugin(state_of())
    assert [type(c) for c in plan.commands] == [Deploy]
    assert plan.apply == []
    assert plan.again_s == 0.0


def test_a_version_on_trial_gets_its_workers() -> None:
    plan = reconcile_plugin(
        state_of(ledger=ledger(Standing.STAGING), replicas={judged().artifact_hash: 1})
    )
    made = applied(plan)
    assert set(made) == {"ServiceAccount", "Secret", "ConfigMap", "NetworkPolicy", "Deployment"}
    assert made["Deployment"]["spec"]["replicas"] == 1
    assert condition(plan, "Deployed") == ("False", "OnTrial")
    assert condition(plan, "Ready") == ("False", "NotDeployed")


def test_an_active_version_is_ready_at_zero_replicas() -> None:
    state = state_of(ledger=ledger(Standing.ACTIVE))
    state = after(state, reconcile_plugin(state))
    plan = reconcile_plugin(state)
    assert condition(plan, "Ready") == ("True", "Ready")
    assert plan.status is not None
    assert plan.status["replicas"] == 0
    assert plan.status["activeVersion"] == "1.0.0"
    assert "casparian.io/plugin=sales" in plan.status["selector"]


def test_an_unchanged_world_gets_no_write() -> None:
    state = state_of(ledger=ledger(Standing.ACTIVE))
    for _ in range(3):
        state = after(state, reconcile_plugin(state))
    plan = reconcile_plugin(state)
    assert (plan.apply, plan.scale, plan.delete, plan.commands, plan.notes) == ([], [], [], [], [])
    assert plan.status == state.body["status"]


@pytest.mark.parametrize(
    "kind", ["ServiceAccount", "Secret", "ConfigMap", "NetworkPolicy", "Deployment"]
)
def test_what_somebody_has_deleted_is_made_again(kind: str) -> None:
    state = state_of(ledger=ledger(Standing.ACTIVE))
    for _ in range(2):
        state = after(state, reconcile_plugin(state))
    left = {ref: body for ref, body in state.objects.items() if ref.kind != kind}
    plan = reconcile_plugin(replace(state, objects=left))
    assert list(applied(plan)) == [kind]


def test_an_edited_secret_is_put_right_and_told_of() -> None:
    state = state_of(ledger=ledger(Standing.ACTIVE))
    for _ in range(2):
        state = after(state, reconcile_plugin(state))
    ref = next(r for r in state.objects if r.kind == "Secret")
    edited = {**state.objects[ref], "data": {"client.key_secret": "eA=="}}
    plan = reconcile_plugin(replace(state, objects={**state.objects, ref: edited}))
    assert list(applied(plan)) == ["Secret"]
    assert [n.reason for n in plan.notes] == ["Repaired"]


def test_scaling_is_no_repair() -> None:
    state = state_of(ledger=ledger(Standing.ACTIVE))
    for _ in range(2):
        state = after(state, reconcile_plugin(state))
    plan = reconcile_plugin(replace(state, replicas={judged().artifact_hash: 3}))
    assert applied(plan)["Deployment"]["spec"]["replicas"] == 3
    assert plan.notes == []


def test_workers_stay_as_they_are_until_the_queue_was_looked_at() -> None:
    state = state_of(ledger=ledger(Standing.ACTIVE), replicas={judged().artifact_hash: 2})
    for _ in range(2):
        state = after(state, reconcile_plugin(state))
    plan = reconcile_plugin(replace(state, replicas={}))
    assert (plan.apply, plan.scale) == ([], [])


def test_the_same_version_with_other_bytes_is_refused() -> None:
    other = ledger(Standing.ACTIVE, artifact_hash="f" * 64)
    plan = reconcile_plugin(state_of(ledger=other))
    assert condition(plan, "Verified") == ("False", "VersionReused")
    assert (plan.commands, plan.apply) == ([], [])


def test_other_bytes_may_follow_a_version_that_was_rejected() -> None:
    rejected = ledger(Standing.REJECTED, artifact_hash="f" * 64)
    plan = reconcile_plugin(state_of(ledger=rejected))
    assert [type(c) for c in plan.commands] == [Deploy]


def test_a_rejected_version_is_not_deployed_again_and_again() -> None:
    plan = reconcile_plugin(state_of(ledger=ledger(Standing.REJECTED, error="row 3 is bad")))
    assert plan.commands == []
    assert condition(plan, "Deployed") == ("False", "TrialFailed")
    assert "row 3 is bad" in message(plan, "Deployed")


def test_of_two_objects_with_one_plugin_the_younger_is_refused() -> None:
    plan = reconcile_plugin(state_of(rival="sales-first"))
    assert condition(plan, "Verified") == ("False", "NameTaken")
    assert "sales-first" in message(plan, "Verified")


def test_an_object_keeps_its_plugin() -> None:
    body = plugin_body(status={"plugin": "invoices"})
    plan = reconcile_plugin(state_of(body))
    assert condition(plan, "Verified") == ("False", "PluginChanged")


def test_an_earlier_version_is_rolled_back_to() -> None:
    view = LedgerView(
        [
            *ledger(Standing.ACTIVE, version="2.0.0", artifact_hash="2" * 64).versions,
            *ledger(Standing.SUPERSEDED).versions,
        ]
    )
    plan = reconcile_plugin(state_of(ledger=view))
    assert plan.commands == [Rollback("flow/sales", "1.0.0")]


# -- rollover


def rolled(pods: int, *, standing: Standing = Standing.ACTIVE) -> PluginState:
    """Version 1.0.0 runs with three workers, and the object asks for 2.0.0."""
    first = state_of(ledger=ledger(Standing.ACTIVE), replicas={judged().artifact_hash: 3})
    first = after(first, reconcile_plugin(first), replicas=3)
    body = {**plugin_body(version="2.0.0", generation=2), "status": first.body["status"]}
    second = judged(version="2.0.0", artifact_hash="2" * 64)
    old = Standing.SUPERSEDED if standing is Standing.ACTIVE else Standing.ACTIVE
    view = LedgerView(
        [
            *ledger(standing, version="2.0.0", artifact_hash="2" * 64).versions,
            *ledger(old).versions,
        ]
    )
    objects = {
        ref: {**o, "status": {"replicas": pods}} if ref.kind == "Deployment" else o
        for ref, o in first.objects.items()
    }
    return state_of(
        body,
        of=second,
        ledger=view,
        objects=objects,
        active=judged() if standing is not Standing.ACTIVE else None,
        replicas={judged().artifact_hash: 3, "2" * 64: 1},
    )


def deployments(plan: Plan) -> dict[str, int]:
    return {
        m["metadata"]["labels"][names.VERSION_LABEL]: m["spec"]["replicas"]
        for m in plan.apply
        if m["kind"] == "Deployment"
    }


def test_while_the_new_version_is_tried_the_old_one_goes_on() -> None:
    plan = reconcile_plugin(rolled(3, standing=Standing.STAGING))
    assert deployments(plan) == {"2.0.0": 1}
    assert (plan.scale, plan.delete) == ([], [])
    assert "version 1.0.0 stays active" in message(plan, "Deployed")


def test_while_the_new_version_is_tried_the_old_one_is_repaired_too() -> None:
    state = rolled(3, standing=Standing.STAGING)
    plan = reconcile_plugin(replace(state, objects={}))
    assert deployments(plan) == {"2.0.0": 1, "1.0.0": 3}


def test_once_the_new_version_is_active_the_old_workers_are_asked_to_end() -> None:
    state = rolled(3)
    state = after(state, reconcile_plugin(state))
    plan = reconcile_plugin(state)
    assert [s.replicas for s in plan.scale] == [0]
    assert plan.delete == []
    assert condition(plan, "Deployed") == ("False", "RollingOver")
    assert condition(plan, "Ready") == ("True", "Ready")


def test_the_old_workers_stay_until_the_new_deployment_is_there() -> None:
    plan = reconcile_plugin(rolled(3))
    assert plan.scale == []


def test_old_deployments_are_kept_at_zero_and_later_ones_removed() -> None:
    state = rolled(3)
    state = after(state, reconcile_plugin(state))
    state = after(state, reconcile_plugin(state))
    ended = {
        ref: {**o, "status": {}} if ref.kind == "Deployment" else o
        for ref, o in state.objects.items()
    }
    kept = reconcile_plugin(replace(state, objects=ended, kept_versions=1))
    assert (kept.scale, kept.delete) == ([], [])
    assert condition(kept, "Deployed") == ("True", "Deployed")
    gone = reconcile_plugin(replace(state, objects=ended, kept_versions=0))
    assert {r.kind for r in gone.delete} == {
        "Deployment",
        "NetworkPolicy",
        "ConfigMap",
        "Secret",
        "ServiceAccount",
    }


def test_a_refused_new_version_leaves_the_old_one_as_it_is() -> None:
    state = rolled(3, standing=Standing.STAGING)
    refused = replace(state, judgement=Judgement(VerifiedReason.UNKNOWN_SIGNER, "who?"))
    plan = reconcile_plugin(refused)
    assert (plan.apply, plan.scale, plan.delete) == ([], [], [])


# -- suspend


def test_suspend_pauses_the_plugin_and_takes_its_workers_away() -> None:
    state = state_of(
        plugin_body(spec={"suspend": True}),
        ledger=ledger(Standing.ACTIVE),
        replicas={judged().artifact_hash: 3},
    )
    plan = reconcile_plugin(state)
    assert plan.commands == [Pause("flow/sales", SUSPENDED)]
    assert applied(plan)["Deployment"]["spec"]["replicas"] == 0
    assert condition(plan, "Ready") == ("False", "Suspended")


def test_the_end_of_suspend_resumes_what_it_had_paused() -> None:
    plan = reconcile_plugin(state_of(ledger=ledger(Standing.ACTIVE, paused=SUSPENDED)))
    assert plan.commands == [Resume("flow/sales")]


def test_a_pause_by_somebody_else_stays_and_is_told() -> None:
    state = state_of(ledger=ledger(Standing.ACTIVE, paused="5 jobs failed in a row"))
    state = after(state, reconcile_plugin(state))
    plan = reconcile_plugin(state)
    assert plan.commands == []
    assert condition(plan, "Ready") == ("False", "Paused")
    assert "casparian plugin resume flow/sales" in message(plan, "Ready")


# -- outputs


@pytest.mark.parametrize("scheme", ["sqlite", "duckdb"])
def test_a_database_file_is_not_shared_by_several_workers(scheme: str) -> None:
    wiring = {"rows": TopicWiring((f"{scheme}://out.db",))}
    body = plugin_body(spec={"workers": {"maxReplicas": 3, "outputs": _CLAIM}})
    plan = reconcile_plugin(
        state_of(body, of=judged(topics=wiring), ledger=ledger(Standing.ACTIVE))
    )
    assert condition(plan, "Deployed") == ("False", "UnsafeOutputs")
    assert (plan.commands, plan.apply) == ([], [])


_CLAIM = {"persistentVolumeClaim": {"claimName": "out"}}


@pytest.mark.parametrize(
    "workers",
    [
        {"maxReplicas": 1, "outputs": _CLAIM},
        {"maxReplicas": 3, "outputs": _CLAIM, "nodeSelector": {"kubernetes.io/hostname": "n1"}},
    ],
)
def test_a_database_file_of_one_node_is_allowed_and_its_workers_stay_together(
    workers: dict[str, Any],
) -> None:
    wiring = {"rows": TopicWiring(("sqlite://out.db",))}
    body = plugin_body(spec={"workers": workers})
    plan = reconcile_plugin(
        state_of(body, of=judged(topics=wiring), ledger=ledger(Standing.ACTIVE))
    )
    pod = applied(plan)["Deployment"]["spec"]["template"]["spec"]
    (term,) = pod["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert term["labelSelector"]["matchLabels"][names.PLUGIN_LABEL] == "sales"


def test_a_database_file_is_not_shared_by_two_plugins() -> None:
    wiring = {"rows": TopicWiring(("sqlite:///outputs/out.db",))}
    body = plugin_body(spec={"workers": {"outputs": _CLAIM}})
    plan = reconcile_plugin(
        state_of(body, of=judged(topics=wiring), shared_files={"out.db": "invoices"})
    )
    assert condition(plan, "Deployed") == ("False", "UnsafeOutputs")
    assert "invoices" in message(plan, "Deployed")


def test_files_without_a_volume_for_them_are_refused() -> None:
    plan = reconcile_plugin(state_of(plugin_body(spec={"workers": {}})))
    assert condition(plan, "Deployed") == ("False", "NoOutputVolume")


def test_a_server_needs_no_volume() -> None:
    wiring = {"rows": TopicWiring(("mssql://dbo.rows",))}
    plan = reconcile_plugin(state_of(plugin_body(spec={"workers": {}}), of=judged(topics=wiring)))
    assert [type(c) for c in plan.commands] == [Deploy]


def test_a_source_root_that_is_missing_is_told() -> None:
    body = plugin_body(spec={"sourceRoots": ["inbox"]})
    assert condition(reconcile_plugin(state_of(body)), "Deployed") == ("False", "SourceRootMissing")
    known = replace(ledger(Standing.ACTIVE), roots=frozenset({"inbox"}))
    there = state_of(body, roots={"inbox": root("inbox")}, ledger=known)
    pod = applied(reconcile_plugin(there))["Deployment"]["spec"]["template"]["spec"]
    mounts = {m["mountPath"]: m for c in pod["containers"] for m in c["volumeMounts"]}
    assert mounts["/sources/flow/inbox"]["readOnly"] is True


def test_chosen_roots_are_in_the_ledger_before_the_version_is() -> None:
    body = plugin_body(spec={"sourceRoots": ["inbox"]})
    plan = reconcile_plugin(state_of(body, roots={"inbox": root("inbox")}))
    assert [type(c) for c in plan.commands] == [ChooseRoots, Deploy]
    known = replace(ledger(Standing.ACTIVE), roots=frozenset({"inbox"}))
    assert reconcile_plugin(state_of(ledger=known)).commands == [ChooseRoots("flow/sales", ())]


def test_sinks_of_the_object_go_into_the_ledger() -> None:
    wiring = {"rows": TopicWiring(("parquet://daily",))}
    body = plugin_body(spec={"sinks": [{"topic": "rows", "uri": "parquet://daily"}]})
    state = state_of(body, of=judged(topics=wiring), ledger=ledger(Standing.ACTIVE))
    assert reconcile_plugin(state).commands == [SetTopic("flow/sales", "rows", "parquet://daily")]
    told = replace(state, ledger=replace(state.ledger, topics=wiring))
    assert reconcile_plugin(told).commands == []


# -- environments


def locked(**rest: Any) -> PluginState:
    return state_of(
        of=judged(lock_hash="e" * 64),
        ledger=ledger(Standing.STAGING),
        site=SHARED,
        **rest,
    )


def test_an_environment_is_made_before_the_deployment() -> None:
    plan = reconcile_plugin(locked())
    assert {"Job", "PersistentVolumeClaim", "ConfigMap"} <= set(applied(plan))
    assert "Deployment" not in applied(plan)
    assert condition(plan, "Provisioned") == ("False", "Provisioning")
    job = applied(plan)["Job"]
    done = replace(locked(), provision=Provision({**job, **DONE}))
    plan = reconcile_plugin(done)
    assert "Deployment" in applied(plan)
    assert condition(plan, "Provisioned") == ("True", "Provisioned")


def test_a_failed_environment_tells_uvs_words_and_is_tried_again_later() -> None:
    job = applied(reconcile_plugin(locked()))["Job"]
    said = Provision({**job, **FAILED}, "no wheel for pandas==9", 10.0)
    plan = reconcile_plugin(replace(locked(), provision=said, objects={ref_of(job): job}))
    assert condition(plan, "Provisioned") == ("False", "ProvisionFailed")
    assert message(plan, "Provisioned") == "no wheel for pandas==9"
    assert plan.delete == []
    assert plan.again_s == RETRY_PROVISION_S - 10
    late = replace(said, age_s=RETRY_PROVISION_S)
    assert reconcile_plugin(replace(locked(), provision=late)).delete == [ref_of(job)]


def test_a_try_that_may_succeed_later_is_repeated_by_the_job_and_a_final_one_is_not() -> None:
    job = applied(reconcile_plugin(locked()))["Job"]
    final, evicted = job["spec"]["podFailurePolicy"]["rules"]
    assert final["action"] == "FailJob"
    assert final["onExitCodes"]["values"] == [1, 2, 8]
    names_ = [c["name"] for c in job["spec"]["template"]["spec"]["containers"]]
    assert names_ == [final["onExitCodes"]["containerName"]]
    assert job["spec"]["template"]["spec"]["restartPolicy"] == "Never"
    assert evicted["action"] == "Ignore"
    trying = Provision(job, "the index is away")
    plan = reconcile_plugin(replace(locked(), provision=trying))
    assert condition(plan, "Provisioned") == ("False", "Provisioning")
    assert "the index is away" in message(plan, "Provisioned")


def test_a_final_failure_waits_for_other_settings_and_then_is_tried_again_at_once() -> None:
    job = applied(reconcile_plugin(locked()))["Job"]
    why = {"type": "Failed", "status": "True", "reason": "PodFailurePolicy"}
    tried = Provision({**job, "status": {"conditions": [why]}}, "no such package", 1e6)
    state = replace(locked(), provision=tried)
    plan = reconcile_plugin(state)
    assert message(plan, "Provisioned") == "no such package"
    assert (plan.delete, plan.again_s) == ([], None)
    changed = replace(SHARED, settings_toml="[worker]\nindex_url = 'https://index.example'\n")
    assert reconcile_plugin(replace(state, site=changed)).delete == [ref_of(job)]


def test_a_plugin_container_has_memory_for_all_slots_and_a_trial_unless_somebody_says_else() -> (
    None
):
    def resources(site: Site, **given: Any) -> dict[str, Any]:
        body = plugin_body(spec={"workers": {"outputs": OUTPUTS, "resources": given}})
        plan = reconcile_plugin(state_of(body, site=site, ledger=ledger(Standing.ACTIVE)))
        inits = applied(plan)["Deployment"]["spec"]["template"]["spec"]["initContainers"]
        found: dict[str, Any] = inits[-1]["resources"]
        return found

    two = replace(SITE, slots=2, memory_mb=1200)
    assert resources(two)["limits"] == {"memory": "4000Mi"}
    assert resources(replace(SITE, memory_mb=256))["limits"] == {"memory": "608Mi"}
    chart = replace(two, worker_resources={"requests": {"cpu": "1"}, "limits": {"memory": "9Gi"}})
    assert resources(chart) == chart.worker_resources
    assert resources(chart, limits={"memory": "5Gi"}) == {"limits": {"memory": "5Gi"}}
    large = resources(two, requests={"memory": "8Gi"})
    assert large == {"requests": {"memory": "8Gi"}, "limits": {"memory": "8Gi"}}


def test_volumes_of_pods_that_fill_up_are_limited_as_the_settings_say() -> None:
    site = replace(SITE, scratch_size="7Gi")
    plan = reconcile_plugin(state_of(site=site, ledger=ledger(Standing.ACTIVE)))
    volumes = applied(plan)["Deployment"]["spec"]["template"]["spec"]["volumes"]
    limits = {v["name"]: v["emptyDir"].get("sizeLimit") for v in volumes if "emptyDir" in v}
    assert limits["scratch"] == limits["plugin-tmp"] == "7Gi"


def test_without_a_shared_volume_each_pod_makes_its_own() -> None:
    plan = reconcile_plugin(replace(locked(), site=SITE))
    pod = applied(plan)["Deployment"]["spec"]["template"]["spec"]
    assert [c["name"] for c in pod["initContainers"]] == ["provision", "plugin"]
    assert condition(plan, "Provisioned") == ("True", "InPod")


def test_pods_that_fail_take_ready_away() -> None:
    state = state_of(ledger=ledger(Standing.ACTIVE))
    state = after(state, reconcile_plugin(state))
    failing = replace(state, failing={judged().artifact_hash: "ImagePullBackOff: no such image"})
    plan = reconcile_plugin(failing)
    assert condition(plan, "Ready") == ("False", "PodsFailing")
    assert "no such image" in message(plan, "Ready")


def test_counts_of_all_versions_are_summed() -> None:
    counts = {"a": Counts(queued=3, running=1), "b": Counts(running=2, failed=5)}
    view = replace(ledger(Standing.ACTIVE), counts=counts)
    status = reconcile_plugin(state_of(ledger=view)).status
    assert status is not None
    assert (status["queued"], status["running"], status["failed"]) == (3, 3, 5)


def test_the_time_of_a_condition_is_that_of_its_last_change() -> None:
    first = state_of(of=Judgement(VerifiedReason.UNSIGNED, "it is not signed"))
    later = replace(after(first, reconcile_plugin(first)), at="2026-02-02T00:00:00Z")
    plan = reconcile_plugin(later)
    assert plan.status is not None
    assert {c["lastTransitionTime"] for c in plan.status["conditions"]} == {NOW}
    assert plan.notes == []


def test_names_of_a_b_and_a_underscore_b_do_not_meet() -> None:
    def refs(name: str) -> set[Ref]:
        body = plugin_body(name=name)
        made = reconcile_plugin(state_of(body, ledger=ledger(Standing.ACTIVE))).apply
        return {ref_of(m) for m in made}

    assert not refs("a-b") & refs("a.b")


def test_the_plugins_container_has_its_input_to_read_and_nothing_to_steal() -> None:
    site = replace(SITE, log_level="DEBUG", log_format="json")
    plan = reconcile_plugin(replace(locked(), site=site))
    pod = applied(plan)["Deployment"]["spec"]["template"]["spec"]
    plugin = next(c for c in pod["initContainers"] if c["name"] == "plugin")
    mounts = {m["name"]: (m["mountPath"], m.get("readOnly", False)) for m in plugin["volumeMounts"]}
    assert mounts == {
        "launcher": ("/run/casparian", False),
        "scratch": ("/scratch", True),
        "plugin-tmp": ("/tmp", False),
        "environments": ("/environments", True),
    }
    (worker,) = pod["containers"]
    assert "plugin-tmp" not in {m["name"] for m in worker["volumeMounts"]}
    variables = {v["name"]: v.get("value") for v in plugin["env"]}
    assert variables == {
        "HOME": "/tmp",
        "CASPARIAN_LOGGING__LEVEL": "DEBUG",
        "CASPARIAN_LOGGING__FORMAT": "json",
    }
