"""kopf's part: watches, and nothing else.

Handlers put what they hear into the store and a key into the queue, so that a watch waits for
nobody: neither for a slow commit nor for the API server's answer to something else. They are
handlers of raw events, which leave no trace on objects: kopf keeps no annotation of the last
handled spec (a bundle is large) and adds no finalizer, which would hold up a `kubectl delete` while
the operator is away. Timers, daemons and handlers of deletions would each add one.
"""

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import kopf

from casparian_flow.kube.client import MANAGED, KubeClient
from casparian_flow.kube.kinds import DEPLOYMENT, JOB, LEASE, OWN, Body, Kind

log = logging.getLogger(__name__)

Heard = Callable[[str, Body], None]
"""Told of each event: its type ("ADDED", "MODIFIED", "DELETED", "" for one of a first list)."""
SERVER_TIMEOUT_S = 240
"""A watch is begun anew after this; it goes on where the last one ended. The API server takes
whole seconds only."""
SILENCE_S = 70.0
"""Without even a bookmark, which the API server sends every minute: the connection is dead."""
CONNECT_S = 10.0
RESTART_S = 3.0
CLOSING_S = 0.3


class Watches:
    """Runs kopf in a thread with a loop of its own, and starts it anew should it end.

    Args:
        namespaces: whose objects are watched.
        lease: namespace and name of the operator's Lease, which is watched too.
        heard: called in kopf's loop; it must return at once.
    """

    def __init__(
        self,
        client: KubeClient,
        namespaces: Sequence[str],
        lease: tuple[str, str],
        heard: Heard,
    ) -> None:
        self._client = client
        self._namespaces = list(namespaces)
        self._lease_namespace, self._lease = lease
        self._heard = heard
        self._stopping = threading.Event()
        self._stop_flags: list[threading.Event] = []
        self._thread = threading.Thread(target=self._run, name="kopf", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        for flag in self._stop_flags:
            flag.set()
        if self._thread.ident is not None:
            self._thread.join(RESTART_S + 10)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def _run(self) -> None:
        # It tells of every event that was heard.
        logging.getLogger("kopf").setLevel(logging.WARNING)
        # And that it takes no signals in a thread, which is as it should be.
        logging.getLogger("kopf._core.reactor.running").setLevel(logging.ERROR)
        while not self._stopping.is_set():
            self._stop_flags = [threading.Event(), threading.Event()]
            try:
                asyncio.run(self._watch())
            except Exception:
                # As when the API server is away at the start. What runs goes on without it.
                log.exception("the watches ended; they are begun anew")
            self._stopping.wait(RESTART_S)

    async def _watch(self) -> None:
        """Both end as soon as one does, so that none goes silent unnoticed."""
        objects, lease = self._stop_flags
        tasks = [
            asyncio.create_task(self._operator(OWN, MADE_WATCHED, self._namespaces, objects)),
            asyncio.create_task(self._operator((LEASE,), (), [self._lease_namespace], lease)),
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            objects.set()
            lease.set()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            # TLS connections take a moment to close after their session has.
            await asyncio.sleep(CLOSING_S)
        for result in results:
            if isinstance(result, Exception):
                raise result

    async def _operator(
        self,
        own: Sequence[Kind],
        made: Sequence[Kind],
        namespaces: list[str],
        stop: threading.Event,
    ) -> None:
        await kopf.operator(
            registry=self._registry((*own, *made)),
            settings=settings_of(self._lease),
            standalone=True,
            # Its own would begin with the user's name, and a pod's user has none.
            identity=self._lease,  # type: ignore[arg-type]
            namespaces=namespaces,
            stop_flag=stop,
        )

    def _registry(self, kinds: Sequence[Kind]) -> kopf.OperatorRegistry:
        registry = kopf.OperatorRegistry()
        kopf.on.login(registry=registry)(self._login)
        for kind in kinds:
            group, _, version = kind.api_version.rpartition("/")
            kopf.on.event(group, version, kind.plural, registry=registry)(self._handler(kind))
        return registry

    def _handler(self, kind: Kind) -> Any:
        async def hear(event: Any, **_: Any) -> None:
            # Items of a list do not say what they are.
            body = {"apiVersion": kind.api_version, "kind": kind.name, **event["object"]}
            self._heard(event["type"] or "", body)

        return hear

    async def _login(self, **_: Any) -> kopf.ConnectionInfo:
        """The same credentials as every other request; asked for again when they have expired."""
        return kopf.ConnectionInfo(**self._client.connection())


MADE_WATCHED = (DEPLOYMENT, JOB)
"""Kinds of ours whose status tells something; the others are looked at by resyncs."""


def settings_of(lease: str) -> kopf.OperatorSettings:
    """kopf's settings: watch the given namespaces, write nothing."""
    settings = kopf.OperatorSettings()
    settings.posting.enabled = False
    settings.peering.standalone = True
    settings.scanning.disabled = True
    settings.watching.server_timeout = SERVER_TIMEOUT_S
    settings.watching.client_timeout = SERVER_TIMEOUT_S + CONNECT_S
    settings.watching.connect_timeout = CONNECT_S
    settings.watching.inactivity_timeout = SILENCE_S
    settings.networking.connect_timeout = CONNECT_S
    settings.networking.request_timeout = 30.0
    for kind in MADE_WATCHED:
        group, _, version = kind.api_version.rpartition("/")
        settings.watching.label_selectors[group, version, kind.plural] = MANAGED
    group, _, version = LEASE.api_version.rpartition("/")
    settings.watching.field_selectors[group, version, LEASE.plural] = f"metadata.name={lease}"
    settings.persistence.diffbase_storage = _NoStorage()
    return settings


class _NoStorage(kopf.DiffBaseStorage):
    """Keeps nothing of what was handled last, whatever kind of handler there may be one day: a
    bundle in `spec.source` would be written to the object a second time, as an annotation."""

    def fetch(self, *, body: kopf.Body) -> None:
        return None

    def store(self, *, body: kopf.Body, patch: kopf.Patch, essence: kopf.BodyEssence) -> None:
        return None
