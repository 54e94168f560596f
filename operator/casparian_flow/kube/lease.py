"""The operator's Lease: who of several is the one, and the highest epoch that there has been.

The Lease tells operators apart where the volume of the ledger cannot (docs/kubernetes.md says what
remains). Its holder is the pod's uid and a nonce of the process. Who sees another holder ends at
once; who cannot reach the API server goes on, as nobody can take the Lease meanwhile either.

Renewing it is also the proof that watches work: the renewal has to come back through one.
"""

import logging
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from casparian_flow.domain.clock import Clock, utc
from casparian_flow.domain.errors import ConflictError
from casparian_flow.kube import names
from casparian_flow.kube.client import KubeClient, KubeError, KubeUnreachableError
from casparian_flow.kube.kinds import LEASE, POD, Body, Manifest

log = logging.getLogger(__name__)

DURATION_S: Final = 30
RENEW_S: Final = 8.0
POLL_S: Final = 1.0
UNSEEN_S: Final = 60.0
"""A renewal that has not come back through the watch for so long: the watch is dead."""
EPOCH: Final = f"{names.GROUP}/epoch"
POD_NAME: Final = f"{names.GROUP}/pod"


@dataclass(frozen=True, slots=True)
class Holder:
    """One process of the operator."""

    pod: str
    pod_uid: str
    nonce: str

    @classmethod
    def of_pod(cls, pod: str, uid: str) -> "Holder":
        return cls(pod, uid, secrets.token_hex(4))

    @property
    def identity(self) -> str:
        return f"{self.pod_uid}_{self.nonce}"


