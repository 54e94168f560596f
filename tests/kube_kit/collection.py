"""Builds the programs after collection: within a fixture, a test's time limit would end it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from cluster.harness.errors import HarnessError
from cluster.harness.progress import say
from cluster.harness.tools import API_TOOLS, GO_MINIMUM, unavailable

from kube_kit.server import prepare


def prepare_for(
    session: pytest.Session,
    folder: Path,
    *,
    more: Sequence[str] = (),
    also: Callable[[], object] = lambda: None,
) -> None:
    """For `pytest_collection_finish` of a conftest: build if tests of its folder were chosen.

    Where a program is neither there nor can be built, for want of Go, these tests are skipped, and
    a line says what to install. Where building fails, they fail, and no others.

    Args:
        more: programs of the tools cache that the folder needs beside those of the API server.
        also: makes whatever else it needs.
    """
    chosen = [item for item in session.items if item.path.is_relative_to(folder)]
    if session.config.option.collectonly or not chosen:
        return
    with uncaptured(session.config):
        if missing := unavailable((*API_TOOLS, *more)):
            why = f"no {', '.join(missing)}, and no `go` to build with: install Go {GO_MINIMUM}+"
            skip(chosen, folder, why)
            return
        try:
            prepare()
            also()
        except HarnessError as error:
            say(f"tests/{folder.name} will fail: {error}")


def skip(chosen: Sequence[pytest.Item], folder: Path, why: str) -> None:
    """Skip these tests, and say so where nobody overlooks it."""
    say(f"SKIPPED: all {len(chosen)} tests of tests/{folder.name}: {why}")
    for item in chosen:
        item.add_marker(pytest.mark.skip(reason=why))


@contextmanager
def uncaptured(config: pytest.Config) -> Iterator[None]:
    """Let progress be seen as it is made."""
    capture = config.pluginmanager.getplugin("capturemanager")
    if capture is None:
        yield
    else:
        with capture.global_and_fixture_disabled():
            yield
