"""The SQL that the model may write: queries over the given tables, so that all of them parse."""

from __future__ import annotations

from collections.abc import Sequence

from trimtab.urgency.text_to_sql.databases import Table

_COMMON = r"""
number ::= [0-9] [0-9]? [0-9]? [0-9]?
word ::= "'" [A-Za-z] [A-Za-z ]{0,18} "'"
compare ::= " = " | " > " | " < " | " LIKE "
function ::= "MAX" | "MIN" | "AVG" | "SUM" | "COUNT"
"""


def grammar(tables: Sequence[Table]) -> str:
    """An EBNF grammar, as vLLM's structured outputs take it, whose columns belong to their table.

    Args:
        tables: those that may be asked.
    """
    roots = " | ".join(f"query{number}" for number in range(len(tables)))
    rules = (_rules(number, table) for number, table in enumerate(tables))
    return f"root ::= {roots}\n" + "\n".join(rules) + _COMMON


def _rules(n: int, table: Table) -> str:
    columns = " | ".join(f'"{name}"' for name, _ in table.columns)
    return (
        f'query{n} ::= "SELECT " what{n} " FROM {table.name}" where{n}? order{n}?\n'
        f'what{n} ::= "COUNT(*)" | function "(" column{n} ")" | column{n} (", " column{n})?\n'
        f'where{n} ::= " WHERE " test{n} (" AND " test{n})?\n'
        f"test{n} ::= column{n} compare (number | word)\n"
        f'order{n} ::= " ORDER BY " column{n} " DESC"? " LIMIT " number\n'
        f"column{n} ::= {columns}"
    )
