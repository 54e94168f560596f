"""Which source roots a plugin's files come from, where those are not all of its namespace.

The ledger keeps it among its own settings (`cf_meta`), under the plugin's scoped name: it belongs
to no version, and a deploy leaves it alone.
"""

from collections.abc import Collection, Mapping

import duckdb
import msgspec

from casparian_flow.db.ledger import Ledger
from casparian_flow.domain.errors import UsageError

ROOTS_MAX = 1_000
_PREFIX = "plugin_roots/"


def chosen_roots(connection: duckdb.DuckDBPyConnection) -> Mapping[str, frozenset[str]]:
    """Plain names of the chosen roots, by plugin; a plugin that is missing takes all."""
    rows = connection.execute(
        "SELECT key, value FROM cf_meta WHERE starts_with(key, $1)", [_PREFIX]
    ).fetchall()
    return {
        key.removeprefix(_PREFIX): frozenset(msgspec.json.decode(value, type=list[str]))
        for key, value in rows
    }


def choose_roots(ledger: Ledger, plugin: str, roots: Collection[str]) -> None:
    """Give a plugin the files of these roots from now on.

    Args:
        roots: plain names, which need not be there yet; empty gives it all of its namespace.

    Raises:
        UsageError: too many.
        LedgerUnavailableError: nothing is changed.
    """
    if len(roots) > ROOTS_MAX:
        raise UsageError(f"{len(roots)} source roots are more than {ROOTS_MAX}")
    with ledger.transaction() as connection:
        connection.execute("DELETE FROM cf_meta WHERE key = $1", [_PREFIX + plugin])
        if roots:
            value = msgspec.json.encode(sorted(set(roots))).decode()
            connection.execute("INSERT INTO cf_meta VALUES ($1, $2)", [_PREFIX + plugin, value])
