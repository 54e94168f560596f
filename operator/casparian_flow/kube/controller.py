"""Works through objects that may need something: gather, decide, carry out.

What a plan asks for is done in this order: the ledger, objects, removals, status, Events. A crash
in between leaves what the next round finds and finishes. Nothing here is done twice for being
asked twice, and an object for which everything is as it should be costs no request at all.
"""

import logging
import threading
from collections.abc import Iterable, Mapping, Sequence

from casparian_flow.domain.clock import Clock
from casparian_flow.domain.errors import (
    CasparianError,
    LedgerError,
    SentinelUnreachableError,
)
from casparian_flow.domain.scoped_names import split
from casparian_flow.domain.wiring import PluginStatus as Standing
from casparian_flow.kube import names
from casparian_flow.kube import plan as p
from casparian_flow.kube.client import KubeClient, KubeError, KubeUnreachableError
from casparian_flow.kube.curve_keys import KeyRing
from casparian_flow.kube.gather import Gatherer, Surroundings
from casparian_flow.kube.kinds import (
    DEPLOYMENT,
    PLUGIN,
    POD,
    SOURCE,
    Body,
    Manifest,
    Ref,
    named,
    ref_of,
)
from casparian_flow.kube.ledger_view import Look
from casparian_flow.kube.models import SourceRoot
from casparian_flow.kube.plan import Plan, differs
from casparian_flow.kube.reconcile_approval import reconcile_approval
from casparian_flow.kube.reconcile_plugin import LedgerView, PluginState, reconcile_plugin
from casparian_flow.kube.reconcile_source import reconcile_source, source_name
from casparian_flow.kube.refusal import Refuser, is_final, refused
from casparian_flow.kube.scaling import BUSY_COST, DELETION_COST, IDLE_COST
from casparian_flow.kube.store import Store
from casparian_flow.kube.work_queue import WorkQueue
from casparian_flow.sentinel.admission import Admission, Principal
from casparian_flow.sentinel.control_plane import ControlPlane

log = logging.getLogger(__name__)

REQUEUE_S = 0.05
"""After a change in the ledger, so that several share the next look at it."""
REFUSED_S = 30.0
"""Before the ledger is asked again for what it has refused."""


