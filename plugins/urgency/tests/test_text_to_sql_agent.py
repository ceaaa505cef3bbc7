from __future__ import annotations

import asyncio
import sqlite3
from importlib.resources import files

import pytest
import yaml

from trimtab.urgency.text_to_sql import databases
from trimtab.urgency.text_to_sql.agent import Answer, Class, Stage, answer, linked, query
from trimtab.urgency.text_to_sql.databases import NAMES, Database, Table

SHOPS = Table("shops", (("id", "INTEGER"), ("name", "TEXT")))
GOODS = Table("goods", tuple((f"c{n}", "TEXT") for n in range(9)))
OTHERS = tuple(Table(f"other{n}", (("id", "INTEGER"),)) for n in range(5))


@pytest.fixture
def database(tmp_path):
    path = tmp_path / "shop.sqlite"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE shops (id INTEGER, name TEXT)")
    connection.execute("INSERT INTO shops VALUES (7, 'corner')")
    connection.commit()
    connection.close()
    return Database("shop", path, (GOODS, SHOPS, *OTHERS))


class Scripted:
    """A model that says for each stage what the script says."""

    def __init__(self, script: dict[str, str]) -> None:
        self.script = script
        self.prompts: dict[str, str] = {}

    async def ask(self, stage: Stage, prompt: str) -> str:
        self.prompts[stage.name] = prompt
        return self.script.get(stage.name, "")


def ask(database: Database, script: dict[str, str], kind: Class = "interactive"):
    model = Scripted(script)
    found = asyncio.run(answer("Which shops are there?", database, kind, model))
    return found, model.prompts


def test_a_query_that_runs_is_checked_and_done(database):
    found, prompts = ask(
        database, {"schema": " shops", "sql": " name\nFROM shops", "check": "Yes."}
    )
    assert found.stages == ["schema", "sql", "check"]
    assert (found.sql, found.rows, found.error) == ("SELECT name FROM shops", [("corner",)], None)
    assert found.approved
    assert "goods(c0, c1, c2, c3, c4)" in prompts["schema"]
    assert prompts["sql"].startswith("CREATE TABLE shops (id INTEGER, name TEXT);\nQuestion: Which")
    assert "corner" in prompts["check"]


def test_a_query_that_fails_is_mended_with_the_databases_error(database):
    script = {"schema": "shops", "sql": "title FROM shops", "fix-1": "name FROM shops"}
    found, prompts = ask(database, script, "report")
    assert found.stages == ["schema", "sql", "fix-1", "check", "report"]
    assert found.rows == [("corner",)]
    assert "Error: no such column: title" in prompts["fix-1"]


def test_mending_ends_after_two_attempts(database):
    found, prompts = ask(database, {"sql": "a FROM b", "fix-1": "c FROM d", "fix-2": "e FROM f"})
    assert found.stages == ["schema", "sql", "fix-1", "fix-2", "check"]
    assert found.error == "no such table: f"
    assert "error, no such table: f" in prompts["check"]
    assert not found.approved


@pytest.mark.parametrize("said", ["", ";;;", "```", "\x00", "*/ -- '"])
def test_nonsense_ends_as_an_error_of_the_database(database, said):
    found, _ = ask(database, dict.fromkeys(("schema", "sql", "fix-1", "fix-2", "check"), said))
    assert found.error
    assert found.rows == []


def test_tables_are_linked_by_what_the_model_said_else_by_the_question():
    tables = (GOODS, SHOPS, *OTHERS)
    assert linked(tables, "Which shop sells?", " Goods, other4") == [GOODS, OTHERS[4]]
    assert linked(tables, "Which shop sells?", "none of them") == [SHOPS]
    assert linked(tables, "What?", "") == [GOODS, SHOPS, OTHERS[0]]
    assert len(linked(tables, "", "other0 other1 other2 other3 other4")) == 3


def test_a_query_ends_at_its_semicolon():
    assert query(" a\n FROM b; DROP TABLE b") == "SELECT a FROM b"


def test_an_answer_begins_empty():
    assert Answer() == Answer("", None, [], False, [])


def test_every_database_has_questions_of_its_own():
    text = files("trimtab.urgency.text_to_sql").joinpath("questions.yaml").read_text("utf-8")
    questions = yaml.safe_load(text)
    assert tuple(questions) == NAMES == databases.NAMES
    asked = [question for each in questions.values() for question in each]
    assert len(set(asked)) == len(asked) == 56
    assert all(question.endswith(("?", ".")) for question in asked)
