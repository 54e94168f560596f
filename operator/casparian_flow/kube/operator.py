"""The operator process: Sentinel and ledger, watches, and what brings the cluster in order.

    threads     sentinel: loop and sockets      kopf: watches          lease: renews
                ledger: the writer              work-1 … work-4        resync: lists, every 15 s
                                                scale: every second    health: HTTP

They share the store of bodies and the queue of keys. None waits for another but `work-*`, which
ask the Sentinel and the API server: a slow commit holds up an object, never a watch.

Order of starting: Lease, ledger with an epoch above the Lease's and the ledger's own, durable;
then sockets, Lease again with that epoch; then a first look at everything, then watches.
"""

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Final

from casparian_flow.config import Settings, load_settings
from casparian_flow.config_trust import trust_source
from casparian_flow.domain.clock import Clock, SystemClock
from casparian_flow.domain.errors import (
    CasparianError,
    ConfigError,
    LedgerUnavailableError,
    SentinelUnreachableError,
)
from casparian_flow.kube import names
from casparian_flow.kube.autoscaler import Autoscaler
from casparian_flow.kube.client import KubeClient
from casparian_flow.kube.controller import Controller
from casparian_flow.kube.curve_keys import KeyRing, folder_of
from casparian_flow.kube.gather import Surroundings
from casparian_flow.kube.handlers import Watches
from casparian_flow.kube.health import Check, HealthServer
from casparian_flow.kube.kinds import LEASE, OWN, Body, Ref, ref_of
from casparian_flow.kube.lease import UNSEEN_S, Holder, LeaseKeeper
from casparian_flow.kube.ledger_view import LedgerLooks
from casparian_flow.kube.manifests_common import Site
from casparian_flow.kube.pod_settings import site_of
from casparian_flow.kube.requests import Requests
from casparian_flow.kube.resync import Resync, WatchJudge
from casparian_flow.kube.service_access import BACKUP, MCP, keep_service_secret, service_keys
from casparian_flow.kube.store import Store
from casparian_flow.kube.token_review import reviewer
from casparian_flow.kube.work_queue import WorkQueue
from casparian_flow.sentinel.admission import Admission
from casparian_flow.sentinel.control_plane import ControlPlane
from casparian_flow.sentinel.server import Sentinel, SentinelConfig, config_of
from casparian_flow.trust.rules import TrustSource

log = logging.getLogger(__name__)

WORKERS: Final = 4
"""Objects that are brought in order at a time."""
START_S: Final = 180.0
STOP_S: Final = 30.0
NAMESPACE_FILE: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
EXIT_LOST: Final = 10
"""The process ends with this when another holds the Lease."""


@dataclass(frozen=True, slots=True)
class OperatorConfig:
    """What the operator needs beside the cluster.

    Attributes:
        namespace: its own.
        watched: namespaces whose objects it looks after.
        curve: folder of keys; beside the ledger.
        holder: which process this is.
    """

    settings: Settings
    sentinel: SentinelConfig
    namespace: str
    watched: tuple[str, ...]
    curve: Path
    holder: Holder


def config_from(settings: Settings, environment: Mapping[str, str] = os.environ) -> OperatorConfig:
    """The operator's configuration from its settings and its pod's variables.

    Raises:
        ConfigError: the worker image or the namespace is not known.
    """
    own = settings.operator
    namespace = own.namespace or environment.get("POD_NAMESPACE", "") or _pod_namespace()
    if not namespace:
        raise ConfigError(
            "the operator's namespace is not known",
            hint="Set [operator] namespace, or run it in a pod.",
        )
    if not own.worker_image:
        raise ConfigError(
            "no image for workers is known", hint="Set [operator] worker_image, as the chart does."
        )
    curve = folder_of(settings.database.db_location)
    pod = environment.get("POD_NAME", "") or environment.get("HOSTNAME", "operator")
    uid = environment.get("POD_UID", "") or pod
    return OperatorConfig(
        settings=settings,
        sentinel=replace(
            config_of(settings),
            metrics_port=own.metrics_port,
            metrics_host=own.listen_host,
            curve_dir=curve,
            remote_control_address=f"tcp://{own.listen_host}:{names.CONTROL_PORT}",
            loopback_control_address=f"tcp://127.0.0.1:{names.LOOPBACK_PORT}",
            wire_deploy=False,
            # On a cluster decisions are made on Approval objects, and judged there.
            allow_self_approval=False,
        ),
        namespace=namespace,
        watched=own.watch_namespaces or (namespace,),
        curve=curve,
        holder=Holder.of_pod(pod, uid),
    )


def _pod_namespace() -> str:
    try:
        return NAMESPACE_FILE.read_text().strip()
    except OSError:
        return ""


