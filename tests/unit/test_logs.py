"""The form of the services' log."""

import io
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from casparian_flow.logs import (
    FORMAT_VARIABLE,
    LEVEL_VARIABLE,
    start_logging,
    start_logging_from_environment,
)


@contextmanager
def fresh() -> Iterator[logging.Logger]:
    """The root logger as a process begins with it; pytest's own handlers come back."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers[:] = []
    try:
        yield root
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


def test_json_is_one_object_a_line_with_its_traceback() -> None:
    stream = io.StringIO()
    with fresh() as root:
        start_logging("INFO", "json", stream)
        try:
            raise ValueError("two\nlines")
        except ValueError:
            logging.getLogger("casparian.part").exception("it failed: %s", "why\n")
        root.debug("not told")
    (line,) = stream.getvalue().splitlines()
    told = json.loads(line)
    assert (told["level"], told["logger"], told["message"]) == (
        "ERROR",
        "casparian.part",
        "it failed: why\n",
    )
    assert "ValueError: two\nlines" in told["exception"]
    assert told["time"].endswith("Z")


def test_the_form_may_change_once_the_settings_are_read() -> None:
    stream = io.StringIO()
    with fresh() as root:
        start_logging("INFO", "text", stream)
        root.info("first")
        start_logging("WARNING", "json")
        root.info("hidden")
        root.warning("second")
        assert len(root.handlers) == 1
    first, second = stream.getvalue().splitlines()
    assert first.endswith("INFO    root: first")
    assert json.loads(second)["message"] == "second"


def test_a_log_that_somebody_else_has_set_up_keeps_its_form() -> None:
    stream = io.StringIO()
    with fresh() as root:
        root.addHandler(logging.StreamHandler(stream))
        start_logging("INFO", "json")
        root.info("as it was")
    assert stream.getvalue() == "as it was\n"


@pytest.mark.parametrize(("level", "wanted"), [("debug", 10), ("nonsense", 20)])
def test_the_environment_decides_until_the_settings_do(
    monkeypatch: pytest.MonkeyPatch, level: str, wanted: int
) -> None:
    monkeypatch.setenv(LEVEL_VARIABLE, level)
    monkeypatch.setenv(FORMAT_VARIABLE, "json")
    with fresh() as root:
        start_logging_from_environment()
        assert root.level == wanted
