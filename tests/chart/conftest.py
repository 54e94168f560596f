"""Tests of the Helm chart: rendered by the real helm, and judged by a real API server."""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import chart_kit
import pytest
from kube_kit import ApiServer, api_server, prepare


def pytest_collection_finish(session: pytest.Session) -> None:
    """Build the programs now: within a fixture, a test's time limit would end it."""
    here = Path(__file__).parent
    if session.config.option.collectonly:
        return
    if not any(item.path.is_relative_to(here) for item in session.items):
        return
    capture = session.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled() if capture else nullcontext():
        prepare()
        chart_kit.helm()
        chart_kit.promtool()


@pytest.fixture(scope="session")
def api() -> Iterator[ApiServer]:
    """One API server, with namespaces that allow nothing beyond Pod Security `restricted`."""
    with api_server() as server:
        for name in (chart_kit.NAMESPACE, "finance"):
            server.namespace(name, {"pod-security.kubernetes.io/enforce": "restricted"})
        server.client.apply(Path(__file__).parent / "monitoring-crds.yaml")
        yield server
