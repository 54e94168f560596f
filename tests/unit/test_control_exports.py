"""What `casparian_flow.sentinel` offers, and what it costs to import."""

import subprocess
import sys

from casparian_flow import sentinel


def test_the_documented_names_are_there() -> None:
    for name in sentinel.__all__:
        assert getattr(sentinel, name).__name__ == name


def test_broker_and_client_need_neither_duckdb_nor_arrow() -> None:
    code = (
        "import sys, casparian_flow.sentinel.broker\n"
        "assert 'zmq' not in sys.modules\n"
        "import casparian_flow.sentinel.control\n"
        "assert not {'duckdb', 'pyarrow', 'pydantic', 'sqlalchemy'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    assert not hasattr(sentinel, "Nothing")
