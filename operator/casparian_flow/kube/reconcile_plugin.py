"""What a CasparianPlugin needs: gathered state in, `Plan` out. Pure.

    Verified ──> recorded in the ledger ──> Provisioned ──> Deployment ──> trial ──> Ready
    (nothing is made for a bundle that is not)                   └─ rollover: the old one goes to
                                                                    zero, and is kept for a while

Each step is decided from what is there now, never from what was done last: the same function
brings up a new plugin, finishes what a crash has cut off and repairs what somebody has deleted.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from casparian_flow.domain.scoped_names import scoped
from casparian_flow.domain.wiring import PluginStatus as Standing
from casparian_flow.kube import names
from casparian_flow.kube.kinds import (
    CONFIG_MAP,
    DEPLOYMENT,
    JOB,
    NETWORK_POLICY,
    SECRET,
    SERVICE_ACCOUNT,
    Body,
    Manifest,
    Ref,
    ref_of,
)
from casparian_flow.kube.manifests_common import HOSTNAME, Site, claim_of, single_node
from casparian_flow.kube.manifests_provision import (
    SETTINGS_HASH,
    environments_claim,
    provision_job,
    settings_hash,
)
from casparian_flow.kube.manifests_worker import WorkerSet, worker_objects
from casparian_flow.kube.models import VERSIONS_MAX, CasparianPlugin, SourceRoot
from casparian_flow.kube.plan import (
    ChooseRoots,
    Command,
    Condition,
    Deploy,
    Note,
    Pause,
    Plan,
    Resume,
    Rollback,
    Scale,
    SetTopic,
    differs,
    no,
    told,
    unknown,
    written,
    yes,
)
from casparian_flow.kube.reasons import (
    ConditionType,
    DeployedReason,
    EventReason,
    ProvisionedReason,
    ReadyReason,
    VerifiedReason,
)
from casparian_flow.kube.verdict import Judgement, TopicWiring

SUSPENDED: Final = "suspended by its CasparianPlugin"
"""Reason of a pause in the ledger that the object asked for, and that the object ends."""
RETRY_PROVISION_S: Final = 300.0
"""After which a failed provisioning is tried again: an index may have been away. One whose failure
is final waits for other settings instead."""
LOOK_AGAIN_S: Final = 2.0
"""While something is under way that no watch tells of, such as a trial."""
_MADE_BY_NAME: Final = (DEPLOYMENT, NETWORK_POLICY, CONFIG_MAP, SECRET, SERVICE_ACCOUNT)


# -- what is gathered -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LedgerVersion:
    """A plugin version as the ledger has it."""

    version: str
    artifact_hash: str
    standing: Standing
    signer: str = ""
    error: str = ""
    deployed_at: str = ""
    deployed_at_us: int = 0


@dataclass(frozen=True, slots=True)
class Counts:
    """Work of one plugin version; `trial` tells how its trial stands, "" if it has none."""

    queued: int = 0
    running: int = 0
    failed: int = 0
    workers: int = 0
    idle: int = 0
    trial: str = ""


@dataclass(frozen=True, slots=True)
class LedgerView:
    """What the ledger knows of one plugin.

    Attributes:
        versions: newest first.
        paused: why it is paused, None if it is not.
        counts: by artifact hash.
        topics: where the ledger sends them now.
        roots: names of the source roots whose files it gets; empty for all of the namespace.
    """

    versions: Sequence[LedgerVersion] = ()
    paused: str | None = None
    counts: Mapping[str, Counts] = field(default_factory=dict)
    topics: Mapping[str, TopicWiring] = field(default_factory=dict)
    roots: frozenset[str] = frozenset()

    def of(self, version: str) -> LedgerVersion | None:
        """The version of that number that counts: a refused one only if there is no other."""
        found = [v for v in self.versions if v.version == version]
        kept = [v for v in found if v.standing is not Standing.REJECTED]
        return next(iter(kept or found), None)

    @property
    def active(self) -> LedgerVersion | None:
        return next((v for v in self.versions if v.standing is Standing.ACTIVE), None)


@dataclass(frozen=True, slots=True)
class Provision:
    """How the environment of the wanted version's lock file stands on the shared volume.

    Attributes:
        job: the Job, None if there is none.
        said: what its last failed pod has said, uv's own words; also while it is tried again.
        age_s: seconds since it failed.
    """

    job: Body | None = None
    said: str = ""
    age_s: float = 0.0

    def state(self) -> str:
        """ "", "running", "done" or "failed"."""
        if self.job is None:
            return ""
        kinds = {
            c["type"]
            for c in self.job.get("status", {}).get("conditions", ())
            if c.get("status") == "True"
        }
        return "done" if "Complete" in kinds else "failed" if "Failed" in kinds else "running"

    def final(self, site: Site) -> bool:
        """Whether another try with these settings would fail likewise."""
        job = self.job or {}
        tried = job.get("metadata", {}).get("annotations", {}).get(SETTINGS_HASH)
        return tried == settings_hash(site) and any(
            c["type"] == "Failed" and c.get("reason") == "PodFailurePolicy"
            for c in job.get("status", {}).get("conditions", ())
        )


@dataclass(frozen=True, slots=True)
class PluginState:
    """All that decides what one CasparianPlugin needs.

    Attributes:
        body: the object as it is; `plugin` the same, read.
        judgement: of the bundle of `spec.source`.
        active: of the active version's bundle where that is another; None if there is none.
        rival: name of an older object of the namespace with a plugin of this name, "" for none.
        shared_files: database files that other plugins of the namespace write on the same volume,
            with the name of one that does.
        roots: the namespace's SourceRoots by name.
        claims: the namespace's PersistentVolumeClaims by name.
        objects: what is there of the plugin's own, and the namespace's environments claim.
        provision: of the wanted version's environment.
        failing: what pods that do not start say, by artifact hash.
        replicas: wanted by now, by artifact hash; those of `scaling: queue` follow the queue.
        client_keys: CURVE key files, by Deployment name.
        at: this moment, RFC 3339.
    """

    body: Body
    plugin: CasparianPlugin
    judgement: Judgement
    ledger: LedgerView
    site: Site
    at: str
    active: Judgement | None = None
    rival: str = ""
    shared_files: Mapping[str, str] = field(default_factory=dict)
    roots: Mapping[str, SourceRoot] = field(default_factory=dict)
    claims: Mapping[str, Body] = field(default_factory=dict)
    objects: Mapping[Ref, Body] = field(default_factory=dict)
    provision: Provision = field(default_factory=Provision)
    failing: Mapping[str, str] = field(default_factory=dict)
    replicas: Mapping[str, int] = field(default_factory=dict)
    client_keys: Mapping[str, str] = field(default_factory=dict)
    kept_versions: int = 2

    @property
    def namespace(self) -> str:
        return self.plugin.metadata.namespace

    @property
    def scoped(self) -> str:
        """What the ledger calls the plugin."""
        return scoped(self.namespace, self.judgement.name or self.plugin.status.plugin)

    def found(self, ref: Ref) -> Body | None:
        return self.objects.get(ref)

    def deployments(self) -> list[Body]:
        """Of this plugin, by name."""
        return [self.objects[r] for r in sorted(self.objects) if r.kind == DEPLOYMENT.name]


# -- the decision -----------------------------------------------------------------------------


def reconcile_plugin(state: PluginState) -> Plan:
    """What is to be done for the object now, and what its status has to say."""
    verified = _verified(state)
    layout = _layout(state) if verified.holds else None
    wanted = _target(state) if verified.holds and layout is None else None
    commands = _commands(state) if wanted is not None else []
    provisioned = _provisioned(state, verified)
    sets = _sets(state, wanted)
    apply = _objects(state, wanted, sets, provisioned)
    scale, delete = _rollover(state, sets, takes_over=_took_over(state, wanted))
    deployed = layout or _deployed(state, verified, provisioned, wanted)
    ready = _ready(state, verified, provisioned, deployed)
    conditions = [verified, provisioned, deployed, ready]
    return Plan(
        commands=commands,
        apply=apply,
        scale=scale,
        delete=[*delete, *_provision_again(state, provisioned)],
        status=_status(state, conditions, wanted),
        notes=told(conditions, state.body, ConditionType.READY) or _repairs(state, apply),
        again_s=_again(state, conditions, commands),
    )


# -- Verified ---------------------------------------------------------------------------------


def _verified(state: PluginState) -> Condition:
    kind, found = ConditionType.VERIFIED, state.judgement
    if not found.ok:
        return no(kind, found.reason, found.message)
    before = state.plugin.status.plugin
    if before and before != found.name:
        return no(
            kind,
            VerifiedReason.PLUGIN_CHANGED,
            f"the bundle is of plugin {found.name!r}, and this object is of {before!r}. Make "
            "another CasparianPlugin for it.",
        )
    if state.rival:
        return no(
            kind,
            VerifiedReason.NAME_TAKEN,
            f"CasparianPlugin {state.rival} of this namespace has plugin {found.name!r} already. "
            "Delete one of the two, or publish the plugin under another name.",
        )
    known = state.ledger.of(found.version)
    if (
        known is not None
        and known.standing is not Standing.REJECTED
        and known.artifact_hash != found.artifact_hash
    ):
        return no(
            kind,
            VerifiedReason.VERSION_REUSED,
            f"{found.name} {found.version} was deployed before with other bytes (artifact hash "
            f"{known.artifact_hash[:12]}…, now {found.artifact_hash[:12]}…). Versions are "
            "immutable: publish the change as a new one.",
        )
    return yes(kind, found.reason, found.message)


# -- what stands in the way of a Deployment ---------------------------------------------------


def _layout(state: PluginState) -> Condition | None:
    """Deployed=False for an object from which no safe Deployment can be made."""
    for check in (_unsafe_outputs, _missing_output_volume, _missing_roots):
        found = check(state)
        if found is not None:
            return no(ConditionType.DEPLOYED, *found)
    return None


def _unsafe_outputs(state: PluginState) -> tuple[DeployedReason, str] | None:
    files = state.judgement.embedded()
    if not files:
        return None
    workers = state.plugin.spec.workers
    most = workers.max_replicas if workers.scaling == "queue" else (workers.replicas or 0)
    if most > 1 and HOSTNAME not in workers.node_selector:
        return (
            DeployedReason.UNSAFE_OUTPUTS,
            (
                f"{files[0]} is a database file, and up to {most} workers on several nodes would "
                f"write it, which destroys it. Allow one worker, hold them to one node with "
                f"nodeSelector {HOSTNAME}, or use Parquet or SQL Server."
            ),
        )
    shared = next((f for f in files if f in state.shared_files), None)
    if shared is not None:
        return (
            DeployedReason.UNSAFE_OUTPUTS,
            (
                f"{shared} is a database file that CasparianPlugin {state.shared_files[shared]} "
                "writes too, and their workers may be on two nodes. Give each plugin a file of its "
                "own, or use Parquet or SQL Server."
            ),
        )
    return None


def _missing_output_volume(state: PluginState) -> tuple[DeployedReason, str] | None:
    if state.plugin.spec.workers.outputs is not None or not state.judgement.writes_files:
        return None
    return (
        DeployedReason.NO_OUTPUT_VOLUME,
        "a sink writes files, and they would go with the pod. Name a volume in workers.outputs.",
    )


def _missing_roots(state: PluginState) -> tuple[DeployedReason, str] | None:
    missing = [n for n in state.plugin.spec.source_roots if n not in state.roots]
    if not missing:
        return None
    return (
        DeployedReason.SOURCE_ROOT_MISSING,
        f"there is no SourceRoot {missing[0]} in this namespace. Apply it, or correct sourceRoots.",
    )


# -- the ledger -------------------------------------------------------------------------------


def _commands(state: PluginState) -> list[Command]:
    found, known = state.judgement, state.ledger.of(state.judgement.version)
    if known is None or (
        known.standing is Standing.REJECTED and known.artifact_hash != found.artifact_hash
    ):
        # Which files it gets is settled before there is anything to get them.
        return [*_chosen_roots(state), Deploy(found.bundle, state.namespace)]
    commands: list[Command] = _chosen_roots(state)
    if known.standing is Standing.SUPERSEDED:
        commands.append(Rollback(state.scoped, found.version))
    if known.standing is not Standing.REJECTED:
        commands += _topics(state)
    if state.plugin.spec.suspend and state.ledger.paused is None:
        commands.append(Pause(state.scoped, SUSPENDED))
    elif not state.plugin.spec.suspend and state.ledger.paused == SUSPENDED:
        commands.append(Resume(state.scoped))
    return commands


def _chosen_roots(state: PluginState) -> list[Command]:
    chosen = state.plugin.spec.source_roots
    if state.ledger.roots == frozenset(chosen):
        return []
    return [ChooseRoots(state.scoped, tuple(sorted(chosen)))]


def _topics(state: PluginState) -> list[Command]:
    """Only where the object says more than the MANIFEST, or the ledger has what it once said."""
    spec = state.plugin.spec
    said = spec.sinks or spec.contract or spec.quarantine is not None
    if not said and not (set(state.ledger.topics) & set(state.judgement.topics)):
        return []
    return [
        SetTopic(state.scoped, topic, "\n".join(wiring.uris), wiring.contract)
        for topic, wiring in sorted(state.judgement.topics.items())
        if state.ledger.topics.get(topic) != wiring
    ]


# -- Provisioned ------------------------------------------------------------------------------


def _provisioned(state: PluginState, verified: Condition) -> Condition:
    kind, lock = ConditionType.PROVISIONED, state.judgement.lock_hash
    if not verified.holds:
        return unknown(kind, ProvisionedReason.WAITING, "waits for Verified")
    if not lock:
        return yes(
            kind,
            ProvisionedReason.NOT_NEEDED,
            "the plugin has no lock file; it runs on what the worker image holds",
        )
    if not state.site.storage_class:
        return yes(
            kind,
            ProvisionedReason.IN_POD,
            "an init container of each worker pod makes the environment",
        )
    progress = state.provision.state()
    if progress == "done":
        return yes(kind, ProvisionedReason.PROVISIONED, f"environment {lock[:12]} is there")
    if progress == "failed":
        return no(
            kind,
            ProvisionedReason.PROVISION_FAILED,
            state.provision.said or "the Job failed, and its pod has left no message",
        )
    said = f"; the last try ended with: {state.provision.said}" if state.provision.said else ""
    return no(kind, ProvisionedReason.PROVISIONING, f"environment {lock[:12]} is being made{said}")


def _provision_again(state: PluginState, provisioned: Condition) -> list[Ref]:
    failed = provisioned.reason == ProvisionedReason.PROVISION_FAILED
    if not failed or state.provision.job is None:
        return []
    return [] if _provision_waits(state) else [ref_of(state.provision.job)]


def _provision_waits(state: PluginState) -> bool:
    """Whether a failed provisioning is left as it is, for now or until the settings change."""
    tried = state.provision
    if tried.final(state.site):
        return True
    job = tried.job or {}
    was = job.get("metadata", {}).get("annotations", {}).get(SETTINGS_HASH)
    return was == settings_hash(state.site) and tried.age_s < RETRY_PROVISION_S


# -- the objects ------------------------------------------------------------------------------


def _target(state: PluginState) -> WorkerSet:
    return _set(state, state.judgement, signer=state.judgement.signer)


def _set(state: PluginState, of: Judgement, *, signer: str) -> WorkerSet:
    spec = state.plugin.spec
    roots = [state.roots[n] for n in spec.source_roots or sorted(state.roots) if n in state.roots]
    volumes = [spec.workers.outputs, *(root.spec.volume for root in roots)]
    claims = {claim_of(volume) for volume in volumes}
    name = names.deployment_name(state.plugin.metadata.name, of.version, of.artifact_hash)
    known = state.ledger.of(of.version)
    return WorkerSet(
        plugin=state.plugin,
        name=of.name,
        version=of.version,
        artifact_hash=of.artifact_hash,
        signer=signer,
        bundle=of.compressed,
        lock_hash=of.lock_hash,
        roots=roots,
        client_key=state.client_keys.get(name, ""),
        replicas=0 if spec.suspend else _replicas(state, name, of.artifact_hash),
        deployed_at_us=known.deployed_at_us if known is not None else 0,
        one_node=bool(of.embedded()),
        single_node_claims=tuple(sorted(c for c in claims if single_node(state.claims.get(c)))),
        open_egress=of.writes_to_servers,
    )


def _replicas(state: PluginState, name: str, artifact_hash: str) -> int:
    """What the queue wants; what is there, as long as it was not looked at: after a start."""
    wanted = state.replicas.get(artifact_hash)
    if wanted is not None:
        return wanted
    found = state.found(Ref(DEPLOYMENT.name, state.namespace, name))
    return 0 if found is None else int(found.get("spec", {}).get("replicas") or 0)


def _sets(state: PluginState, wanted: WorkerSet | None) -> list[WorkerSet]:
    """The wanted version's workers and, while that is another one, the active version's."""
    sets = [wanted] if wanted is not None else []
    running = state.active
    if running is None or not running.ok:
        return sets
    if wanted is not None and running.artifact_hash == wanted.artifact_hash:
        return sets
    return [*sets, _set(state, running, signer=running.signer)]


def _objects(
    state: PluginState,
    wanted: WorkerSet | None,
    sets: Sequence[WorkerSet],
    provisioned: Condition,
) -> list[Manifest]:
    """Those that are missing or not as they should be."""
    needed: list[Manifest] = []
    for workers in sets:
        made = worker_objects(workers, state.site)
        if workers is not wanted:
            needed += made
        elif _recorded(state):
            *rest, deployment = made
            needed += [*rest, *_environment(state, workers)]
            if provisioned.holds:
                needed.append(deployment)
    return [m for m in needed if _wants(m, state.found(ref_of(m)))]


def _wants(manifest: Manifest, found: Body | None) -> bool:
    """Whether it is to be applied. A Job's template and a claim cannot be changed afterwards."""
    if found is None:
        return True
    if manifest["kind"] not in {m.name for m in _MADE_BY_NAME}:
        return False
    return differs(manifest, found)


