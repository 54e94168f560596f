"""The project as people install it: its own images, its chart, one release for a whole session."""

import json
import shutil
import subprocess
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from acceptance_kit import Flow, make_flow, wait_for
from cluster.harness import images
from cluster.harness.kind import Cluster
from cluster.harness.tools import tool
from kube_kit import ApiClient
from kube_kit.pods import await_ready

from casparian_flow.kube.names import API_VERSION

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "casparian"
NAME = "casparian"
NAMESPACE = "casparian"
"""Of the operator."""
FLOW = "flow"
"""Of plugins, source roots, approvals."""
OPERATOR = "casparian-operator"
OPERATOR_POD = f"{OPERATOR}-0"
START_S = 180.0
PARTS = ("operator", "worker")


def tag(part: str) -> str:
    """What the chart calls an image, if nothing else is said."""
    return f"casparian-{part}:{version('casparian-flow')}"


def build_images(cluster: Cluster) -> None:
    """Build the images as `make images` does, and put them onto the nodes."""
    base = {"BASE_IMAGE": images.python_image()} if cluster.own_image else {}
    for part in PARTS:
        images.build(ROOT / f"Dockerfile.{part}", tag(part), ROOT, base)
    cluster.load_image(*map(tag, PARTS))


@dataclass
class Release:
    """One installation, and a person with a key whom it trusts.

    Attributes:
        folder: for files of values, and the person's.
    """

    cluster: Cluster
    folder: Path

    @property
    def kube(self) -> ApiClient:
        return self.cluster.client

    @cached_property
    def person(self) -> Flow:
        """Where plugins are written and published from."""
        return make_flow(self.folder / "person")

    # -- helm ---------------------------------------------------------------------------------

    def helm(self, *arguments: str, timeout_s: float = 300.0) -> str:
        """Run helm on the release's namespace; returns what it prints."""
        done = subprocess.run(
            [tool("helm"), "--namespace", NAMESPACE, *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout_s,
            env={
                "KUBECONFIG": str(self.cluster.kubeconfig),
                "HOME": str(self.folder),
                "PATH": "/usr/bin:/bin",
            },
        )
        assert done.returncode == 0, (arguments, done.stdout, done.stderr)
        return done.stdout

    def install(self, **changes: Any) -> str:
        """Install it, or upgrade what is there to these values; waits until the operator is ready.

        Args:
            changes: values by the first part of their path, instead of the tests' own.
        """
        file = self.folder / "values.yaml"
        file.write_text(yaml.safe_dump(self.values() | changes))
        said = self.helm("upgrade", "--install", NAME, str(CHART), "--values", str(file))
        self.await_operator()
        return said

    def values(self) -> dict[str, Any]:
        trusted = self.person.json("keys", "show", "local")["public"]
        return {
            "watchNamespaces": [FLOW],
            "trust": {"allowedSigners": ["local"], "keys": {"local": [{"public": trusted}]}},
            "operator": {
                "resyncSeconds": 5,
                "resources": {"requests": {"cpu": "50m", "memory": "256Mi"}},
            },
            "worker": {
                "jobTimeoutSeconds": 60,
                "resources": {
                    "requests": {"cpu": "50m", "memory": "128Mi"},
                    "limits": {"memory": "1536Mi"},
                },
            },
        }

    def make_namespaces(self) -> None:
        labels = {"pod-security.kubernetes.io/enforce": "restricted"}
        for name in (NAMESPACE, FLOW):
            meta = {"name": name, "labels": labels}
            self.kube.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": meta})

    def remove(self) -> None:
        """Uninstall it, and take all away that it keeps."""
        self.helm("uninstall", NAME, "--ignore-not-found", "--wait")
        for plural in ("casparianplugins", "sourceroots", "approvals"):
            self.kube.kubectl(
                *("delete", f"{plural}.casparian.io", "--all", "-n", FLOW, "--ignore-not-found"),
                check=False,
            )
        self.kube.kubectl("delete", "namespace", FLOW, NAMESPACE, "--ignore-not-found")
        for volume in self.kube.list("v1", "PersistentVolume"):
            name = volume["metadata"]["name"]
            if volume["spec"].get("claimRef", {}).get("namespace") == FLOW:
                self.kube.delete("v1", "PersistentVolume", name)
                shutil.rmtree(self.cluster.shared / name, ignore_errors=True)
        crds = ("casparianplugins", "sourceroots", "approvals")
        names = [f"{plural}.casparian.io" for plural in crds]
        self.kube.kubectl("delete", "crd", *names, "--ignore-not-found")

    # -- the operator -------------------------------------------------------------------------

    def operator_uid(self) -> str:
        """Of the pod that is there now, "" for none."""
        pod = self.kube.find("v1", "Pod", OPERATOR_POD, NAMESPACE)
        return str(pod["metadata"]["uid"]) if pod else ""

    def await_operator(self, other_than: str = "") -> None:
        """Until the operator's pod is the one that is wanted now, and ready.

        Args:
            other_than: the uid of a pod that does not count.
        """

        def settled() -> bool:
            found = self.kube.get("apps/v1", "StatefulSet", OPERATOR, NAMESPACE)
            status = found.get("status", {})
            return bool(
                status.get("observedGeneration") == found["metadata"]["generation"]
                and status.get("currentRevision") == status.get("updateRevision")
                and status.get("readyReplicas") == 1
                and self.operator_uid() not in {"", other_than}
            )

        wait_for("the operator", settled, START_S)
        await_ready(self.kube, NAMESPACE, OPERATOR_POD, START_S)

    def casparian(self, *arguments: str) -> Any:
        """Run a command of the command line in the operator's pod; its JSON."""
        return json.loads(self.execute("casparian", *arguments, "-o", "json"))

    def sql(self, query: str) -> list[dict[str, Any]]:
        """Ask the ledger."""
        found: list[dict[str, Any]] = self.casparian("sql", query)
        return found

    def execute(self, *command: str) -> str:
        """Run something in the operator's pod."""
        return self.kube.kubectl("exec", "-n", NAMESPACE, OPERATOR_POD, "--", *command).stdout


def condition(body: dict[str, Any] | None, kind: str) -> dict[str, Any]:
    """A condition of an object, empty if it has none of that type."""
    found = (body or {}).get("status", {}).get("conditions", [])
    return next((c for c in found if c["type"] == kind), {})


__all__ = ["API_VERSION", "FLOW", "NAMESPACE", "OPERATOR_POD", "Release", "condition"]
