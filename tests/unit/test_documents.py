"""Documents that mirror the code are in step with it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]


def test_the_pages_on_settings_and_commands_are_what_the_code_says() -> None:
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "tools" / "reference.py"), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_within_the_project_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" not in target and not target.startswith("#"):
            path = (page.parent / target.partition("#")[0]).resolve()
            assert path.exists(), f"{page.name}: {target}"


def test_the_glossary_explains_each_word_once_in_order() -> None:
    rows = re.findall(r"^\| (\*\*.+?) \|", (REPOSITORY / "docs" / "glossary.md").read_text(), re.M)
    words = [row.replace("*", "") for row in rows]
    assert len(words) > 30
    assert len(set(words)) == len(words)
    assert words == sorted(words, key=str.lower)
