"""GROUP BY a primary key, as SQL:1999 defines it, for a database that does not know it.

A column of a base table depends functionally on the table's primary key, so a query that groups
by the key may select the column. DuckDB refuses that; here such columns are added to the GROUP
BY, right behind the key, which changes no group. Nothing else is touched: a query that needs
nothing, or that the parser does not understand, comes back byte for byte, and a column that does
not depend on a grouped key is still refused by DuckDB.
"""

import logging
from collections.abc import Iterator
from typing import Final

import sqlglot
from sqlglot import exp
from sqlglot.optimizer.scope import Scope, traverse_scope

from casparian_flow.db import schema

log = logging.getLogger(__name__)

SQL_CHARS_MAX: Final = 65_536
"""Longer texts are left to DuckDB as they are."""
_NEEDING: Final = ("expressions", "having", "order", "qualify", "distinct")
"""Clauses of a SELECT in which a column has to be grouped or aggregated."""

_KEYS = {table: schema.primary_key(table) for table in schema.TABLES}
_COLUMNS = {table: frozenset(schema.column_names(table)) for table in schema.TABLES}


def complete_group_by(sql: str) -> str:
    """`sql` with the dependent columns added to its GROUP BY clauses."""
    if "group" not in sql.lower() or len(sql) > SQL_CHARS_MAX:
        return sql
    try:
        insertions = sorted(_insertions(sql), reverse=True)
    except Exception as error:  # noqa: BLE001 - odd SQL is DuckDB's to judge, not the parser's
        log.debug("left to DuckDB as it is: %s", error)
        return sql
    for position, addition in insertions:
        sql = sql[:position] + addition + sql[position:]
    return sql


def _insertions(sql: str) -> Iterator[tuple[int, str]]:
    for statement in sqlglot.parse(sql, dialect="duckdb"):
        if isinstance(statement, exp.Query):
            for scope in traverse_scope(statement):
                yield from _scope_insertions(scope, sql)


def _scope_insertions(scope: Scope, sql: str) -> Iterator[tuple[int, str]]:
    select = scope.expression
    if not isinstance(select, exp.Select):
        return
    group = select.args.get("group")
    if not isinstance(group, exp.Group) or _is_special(group):
        return
    tables = {
        alias.lower(): source.name.lower()
        for alias, source in scope.sources.items()
        if isinstance(source, exp.Table) and _is_base_table(source)
    }
    grouped = _grouped(group, scope, tables)
    for alias, table in tables.items():
        key = _KEYS[table]
        if not key or not all((alias, column) in grouped for column in key):
            continue
        needed = _needed(scope, select, alias, tables)
        missing = sorted(column for column in needed if (alias, column) not in grouped)
        if missing:
            last = grouped[alias, key[-1]]
            prefix = _prefix(last, alias)
            yield _end_of(last, sql), "".join(f', {prefix}"{column}"' for column in missing)


def _is_special(group: exp.Group) -> bool:
    """ALL, ROLLUP, CUBE and GROUPING SETS group by more than a list of columns."""
    return any(value for name, value in group.args.items() if name != "expressions")


def _is_base_table(source: exp.Table) -> bool:
    return (
        isinstance(source.this, exp.Identifier)
        and source.name.lower() in _KEYS
        and source.db.lower() in ("", "main")
        and not source.args.get("pivots")
    )


def _grouped(
    group: exp.Group, scope: Scope, tables: dict[str, str]
) -> dict[tuple[str, str], exp.Column]:
    """The plain columns of the GROUP BY, by (alias, column)."""
    found = {}
    for expression in group.expressions:
        if isinstance(expression, exp.Column):
            owner = _owner(expression, scope, tables)
            if owner:
                found[owner, expression.name.lower()] = expression
    return found


def _needed(scope: Scope, select: exp.Select, alias: str, tables: dict[str, str]) -> set[str]:
    """Columns of `alias` that stand outside aggregates where only grouped ones may."""
    if any(_is_star(item, alias) for item in select.expressions):
        return set(_COLUMNS[tables[alias]])
    return {
        column.name.lower()
        for column in scope.columns
        if _owner(column, scope, tables) == alias and _must_be_grouped(column, select)
    }


def _is_star(item: exp.Expr, alias: str) -> bool:
    """`*` or `alias.*`."""
    if isinstance(item, exp.Column) and isinstance(item.this, exp.Star):
        return item.table.lower() == alias
    return isinstance(item, exp.Star)


def _must_be_grouped(column: exp.Column, select: exp.Select) -> bool:
    node: exp.Expr = column
    while node.parent is not None:
        if node.parent is select:
            return node.arg_key in _NEEDING
        node = node.parent
        if isinstance(node, exp.AggFunc) and not isinstance(node.parent, exp.Window):
            return False
    return False


def _owner(column: exp.Column, scope: Scope, tables: dict[str, str]) -> str:
    """Alias of the base table a column belongs to, "" if that is not certain."""
    name = column.name.lower()
    qualifier = column.table.lower()
    if qualifier:
        table = tables.get(qualifier)
        return qualifier if table is not None and name in _COLUMNS[table] else ""
    if len(tables) != len(scope.sources):
        return ""
    owners = [alias for alias, table in tables.items() if name in _COLUMNS[table]]
    return owners[0] if len(owners) == 1 else ""


def _prefix(column: exp.Column, alias: str) -> str:
    return f'"{alias}".' if column.table else ""


def _end_of(column: exp.Column, sql: str) -> int:
    """Offset behind a column's name in the text.

    Raises:
        ValueError: the parser's position is not where the name stands.
    """
    meta = column.this.meta
    start, end = int(meta["start"]), int(meta["end"]) + 1
    if sql[start:end].strip('"').lower() != column.name.lower():
        raise ValueError(f"{column.name} is not at {start}")
    return end
