"""The seven databases of the package ``defog-data``, as SQLite files made from its dumps."""

from __future__ import annotations

import re
import sqlite3
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from trimtab.core.cache import made_once
from trimtab.core.errors import BadInput

NAMES = ("academic", "advising", "atis", "geography", "restaurants", "scholar", "yelp")

QUERY_TIMEOUT_S = 1.0
ROW_CAP = 50
VALUE_LIMIT_BYTES = 2**20

# A read-only file alone would still let a query attach, and so make, another one.
_READS = frozenset(
    {
        sqlite3.SQLITE_SELECT,
        sqlite3.SQLITE_READ,
        sqlite3.SQLITE_FUNCTION,
        sqlite3.SQLITE_RECURSIVE,
    }
)

_CREATE = re.compile(r"^CREATE TABLE (?:public\.)?(\w+) \(\n(.*?)\n\);", re.MULTILINE | re.DOTALL)
_COPY = re.compile(
    r"^COPY (?:public\.)?(\w+) \((.*?)\) FROM stdin;\n(.*?)^\\\.$", re.MULTILINE | re.DOTALL
)
_CAST = re.compile(r"::[a-z ]+(?=[ ,)\n]|$)")
_ESCAPE = re.compile(r"\\(.)")

_UNESCAPED = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v"}
_TYPES = {
    "bigint": "INTEGER",
    "boolean": "BOOLEAN",
    "double precision": "REAL",
    "real": "REAL",
    "numeric": "NUMERIC",
    "date": "DATE",
    "time without time zone": "TIME",
    "text": "TEXT",
}
_TYPE = re.compile(rf"(?<=\w )({'|'.join(_TYPES)})\b")

Row = tuple[object, ...]


class QueryError(Exception):
    """A query that SQLite refuses, or that takes too long."""


@dataclass(frozen=True, slots=True)
class Table:
    """A table's name and its columns' names and SQLite types, in order."""

    name: str
    columns: tuple[tuple[str, str], ...]

    def summary(self) -> str:
        """``name(column, column)``."""
        return f"{self.name}({', '.join(name for name, _ in self.columns)})"

    def definition(self) -> str:
        """The table's CREATE TABLE statement on one line."""
        return f"CREATE TABLE {self.name} ({', '.join(' '.join(c) for c in self.columns)});"


@dataclass(frozen=True, slots=True)
class Database:
    """A SQLite file that is only read."""

    name: str
    path: Path
    tables: tuple[Table, ...]

    def query(
        self, sql: str, *, timeout_s: float = QUERY_TIMEOUT_S, row_cap: int = ROW_CAP
    ) -> list[Row]:
        """The first rows of a query's result.

        Raises:
            QueryError: SQLite refuses the query, it writes, or it takes too long.
        """
        connection = sqlite3.connect(f"{self.path.as_uri()}?mode=ro", uri=True)
        stop_s = time.monotonic() + timeout_s
        connection.set_progress_handler(lambda: time.monotonic() > stop_s, 1000)
        connection.set_authorizer(_reads_only)
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, VALUE_LIMIT_BYTES)
        try:
            rows: list[Row] = connection.execute(sql).fetchmany(row_cap)
            return rows
        except (sqlite3.Error, sqlite3.Warning) as error:
            raise QueryError(str(error)) from None
        finally:
            connection.close()


def _reads_only(action: int, *_details: object) -> int:
    return sqlite3.SQLITE_OK if action in _READS else sqlite3.SQLITE_DENY


def load(cache: Path) -> tuple[Database, ...]:
    """All seven databases; their files are made in ``cache`` on first use.

    Raises:
        BadInput: the package ``defog-data`` is not installed, or ``cache`` cannot be written.
    """
    return tuple(_load(name, cache) for name in NAMES)


def dump(name: str) -> str:
    """The text of a database's PostgreSQL dump.

    Raises:
        BadInput: the package ``defog-data`` is not installed.
    """
    spec = find_spec("defog_data")
    path = Path(spec.origin).parent / name / f"{name}.sql" if spec and spec.origin else None
    if path is None or not path.is_file():
        raise BadInput(
            "the databases of the demo are not installed",
            fix="pip install --no-deps defog-data==0.1.1",
        )
    return path.read_text(encoding="utf-8")


def _load(name: str, cache: Path) -> Database:
    path = made_once(cache / f"{name}.sqlite", "the databases", partial(_make, name))
    return Database(name, path.resolve(), tuple(_tables(path)))


def _make(name: str, path: Path) -> None:
    text = dump(name)
    connection = sqlite3.connect(path)
    try:
        with connection:
            fill(connection, text)
    finally:
        connection.close()


def fill(connection: sqlite3.Connection, text: str) -> None:
    """Makes the tables of a pg_dump text, and copies their rows."""
    for table, columns in _CREATE.findall(text):
        connection.execute(f"CREATE TABLE {table} (\n{_in_sqlite(columns)}\n)")
    for table, columns, lines in _COPY.findall(text):
        places = ", ".join("?" * len(columns.split(",")))
        insert = f"INSERT INTO {table} ({columns}) VALUES ({places})"
        connection.executemany(insert, _rows(lines.splitlines()))


def _in_sqlite(columns: str) -> str:
    return _TYPE.sub(lambda match: _TYPES[match[1]], _CAST.sub("", columns))


def _rows(lines: Iterable[str]) -> Iterator[list[str | None]]:
    for line in lines:
        yield [_value(field) for field in line.split("\t")]


def _value(field: str) -> str | None:
    """A field of COPY's text format (PostgreSQL, "COPY", File Formats)."""
    if field == r"\N":
        return None
    return _ESCAPE.sub(lambda match: _UNESCAPED.get(match[1], match[1]), field)


def _tables(path: Path) -> Iterator[Table]:
    connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)
    try:
        names = connection.execute(
            "SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY rowid"
        ).fetchall()
        for (name,) in names:
            columns = connection.execute(f"PRAGMA table_info({name})").fetchall()
            yield Table(name, tuple((column[1], column[2]) for column in columns))
    finally:
        connection.close()