class Controller:
    """`work` is for any number of threads; see the module's text.

    Args:
        admission: told whose keys are issued.
    """

    def __init__(self, around: Surroundings, queue: WorkQueue[Ref], admission: Admission) -> None:
        self._around = around
        self._queue = queue
        self._admission = admission
        self._gatherer = Gatherer(around)
        self._since: dict[Ref, float] = {}
        # Only what is known of the ledger from then on counts for the object.
        self._principals: dict[Ref, Mapping[str, Principal]] = {}
        self._lock = threading.Lock()

    @property
    def _store(self) -> Store:
        return self._around.store

    @property
    def _client(self) -> KubeClient:
        return self._around.client

    @property
    def _clock(self) -> Clock:
        return self._around.clock

    @property
    def _control(self) -> ControlPlane:
        return self._around.control()

    # -- the loop of one thread ---------------------------------------------------------------

    def work(self) -> None:
        """Reconcile whatever is in the queue until it is closed."""
        while (ref := self._queue.take()) is not None:
            failed = True
            try:
                self.reconcile(ref)
                failed = False
            except (KubeUnreachableError, SentinelUnreachableError, LedgerError) as error:
                log.warning("%s %s/%s waits: %s", ref.kind, ref.namespace, ref.name, error)
            except CasparianError as error:
                log.error("%s %s/%s: %s", ref.kind, ref.namespace, ref.name, error.with_hint())
            except Exception:
                # One object's bug must not stop the others; it is tried again, and told.
                log.exception("%s %s/%s", ref.kind, ref.namespace, ref.name)
            finally:
                self._queue.done(ref, failed=failed)

    def reconcile(self, ref: Ref) -> None:
        """Bring one object's world in order.

        Raises:
            CasparianError: it cannot be done now.
        """
        body = self._store.get(ref)
        if body is None:
            self.forget(ref)
            return
        if body["metadata"].get("deletionTimestamp"):
            return  # somebody else's finalizer holds it; what is ours goes with it
        plan = self._decide(ref, body)
        self._carry_out(ref, body, plan)

    def _decide(self, ref: Ref, body: Body) -> Plan:
        # Any look will do, unless the ledger was changed for this object after it.
        since = self._since.get(ref, 0.0)
        if ref.kind == PLUGIN.name:
            state = self._gatherer.plugin(body, since=since)
            self.admit(ref, _workers_of(state, self._around.keys()))
            return reconcile_plugin(state)
        if ref.kind == SOURCE.name:
            found = self._gatherer.source(body, since=since)
            self.admit(ref, _scout_of(found.root, self._around.keys()))
            return reconcile_source(found)
        return reconcile_approval(self._gatherer.approval(body, since=since))

    # -- carrying out -------------------------------------------------------------------------

    def _carry_out(self, ref: Ref, body: Body, plan: Plan) -> None:
        refusals = [r for command in plan.commands if (r := self._command(command))]
        if plan.commands:
            self._since[ref] = self._clock.now().mono
        try:
            self._change(plan)
        except KubeError as error:
            if is_final(error) and not plan.commands:
                message = f"the API server refuses an object of it: {error}"
                self._write_refusal(body, plan, Refuser.API_SERVER, message)
            raise
        if refusals:
            # It would be refused again at once.
            self._write_refusal(body, plan, Refuser.LEDGER, "; ".join(refusals))
            self._queue.add(ref, REFUSED_S)
            return
        if plan.commands:
            # The next round sees what came of them: this one's status would be of no worth.
            self._queue.add(ref, REQUEUE_S)
            return
        self._write_status(body, plan)
        if plan.again_s is not None:
            self._queue.add(ref, max(plan.again_s, REQUEUE_S))

    def _change(self, plan: Plan) -> None:
        """The objects that are missing, wrong or not needed any more."""
        for manifest in plan.apply:
            self._apply(manifest)
        for scale in plan.scale:
            self._scale(scale)
        for gone in plan.delete:
            self._delete(gone)

    def _write_refusal(self, body: Body, plan: Plan, who: Refuser, message: str) -> None:
        self._write_status(body, refused(plan, body, who, message, at=self._gatherer.now()))

    def _write_status(self, body: Body, plan: Plan) -> None:
        if plan.status is None or not differs(plan.status, body.get("status")):
            return
        try:
            self._store.put(self._client.apply_status(body, plan.status))
        except KubeError as error:
            if error.status in {404, 409}:
                return  # deleted, or another of its name, in the meantime: the watch will tell
            raise
        self._tell(body, plan.notes)

    def _tell(self, body: Body, notes: Sequence[p.Note]) -> None:
        for note in notes:
            log.info(
                "%s %s/%s: %s: %s",
                body["kind"],
                body["metadata"]["namespace"],
                body["metadata"]["name"],
                note.reason,
                note.message,
            )
            self._client.emit(
                body,
                type_=note.type,
                reason=note.reason,
                message=note.message,
                now=self._clock.now(),
            )

    def _command(self, command: p.Command) -> str:
        """Change the ledger; returns why it refuses, "" if it does not."""
        try:
            self._do(command)
        except (LedgerError, SentinelUnreachableError):
            raise
        except CasparianError as error:
            return error.with_hint() or type(error).__name__
        return ""

    def _do(self, command: p.Command) -> None:
        control = self._control
        match command:
            case p.Deploy(bundle, namespace):
                control.deploy(bundle, namespace)
            case p.Rollback(plugin, version):
                control.rollback_plugin(plugin, version)
            case p.Pause(plugin, reason):
                control.pause_plugin(plugin, reason=reason)
            case p.Resume(plugin):
                control.resume_plugin(plugin)
            case p.SetTopic(plugin, topic, uri, contract):
                control.set_topic(plugin, topic, uri=uri, schema_json=contract)
            case p.ChooseRoots(plugin, roots):
                control.choose_roots(plugin, roots)
            case p.AddSource(path, namespace, name, settle, include, ignore):
                control.add_source(
                    path,
                    settle_seconds=settle,
                    include=include,
                    ignore=ignore,
                    name=name,
                    namespace=namespace,
                )
            case p.Approve(approval_id, decided_by):
                control.api.approve(approval_id, decided_by)
            case p.Reject(approval_id, decided_by, reason):
                control.api.reject(approval_id, decided_by, reason)

    def _apply(self, manifest: Manifest) -> None:
        found = self._store.get(ref_of(manifest))
        if manifest["kind"] == DEPLOYMENT.name and found is not None:
            self._mark_idle(found, manifest["spec"]["replicas"])
        self._store.put(self._client.apply(manifest))

    def _scale(self, scale: p.Scale) -> None:
        patch = {"spec": {"replicas": scale.replicas}}
        ref = scale.ref
        try:
            self._store.put(self._client.merge(named(ref.kind), ref.namespace, ref.name, patch))
        except KubeError as error:
            if error.status != 404:
                raise

    def _delete(self, ref: Ref) -> None:
        self._client.delete(named(ref.kind), ref.namespace, ref.name)
        body = self._store.get(ref)
        if body is not None:
            self._store.drop(body)

    def _mark_idle(self, deployment: Body, replicas: int) -> None:
        """Before fewer are wanted: say which pods may go first, as they hold nothing."""
        if not 0 < replicas < int(deployment["spec"].get("replicas") or 0):
            return
        held = {row["hostname"]: bool(row["held"]) for row in self._control.list_workers()}
        chosen = deployment["spec"]["selector"]["matchLabels"]
        selector = ",".join(f"{key}={value}" for key, value in sorted(chosen.items()))
        namespace = deployment["metadata"]["namespace"]
        for pod in self._client.list(POD, namespace, selector=selector):
            name = pod["metadata"]["name"]
            cost = str(BUSY_COST if held.get(name, False) else IDLE_COST)
            if pod["metadata"].get("annotations", {}).get(DELETION_COST) != cost:
                patch = {"metadata": {"annotations": {DELETION_COST: cost}}}
                self._client.merge(POD, namespace, name, patch)

    # -- what is gone -------------------------------------------------------------------------

    def forget(self, ref: Ref) -> None:
        """An object is gone: take what it stood for out of the ledger's wiring, and its keys."""
        self.admit(ref, {})
        self._since.pop(ref, None)
        self._gatherer.forget(ref)
        if ref.kind in {SOURCE.name, PLUGIN.name}:
            self.retire_orphans([ref.namespace])

    def retire_orphans(self, namespaces: Iterable[str]) -> None:
        """Take out of the ledger's wiring what no object stands for any more.

        Args:
            namespaces: whose objects are all known at this moment.
        """
        look = self._around.looks.since(self._clock.now().mono)
        for namespace in namespaces:
            self._retire_plugins(namespace, look)
            roots = {b["metadata"]["name"] for b in self._store.all(SOURCE, namespace)}
            for source, known in look.sources.items():
                place, name = split(source)
                if place == namespace and name not in roots and known.active:
                    log.info("retiring source root %s: its object is gone", source)
                    self._control.retire_source(source)

    def _retire_plugins(self, namespace: str, look: Look) -> None:
        bodies = self._store.all(PLUGIN, namespace)
        if not all(map(_judged, bodies)):
            return  # one that was not looked at yet may stand for it
        kept = {b["status"].get("plugin", "") for b in bodies}
        for plugin, view in look.plugins.items():
            place, name = split(plugin)
            if place == namespace and name not in kept and _wired(view):
                log.info("retiring plugin %s: its object is gone", plugin)
                self._control.retire_plugin(plugin)
                for body in bodies:  # one that had to stand back for it may go on now
                    self._queue.add(ref_of(body))

    # -- keys ---------------------------------------------------------------------------------

    def principals(self) -> list[Principal]:
        """Whose keys are admitted now."""
        with self._lock:
            return [p for some in self._principals.values() for p in some.values()]

    def admit(self, ref: Ref, principals: Mapping[str, Principal]) -> None:
        """Make these the keys of an object's pods, and no others."""
        with self._lock:
            if self._principals.get(ref, {}) == principals:
                return
            if principals:
                self._principals[ref] = principals
            else:
                self._principals.pop(ref, None)
            everybody: dict[str, Principal] = {}
            for some in self._principals.values():
                everybody.update(some)
            self._admission.replace(everybody)


