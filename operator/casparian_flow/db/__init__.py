"""The ledger: one DuckDB file, one writer. Everything that touches duckdb is in here."""
