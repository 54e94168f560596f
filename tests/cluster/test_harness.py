"""The cluster that the other tests stand on works, and breaks when it is told to."""

import pytest
from cluster.harness import images
from cluster.harness.faults import Faults
from cluster.harness.kind import Cluster
from kube_kit import ApiClient, ApiError, Manifest
from kube_kit.pods import await_end, await_ready, log, restricted_pod

SERVE = ("python3", "-u", "-m", "http.server", "8080", "--directory", "/etc")
ASK = """
import sys, time, urllib.request
for _ in range(300):
    try:
        with urllib.request.urlopen(sys.argv[1], timeout=2) as answer:
            print("answered", answer.status)
            break
    except OSError as error:
        print(error)
        time.sleep(0.2)
else:
    sys.exit("no answer")
"""


@pytest.fixture(scope="module")
def python(cluster: Cluster) -> str:
    """An image with Python, on both nodes."""
    tag = images.python_image()
    cluster.load_image(tag)
    return tag


def node_is_ready(kube: ApiClient, name: str) -> bool:
    conditions = kube.get("v1", "Node", name)["status"]["conditions"]
    return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)


def service(namespace: str, name: str) -> Manifest:
    ports = [{"port": 80, "targetPort": 8080}]
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"selector": {"app": name}, "ports": ports},
    }


def test_each_node_reaches_a_service_on_the_other_by_name(
    cluster: Cluster, kube: ApiClient, space: str, python: str
) -> None:
    pairs = list(zip(cluster.nodes, reversed(cluster.nodes), strict=True))
    for number, (here, there) in enumerate(pairs):
        serving, asking = f"serve-{number}", f"ask-{number}"
        url = f"http://{serving}.{space}.svc.cluster.local/hostname"
        kube.apply(
            restricted_pod(space, serving, python, SERVE, node=there),
            service(space, serving),
            restricted_pod(space, asking, python, ("python3", "-c", ASK, url), node=here),
        )
    for number, (here, there) in enumerate(pairs):
        assert "answered 200" in await_end(kube, space, f"ask-{number}")
        assert await_ready(kube, space, f"serve-{number}")["spec"]["nodeName"] == there
        assert kube.get("v1", "Pod", f"ask-{number}", space)["spec"]["nodeName"] == here


def test_a_root_pod_is_refused_where_pods_are_restricted(kube: ApiClient, space: str) -> None:
    pod = restricted_pod(space, "root", "none.invalid/none", ("true",))
    pod["spec"]["securityContext"]["runAsNonRoot"] = False
    with pytest.raises(ApiError, match="violates PodSecurity"):
        kube.create(pod)


def test_a_claim_is_bound_and_keeps_what_is_written(
    kube: ApiClient, space: str, python: str
) -> None:
    requests = {"requests": {"storage": "1Mi"}}
    kube.apply(
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": "kept", "namespace": space},
            "spec": {"accessModes": ["ReadWriteOnce"], "resources": requests},
        }
    )
    claims = {"/kept": "kept"}
    kube.apply(
        restricted_pod(space, "w", python, ("sh", "-c", "echo hello >/kept/x"), claims=claims)
    )
    await_end(kube, space, "w")
    kube.apply(restricted_pod(space, "r", python, ("cat", "/kept/x"), claims=claims))
    assert await_end(kube, space, "r") == "hello\n"
    claim = kube.get("v1", "PersistentVolumeClaim", "kept", space)
    assert claim["status"]["phase"] == "Bound"


def test_a_shared_claim_is_one_folder_on_both_nodes_and_here(
    cluster: Cluster, kube: ApiClient, space: str, python: str
) -> None:
    folder = cluster.shared_claim(space, "files")
    (folder / "here").write_text("from here")
    for node in cluster.nodes:
        script = f"cat /files/here >/files/{node}"
        kube.apply(
            restricted_pod(
                *(space, node, python, ("sh", "-c", script)), node=node, claims={"/files": "files"}
            )
        )
    for node in cluster.nodes:
        await_end(kube, space, node)
        assert (folder / node).read_text() == "from here"


def test_a_frozen_node_is_missed_and_comes_back(
    cluster: Cluster, kube: ApiClient, faults: Faults
) -> None:
    with faults.frozen(cluster.worker):
        kube.wait(lambda: not node_is_ready(kube, cluster.worker))
    kube.wait(lambda: node_is_ready(kube, cluster.worker))


def test_a_node_that_is_cut_off_is_silent_until_it_is_healed(
    cluster: Cluster, kube: ApiClient, faults: Faults, space: str, python: str
) -> None:
    url = "http://serve/hostname"
    ask = ("python3", "-u", "-c", f"while True:\n{_indented(ASK)}    time.sleep(0.2)", url)
    kube.apply(
        restricted_pod(space, "serve", python, SERVE, node=cluster.worker),
        service(space, "serve"),
        restricted_pod(space, "ask", python, ask, node=cluster.control_plane),
    )
    kube.wait(lambda: "answered" in log(kube, space, "ask"))
    with faults.isolated(cluster.worker):
        kube.wait(lambda: "timed out" in log(kube, space, "ask")[-40:])
    before = log(kube, space, "ask").count("answered")
    kube.wait(lambda: log(kube, space, "ask").count("answered") > before)
    kube.wait(lambda: node_is_ready(kube, cluster.worker))


def _indented(script: str) -> str:
    return "".join(f"    {line}\n" for line in script.splitlines())


def test_a_killed_container_is_started_anew_and_a_killed_pod_is_gone(
    cluster: Cluster, kube: ApiClient, faults: Faults, space: str, python: str
) -> None:
    forever = ("sleep", "infinity")
    kube.apply(restricted_pod(space, "p", python, forever, node=cluster.worker, restart="Always"))
    await_ready(kube, space, "p")
    faults.kill_container(space, "p", "main")

    def restarted() -> bool:
        statuses = kube.get("v1", "Pod", "p", space)["status"]["containerStatuses"]
        return bool(statuses[0]["restartCount"] == 1 and statuses[0]["ready"])

    kube.wait(restarted)
    faults.kill_pod(space, "p")
    assert kube.find("v1", "Pod", "p", space) is None


def test_the_api_server_comes_back_with_what_it_knew(
    kube: ApiClient, faults: Faults, space: str
) -> None:
    faults.restart_api_server()
    assert kube.get("v1", "Namespace", space)["status"]["phase"] == "Active"


def test_a_pod_that_is_kept_from_the_api_server_goes_on_afterwards(
    cluster: Cluster, kube: ApiClient, faults: Faults, space: str, python: str
) -> None:
    knock = (
        "import socket, time\n"
        "while True:\n"
        "    try:\n"
        "        socket.create_connection(('kubernetes.default', 443), 1).close()\n"
        "        print('in', flush=True)\n"
        "    except OSError:\n"
        "        print('out', flush=True)\n"
        "    time.sleep(0.1)\n"
    )
    kube.apply(restricted_pod(space, "p", python, ("python3", "-c", knock), node=cluster.worker))
    kube.wait(lambda: log(kube, space, "p").endswith("in\n"))
    with faults.without_api(space, "p"):
        kube.wait(lambda: log(kube, space, "p").endswith("out\n"))
    kube.wait(lambda: log(kube, space, "p").endswith("in\n"))
