"""A plugin in a real pod wants what its neighbours have, with no NetworkPolicy in its way.

The same attempts are made in the container `worker` beside it, where each of them succeeds:
otherwise their failure would prove nothing.
"""

import json
import textwrap
from collections.abc import Iterator
from typing import Any

import pytest
from acceptance_kit import wait_for
from cluster.line import PATIENCE_S, Line
from cluster.release import FLOW, NAMESPACE, OPERATOR_POD, Release
from kube_kit.pods import await_ready

SECRET = "kept-from-the-plugin"
ATTEMPTS = """\
import glob, os, socket

def read(path):
    with open(path, "rb") as file:
        return file.read(100_000)

def processes_say(secret):
    for path in glob.glob("/proc/[0-9]*/environ"):
        try:
            if secret.encode() in read(path):
                return True
        except OSError:
            pass
    return secret in os.environ.values()

def connect(host, port):
    socket.create_connection((host, port), 3).close()
    return True

def attempt(try_it, *arguments):
    try:
        return "got it" if try_it(*arguments) else "nothing there"
    except Exception as error:
        return f"{type(error).__name__}: {error}"

def attempts(places):
    return {
        "sink password": attempt(processes_say, places["secret"]),
        **{name: attempt(read, path) for name, path in places["files"].items()},
        **{name: attempt(connect, *where) for name, where in places["ports"].items()},
    }
"""
PLUGIN = """\
import json
import pyarrow as pa
from casparian_flow.sdk import BasePlugin, PluginMetadata

MANIFEST = PluginMetadata(pattern="*.json", topic="attempts")

{attempts}

class Handler(BasePlugin):
    def execute(self, file_path):
        with self.open_input() as file:
            found = attempts(json.loads(file.read()))
        table = {{"attempt": list(found), "result": list(found.values())}}
        self.publish("attempts", pa.table(table))
"""
FILES = {
    "token for the Sentinel": "/var/run/secrets/casparian/token",
    "CURVE key": "/var/run/casparian/curve/client.key_secret",
}


@pytest.fixture
def lenient(release: Release) -> Iterator[Release]:
    """A release and a person whose Gatekeepers let everything pass: the walls alone are to hold."""
    config = release.person.folder / "global_config.toml"
    strict = config.read_text()
    config.write_text(strict.replace("[trust]\n", '[trust]\ngatekeeper = "off"\n'))
    release.install(trust=release.values()["trust"] | {"gatekeeper": "off"})
    hurry(release)
    yield release
    config.write_text(strict)
    release.install()
    hurry(release)


def hurry(release: Release) -> None:
    """Have the kubelet look at the operator's volumes now, not within a minute."""
    mark = release.kube.kubectl(
        "get",
        "configmap",
        "casparian-settings",
        "-n",
        NAMESPACE,
        "-o",
        "jsonpath={.metadata.resourceVersion}",
    ).stdout
    release.kube.kubectl(
        "annotate",
        "pod",
        OPERATOR_POD,
        "-n",
        NAMESPACE,
        "--overwrite",
        f"casparian.io/tests={mark}",
    )


def test_a_plugin_gets_at_nothing_of_its_pod_or_the_cluster(lenient: Release) -> None:
    line, kube = Line(lenient, "hostile"), lenient.kube
    kube.apply(
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": "sink", "namespace": FLOW},
            "stringData": {"password": SECRET},
        }
    )
    line.watch()
    reference = {"secretKeyRef": {"name": "sink", "key": "password"}}
    line.apply_plugin(
        PLUGIN.format(attempts=ATTEMPTS),
        env=[{"name": "CASPARIAN_MSSQL_PASSWORD", "valueFrom": reference}],
    )
    line.await_ready()
    (pod,) = line.pods()
    places = {"secret": SECRET, "files": FILES, "ports": ports(lenient, pod)}
    (line.inbox / "places.json").write_text(json.dumps(places))
    line.scan()
    wait_for("the attempts", lambda: line.table("attempts").num_rows, PATIENCE_S)
    rows = line.table("attempts").to_pylist()
    results = {row["attempt"]: row["result"] for row in rows}

    # The worker beside it can do all of that.
    script = (
        textwrap.dedent(ATTEMPTS)
        + "\nimport json, sys\nprint(json.dumps(attempts(json.load(sys.stdin))))"
    )
    said = kube.kubectl(
        *("exec", "-i", "-n", FLOW, pod["metadata"]["name"], "-c", "worker", "--"),
        *("python", "-c", script),
        stdin=json.dumps(places),
    )
    assert set(json.loads(said.stdout).values()) == {"got it"}, said.stdout
    assert set(results) == set(json.loads(said.stdout))
    assert "got it" not in results.values(), results
    assert "kubernetes.io" not in str(pod["spec"]["initContainers"])
    line.remove()


def ports(release: Release, pod: dict[str, Any]) -> dict[str, tuple[str, int]]:
    """Whom it may want to talk to, by address, as it need not be able to ask for names."""
    kube = release.kube
    operator = await_ready(kube, NAMESPACE, OPERATOR_POD)["status"]["podIP"]
    api = kube.get("v1", "Service", "kubernetes", "default")["spec"]["clusterIP"]
    return {
        "Sentinel": (operator, 5555),
        "remote control": (operator, 5556),
        "another pod": (operator, 8080),
        "API server": (api, 443),
        "worker of its pod": ("127.0.0.1", 9464),
        "its own pod's address": (pod["status"]["podIP"], 9464),
    }
