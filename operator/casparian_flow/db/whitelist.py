"""cf_library_whitelist: what plugins may import, as the configuration says at each start."""

from collections.abc import Collection

from casparian_flow.db.ledger import Ledger

_TABLE = "cf_library_whitelist"


def record(ledger: Ledger, libraries: Collection[str], *, now_us: int) -> None:
    """Bring the table in step with the libraries in force; writes only if it differs.

    Raises:
        LedgerUnavailableError: nothing is recorded.
    """
    listed = {
        str(row["library_name"]) for row in ledger.query(f"SELECT library_name FROM {_TABLE}")
    }
    added, removed = sorted(set(libraries) - listed), sorted(listed - set(libraries))
    if not added and not removed:
        return
    with ledger.transaction() as connection:
        connection.execute(f"DELETE FROM {_TABLE} WHERE list_contains($1, library_name)", [removed])
        for name in added:
            connection.execute(
                f"INSERT INTO {_TABLE} (id, library_name, description, added_at) "
                "VALUES ($1, $2, 'from [trust] libraries', make_timestamp($3))",
                [ledger.next_id(_TABLE), name, now_us],
            )