def _recorded(state: PluginState) -> bool:
    """Whether the ledger has the wanted version, so that workers for it make sense."""
    known = state.ledger.of(state.judgement.version)
    return known is not None and known.standing in {
        Standing.STAGING,
        Standing.ACTIVE,
        Standing.SUPERSEDED,
    }


def _environment(state: PluginState, workers: WorkerSet) -> list[Manifest]:
    if not workers.lock_hash or not state.site.storage_class:
        return []
    job = provision_job(state.site, state.namespace, workers.lock_hash, workers.object_name)
    return [environments_claim(state.site, state.namespace), job]


# -- rollover ---------------------------------------------------------------------------------


def _took_over(state: PluginState, wanted: WorkerSet | None) -> bool:
    """Whether jobs now run on the wanted version alone, and its Deployment is there for them."""
    active = state.ledger.active
    if wanted is None or active is None or active.artifact_hash != wanted.artifact_hash:
        return False
    return state.found(Ref(DEPLOYMENT.name, state.namespace, wanted.object_name)) is not None


def _rollover(
    state: PluginState, sets: Sequence[WorkerSet], *, takes_over: bool
) -> tuple[list[Scale], list[Ref]]:
    """Take the workers of earlier versions down, and remove them once they are old history.

    A worker that is asked to end finishes what it runs.
    """
    if not takes_over:
        return [], []
    current = {workers.object_name for workers in sets}
    old = [d for d in state.deployments() if d["metadata"]["name"] not in current]
    scale = [Scale(ref_of(d), 0) for d in old if d.get("spec", {}).get("replicas", 1) != 0]
    empty = [d for d in old if not _pods(d) and d.get("spec", {}).get("replicas", 1) == 0]
    empty.sort(key=lambda d: _seniority(state, d))
    delete: list[Ref] = []
    for deployment in empty[state.kept_versions :]:
        name = deployment["metadata"]["name"]
        refs = [Ref(kind.name, state.namespace, name) for kind in _MADE_BY_NAME]
        delete += [ref for ref in refs if ref in state.objects]
    return scale, delete


