"""What a uv.lock must be, so that a worker can make an environment from it."""

from pathlib import Path

import pytest

from casparian_flow.domain.lockfile import LockError, lock_problems, read_lock

LOCK = (Path(__file__).parent.parent / "data" / "excel_reader.uv.lock").read_text()


def locked(packages: str, requires: str = ">=3.11") -> str:
    return f"""
version = 1
requires-python = "{requires}"
[[package]]
name = "plugin"
version = "0.1.0"
source = {{ virtual = "." }}
{packages}
"""


PYARROW = """
[[package]]
name = "pyarrow"
version = "20.0.0"
source = { registry = "https://pypi.org/simple" }
wheels = [{ url = "https://example.org/pyarrow.whl" }]
"""


def test_a_real_lock_has_no_problems_and_yields_its_project() -> None:
    lock = read_lock(LOCK)
    assert lock.problems() == []
    assert [package.name for package in lock.packages] == ["et-xmlfile", "openpyxl", "pyarrow"]
    assert 'name = "excel-reader"' in lock.pyproject()
    assert 'requires-python = ">=3.11"' in lock.pyproject()


def test_a_lock_without_pyarrow_is_a_problem_at_deploy_time() -> None:
    assert lock_problems(locked("")) == ["the lock lacks pyarrow; add it with `uv add pyarrow`"]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ('git = "https://example.org/x.git"', "a git repository"),
        ('directory = "../x"', "a local folder"),
        ('url = "https://example.org/x.whl"', "a direct URL"),
    ],
)
def test_packages_from_elsewhere_are_problems(source: str, words: str) -> None:
    text = locked(PYARROW + f'[[package]]\nname = "x"\nversion = "1"\nsource = {{ {source} }}\n')
    assert lock_problems(text) == [f"x comes from {words}, which a worker cannot install"]


def test_a_package_without_wheels_would_have_to_be_built() -> None:
    text = locked(PYARROW + '[[package]]\nname = "x"\nversion = "1"\nsource = { registry = "r" }\n')
    assert lock_problems(text) == ["x 1 has no wheels; choose one that has"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "not toml [",
        "version = 1",
        'package = "text"',
        locked(PYARROW, requires='3"\\nx = "'),
        locked(PYARROW).replace('"plugin"', '"pl\\"ugin"'),
        locked(PYARROW) + '[[package]]\nname = "b"\nversion = "1"\nsource = { virtual = "." }\n',
        "a = " + "[" * 100_000,
        "a = " + "1" * 5_000,
        "x" * 9_000_000,
    ],
)
def test_other_text_is_refused_in_words(text: str) -> None:
    with pytest.raises(LockError):
        read_lock(text)
    assert len(lock_problems(text)) == 1
