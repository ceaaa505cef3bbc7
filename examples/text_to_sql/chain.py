"""A chain in the manner of CHESS: find the tables, write candidates, run, repair, vote.

Every call says which workflow and stage it belongs to and by when the workflow is due; that is all
that urgency needs to know.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass

import openai
from grammar import grammar

from trimtab.urgency.text_to_sql.agent import linked
from trimtab.urgency.text_to_sql.databases import Database, QueryError, Row, Table

CANDIDATES = 2
REPAIRS = 2
_SHOWN_TABLES = 12
_SHOWN_COLUMNS = 8


@dataclass(frozen=True, slots=True)
class Workflow:
    """A question on its way to an answer."""

    name: str
    question: str
    database: Database
    deadline_s: float


@dataclass(frozen=True, slots=True)
class Candidate:
    """A query and what came of it."""

    sql: str
    rows: tuple[Row, ...] = ()
    error: str | None = None

    @property
    def fault(self) -> str | None:
        """What is wrong with it, in words for the model."""
        return self.error or (None if self.rows else "the result is empty")


class Chain:
    """Answers questions by the calls of a model.

    Args:
        client: of an OpenAI-compatible server that supports vLLM's structured outputs.
        model: the model's name there.
    """

    def __init__(self, client: openai.AsyncOpenAI, model: str) -> None:
        self._client, self._model = client, model
        self.calls = 0

    async def answer(self, workflow: Workflow) -> Candidate:
        """The candidate that most agree with, by the rows that the queries give."""
        tables = await self._tables(workflow)
        found = await asyncio.gather(
            *(self._candidate(workflow, tables, seed) for seed in range(CANDIDATES))
        )
        return vote(found)

    async def _tables(self, workflow: Workflow) -> list[Table]:
        shown = workflow.database.tables[:_SHOWN_TABLES]
        names = "\n".join(f"{t.name}: {', '.join(n for n, _ in t.columns[:4])}" for t in shown)
        choice = "|".join(table.name for table in shown)
        said = await self._ask(
            workflow,
            "schema",
            f"{names}\nQuestion: {workflow.question}\nName the tables that are needed.",
            {"regex": f"({choice})(, ({choice}))?"},
        )
        tables = linked(shown, workflow.question, said)
        return [Table(table.name, table.columns[:_SHOWN_COLUMNS]) for table in tables]

    async def _candidate(self, workflow: Workflow, tables: list[Table], seed: int) -> Candidate:
        schema = "\n".join(table.definition() for table in tables)
        rules = {"grammar": grammar(tables)}
        task = f"{schema}\nQuestion: {workflow.question}\nAnswer with one SQLite query."
        tried = _run(workflow, await self._ask(workflow, "generate", task, rules, seed))
        for repair in range(REPAIRS):
            if tried.fault is None:
                break
            again = f"{task}\nThis one is wrong, {tried.fault}: {tried.sql}\nWrite another one."
            stage, chance = f"revise-{repair + 1}", seed + CANDIDATES * (repair + 1)
            tried = _run(workflow, await self._ask(workflow, stage, again, rules, chance))
        return tried

    async def _ask(
        self,
        workflow: Workflow,
        stage: str,
        prompt: str,
        rules: dict[str, str],
        seed: int | None = None,
    ) -> str:
        self.calls += 1
        said = await self._client.chat.completions.create(
            model=self._model,
            messages=[{"role": "user", "content": prompt}],
            max_tokens=64,
            temperature=0.0 if seed is None else 0.8,
            seed=seed,
            extra_body={
                "structured_outputs": rules,
                "vllm_xargs": {
                    "trimtab.workflow": workflow.name,
                    "trimtab.stage": stage,
                    "trimtab.deadline_s": workflow.deadline_s,
                },
            },
        )
        return said.choices[0].message.content or ""


def vote(candidates: list[Candidate]) -> Candidate:
    """One of those whose rows most others give too; one without fault before one with."""
    sound = [candidate for candidate in candidates if candidate.fault is None] or candidates
    ((most, _),) = Counter(candidate.rows for candidate in sound).most_common(1)
    return next(candidate for candidate in sound if candidate.rows == most)


def _run(workflow: Workflow, sql: str) -> Candidate:
    try:
        return Candidate(sql, tuple(workflow.database.query(sql)))
    except QueryError as error:
        return Candidate(sql, error=str(error))
