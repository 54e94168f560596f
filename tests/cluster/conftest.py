"""Tests on a real cluster: an existing one, one that `make cluster-up` made, or one of their own.

The cluster is made before the first test, outside of any test's time limit, and removed after the
last, unless it was made to stay or others use it. When a test has failed, logs are kept in
build/cluster-logs.
"""

import itertools
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from cluster.harness import kind, machine
from cluster.harness.errors import HarnessError
from cluster.harness.faults import Faults
from cluster.harness.progress import say
from cluster.harness.tools import tool
from cluster.release import Release, build_images
from kube_kit import ApiClient
from kube_kit.collection import skip, uncaptured

HERE = Path(__file__).parent
LOGS = HERE.parents[1] / "build" / "cluster-logs"
# Read at import: tests run without variables of ours.
EXISTING = os.environ.get("CASPARIAN_TEST_KUBECONFIG")
NAME = os.environ.get("CASPARIAN_TEST_CLUSTER", kind.DEFAULT_NAME)
_CLUSTER = pytest.StashKey[kind.Cluster]()
_HELD = pytest.StashKey[ExitStack]()
_FAILURE = pytest.StashKey[str]()
# Nodes that are missed and images that are loaded take their time, more so on a busy machine.
TEST_S = 600
_numbers = itertools.count(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE) and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(TEST_S))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Make the cluster now, if any test needs it."""
    config = session.config
    wanted = [item for item in session.items if item.path.is_relative_to(HERE)]
    if config.option.collectonly or not wanted or EXISTING:
        return
    if why_not := machine.why_not():
        with uncaptured(config):
            skip(wanted, HERE, why_not)
        return
    with uncaptured(config), ExitStack() as held:
        try:
            config.stash[_CLUSTER] = held.enter_context(kind.using(NAME))
        except HarnessError as error:
            config.stash[_FAILURE] = str(error)
        config.stash[_HELD] = held.pop_all()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    config = session.config
    made = config.stash.get(_CLUSTER, None)
    with uncaptured(config), config.stash.get(_HELD, ExitStack()):
        if made is not None and session.testsfailed:
            shutil.rmtree(LOGS, ignore_errors=True)
            made.save_logs(LOGS)
            say(f"logs of the cluster are in {LOGS}")


@pytest.fixture(scope="session")
def cluster(pytestconfig: pytest.Config) -> kind.Cluster:
    """The harness's cluster, with nodes that can be broken and images loaded.

    Skipped where none can be made, and on an existing cluster; fails where making it failed.
    """
    if failure := pytestconfig.stash.get(_FAILURE, None):
        pytest.fail(failure, pytrace=False)
    if EXISTING:
        pytest.skip("CASPARIAN_TEST_KUBECONFIG is set: its nodes are not ours to break")
    if why_not := machine.why_not():
        pytest.skip(why_not)
    return pytestconfig.stash[_CLUSTER]


@pytest.fixture(scope="session")
def kube(request: pytest.FixtureRequest) -> ApiClient:
    """The cluster's administrator, on an existing cluster as well."""
    if EXISTING:
        return ApiClient(Path(EXISTING), tool("kubectl"))
    made: kind.Cluster = request.getfixturevalue("cluster")
    return made.client


@pytest.fixture
def faults(cluster: kind.Cluster) -> Faults:
    """What can be made to go wrong."""
    return cluster.faults


@pytest.fixture
def space(kube: ApiClient) -> Iterator[str]:
    """A namespace of the test's own, restricted by Pod Security; removed afterwards."""
    name = f"test-{os.getpid()}-{next(_numbers)}"
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    meta = {"name": name, "labels": labels}
    kube.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": meta})
    # Without it no pod is admitted; controllers may be late, as after an API server's restart.
    kube.wait(lambda: kube.find("v1", "ServiceAccount", "default", name))
    yield name
    kube.delete("v1", "Namespace", name)


@pytest.fixture(scope="session")
def installed(cluster: kind.Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Release]:
    """The project, installed from its own images and chart; removed with everything it keeps."""
    build_images(cluster)
    made = Release(cluster, tmp_path_factory.mktemp("release"))
    made.make_namespaces()
    made.install()
    yield made
    made.remove()


@pytest.fixture
def release(installed: Release) -> Release:
    """The installation, ready again after whatever the test before has done to its nodes."""
    installed.await_operator()
    return installed