def _seniority(state: PluginState, deployment: Body) -> int:
    """Place in the history, 0 for the version that was active last."""
    digest = deployment["metadata"].get("annotations", {}).get(names.ARTIFACT_HASH, "")
    history = [v.artifact_hash for v in state.ledger.versions]
    return history.index(digest) if digest in history else len(history)


def _pods(deployment: Body) -> int:
    return int(deployment.get("status", {}).get("replicas") or 0)


# -- Deployed and Ready -----------------------------------------------------------------------


def _deployed(
    state: PluginState,
    verified: Condition,
    provisioned: Condition,
    wanted: WorkerSet | None,
) -> Condition:
    kind = ConditionType.DEPLOYED
    if not verified.holds or wanted is None:
        return unknown(kind, DeployedReason.WAITING, f"waits for Verified{_still(state)}")
    if not provisioned.holds:
        return unknown(kind, DeployedReason.WAITING, f"waits for Provisioned{_still(state)}")
    known = state.ledger.of(wanted.version)
    if known is None:
        return unknown(kind, DeployedReason.WAITING, "waits for the ledger")
    if known.standing is Standing.REJECTED:
        return no(kind, DeployedReason.TRIAL_FAILED, f"{known.error}{_still(state)}")
    if known.standing is not Standing.ACTIVE:
        trial = state.ledger.counts.get(wanted.artifact_hash, Counts()).trial
        how = f" ({trial})" if trial else ""
        return no(
            kind,
            DeployedReason.ON_TRIAL,
            f"a worker tries {wanted.name} {wanted.version}{how}{_still(state)}",
        )
    if state.found(Ref(DEPLOYMENT.name, state.namespace, wanted.object_name)) is None:
        return unknown(kind, DeployedReason.WAITING, "the Deployment is being made")
    leaving = [
        d
        for d in state.deployments()
        if d["metadata"]["name"] != wanted.object_name and _pods(d) > 0
    ]
    if leaving:
        return no(
            kind,
            DeployedReason.ROLLING_OVER,
            f"{wanted.version} is active; {_pods(leaving[0])} workers of "
            f"{leaving[0]['metadata']['name']} finish what they have",
        )
    return yes(kind, DeployedReason.DEPLOYED, f"{wanted.name} {wanted.version} is active")


