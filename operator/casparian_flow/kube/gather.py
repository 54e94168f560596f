"""Collects what decisions are made from: the store's bodies, the ledger, bundles and keys."""

import base64
import posixpath
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

from casparian_flow.domain.clock import Clock, utc
from casparian_flow.domain.errors import UsageError
from casparian_flow.domain.scoped_names import scoped
from casparian_flow.kube import names
from casparian_flow.kube.client import KubeClient
from casparian_flow.kube.curve_keys import KeyRing
from casparian_flow.kube.judgement import judge, judge_bundle
from casparian_flow.kube.kinds import (
    CLAIM,
    CONFIG_MAP,
    DEPLOYMENT,
    JOB,
    MADE,
    PLUGIN,
    POD,
    SOURCE,
    Body,
    Ref,
    ref_of,
)
from casparian_flow.kube.ledger_view import LedgerLooks, micros
from casparian_flow.kube.manifests_common import Site, claim_of, single_node
from casparian_flow.kube.models import (
    CasparianPlugin,
    SourceRoot,
    approval_of,
    plugin_of,
    source_of,
)
from casparian_flow.kube.pod_health import last_words_of, nodes_of, not_made, problem_of
from casparian_flow.kube.reconcile_approval import ApprovalState
from casparian_flow.kube.reconcile_plugin import LedgerView, PluginState, Provision
from casparian_flow.kube.reconcile_source import SourceState
from casparian_flow.kube.store import Store
from casparian_flow.kube.verdict import Judgement
from casparian_flow.protocol.curve import secret_text
from casparian_flow.sentinel.control_plane import ControlPlane
from casparian_flow.trust.bundle import Bundle, unpack
from casparian_flow.trust.rules import TrustRules, TrustSource

JUDGED_FOR_S = 60.0
"""A judgement is made anew after this long: a key's time may be over."""
JOB_NAME = "batch.kubernetes.io/job-name"


@dataclass(frozen=True, slots=True)
class Surroundings:
    """Where states are gathered from.

    Attributes:
        site: what pods share, as the settings now are.
        keys: likewise, the keys that are issued.
        replicas: how many workers are wanted, by scoped plugin and artifact hash.
    """

    store: Store
    client: KubeClient
    looks: LedgerLooks
    control: Callable[[], ControlPlane]
    trust: TrustSource
    site: Callable[[], Site]
    keys: Callable[[], KeyRing]
    replicas: Callable[[str], Mapping[str, int]]
    clock: Clock
    kept_versions: int = 2


class _Judged(NamedTuple):
    """A judgement that was made, and of what."""

    key: tuple[object, ...]
    at: float
    rules: TrustRules
    found: Judgement

    def holds(self, key: tuple[object, ...], rules: TrustRules, now: float) -> bool:
        return self.key == key and self.rules is rules and now - self.at < JUDGED_FOR_S


