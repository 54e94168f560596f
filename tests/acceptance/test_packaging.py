"""What somebody gets who installs the wheel; and what the make targets promise."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from acceptance_kit import REPOSITORY

from casparian_flow import __version__

UV = str(REPOSITORY / ".venv" / "bin" / "uv")


def run(*argv: str, cwd: Path | None = None) -> str:
    done = subprocess.run(argv, cwd=cwd, capture_output=True, text=True, timeout=115, check=False)
    assert done.returncode == 0, done
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(UV, "build", "--quiet", "--wheel", "--out-dir", str(folder), str(REPOSITORY))
    return next(folder.glob("*.whl"))


def test_the_wheel_installs_into_a_fresh_environment_and_runs(wheel: Path, tmp_path: Path) -> None:
    run(UV, "venv", "--quiet", "--python", sys.executable, str(tmp_path / "venv"))
    python = str(tmp_path / "venv" / "bin" / "python")
    run(UV, "pip", "install", "--quiet", "--python", python, f"{wheel}[local]")
    casparian = str(tmp_path / "venv" / "bin" / "casparian")
    assert "casparian start" in run(casparian, "--help", cwd=tmp_path)
    run(casparian, "init", cwd=tmp_path)
    run(casparian, "source", "add", "inbox", cwd=tmp_path)
    assert "inbox" in run(casparian, "source", "list", cwd=tmp_path)


def test_the_wheel_has_both_packages_and_nothing_else(wheel: Path) -> None:
    import zipfile

    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {
        "casparian_flow",
        "casparian_worker",
    }
    assert "casparian_flow/py.typed" in names


def test_the_code_and_the_distribution_agree_on_the_version() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert project["version"] == __version__


def test_the_pinned_uv_is_the_locked_one() -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    lock = tomllib.loads((REPOSITORY / "uv.lock").read_text())
    locked = next(p["version"] for p in lock["package"] if p["name"] == "uv")
    assert f"UV_VERSION := {locked}\n" in makefile


def test_continuous_integration_runs_make_test_and_nothing_else() -> None:
    lines = (REPOSITORY / ".ci" / "run").read_text().splitlines()
    assert lines[-1] == "exec make test"


def test_make_help_lists_every_target_with_its_purpose() -> None:
    shown = run("make", "--no-print-directory", "help", cwd=REPOSITORY)
    for target in ("setup", "test", "lint", "typecheck", "demo", "clean"):
        assert f"make {target} " in shown