def _still(state: PluginState) -> str:
    active = state.ledger.active
    if active is None or active.version == state.plugin.spec.version:
        return ""
    return f"; version {active.version} stays active"


def _ready(
    state: PluginState, verified: Condition, provisioned: Condition, deployed: Condition
) -> Condition:
    kind = ConditionType.READY
    for condition, reason in (
        (verified, ReadyReason.NOT_VERIFIED),
        (provisioned, ReadyReason.NOT_PROVISIONED),
    ):
        if not condition.holds:
            return no(kind, reason, condition.message)
    if state.plugin.spec.suspend:
        return no(kind, ReadyReason.SUSPENDED, "spec.suspend is set; jobs wait")
    failing = state.failing.get(state.judgement.artifact_hash)
    if failing:
        return no(kind, ReadyReason.PODS_FAILING, failing)
    if not deployed.holds and deployed.reason != DeployedReason.ROLLING_OVER:
        return no(kind, ReadyReason.NOT_DEPLOYED, deployed.message)
    if state.ledger.paused is not None and state.ledger.paused != SUSPENDED:
        return no(
            kind,
            ReadyReason.PAUSED,
            f"paused: {state.ledger.paused}. 'casparian plugin resume {state.scoped}' resumes it.",
        )
    return yes(kind, ReadyReason.READY, f"{state.judgement.name} {state.judgement.version} runs")