def _judged(body: Body) -> bool:
    """Whether a status tells which plugin an object stands for, if any."""
    status = body.get("status", {})
    observed = status.get("observedGeneration") == body["metadata"].get("generation")
    return observed or bool(status.get("plugin"))


def _wired(view: LedgerView) -> bool:
    return any(v.standing in {Standing.ACTIVE, Standing.STAGING} for v in view.versions)


def _workers_of(state: PluginState, keys: KeyRing) -> dict[str, Principal]:
    """The keys of a plugin's workers: of the wanted version, once it may run, and of every other
    version that still has a Deployment. Which those are is taken from the ledger, as labels and
    annotations in the cluster can be edited."""
    if state.rival:
        return {}
    meta, there = state.plugin.metadata, {b["metadata"]["name"] for b in state.deployments()}
    hashes = {
        names.deployment_name(meta.name, v.version, v.artifact_hash): v.artifact_hash
        for v in state.ledger.versions
        if v.standing is not Standing.REJECTED
    }
    found = state.judgement
    admitted: dict[str, Principal] = {}
    for name, artifact_hash in hashes.items():
        if name in there or (found.ok and artifact_hash == found.artifact_hash):
            whom = Principal("worker", meta.namespace, name, state.scoped, artifact_hash)
            admitted |= dict.fromkeys(keys.admitted("worker", meta.namespace, name), whom)
    return admitted


def _scout_of(root: SourceRoot, keys: KeyRing) -> dict[str, Principal]:
    meta, name = root.metadata, names.scout_name(root.metadata.name)
    whom = Principal("scout", meta.namespace, name, root=source_name(root))
    return dict.fromkeys(keys.admitted("scout", meta.namespace, name), whom)
