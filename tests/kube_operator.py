"""The operator in this process, against a test's API server, on a ledger of its own."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from chart_kit import CHART, run_helm
from kube_kinds import OPERATOR
from kube_kit import ApiServer
from signing_kit import lax_rules, signed

from casparian_flow.config import OperatorSettings, Settings
from casparian_flow.kube.bundles import inlined
from casparian_flow.kube.client import KubeClient
from casparian_flow.kube.lease import Holder
from casparian_flow.kube.names import API_VERSION
from casparian_flow.kube.operator import Operator, OperatorConfig
from casparian_flow.sentinel.server import SentinelConfig
from casparian_flow.trust.bundle import pack

SOURCE = """
    from casparian_flow.sdk import PluginMetadata

    MANIFEST = PluginMetadata(pattern="*.csv", topic="rows")


    class Handler:
        def execute(self, ctx):
            pass
"""
WAIT_S = 60.0
RULES = lax_rules()
OUTPUTS = {"persistentVolumeClaim": {"claimName": "out"}}


def operator_config(
    folder: Path, namespace: str, watched: tuple[str, ...], *, nonce: str = "a", **own: Any
) -> OperatorConfig:
    """An operator whose ledger is in `folder`; free ports, no health, no trials."""
    settings = Settings(
        operator=OperatorSettings(
            namespace=namespace,
            watch_namespaces=watched,
            worker_image="casparian-worker:test",
            health_port=0,
            metrics_port=0,
            **{"resync_seconds": 30, **own},
        )
    )
    sentinel = SentinelConfig(
        bind_address="tcp://127.0.0.1:*",
        database=folder / "ledger.duckdb",
        curve_dir=folder / "curve",
        remote_control_address="tcp://127.0.0.1:*",
        trust=lambda: RULES,
        trials=False,
        wire_deploy=False,
        allow_self_approval=False,
        drain_s=0.2,
    )
    holder = Holder("casparian-operator-0", f"uid-{folder.name}", nonce)
    return OperatorConfig(settings, sentinel, namespace, watched, folder / "curve", holder)


def install_operator(api: ApiServer, watched: Sequence[str]) -> Path:
    """The operator's account with the chart's own roles in these namespaces, and no other rights;
    returns its kubeconfig."""
    namespace, account = OPERATOR
    for name in (namespace, *watched):
        api.namespace(name)
    names = ",".join(watched)
    templates = ("role", "role-own", "rolebinding", "clusterrole", "clusterrolebinding")
    shown = [f"--show-only=templates/operator/{name}.yaml" for name in templates]
    text = run_helm(
        "template", "casparian", CHART, "--namespace", namespace,
        "--set", f"watchNamespaces={{{names}}}", *shown,
    ).stdout  # fmt: skip
    api.client.apply(*(d for d in yaml.safe_load_all(text) if d))
    return api.client_for_account(namespace, account).kubeconfig


@contextmanager
def operator(
    api: ApiServer, config: OperatorConfig, kubeconfig: Path | None = None
) -> Iterator[Operator]:
    """The operator, running; stopped at the end, with what went wrong in it raised.

    Args:
        kubeconfig: as whom; the cluster's administrator if None.
    """
    client = KubeClient.connect(kubeconfig or api.kubeconfig)
    running = Operator(config, client, trust=lambda: RULES)
    failures: list[BaseException] = []

    def run() -> None:
        try:
            running.run()
        except Exception as error:  # noqa: BLE001 - told by the test
            failures.append(error)

    thread = threading.Thread(target=run, name="operator")
    thread.start()
    try:
        while not running.wait_started(0.2) and thread.is_alive():
            pass
        yield running
    finally:
        running.stop()
        thread.join(60)
        client.close()
    assert not failures, failures
    assert not thread.is_alive()


def plugin(
    namespace: str, name: str = "sales", version: str = "1.0.0", code: str = SOURCE, **spec: Any
) -> dict[str, Any]:
    """A signed CasparianPlugin; `plugin` is the plugin's own name, if it is another."""
    bundle = signed(code, spec.pop("plugin", name), version)
    return {
        "apiVersion": API_VERSION,
        "kind": "CasparianPlugin",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "version": version,
            "source": {"inline": inlined(pack(bundle))},
            "workers": {"outputs": OUTPUTS},
            **spec,
        },
    }


def source_root(namespace: str, name: str = "inbox", **spec: Any) -> dict[str, Any]:
    volume = {"persistentVolumeClaim": {"claimName": "files"}}
    return {
        "apiVersion": API_VERSION,
        "kind": "SourceRoot",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"volume": volume, **spec},
    }


def conditions(body: dict[str, Any] | None) -> dict[str, tuple[str, str]]:
    """Status and reason by type."""
    found = (body or {}).get("status", {}).get("conditions", ())
    return {c["type"]: (c["status"], c["reason"]) for c in found}


def await_condition(
    api: ApiServer, kind: str, namespace: str, name: str, type_: str, reason: str
) -> dict[str, Any]:
    """The object, once a condition of it has this reason."""
    found: dict[str, Any] = {}

    def holds() -> bool:
        found.clear()
        found.update(api.client.find(API_VERSION, kind, name, namespace) or {})
        return conditions(found).get(type_, ("", ""))[1] == reason

    try:
        api.client.wait(holds, WAIT_S)
    except TimeoutError:
        raise AssertionError(f"{type_} is not {reason}: {found.get('status')}") from None
    return found


def settled(running: Operator, quiet: Callable[[], bool] = lambda: True) -> bool:
    """Whether nothing waits to be worked on."""
    return running.queue.idle() and quiet()
