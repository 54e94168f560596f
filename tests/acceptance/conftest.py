"""See tests/acceptance_kit.py for what goes in, what is observed, and that nothing is a double."""

from pathlib import Path

import pytest
from acceptance_kit import Flow, make_flow


@pytest.fixture
def flow(tmp_path: Path) -> Flow:
    """An empty folder with a configuration and an inbox."""
    return make_flow(tmp_path)
