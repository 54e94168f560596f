"""Looks at everything again, every few seconds: what was deleted or edited is put right.

One list for each kind and namespace, and a request for what differs; for an unchanged world no
write. It is a task of its own, since kopf's timers would put a finalizer on every object.

A list also tells whether the watches work: an object that a list has had for a minute in a version
that no watch has told of was told of by none.
"""

import logging
import threading
from collections.abc import Callable, Sequence

from casparian_flow.domain.clock import Clock
from casparian_flow.domain.errors import CasparianError
from casparian_flow.kube.client import MANAGED, KubeClient, KubeError, KubeUnreachableError
from casparian_flow.kube.kinds import CLAIM, MADE, OWN, Body, Kind, Ref, ref_of
from casparian_flow.kube.store import Store
from casparian_flow.kube.work_queue import WorkQueue

log = logging.getLogger(__name__)

SILENT_S = 60.0
"""After which a watch should have told of what a list had."""


class WatchJudge:
    """Compares what lists and watches tell of the kinds that are watched."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._heard: dict[Ref, int] = {}
        self._missing: dict[Ref, tuple[int, float]] = {}

    def heard(self, body: Body, *, gone: bool) -> None:
        """A watch has told of an object."""
        ref, version = ref_of(body), _version(body)
        with self._lock:
            if gone:
                self._heard.pop(ref, None)
                self._missing.pop(ref, None)
                return
            self._heard[ref] = max(version, self._heard.get(ref, 0))
            missing = self._missing.get(ref)
            if missing is not None and missing[0] <= version:
                del self._missing[ref]

    def listed(self, kind: Kind, namespace: str, bodies: Sequence[Body]) -> None:
        """A list has had these objects."""
        now = self._clock.now().mono
        with self._lock:
            refs = set()
            for body in bodies:
                ref, version = ref_of(body), _version(body)
                refs.add(ref)
                if self._heard.get(ref, 0) < version:
                    self._missing.setdefault(ref, (version, now))
            for known in (self._heard, self._missing):
                for ref in [r for r in known if (r.kind, r.namespace) == (kind.name, namespace)]:
                    if ref not in refs:
                        del known[ref]

    def excuse(self) -> None:
        """The API server is away: no watch can tell of anything meanwhile."""
        now = self._clock.now().mono
        with self._lock:
            self._missing = {ref: (version, now) for ref, (version, _) in self._missing.items()}

    def silent(self) -> str:
        """An object that no watch tells of, "" if there is none."""
        now = self._clock.now().mono
        with self._lock:
            for ref, (_, since) in self._missing.items():
                if now - since > SILENT_S:
                    return f"{ref.kind} {ref.namespace}/{ref.name}"
        return ""


class Resync:
    """`run` is for a thread of its own.

    Args:
        namespaces: whose objects are looked after.
        every_s: seconds between two looks.
        done: called after each look with the namespaces that are wholly known: one in which the
            operator may do nothing (any more) holds up no other.
    """

    def __init__(
        self,
        client: KubeClient,
        store: Store,
        queue: WorkQueue[Ref],
        judge: WatchJudge,
        clock: Clock,
        *,
        namespaces: Sequence[str],
        every_s: float,
        done: Callable[[Sequence[str]], None],
    ) -> None:
        self._client = client
        self._store = store
        self._queue = queue
        self._judge = judge
        self._clock = clock
        self._namespaces = tuple(namespaces)
        self._every_s = every_s
        self._done = done
        self._stopping = threading.Event()

    def run(self) -> None:
        """Look again and again until `close`."""
        while not self._stopping.is_set():
            began = self._clock.now().mono
            try:
                self.look()
            except KubeUnreachableError as error:
                self._judge.excuse()
                log.warning("looking at all objects failed: %s", error)
            except CasparianError as error:
                log.warning("looking at all objects failed: %s", error)
            except Exception:
                log.exception("looking at all objects failed")
            spent = self._clock.now().mono - began
            self._stopping.wait(max(0.5, self._every_s - spent))

    def close(self) -> None:
        self._stopping.set()

    def look(self) -> None:
        """List everything, once, and have every object of ours looked at.

        Raises:
            KubeUnreachableError: the API server is away; what was listed until then counts.
        """
        known = []
        for namespace in self._namespaces:
            try:
                wanted = self._list(namespace)
            except KubeUnreachableError:
                raise
            except KubeError as error:
                log.error("namespace %s cannot be looked at: %s", namespace, error)
                continue
            known.append(namespace)
            for ref in wanted:
                self._queue.add(ref)
        self._done(known)

    def _list(self, namespace: str) -> set[Ref]:
        """Take in all that a namespace has; returns what is there of ours, or was.

        Nothing is queued before everything is known: what is gone is judged by what is there.
        """
        for kind in MADE:
            # Claims are people's too: their access modes decide where pods can be.
            selector = "" if kind is CLAIM else MANAGED
            found = self._client.listing(kind, namespace, selector=selector)
            self._store.replace(kind, namespace, found.items, found.version)
        wanted: set[Ref] = set()
        for kind in OWN:
            found = self._client.listing(kind, namespace)
            wanted |= self._store.replace(kind, namespace, found.items, found.version)
            self._judge.listed(kind, namespace, found.items)
            wanted |= {ref_of(body) for body in found.items}
        return wanted


def _version(body: Body) -> int:
    text = str(body["metadata"].get("resourceVersion", ""))
    return int(text) if text.isascii() and text.isdigit() else 0
