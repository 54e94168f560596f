"""`casparian --context`: a way into a pod, and decisions in the caller's name.

The API server here has no nodes, so the last step, from it to the pod, is a socket of the test's.
"""

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from kube_kinds import install, manifest
from kube_kit import ApiClient, ApiServer
from kube_people import await_stamp, operator_of, people

from casparian_flow.cli.app import App
from casparian_flow.cli.app import run as run_cli
from casparian_flow.domain.errors import ConfigError, NotFoundError, SentinelUnreachableError
from casparian_flow.kube.client import KubeClient, KubeError
from casparian_flow.kube.context import ClusterSession, object_of, operator_pod
from casparian_flow.kube.forward import Forward, dial_pod
from casparian_flow.kube.names import API_VERSION
from casparian_flow.protocol.http_types import ApprovalOperation, ApprovalStatus
from casparian_flow.sentinel.control import remote
from casparian_flow.sentinel.server import Sentinel, SentinelConfig


@pytest.fixture
def sentinel(tmp_path: Path) -> Iterator[Sentinel]:
    """A Sentinel with a control socket on its loopback, as in the operator's pod."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    running = Sentinel(
        SentinelConfig(
            bind_address="tcp://127.0.0.1:*",
            database=tmp_path / "ledger.duckdb",
            loopback_control_address=f"tcp://127.0.0.1:{port}",
        )
    )
    thread = threading.Thread(target=running.run)
    thread.start()
    assert running.wait_started(60)
    yield running
    running.stop()
    thread.join(60)


def loopback_of(sentinel: Sentinel) -> socket.socket:
    address = sentinel.config.loopback_control_address
    return socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])))


@pytest.fixture
def forward(sentinel: Sentinel) -> Iterator[Forward]:
    found = Forward(lambda: loopback_of(sentinel))
    yield found
    found.close()


def test_the_control_plane_is_asked_through_a_socket_that_only_its_user_can_reach(
    forward: Forward,
) -> None:
    path = Path(forward.address.removeprefix("ipc://"))
    assert path.parent.stat().st_mode & 0o077 == 0
    with contextlib.closing(remote(forward.address)) as control:
        assert control.list_jobs() == []
        threads = [threading.Thread(target=control.status) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert control.status()["sentinel"] is not None
    forward.close()
    assert not path.parent.exists()


def test_a_way_that_breaks_is_made_anew_and_a_refusal_is_told_at_once(sentinel: Sentinel) -> None:
    made: list[socket.socket] = []

    def dial() -> socket.socket:
        made.append(loopback_of(sentinel))
        return made[-1]

    forward = Forward(dial)
    with contextlib.closing(remote(forward.address)) as control:
        control.ping()
        made[-1].shutdown(socket.SHUT_RDWR)
        while len(made) == 1:
            # A call that is under way when its connection ends says so.
            with contextlib.suppress(SentinelUnreachableError):
                control.ping()
        assert control.list_jobs() == []
    forward.close()

    def refused() -> socket.socket:
        raise KubeError("no", status=403)

    with pytest.raises(KubeError):
        Forward(refused)


def client_of(person: ApiClient) -> KubeClient:
    return KubeClient(KubeClient.connect(person.kubeconfig).configuration)


def test_who_may_not_forward_ports_is_told_what_it_needs(api: ApiServer, space: str) -> None:
    with pytest.raises(KubeError, match="can be reached") as refused:
        dial_pod(client_of(api.client_for("eve")), space, "casparian-operator-0", 5557)
    assert refused.value.status == 403
    assert "pods/portforward" in refused.value.hint


def test_the_operators_pod_is_looked_for_where_it_usually_is(api: ApiServer, space: str) -> None:
    admin = client_of(api.client)
    with pytest.raises(NotFoundError, match="no operator runs in"):
        operator_pod(admin, [space, "default"])
    labels = {"app.kubernetes.io/name": "casparian", "app.kubernetes.io/component": "operator"}
    api.account(space, "casparian-operator")
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "casparian-operator-0", "namespace": space, "labels": labels},
        "spec": {
            "containers": [{"name": "operator", "image": "none"}],
            "serviceAccountName": "casparian-operator",
        },
    }
    api.client.create(pod)
    with pytest.raises(NotFoundError):
        operator_pod(admin, [space])  # it does not run yet
    running = {"status": {"phase": "Running"}}
    api.client.patch("v1", "Pod", "casparian-operator-0", running, space, subresource="status")
    assert operator_pod(admin, ["default", space]) == (space, "casparian-operator-0")
    with pytest.raises(KubeError):
        operator_pod(client_of(api.client_for("nobody")), [space])


class Session(ClusterSession):
    """As opened by ann, with the operator's part played by the test."""

    def close(self) -> None:
        self.client.close()


def test_approve_writes_the_decision_into_the_object_in_the_callers_name(
    api: ApiServer,
    space: str,
    sentinel: Sentinel,
    forward: Forward,
    capsys: pytest.CaptureFixture[str],
) -> None:
    install(api)
    operator = operator_of(api, people(api, space))
    await_stamp(api, operator, space)
    storage = sentinel.control.api
    asked = ApprovalOperation.Run(plugin_name=f"{space}/sales", input_dir="/in", file_count=1)
    storage.create_approval("0d6c1c0e", asked, "Run sales", timedelta(hours=1), requester="rita")
    request = storage.get_approval("0d6c1c0e")
    assert request is not None
    _, name = object_of(request)
    operator.create(manifest("Approval", space, name=name, approvalId="0d6c1c0e"))
    ann = api.client_for("ann")
    stop = threading.Event()

    reader = api.client_for("operating", ["system:masters"])

    def operate() -> None:
        """Take the object's decision into the ledger, as the operator does."""
        while not stop.wait(0.1):
            spec = reader.get(API_VERSION, "Approval", name, space)["spec"]
            if "decision" in spec:
                storage.approve("0d6c1c0e", spec["decidedBy"])
                return

    thread = threading.Thread(target=operate)
    thread.start()
    app = App()
    with contextlib.closing(remote(forward.address)) as control:
        app._session = Session(client_of(ann), control, forward)
        code = run_cli(["--context", "c", "mcp", "approve", "0d6c", "-o", "json"], app)
    stop.set()
    thread.join(30)
    told = capsys.readouterr()
    assert code == 0, told.err
    row = json.loads(told.out)
    assert (row["status"], row["decided_by"]) == (ApprovalStatus.APPROVED, "ann")


def test_what_needs_this_machine_is_refused_with_a_context(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for argv in (["scan"], ["start"], ["publish", "x.py", "--version", "1"], ["sql", "SELECT 1"]):
        assert run_cli(["--context", "c", *argv]) == 2
        assert "works on this machine" in capsys.readouterr().err
    assert run_cli(["--context", "c", "mcp", "serve"]) == 2


def test_a_context_that_is_not_there_is_told(api: ApiServer) -> None:
    with pytest.raises(ConfigError):
        KubeClient.connect(api.kubeconfig, "nowhere")
