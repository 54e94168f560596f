"""Builds the programs after collection: within a fixture, a test's time limit would end it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kube_kit.server import prepare


def prepare_for(session: pytest.Session, folder: Path) -> None:
    """For `pytest_collection_finish` of a conftest: build if tests of its folder were chosen."""
    if session.config.option.collectonly:
        return
    if any(item.path.is_relative_to(folder) for item in session.items):
        with uncaptured(session.config):
            prepare()


@contextmanager
def uncaptured(config: pytest.Config) -> Iterator[None]:
    """Let progress be seen as it is made."""
    capture = config.pluginmanager.getplugin("capturemanager")
    if capture is None:
        yield
    else:
        with capture.global_and_fixture_disabled():
            yield
