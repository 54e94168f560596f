"""Every test starts without settings from the outside, and in a folder of its own.

What tests need beside that, they build: real files, real ledgers, real processes.
"""

import os

import pytest


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("CASPARIAN_", "AZURE_")):
            monkeypatch.delenv(name)