class Gatherer:
    """For several threads, each with another object."""

    def __init__(self, around: Surroundings) -> None:
        self._around = around
        # Of each object one, as bundles are large: of what it wants, and of what is active.
        self._judged: dict[Ref, _Judged] = {}
        self._active_judged: dict[Ref, _Judged] = {}
        self._names: dict[Ref, tuple[str, str]] = {}

    def forget(self, ref: Ref) -> None:
        """An object is gone."""
        for known in (self._judged, self._active_judged, self._names):
            known.pop(ref, None)

    def now(self) -> str:
        """This moment as objects have it."""
        at = utc(self._around.clock.now().wall_us).replace(microsecond=0)
        return f"{at.isoformat()}Z"

    # -- plugins ------------------------------------------------------------------------------

    def plugin(self, body: Body, *, since: float) -> PluginState:
        """What decides about a CasparianPlugin.

        Args:
            since: how old what is known of the ledger may be, in seconds of the clock.

        Raises:
            CasparianError: the ledger or the API server cannot be asked.
        """
        around, plugin = self._around, plugin_of(body)
        namespace = plugin.metadata.namespace
        found = self._judgement(plugin)
        look = around.looks.since(since)
        view = look.plugin(scoped(namespace, found.name or plugin.status.plugin))
        site, keys = around.site(), around.keys()
        roots = self._roots(namespace)
        mine = self._owned(plugin)
        judged = self._active(plugin, found, view)
        deployments = [
            names.deployment_name(plugin.metadata.name, v.version, v.artifact_hash)
            for v in (found, judged)
            if v is not None and v.ok
        ]
        return PluginState(
            body=body,
            plugin=plugin,
            judgement=found,
            ledger=view,
            site=site,
            at=self.now(),
            active=judged,
            rival=self._rival(body, found.name),
            shared_files=self._shared_files(body, plugin, found),
            roots=roots,
            claims=self._by_name(around.store.all(CLAIM, namespace)),
            objects={**mine, **self._shared_objects(namespace, found, site)},
            provision=self._provision(namespace, found),
            failing=self._failing(mine),
            replicas=around.replicas(scoped(namespace, found.name)),
            client_keys={
                name: secret_text(keys.issued("worker", namespace, name)) for name in deployments
            },
            kept_versions=around.kept_versions,
        )

    def _judgement(self, plugin: CasparianPlugin) -> Judgement:
        """The judgement of a bundle, which takes long enough to be remembered."""
        around, source = self._around, plugin.spec.source
        config_map = None
        if source.config_map is not None:
            config_map = around.store.get(
                Ref(CONFIG_MAP.name, plugin.metadata.namespace, source.config_map.name)
            ) or self._fetched(plugin.metadata.namespace, source.config_map.name)
        key = (
            plugin.metadata.uid,
            plugin.metadata.generation,
            "" if config_map is None else config_map["metadata"].get("resourceVersion"),
        )
        rules, now, ref = around.trust(), around.clock.now(), _ref_of(plugin)
        known = self._judged.get(ref)
        if known is not None and known.holds(key, rules, now.mono):
            found = known.found
        else:
            deployed = partial(self._deployed_at, plugin.metadata.namespace, now.wall_us)
            found = judge(plugin, config_map, rules, deployed)
            self._judged[ref] = _Judged(key, now.mono, rules, found)
        if found.name:
            self._names[ref] = plugin.metadata.uid, found.name
        return found

    def _deployed_at(self, namespace: str, now_us: int, bundle: Bundle) -> int:
        known = self._around.looks.last.plugin(scoped(namespace, bundle.name)).of(bundle.version)
        same = known is not None and known.artifact_hash == bundle.computed_hash()
        return known.deployed_at_us or now_us if known is not None and same else now_us

    def _fetched(self, namespace: str, name: str) -> Body | None:
        """A ConfigMap that people have made: it is not among those that are listed."""
        return self._around.client.get(CONFIG_MAP, namespace, name)

    def _active(
        self, plugin: CasparianPlugin, found: Judgement, view: LedgerView
    ) -> Judgement | None:
        """The active version's bundle, from the ledger, where the object wants another one."""
        active = view.active
        if active is None or (found.ok and active.artifact_hash == found.artifact_hash):
            return None
        around, ref = self._around, _ref_of(plugin)
        key = (plugin.metadata.uid, plugin.metadata.generation, active.artifact_hash)
        rules, now = around.trust(), around.clock.now()
        known = self._active_judged.get(ref)
        if known is not None and known.holds(key, rules, now.mono):
            return known.found
        name = scoped(plugin.metadata.namespace, found.name or plugin.status.plugin)
        row = around.control().plugin_bundle(name, active.version)
        data = base64.b64decode(row["bundle"])
        bundle = unpack(data)
        judged = judge_bundle(
            plugin, data, bundle, rules, deployed_at_us=int(row["deployed_at_us"])
        )
        if judged.ok:
            judged = replace(judged, signer=active.signer)
        self._active_judged[ref] = _Judged(key, now.mono, rules, judged)
        return judged

    def _rival(self, body: Body, name: str) -> str:
        """Another object of the namespace that has the plugin of this name: the one under which the
        ledger has something already, else the older one."""
        if not name:
            return ""
        mine = _claim_on(body, name)
        for other in self._around.store.all(PLUGIN, body["metadata"]["namespace"]):
            if other["metadata"].get("uid") == body["metadata"].get("uid"):
                continue
            if self._name_of(other) == name and _claim_on(other, name) < mine:
                return str(other["metadata"]["name"])
        return ""

    def _name_of(self, body: Body) -> str:
        """The plugin's name in an object, as far as it is known."""
        uid, known = self._names.get(ref_of(body), ("", ""))
        if uid == body["metadata"].get("uid"):
            return known
        return str(body.get("status", {}).get("plugin", ""))

    def _shared_files(
        self, body: Body, plugin: CasparianPlugin, found: Judgement
    ) -> dict[str, str]:
        """Database files that older objects write on the same volume."""
        mine = {_file(plugin, path): path for path in found.embedded()}
        if not mine:
            return {}
        place = _place(plugin)
        shared: dict[str, str] = {}
        for other in self._around.store.all(PLUGIN, plugin.metadata.namespace):
            if _age(other) >= _age(body):
                continue
            try:
                read = plugin_of(other)
            except UsageError:
                continue
            if _place(read) == place:
                for path in self._judgement(read).embedded():
                    own = mine.get(_file(read, path))
                    if own is not None:
                        shared.setdefault(own, read.metadata.name)
        return shared

    def _roots(self, namespace: str) -> dict[str, SourceRoot]:
        roots = {}
        for body in self._around.store.all(SOURCE, namespace):
            try:
                roots[body["metadata"]["name"]] = source_of(body)
            except UsageError:
                continue  # its own condition tells
        return roots

    def _owned(self, owner: CasparianPlugin | SourceRoot) -> dict[Ref, Body]:
        """What the operator has made of an object."""
        namespace, uid = owner.metadata.namespace, owner.metadata.uid
        return {
            ref_of(body): body
            for kind in MADE
            for body in self._around.store.all(kind, namespace)
            if any(o.get("uid") == uid for o in body["metadata"].get("ownerReferences", ()))
        }

    def _shared_objects(self, namespace: str, found: Judgement, site: Site) -> dict[Ref, Body]:
        """The namespace's volume of environments, and the Job for this lock file."""
        if not found.lock_hash or not site.storage_class:
            return {}
        refs = (
            Ref(CLAIM.name, namespace, site.environments_claim),
            Ref(JOB.name, namespace, names.provision_name(found.lock_hash)),
        )
        known = ((ref, self._around.store.get(ref)) for ref in refs)
        return {ref: body for ref, body in known if body is not None}

    def _provision(self, namespace: str, found: Judgement) -> Provision:
        if not found.lock_hash or not self._around.site().storage_class:
            return Provision()
        name = names.provision_name(found.lock_hash)
        job = self._around.store.get(Ref(JOB.name, namespace, name))
        provision = Provision(job)
        ended, tries = provision.state(), (job or {}).get("status", {}).get("failed", 0)
        if job is None or ended == "done" or (ended == "running" and not tries):
            return provision
        pods = self._around.client.list(POD, namespace, selector=f"{JOB_NAME}={name}")
        failed = [
            micros(c.get("lastTransitionTime"))
            for c in job["status"].get("conditions", ())
            if c["type"] == "Failed"
        ]
        age = (self._around.clock.now().wall_us - max(failed, default=0)) / 1e6
        return Provision(job, last_words_of(pods), age)

    def _failing(self, mine: Mapping[Ref, Body]) -> dict[str, str]:
        """What pods say, asked only of Deployments that lack some."""
        failing = {}
        for ref, body in mine.items():
            wanted = body.get("spec", {}).get("replicas", 0)
            if ref.kind != DEPLOYMENT.name or not wanted:
                continue
            if int(body.get("status", {}).get("readyReplicas") or 0) >= wanted:
                continue
            chosen = body["spec"]["selector"]["matchLabels"]
            selector = ",".join(f"{key}={value}" for key, value in sorted(chosen.items()))
            pods = self._around.client.list(POD, ref.namespace, selector=selector)
            problem = problem_of(pods) or not_made(body)
            digest = body["metadata"].get("annotations", {}).get(names.ARTIFACT_HASH, "")
            if problem:
                failing[digest] = problem
        return failing

    # -- source roots and approvals -----------------------------------------------------------

    def source(self, body: Body, *, since: float) -> SourceState:
        """What decides about a SourceRoot; raises as `plugin`."""
        around, root = self._around, source_of(body)
        namespace, name = root.metadata.namespace, root.metadata.name
        claim = claim_of(root.spec.volume)
        held = around.store.get(Ref(CLAIM.name, namespace, claim)) if claim else None
        # Other people's pods count too: where one has the volume, ours have to go.
        pods = around.client.list(POD, namespace) if single_node(held) else ()
        look = around.looks.since(since)
        keys = around.keys()
        owned = self._owned(root)
        return SourceState(
            body=body,
            root=root,
            site=around.site(),
            at=self.now(),
            ledger=look.sources.get(scoped(namespace, name)),
            claim=held,
            nodes=nodes_of(pods, claim),
            failed=self._failed_scan(namespace, name),
            objects=owned,
            client_key=secret_text(keys.issued("scout", namespace, names.scout_name(name))),
        )

    def _failed_scan(self, namespace: str, root: str) -> str:
        """What the last scan said, if it failed."""
        jobs = [
            job
            for job in self._around.store.all(JOB, namespace)
            if job["metadata"].get("labels", {}).get(names.ROOT_LABEL) == names.label_value(root)
        ]
        ended = [j for j in jobs if Provision(j).state() in {"done", "failed"}]
        if not ended:
            return ""
        last = max(ended, key=lambda j: str(j.get("status", {}).get("startTime", "")))
        if Provision(last).state() != "failed":
            return ""
        name = last["metadata"]["name"]
        pods = self._around.client.list(POD, namespace, selector=f"{JOB_NAME}={name}")
        return last_words_of(pods) or f"Job {name} failed, and its pod has left no message"

    def approval(self, body: Body, *, since: float) -> ApprovalState:
        """What decides about an Approval; raises as `plugin`."""
        approval = approval_of(body)
        wanted = approval.spec.approval_id
        request = self._around.looks.requests(since).get(wanted)
        if request is None:  # as old ones are, among many
            request = self._around.control().api.get_approval(wanted)
        return ApprovalState(body, approval, request, self.now())

    @staticmethod
    def _by_name(bodies: Iterable[Body]) -> dict[str, Body]:
        return {body["metadata"]["name"]: body for body in bodies}


def _age(body: Body) -> tuple[str, str]:
    """Older objects come first; of two of one second one of them, always the same."""
    meta = body["metadata"]
    return str(meta.get("creationTimestamp", "")), str(meta.get("uid", ""))


def _claim_on(body: Body, name: str) -> tuple[bool, str, str]:
    """Whose claim on a plugin's name is better comes first."""
    return (body.get("status", {}).get("plugin") != name, *_age(body))


def _place(plugin: CasparianPlugin) -> tuple[str, str]:
    """Which volume a plugin's files are on."""
    outputs = plugin.spec.workers.outputs
    inline = None if outputs is None else outputs.csi
    return claim_of(outputs), "" if inline is None else inline.model_dump_json()


def _file(plugin: CasparianPlugin, path: str) -> str:
    """A file of a plugin's outputs as a path of the whole volume."""
    outputs = plugin.spec.workers.outputs
    return posixpath.normpath(posixpath.join("" if outputs is None else outputs.sub_path, path))


def _ref_of(plugin: CasparianPlugin) -> Ref:
    return Ref(PLUGIN.name, plugin.metadata.namespace, plugin.metadata.name)