class Operator:
    """`run` blocks until `stop`, a signal, or the loss of the Lease; see the module's text."""

    def __init__(
        self,
        config: OperatorConfig,
        client: KubeClient,
        *,
        clock: Clock | None = None,
        trust: TrustSource | None = None,
    ) -> None:
        self.config = config
        self.client = client
        self.store = Store()
        self._clock = clock or SystemClock()
        self.queue: WorkQueue[Ref] = WorkQueue(self._clock)
        self.judge = WatchJudge(self._clock)
        self.admission = Admission(reviewer(client))
        self.health: HealthServer | None = None
        self._stopping = threading.Event()
        self._synced = threading.Event()
        self.exit_code = 0
        self._sentinel: Sentinel | None = None
        self._sentinel_error: BaseException | None = None
        self._keys = KeyRing.open(config.curve)
        self._site: Site | None = None
        self._settings = config.settings
        self._threads: list[threading.Thread] = []
        own = config.settings.operator
        self.lease = LeaseKeeper(
            client, config.namespace, f"{own.name}-operator", config.holder, self._clock, self._lost
        )
        self.looks = LedgerLooks(lambda: self.control, self._clock)
        self.autoscaler = Autoscaler(
            self.looks, self.store, self.queue, self._clock, config.settings.worker.slots or 1
        )
        around = Surroundings(
            store=self.store,
            client=client,
            looks=self.looks,
            control=lambda: self.control,
            trust=trust or trust_source(config.settings),
            site=lambda: self.site,
            keys=lambda: self._keys,
            replicas=self.autoscaler.replicas,
            clock=self._clock,
            kept_versions=own.kept_versions,
        )
        self.controller = Controller(around, self.queue, self.admission)
        self.requests = Requests(client, self.store, frozenset(config.watched))
        self.resync = Resync(
            client,
            self.store,
            self.queue,
            self.judge,
            self._clock,
            namespaces=config.watched,
            every_s=own.resync_seconds,
            done=self._looked,
        )
        self.watches = Watches(
            client, config.watched, (config.namespace, self.lease.name), self._heard
        )

    # -- what parts ask for -------------------------------------------------------------------

    @property
    def control(self) -> ControlPlane:
        """The Sentinel's control plane, in this process.

        Raises:
            SentinelUnreachableError: it does not serve.
        """
        return self.sentinel.control

    @property
    def sentinel(self) -> Sentinel:
        """Raises:
        SentinelUnreachableError: there is none yet.
        """
        if self._sentinel is None:
            raise SentinelUnreachableError(
                "the operator has not begun yet", hint="It waits for its Lease, or for the ledger."
            )
        return self._sentinel

    def wait_started(self, timeout_s: float) -> bool:
        """Wait until everything was looked at once; False if that took longer."""
        return self._synced.wait(timeout_s)

    @property
    def site(self) -> Site:
        """What pods share, as the settings now are."""
        if self._site is None:
            self._site = site_of(self._settings, self.config.namespace, self._keys)
        return self._site

    # -- life ---------------------------------------------------------------------------------

    def stop(self) -> None:
        """End `run`; from anywhere."""
        self._stopping.set()

    def stopped(self) -> bool:
        """Whether it is ending, or has ended."""
        return self._stopping.is_set()

    def run(self) -> int:
        """Serve; returns the exit code.

        Raises:
            CasparianError: it cannot start.
        """
        with ExitStack() as stack:
            stack.enter_context(_stop_on_signals(self.stop))
            self._open_health(stack)
            if not self.lease.acquire(self._stopping):
                return 0
            self._start_sentinel(stack)
            self.lease.record_epoch(self.sentinel.epoch)
            self._start_threads(stack)
            log.info("operator ready: looks after %s", ", ".join(self.config.watched))
            self._stopping.wait()
        if self._sentinel_error is not None:
            raise self._sentinel_error
        return self.exit_code

    def _start_sentinel(self, stack: ExitStack) -> None:
        self._keys.write_server(self.config.curve)
        own = replace(self.config.sentinel, admission=self.admission, epoch_floor=self.lease.epoch)
        self._sentinel = sentinel = Sentinel(own, clock=self._clock)
        thread = threading.Thread(target=self._run_sentinel, name="sentinel", daemon=True)
        thread.start()
        self._threads.append(thread)
        stack.callback(thread.join, STOP_S)
        stack.callback(sentinel.stop)
        deadline = self._clock.now().mono + START_S
        while not sentinel.wait_started(0.2):
            if self._sentinel_error is not None:
                raise self._sentinel_error
            if self._stopping.is_set() or self._clock.now().mono > deadline:
                raise LedgerUnavailableError("the Sentinel did not start")

    def _run_sentinel(self) -> None:
        try:
            self.sentinel.run()
        except CasparianError as error:
            self._sentinel_error = error
        finally:
            self.stop()

    def _start_threads(self, stack: ExitStack) -> None:
        parts = [(f"work-{n}", self.controller.work) for n in range(1, WORKERS + 1)]
        parts += [
            ("lease", self.lease.run),
            ("resync", self.resync.run),
            ("scale", self.autoscaler.run),
        ]
        for name, part in parts:
            thread = threading.Thread(target=part, name=name, daemon=True)
            self._threads.append(thread)
            thread.start()
        stack.callback(self._join)
        for close in (self.lease.close, self.resync.close, self.autoscaler.close, self.queue.close):
            stack.callback(close)
        # What a list cannot find, a watch cannot either: kinds that are not installed yet.
        while not self._synced.wait(0.2) and not self._stopping.is_set():
            pass
        self.watches.start()
        stack.callback(self.watches.stop)

    def _join(self) -> None:
        """What they have begun is finished while the Sentinel still answers."""
        for thread in self._threads:
            if thread.name != "sentinel":
                thread.join(STOP_S)

    def _lost(self, why: str) -> None:
        """Another is the operator. Nothing more may be written, so this ends at once."""
        log.critical("%s: this one ends", why)
        self.exit_code = EXIT_LOST
        self.queue.close()
        if self._sentinel is not None:
            # Twice: it does not wait for jobs that run.
            self._sentinel.stop()
            self._sentinel.stop()
        self.stop()

    # -- news ---------------------------------------------------------------------------------

    def _heard(self, event: str, body: Body) -> None:
        """A watch's event; in kopf's loop, so nothing here may wait."""
        if body["kind"] == LEASE.name:
            self.lease.heard(body)
            return
        gone = event == "DELETED"
        ours = body["kind"] in {kind.name for kind in OWN}
        if ours:
            self.judge.heard(body, gone=gone)
        if gone:
            self.store.drop(body)
        elif not self.store.put(body):
            return  # known already: our own write, as a rule
        for ref in [ref_of(body)] if ours else _owners(body):
            self.queue.add(ref)

    def _looked(self, namespaces: Sequence[str]) -> None:
        """After each look at the cluster; all of these namespaces is known."""
        self._reload()
        self.requests.make(self.looks.requests(self._clock.now().mono))
        self.controller.retire_orphans(namespaces)
        self._let_services_in()
        self._synced.set()

    def _let_services_in(self) -> None:
        """Have the keys of backups and of the MCP server admitted and in their Secrets, if there
        are to be any."""
        own, namespace = self._settings.operator, self.config.namespace
        for service, account in ((BACKUP, own.backup_account), (MCP, own.mcp_account)):
            keys = service_keys(service, self._keys, namespace, account)
            self.controller.admit(Ref(f"ServiceAccount/{service}", namespace, account), keys)
            if account and keep_service_secret(
                self.client, service, self._keys, namespace, account
            ):
                log.info("wrote the key of %s into Secret %s/%s", service, namespace, account)

    def _reload(self) -> None:
        """Take settings and keys in that have changed: whom pods trust, master keys."""
        file = self.config.settings.file
        try:
            self._keys = KeyRing.open(self.config.curve)
            if file is not None:
                self._settings = load_settings(file)
            self._site = None
        except CasparianError as error:
            log.error("%s; what was in force before stays", error.with_hint())

    # -- health -------------------------------------------------------------------------------

    def _open_health(self, stack: ExitStack) -> None:
        own = self.config.settings.operator
        if not own.health_port:
            return
        checks = {"/livez": self.live_checks(), "/readyz": self.ready_checks()}
        self.health = HealthServer(own.listen_host, own.health_port, checks)
        stack.callback(self.health.close)

    def live_checks(self) -> dict[str, Check]:
        return {
            "threads": self._dead_thread,
            "watch": self._dead_watch,
        }

    def ready_checks(self) -> dict[str, Check]:
        return {"started": lambda: "" if self._synced.is_set() else "not started yet"}

    def _dead_thread(self) -> str:
        dead = [t.name for t in self._threads if not t.is_alive()]
        return f"{dead[0]} has ended" if dead and not self._stopping.is_set() else ""

    def _dead_watch(self) -> str:
        if not self._synced.is_set():
            return ""
        unseen = self.lease.unseen_s()
        if unseen > UNSEEN_S:
            return f"a renewal of the Lease has not been told of for {unseen:.0f} s"
        silent = self.judge.silent()
        return f"no watch tells of {silent}" if silent else ""


def _owners(body: Body) -> list[Ref]:
    """Whose object this is; of none in particular: nobody's."""
    namespace = body["metadata"]["namespace"]
    ours = {kind.name for kind in OWN}
    return [
        Ref(owner["kind"], namespace, owner["name"])
        for owner in body["metadata"].get("ownerReferences", ())
        if owner.get("kind") in ours
    ]


@contextmanager
def _stop_on_signals(stop: Callable[[], None]) -> Iterator[None]:
    """Stop upon SIGTERM and SIGINT; only the main thread may set handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, _: FrameType | None) -> None:
        log.info("%s: stopping", signal.Signals(number).name)
        stop()

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_operator(settings: Settings) -> int:
    """Run the operator that the settings describe; returns the exit code.

    Raises:
        CasparianError: it cannot start; says why and what to do.
    """
    client = KubeClient.connect()
    try:
        return Operator(config_from(settings), client).run()
    finally:
        client.close()