# -- status -----------------------------------------------------------------------------------


def _status(
    state: PluginState, conditions: Sequence[Condition], wanted: WorkerSet | None
) -> dict[str, Any]:
    active = state.ledger.active
    shown = active.artifact_hash if active else (wanted.artifact_hash if wanted else "")
    deployment = next(
        (
            d
            for d in state.deployments()
            if d["metadata"].get("annotations", {}).get(names.ARTIFACT_HASH) == shown
        ),
        None,
    )
    observed = (deployment or {}).get("status", {})
    selector = (deployment or {}).get("spec", {}).get("selector", {}).get("matchLabels", {})
    counts = state.ledger.counts.values()
    return {
        "observedGeneration": state.plugin.metadata.generation,
        "conditions": written(conditions, state.body, at=state.at),
        "plugin": _owned_name(state),
        "activeVersion": active.version if active else "",
        "artifactHash": active.artifact_hash if active else "",
        "signer": active.signer if active else "",
        "versions": _history(state),
        "replicas": int(observed.get("replicas") or 0),
        "readyReplicas": int(observed.get("readyReplicas") or 0),
        "selector": ",".join(f"{k}={v}" for k, v in sorted(selector.items())),
        "queued": sum(c.queued for c in counts),
        "running": sum(c.running for c in counts),
        "failed": sum(c.failed for c in counts),
    }


