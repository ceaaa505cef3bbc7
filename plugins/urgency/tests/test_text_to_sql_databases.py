from __future__ import annotations

import re
import sqlite3
from importlib.util import find_spec

import pytest

from trimtab.core.errors import BadInput
from trimtab.urgency.text_to_sql import databases
from trimtab.urgency.text_to_sql.databases import NAMES, QueryError, dump, fill, load

needs_defog_data = pytest.mark.skipif(
    find_spec("defog_data") is None, reason="defog-data is not installed"
)

DUMP = r"""
SET row_security = off;
CREATE TABLE public.shop (
    id bigint DEFAULT '0'::bigint NOT NULL,
    text text,
    price double precision,
    open boolean,
    opens time without time zone,
    kind text DEFAULT 'x y'::character varying
);
ALTER TABLE public.shop OWNER TO postgres;
COPY public.shop (id, price, text, open) FROM stdin;
1	2.5	\N	t
2	\N	a\tb\\c\nd	f
3	1		\N
\.
COPY public.shop (id) FROM stdin;
\.
GRANT ALL ON SCHEMA public TO PUBLIC;
"""


@pytest.fixture
def shop():
    connection = sqlite3.connect(":memory:")
    fill(connection, DUMP)
    yield connection
    connection.close()


def test_a_dump_becomes_tables_with_sqlites_types(shop):
    columns = shop.execute("PRAGMA table_info(shop)").fetchall()
    assert [(c[1], c[2]) for c in columns] == [
        ("id", "INTEGER"),
        ("text", "TEXT"),
        ("price", "REAL"),
        ("open", "BOOLEAN"),
        ("opens", "TIME"),
        ("kind", "TEXT"),
    ]
    assert columns[0][3:5] == (1, "'0'")
    assert columns[5][4] == "'x y'"


def test_copied_fields_are_null_empty_or_unescaped_and_have_their_type(shop):
    rows = shop.execute("SELECT id, price, text, typeof(id), typeof(price) FROM shop").fetchall()
    assert rows == [
        (1, 2.5, None, "integer", "real"),
        (2, None, "a\tb\\c\nd", "integer", "null"),
        (3, 1.0, "", "integer", "real"),
    ]


@pytest.fixture
def made(tmp_path, monkeypatch):
    monkeypatch.setattr(databases, "NAMES", ("shops",))
    monkeypatch.setattr(databases, "dump", lambda name: DUMP)
    return databases.load(tmp_path)[0]


def test_a_made_database_is_made_once(made, tmp_path, monkeypatch):
    def fail(name: str) -> str:
        raise AssertionError(name)

    monkeypatch.setattr(databases, "dump", fail)
    (again,) = databases.load(tmp_path)
    assert again == made
    assert [path.name for path in tmp_path.glob("*.sqlite")] == ["shops.sqlite"]


def test_a_failed_dump_leaves_no_database(tmp_path, monkeypatch):
    monkeypatch.setattr(databases, "NAMES", ("shops",))
    monkeypatch.setattr(databases, "dump", lambda name: DUMP.replace("2.5\t\\N", "2.5"))
    with pytest.raises(sqlite3.Error):
        databases.load(tmp_path)
    assert list(tmp_path.glob("*.sqlite")) == []


def test_queries_see_the_tables_and_get_at_most_the_cap(made):
    assert made.tables[0].summary() == "shop(id, text, price, open, opens, kind)"
    assert made.query("SELECT count(*) FROM shop") == [(3,)]
    assert len(made.query("SELECT id FROM shop", row_cap=2)) == 2


@pytest.mark.parametrize(
    ("sql", "reason"),
    [
        ("SELECT nought FROM shop", "no such column"),
        ("SELEC", "syntax error"),
        ("DELETE FROM shop", "not authorized"),
        ("ATTACH 'other.db' AS other", "not authorized"),
        ("PRAGMA table_info(shop)", "not authorized"),
        ("SELECT 1; SELECT 2", "one statement"),
        ("SELECT length(randomblob(1000000000))", "too big"),
    ],
)
def test_bad_and_writing_queries_are_refused(made, tmp_path, sql, reason):
    with pytest.raises(QueryError, match=reason):
        made.query(sql)
    assert made.query("SELECT count(*) FROM shop") == [(3,)]
    assert [path.name for path in tmp_path.glob("*.sqlite")] == ["shops.sqlite"]


def test_an_endless_query_is_stopped(made):
    endless = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT max(x) FROM n"
    with pytest.raises(QueryError, match="interrupted"):
        made.query(endless, timeout_s=0.05)


def test_without_the_package_the_user_is_told_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(databases, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match="pip install --no-deps defog-data"):
        load(tmp_path)


@needs_defog_data
@pytest.mark.parametrize("name", NAMES)
def test_every_row_of_the_seven_dumps_is_loaded(tmp_path, name, monkeypatch):
    monkeypatch.setattr(databases, "NAMES", (name,))
    (database,) = load(tmp_path)
    text = dump(name)
    assert len(database.tables) == text.count("CREATE TABLE public.") > 0
    rows = dict.fromkeys((table.name for table in database.tables), 0)
    copying = None
    for line in text.splitlines():
        if match := re.match(r"COPY public\.(\w+) ", line):
            copying = match[1]
        elif line == "\\.":
            copying = None
        elif copying is not None:
            rows[copying] += 1
    for table, count in rows.items():
        assert database.query(f"SELECT count(*) FROM {table}") == [(count,)]
    assert sum(rows.values()) > 20
