"""What the engine says reaches people as a ledger's error."""

from pathlib import Path

import duckdb
import pytest

from casparian_flow.db.engine_errors import reading
from casparian_flow.domain.errors import LedgerUnavailableError


def test_a_read_of_an_invalidated_database_is_the_ledgers_error() -> None:
    said = "FATAL Error: Failed: database has been invalidated because of a previous fatal error."
    with pytest.raises(LedgerUnavailableError, match="cannot be read"), reading(Path("l.duckdb")):
        raise duckdb.FatalException(said)
