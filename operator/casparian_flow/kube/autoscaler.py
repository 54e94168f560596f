"""Follows the queue: how many workers each plugin version should have, looked at every second."""

import logging
import threading
from collections.abc import Mapping

from casparian_flow.domain.clock import Clock
from casparian_flow.domain.errors import CasparianError, UsageError
from casparian_flow.domain.scoped_names import scoped
from casparian_flow.domain.wiring import PluginStatus as Standing
from casparian_flow.kube import names
from casparian_flow.kube.kinds import DEPLOYMENT, PLUGIN, Body, Ref, ref_of
from casparian_flow.kube.ledger_view import LedgerLooks, Look
from casparian_flow.kube.models import plugin_of
from casparian_flow.kube.reconcile_plugin import Counts
from casparian_flow.kube.scaling import Scaled, wanted
from casparian_flow.kube.store import Store
from casparian_flow.kube.work_queue import WorkQueue

log = logging.getLogger(__name__)

EVERY_S = 1.0
SHARE = 20.0
"""A look at the ledger may take a twentieth of the time, no more: a long queue is looked at less
often."""


class Autoscaler:
    """`run` is for a thread of its own.

    Args:
        slots: jobs that one worker runs at a time.
    """

    def __init__(
        self,
        looks: LedgerLooks,
        store: Store,
        queue: WorkQueue[Ref],
        clock: Clock,
        slots: int,
    ) -> None:
        self._looks = looks
        self._store = store
        self._queue = queue
        self._clock = clock
        self._slots = slots
        self._stopping = threading.Event()
        self._scaled: dict[tuple[str, str], Scaled] = {}
        self._standing: dict[str, object] = {}

    def replicas(self, plugin: str) -> Mapping[str, int]:
        """How many workers are wanted by now, by artifact hash."""
        known = self._scaled
        return {digest: s.replicas for (name, digest), s in known.items() if name == plugin}

    def run(self) -> None:
        """Look again and again until `close`."""
        spent = 0.0
        while not self._stopping.wait(max(EVERY_S, SHARE * spent)):
            try:
                look = self._looks.since(self._clock.now().mono)
                spent = look.seconds
                self.follow(look)
            except CasparianError as error:
                log.warning("the queue cannot be looked at: %s", error)
            except Exception:
                log.exception("scaling failed")

    def close(self) -> None:
        self._stopping.set()

    def follow(self, look: Look) -> None:
        """Decide anew; objects of plugins for which something has changed are put in the queue."""
        scaled: dict[tuple[str, str], Scaled] = {}
        for body in self._store.all_of(PLUGIN):
            self._one(body, look, scaled)
        self._scaled = scaled

    def _one(self, body: Body, look: Look, scaled: dict[tuple[str, str], Scaled]) -> None:
        try:
            plugin = plugin_of(body)
        except UsageError:
            return
        name = scoped(plugin.metadata.namespace, plugin.status.plugin)
        view = look.plugin(name)
        changed = False
        for version in view.versions:
            if version.standing not in {Standing.ACTIVE, Standing.STAGING}:
                continue  # rollover takes the workers of earlier versions away
            digest = version.artifact_hash
            counts = view.counts.get(digest, Counts())
            last = self._scaled.get((name, digest))
            if last is None:
                # After a restart: what is there is what was wanted.
                last = Scaled(self._there(body, digest))
            now = self._clock.now().mono
            new = wanted(plugin.spec.workers, counts, last, now=now, slots=self._slots)
            scaled[name, digest] = new
            changed |= new.replicas != last.replicas
        standing = (view.paused, [(v.artifact_hash, v.standing) for v in view.versions])
        if self._standing.get(name) != standing:
            self._standing[name] = standing
            changed = True
        if changed:
            self._queue.add(ref_of(body))

    def _there(self, body: Body, digest: str) -> int:
        for deployment in self._store.all(DEPLOYMENT, body["metadata"]["namespace"]):
            meta = deployment["metadata"]
            mine = any(
                o.get("uid") == body["metadata"].get("uid") for o in meta.get("ownerReferences", ())
            )
            if mine and meta.get("annotations", {}).get(names.ARTIFACT_HASH) == digest:
                return int(deployment.get("spec", {}).get("replicas") or 0)
        return 0
