"""The import rules name what there is: a package that is new is not forgotten by them."""

from configparser import ConfigParser
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
SHARED = {"domain", "logs", "protocol", "sdk", "trust"}
"""What the worker may use of ours."""


def forbidden(contract: str) -> set[str]:
    rules = ConfigParser()
    rules.read(REPOSITORY / ".importlinter")
    return set(rules[f"importlinter:contract:{contract}"]["forbidden_modules"].split())


def parts() -> set[str]:
    """The packages and modules right below `casparian_flow`."""
    folder = REPOSITORY / "operator" / "casparian_flow"
    found = {p.stem for p in folder.glob("*.py")} | {p.parent.name for p in folder.glob("*/*.py")}
    return found - {"__init__"}


def test_the_worker_may_import_the_shared_packages_and_no_others() -> None:
    assert forbidden("worker") == {f"casparian_flow.{name}" for name in parts() - SHARED}


def test_the_sdk_may_import_nothing_of_ours() -> None:
    assert forbidden("sdk") == {"casparian_worker"} | {
        f"casparian_flow.{name}" for name in parts() - {"sdk", "main"}
    }