def _owned_name(state: PluginState) -> str:
    """The plugin's name, once the ledger has something of it under this object."""
    if state.plugin.status.plugin:
        return state.plugin.status.plugin
    return state.judgement.name if state.ledger.versions and not state.rival else ""


def _history(state: PluginState) -> list[dict[str, str]]:
    seen = [
        v for v in state.ledger.versions if v.standing in {Standing.ACTIVE, Standing.SUPERSEDED}
    ]
    return [
        {"version": v.version, "artifactHash": v.artifact_hash, "signer": v.signer}
        | ({"deployedAt": v.deployed_at} if v.deployed_at else {})
        for v in seen[:VERSIONS_MAX]
    ]


def _repairs(state: PluginState, apply: Sequence[Manifest]) -> list[Note]:
    """An Event for objects that were put right: the object had been Ready, nothing of it was
    changed, and yet something is to be applied."""
    observed = state.plugin.status.observed_generation == state.plugin.metadata.generation
    was_ready = any(
        c.type == ConditionType.DEPLOYED.value and c.status == "True"
        for c in state.plugin.status.conditions
    )
    lost = [
        m for m in apply if m["kind"] != JOB.name and not _only_scaled(m, state.found(ref_of(m)))
    ]
    if not lost or not observed or not was_ready:
        return []
    named = ", ".join(f"{m['kind']} {m['metadata']['name']}" for m in lost[:3])
    return [Note(EventReason.REPAIRED, f"put right: {named}")]


def _only_scaled(manifest: Manifest, found: Body | None) -> bool:
    if found is None or manifest["kind"] != DEPLOYMENT.name:
        return False
    spec = {k: v for k, v in manifest["spec"].items() if k != "replicas"}
    return not differs({**manifest, "spec": spec}, found)


def _again(
    state: PluginState, conditions: Sequence[Condition], commands: Sequence[Command]
) -> float | None:
    if commands:
        return 0.0
    reasons = {str(c.reason) for c in conditions}
    if DeployedReason.ON_TRIAL in reasons:
        return LOOK_AGAIN_S
    if ProvisionedReason.PROVISION_FAILED in reasons and not state.provision.final(state.site):
        return max(1.0, RETRY_PROVISION_S - state.provision.age_s)
    return None
