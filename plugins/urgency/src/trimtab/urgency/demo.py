"""``trimtab demo``: the same crowd of agent users at vLLM's own server, and at one with urgency."""

from __future__ import annotations

import asyncio
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from pydantic import BaseModel

from trimtab.core.benchmark import Machine, Progress
from trimtab.core.cache import cache_directory
from trimtab.hosts.vllm.server import Server
from trimtab.hosts.vllm.small_model import small_model
from trimtab.urgency.text_to_sql import databases
from trimtab.urgency.text_to_sql.crowd import (
    DEADLINE_FACTORS,
    IN_TIME_SHARE,
    LOAD,
    Journey,
    Visit,
    assemble,
    measure_pace,
    tighten,
    visit_all,
)
from trimtab.urgency.text_to_sql.figures import METRICS, Figures, Metric, figures
from trimtab.urgency.text_to_sql.sides import FCFS, SEATS, URGENCY, Side, servers

if TYPE_CHECKING:
    from rich.table import Table

SIDES = (FCFS, URGENCY)


class WorkflowReport(BaseModel):
    """One workflow under both orders."""

    workflow: str
    question: str
    database: str
    kind: str
    arrival_s: float
    deadline_s: float
    stages: list[str]
    baseline_latency_s: float
    latency_s: float
    same_sql: bool


class SideReport(BaseModel):
    """One side: how its server was started, and what came out."""

    name: str
    vllm_arguments: list[str]
    figures: Figures


class DemoReport(BaseModel):
    """What ``trimtab demo`` writes. A ratio above 1 means that urgency is better."""

    demo: str = "text-to-sql"
    version: str
    seed: int
    machine: Machine
    model: str
    seats: int
    load: float
    in_time_share: float
    deadline_factors: dict[str, tuple[float, float]]
    alone_s: dict[str, float]
    capacity_per_s: float
    baseline: SideReport
    ours: SideReport
    ratios: dict[str, float]
    same_sql: int
    workflows: list[WorkflowReport]


def run(
    *, workflows: int, seed: int, port: int, model: Path | str | None, progress: Progress
) -> DemoReport:
    """Runs both sides; no process outlives the call.

    Args:
        workflows: how many users ask.
        seed: of the crowd.
        port: the first server's port, the second's being the next; 0 for free ones.
        model: a model to serve instead of the small one.
        progress: told what happens.

    Raises:
        BadInput: a port is taken, there is no such model, or the databases are not installed.
        ServerFailed: a server ended by itself; its log is kept.
    """
    logs = Path(tempfile.mkdtemp(prefix="trimtab-demo-"))
    kept = False
    try:
        progress("preparing the databases and the small model")
        known = databases.load(cache_directory() / "text-to-sql")
        model = model if model is not None else small_model()
        with servers(SIDES, model, logs, progress, port) as started:
            return _compare(started, known, workflows, seed, str(model), progress)
    except Exception:
        kept = any(logs.iterdir())
        raise
    finally:
        if not kept:
            shutil.rmtree(logs, ignore_errors=True)


def _compare(
    started: Sequence[Server],
    known: Sequence[databases.Database],
    workflows: int,
    seed: int,
    model: str,
    progress: Progress,
) -> DemoReport:
    paces = []
    for side, server in zip(SIDES, started, strict=True):
        progress(f"measuring how fast this machine is: {side.title}")
        paces.append(asyncio.run(measure_pace(server, known, SEATS)))
    pace = paces[0]
    crowd = assemble(known, pace, workflows=workflows, seed=seed)
    theirs = tighten(_visit(FCFS, started[0], crowd, progress))
    ours = _visit(URGENCY, started[1], [journey.visit for journey in theirs], progress)
    before, after = figures(theirs), figures(ours)
    return DemoReport(
        version=version("trimtab-urgency"),
        seed=seed,
        machine=Machine.here(),
        model=Path(model).name,
        seats=SEATS,
        load=LOAD,
        in_time_share=IN_TIME_SHARE,
        deadline_factors=dict(DEADLINE_FACTORS),
        alone_s=dict(pace.alone_s),
        capacity_per_s=pace.capacity_per_s,
        baseline=_side_report(FCFS, before),
        ours=_side_report(URGENCY, after),
        ratios={metric.name: metric.ratio(before, after) for metric in METRICS},
        same_sql=sum(a.answer.sql == b.answer.sql for a, b in zip(theirs, ours, strict=True)),
        workflows=[_workflow_report(a, b) for a, b in zip(theirs, ours, strict=True)],
    )


def _visit(side: Side, server: Server, crowd: list[Visit], progress: Progress) -> list[Journey]:
    answered = 0
    message = f"{len(crowd)} workflows under {side.title}"

    def finished() -> None:
        nonlocal answered
        answered += 1
        progress(message, answered / len(crowd))

    progress(message, 0.0)
    return asyncio.run(visit_all(server, crowd, finished=finished))


def _side_report(side: Side, found: Figures) -> SideReport:
    return SideReport(name=side.name, vllm_arguments=list(side.arguments), figures=found)


def _workflow_report(theirs: Journey, ours: Journey) -> WorkflowReport:
    visit = theirs.visit
    return WorkflowReport(
        workflow=visit.workflow,
        question=visit.question,
        database=visit.database.name,
        kind=visit.kind,
        arrival_s=visit.arrival_s,
        deadline_s=visit.deadline_s,
        stages=list(ours.answer.stages),
        baseline_latency_s=theirs.latency_s,
        latency_s=ours.latency_s,
        same_sql=theirs.answer.sql == ours.answer.sql,
    )


def table(report: DemoReport) -> Table:
    """The figures of both sides and their ratios."""
    from rich.table import Table

    kinds = Counter(workflow.kind for workflow in report.workflows)
    mix = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    found = Table(
        title=f"{len(report.workflows)} text-to-SQL workflows ({mix}), "
        f"{report.baseline.figures.calls} calls of {report.model}",
        caption="Deadlines are set so that vLLM's own order meets "
        f"{report.in_time_share:.0%} of them. A ratio above 1 means that urgency is better.",
    )
    found.add_column("")
    for heading in (FCFS.title, URGENCY.title, "ratio"):
        found.add_column(heading, justify="right")
    for metric in METRICS:
        found.add_row(*_row(metric, report))
    return found


def _row(metric: Metric, report: DemoReport) -> list[str]:
    sides = (report.baseline.figures, report.ours.figures)
    if metric.unit == "1":
        cells = [f"{metric.of(side):.0f} of {side.workflows}" for side in sides]
    else:
        cells = [f"{metric.of(side):.3g} {metric.unit}" for side in sides]
    return [metric.title, *cells, f"{report.ratios[metric.name]:.2f}"]


def next_steps(report: DemoReport, out: Path) -> str:
    """What the user may do now, in three lines."""
    flags = " ".join(f"'{word}'" if "{" in word else word for word in report.ours.vllm_arguments)
    return "\n".join(
        (
            f"On your own server: VLLM_PLUGINS=trimtab vllm serve MODEL {flags}",
            'In your client:     extra_body={"vllm_xargs": {"trimtab.workflow": ID, '
            '"trimtab.deadline_s": SECONDS}}, or the headers X-Workflow-ID and '
            "X-Workflow-Deadline-Ms",
            f"All figures:        {out}; measured with repeats: trimtab bench urgency",
        )
    )


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Turns SIGTERM and SIGHUP into an orderly end, so that the servers are stopped."""

    def end(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, end) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
