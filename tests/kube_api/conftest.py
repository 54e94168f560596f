"""Tests against an API server without nodes; see kube_kit for what it can do."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
from kube_kit import ApiServer, api_server
from kube_kit.collection import prepare_for

_numbers = itertools.count(1)


def pytest_collection_finish(session: pytest.Session) -> None:
    prepare_for(session, Path(__file__).parent)


@pytest.fixture(scope="session")
def api() -> Iterator[ApiServer]:
    """One API server for all tests of a run; each takes a namespace of its own."""
    with api_server() as server:
        yield server


@pytest.fixture
def space(api: ApiServer) -> str:
    """A namespace of the test's own."""
    return api.namespace(f"t{next(_numbers)}")
