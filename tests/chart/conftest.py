"""Tests of the Helm chart: rendered by the real helm, and judged by a real API server."""

from collections.abc import Iterator
from pathlib import Path

import chart_kit
import pytest
from kube_kit import ApiServer, api_server
from kube_kit.collection import prepare_for


def pytest_collection_finish(session: pytest.Session) -> None:
    def programs() -> None:
        chart_kit.helm()
        chart_kit.promtool()

    prepare_for(session, Path(__file__).parent, more=["helm"], also=programs)


@pytest.fixture(scope="session")
def api() -> Iterator[ApiServer]:
    """One API server, with namespaces that allow nothing beyond Pod Security `restricted`."""
    with api_server() as server:
        for name in (chart_kit.NAMESPACE, "finance"):
            server.namespace(name, {"pod-security.kubernetes.io/enforce": "restricted"})
        server.client.apply(Path(__file__).parent / "monitoring-crds.yaml")
        yield server