class LeaseKeeper:
    """Takes and keeps the Lease. `acquire` blocks; `run` is for a thread of its own.

    Args:
        lost: called once if another holds the Lease.
    """

    def __init__(
        self,
        client: KubeClient,
        namespace: str,
        name: str,
        holder: Holder,
        clock: Clock,
        lost: Callable[[str], None],
    ) -> None:
        self._client = client
        self.namespace, self.name = namespace, name
        self._holder = holder
        self._clock = clock
        self._lost = lost
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._unseen: tuple[str, float] | None = None
        self.epoch = 0
        """The highest that the Lease knows of."""

    # -- taking it ----------------------------------------------------------------------------

    def acquire(self, stop: threading.Event) -> bool:
        """Take the Lease, once nobody else holds it; False if `stop` came first.

        Who holds it and is of this very pod, or of one that is gone, holds it no more.
        """
        observed: tuple[str, float] | None = None
        told = False
        while not stop.is_set():
            try:
                lease = self._client.get(LEASE, self.namespace, self.name)
                mark = _mark(lease)
                now = self._clock.now().mono
                if observed is None or observed[0] != mark:
                    # Times in the Lease are another machine's: what counts is that it changes.
                    observed = (mark, now)
                if lease is None or self._free(lease, since=now - observed[1]):
                    self._take(lease)
                    return True
                if not told:
                    log.info("waiting for the Lease, held by %s", _holder(lease))
                    told = True
            except KubeUnreachableError as error:
                log.warning("the Lease cannot be taken yet: %s", error)
            except KubeError as error:
                if error.status != 409:
                    raise
            stop.wait(POLL_S)
        return False

    def _free(self, lease: Body, *, since: float) -> bool:
        holder = _holder(lease)
        if not holder or holder.partition("_")[0] == self._holder.pod_uid:
            return True
        if since >= float(lease["spec"].get("leaseDurationSeconds") or DURATION_S):
            return True
        pod = lease["metadata"].get("annotations", {}).get(POD_NAME, "")
        body = self._client.get(POD, self.namespace, pod) if pod else None
        uid = "" if body is None else body["metadata"].get("uid", "")
        return bool(pod) and uid != holder.partition("_")[0]

    def _take(self, lease: Body | None) -> None:
        if lease is not None:
            self.epoch = _epoch(lease)
        self._write(lease)
        log.info("the Lease is ours: %s", self._holder.identity)

    # -- keeping it ---------------------------------------------------------------------------

    def record_epoch(self, epoch: int) -> None:
        """Write down an epoch that has begun; `run` does, should the API server be away."""
        self.epoch = max(self.epoch, epoch)
        self._renew()

    def run(self) -> None:
        """Renew until `close`, or until another is seen to hold it."""
        while not self._stopping.wait(RENEW_S):
            if not self._renew():
                return

    def _renew(self) -> bool:
        try:
            lease = self._client.get(LEASE, self.namespace, self.name)
            holder = _holder(lease) if lease is not None else ""
            if lease is not None and holder not in {"", self._holder.identity}:
                self._lost(f"the Lease is held by {holder}")
                return False
            self._write(lease)
        except KubeUnreachableError as error:
            log.warning("the Lease is not renewed: %s; work goes on", error)
            self._excuse()
        except KubeError as error:
            log.warning("the Lease is not renewed: %s", error)
        return True

    def _write(self, lease: Body | None) -> None:
        now = self._clock.now()
        at = f"{utc(now.wall_us).isoformat(timespec='microseconds')}Z"
        spec: dict[str, Any] = dict(lease["spec"]) if lease is not None else {}
        if spec.get("holderIdentity") != self._holder.identity:
            spec["acquireTime"] = at
            spec["leaseTransitions"] = int(spec.get("leaseTransitions") or 0) + 1
        spec |= {
            "holderIdentity": self._holder.identity,
            "leaseDurationSeconds": DURATION_S,
            "renewTime": at,
        }
        annotations = {EPOCH: str(self.epoch), POD_NAME: self._holder.pod}
        if lease is None:
            written = self._client.create(self._manifest(spec, annotations))
        else:
            meta = dict(lease["metadata"])
            meta["annotations"] = {**meta.get("annotations", {}), **annotations}
            written = self._client.replace_lease({**lease, "metadata": meta, "spec": spec})
        with self._lock:
            if self._unseen is None:
                self._unseen = (str(written["metadata"].get("resourceVersion", "")), now.mono)

    def _manifest(self, spec: Manifest, annotations: dict[str, str]) -> Manifest:
        return {
            "apiVersion": LEASE.api_version,
            "kind": LEASE.name,
            "metadata": {
                "name": self.name,
                "namespace": self.namespace,
                "annotations": annotations,
                "labels": {names.NAME_LABEL: "casparian", names.COMPONENT_LABEL: "operator"},
            },
            "spec": spec,
        }

    def close(self) -> None:
        self._stopping.set()

    # -- the watched round trip ---------------------------------------------------------------

    def heard(self, lease: Body) -> None:
        """A watch has told of the Lease."""
        holder = _holder(lease)
        if holder not in {"", self._holder.identity} and self._newer_than_ours(lease):
            self._lost(f"the Lease is held by {holder}")
        with self._lock:
            if self._unseen is None:
                return
            seen = str(lease["metadata"].get("resourceVersion", ""))
            if _number(seen) >= _number(self._unseen[0]):
                self._unseen = None

    def _newer_than_ours(self, lease: Body) -> bool:
        """A watch may tell of the holder before us, late."""
        with self._lock:
            if self._unseen is None:
                return True
            version = str(lease["metadata"].get("resourceVersion", ""))
            return _number(version) > _number(self._unseen[0])

    def _excuse(self) -> None:
        """No watch can tell of anything while the API server is away."""
        with self._lock:
            if self._unseen is not None:
                self._unseen = self._unseen[0], self._clock.now().mono

    def unseen_s(self) -> float:
        """For how long a renewal has not come back through the watch; 0 if all have."""
        with self._lock:
            return 0.0 if self._unseen is None else self._clock.now().mono - self._unseen[1]


def _holder(lease: Body) -> str:
    return str(lease.get("spec", {}).get("holderIdentity") or "")


def _mark(lease: Body | None) -> str:
    return "" if lease is None else str(lease["metadata"].get("resourceVersion", ""))


def _epoch(lease: Body) -> int:
    text = str(lease["metadata"].get("annotations", {}).get(EPOCH, "0"))
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise ConflictError(
            f"the Lease's epoch {text[:40]!r} is no number",
            hint=f"Correct the annotation {EPOCH}: the highest epoch that there has been.",
        )
    return int(text)


def _number(version: str) -> int:
    return int(version) if version.isascii() and version.isdigit() else 0
