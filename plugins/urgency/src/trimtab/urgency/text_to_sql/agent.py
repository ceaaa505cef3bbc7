"""The agent: it finds the tables, writes SQL, runs it, mends it, checks it, and reports.

Each stage is one call of the model; a workflow is the chain of calls that answers one question.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from trimtab.urgency.text_to_sql.databases import Database, QueryError, Row, Table

Class = Literal["interactive", "report"]
StageName = Literal["schema", "sql", "fix-1", "fix-2", "check", "report"]

_ATTEMPTS: tuple[StageName, ...] = ("fix-1", "fix-2")

LINKED_TABLES = 3
SHOWN_COLUMNS = 5
SHOWN_ROWS = 3
SHOWN_CHARACTERS = 160

_WORD = re.compile(r"\w+")


@dataclass(frozen=True, slots=True)
class Stage:
    """A kind of call.

    Attributes:
        name: the stage's name, as the server is told.
        task: what the model is told to do.
        opening: the beginning of the answer, which the model continues.
        stop: what ends the answer.
        max_tokens: the longest answer.
    """

    name: StageName
    task: str
    max_tokens: int
    opening: str = ""
    stop: tuple[str, ...] = ()


SCHEMA = Stage("schema", "Name the tables that are needed.", 16, "Tables:", ("\n",))
SQL = Stage("sql", "Write one SQLite query that answers.", 40, "```sql\nSELECT", (";", "```"))
FIXES = tuple(
    Stage(name, "The query fails. Write it right.", 40, "```sql\nSELECT", (";", "```"))
    for name in _ATTEMPTS
)
"""One for each attempt: how much work follows a fix depends on how many came before it."""

CHECK = Stage("check", "Does the result answer the question? Say yes or no.", 4)
REPORT = Stage("report", "Write a short report of the result.", 48)


class Model(Protocol):
    """What the agent asks."""

    async def ask(self, stage: Stage, prompt: str) -> str:
        """The model's answer without the stage's opening."""


@dataclass(slots=True)
class Answer:
    """What came out of a workflow.

    Attributes:
        sql: the last query the model wrote.
        error: why the database refuses it; None when it runs.
        rows: the first rows of its result.
        approved: what the model said of the result.
        stages: the calls that were made, in order.
    """

    sql: str = ""
    error: str | None = None
    rows: list[Row] = field(default_factory=list)
    approved: bool = False
    stages: list[StageName] = field(default_factory=list)


async def answer(question: str, database: Database, kind: Class, model: Model) -> Answer:
    """Answers a question; workflows of the class ``report`` have one more stage, the longest.

    Args:
        question: in English.
        database: what the question is about.
        kind: the workflow's class.
        model: makes the calls.
    """
    found = Answer()

    async def ask(stage: Stage, prompt: str) -> str:
        found.stages.append(stage.name)
        return await model.ask(stage, f"{prompt}\nQuestion: {question}\n{stage.task}")

    summary = "\n".join(_short(table).summary() for table in database.tables)
    tables = linked(database.tables, question, await ask(SCHEMA, summary))
    schema = "\n".join(table.definition() for table in tables)
    found.sql = query(await ask(SQL, schema))
    _execute(found, database)
    for fix in FIXES:
        if found.error is None:
            break
        found.sql = query(await ask(fix, f"{schema}\n{found.sql};\nError: {found.error}"))
        _execute(found, database)
    outcome = f"Query: {found.sql}\nResult: {result(found)}"
    found.approved = "yes" in (await ask(CHECK, outcome)).lower()
    if kind == "report":
        await ask(REPORT, outcome)
    return found


def linked(tables: Sequence[Table], question: str, said: str) -> list[Table]:
    """The tables that the model named, else those that share a word with the question."""
    for text in (said, question):
        words = {word.lower().rstrip("s") for word in _WORD.findall(text)}
        named = [t for t in tables if t.name.lower().rstrip("s") in words]
        if named:
            return named[:LINKED_TABLES]
    return list(tables[:LINKED_TABLES])


def query(said: str) -> str:
    """The SQL of an answer that continues ``SELECT``, on one line."""
    return " ".join(f"SELECT {said}".split(";")[0].split())


def result(found: Answer) -> str:
    """The outcome of the query as the model is shown it."""
    shown = f"error, {found.error}" if found.error else repr(found.rows[:SHOWN_ROWS])
    return shown[:SHOWN_CHARACTERS]


def _short(table: Table) -> Table:
    return Table(table.name, table.columns[:SHOWN_COLUMNS])


def _execute(found: Answer, database: Database) -> None:
    try:
        found.rows, found.error = database.query(found.sql), None
    except QueryError as error:
        found.rows, found.error = [], str(error)[:SHOWN_CHARACTERS]
