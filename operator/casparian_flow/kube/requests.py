"""Makes an Approval object for every request in the ledger that waits for a person."""

import logging
from collections.abc import Mapping

from casparian_flow.domain.scoped_names import split
from casparian_flow.kube.client import KubeClient, KubeError, KubeUnreachableError
from casparian_flow.kube.kinds import Ref, ref_of
from casparian_flow.kube.reconcile_approval import OPEN, approval_object, operation_of
from casparian_flow.kube.store import Store
from casparian_flow.protocol.http_types import Approval as Request

log = logging.getLogger(__name__)


class Requests:
    """Args:
    namespaces: those that the operator looks after; requests about plugins of others, or of
        none, are decided by the command line.
    """

    def __init__(self, client: KubeClient, store: Store, namespaces: frozenset[str]) -> None:
        self._client = client
        self._store = store
        self._namespaces = namespaces

    def make(self, requests: Mapping[str, Request]) -> list[Ref]:
        """Make the objects that are missing; returns them.

        Raises:
            KubeUnreachableError: the API server is away.
        """
        made = []
        for request in requests.values():
            if request.status not in OPEN:
                continue
            namespace = split(str(operation_of(request)["plugin"])).namespace
            if namespace not in self._namespaces:
                continue
            manifest = approval_object(request, namespace)
            ref = ref_of(manifest)
            if self._store.get(ref) is not None:
                continue
            try:
                # Not by apply: a decision is nobody's but a person's, also in an object that was
                # made a moment ago.
                self._store.put(self._client.create(manifest))
            except KubeUnreachableError:
                raise
            except KubeError as error:
                if error.status != 409:
                    # One request, or one namespace, must not hold up the others.
                    log.error("no Approval for request %s: %s", request.approval_id, error)
                    continue
            made.append(ref)
        return made
