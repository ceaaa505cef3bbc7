"""``trimtab simulate cluster``: a trace of jobs under queueing policies, around announced jobs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from trimtab.core.errors import BadInput

if TYPE_CHECKING:
    from rich.table import Table

    from trimtab.core.simulate.cluster_jobs import ClusterJob
    from trimtab.placement.queue_figures import QueueFigures, QueueRun

_UNITS_S = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_TIME = re.compile(r"(\d+(?:\.\d+)?)([smhd]?)")
_ANNOUNCE = "write job=ID,ahead=4h or nodes=1200,at=18h,ahead=4h,stages=8,duration=12h"


def cluster(
    trace: Path = typer.Option(help="The jobs: trimtab's JSON lines, CSV, Philly, Helios, sacct."),
    cluster: Path = typer.Option(help="The machines and their network."),
    announce: list[str] = typer.Option(
        [], help="A job known ahead: job=ID,ahead=4h, or nodes=1200,at=18h,ahead=4h; repeatable."
    ),
    policy: list[str] = typer.Option(
        [], help="reserve, fifo-best-fit or reserve-no-backfill; repeatable; by default all."
    ),
    history: Path | None = typer.Option(None, help="A trace to learn the jobs' times from."),
    alpha: float = typer.Option(0.3, min=0, max=1, help="Weight of data parallel spread."),
    quantile: float = typer.Option(0.9, help="Of a job's time that must end before the arrival."),
    risk: float = typer.Option(0.02, help="Chance that any job let into the zone is late."),
    json_: bool = typer.Option(False, "--json", help="Print one JSON object on stdout."),
) -> None:
    """Run a trace of jobs around large announced ones, and compare queueing policies."""
    import json

    from trimtab.core.documents import digest, validate
    from trimtab.core.simulate.cluster_traces import read_jobs
    from trimtab.placement.queue_figures import POLICIES, run_queue
    from trimtab.placement.reservation import ReservationOptions

    given = {"alpha": alpha, "quantile": quantile, "risk": risk}
    options = validate(ReservationOptions, given, where="trimtab simulate cluster")
    pods = _pods(cluster)
    jobs = read_jobs(trace)
    for text in announce:
        jobs = _announced(jobs, text)
    before = [] if history is None else read_jobs(history)
    ended = [(job.request, job.held_s) for job in before]
    runs = [
        run_queue(name, jobs, pods, options=options, history=ended) for name in policy or POLICIES
    ]
    if json_:
        inputs = {"trace_sha256": digest(trace), "cluster_sha256": digest(cluster)}
        content = {**inputs, "pods": pods, "policies": [run.as_json() for run in runs]}
        typer.echo(json.dumps(content, indent=2))
    else:
        _print(runs)


def _pods(path: Path) -> list[int]:
    """Free nodes of each of the widest domains."""
    from trimtab.core.topology import read_topology
    from trimtab.placement.fabric import Fabric, domains

    free = [place for place in Fabric.of(read_topology(path)).places if place.state == "free"]
    return [len(places) for places in domains(free, 0).values()]


def _announced(jobs: Sequence[ClusterJob], text: str) -> list[ClusterJob]:
    """The trace with a job announced: one of its own, or one that is added."""
    from trimtab.core.simulate.cluster_jobs import ClusterJob, JobRequest

    fields = _fields(text)
    ahead_s = _seconds(fields.pop("ahead", "4h"), text)
    job_id = fields.pop("job", None)
    if job_id is not None:
        known = {job.request.job_id: job for job in jobs}
        if job_id not in known or fields:
            wrong = f"the key {next(iter(fields))!r}" if fields else f"no job {job_id!r}"
            raise BadInput(f"{text!r} has {wrong}", where="--announce", fix=_ANNOUNCE)
        own = known[job_id]
        arrival_s = own.request.arrival_s
        announced = replace(own.request, announced_s=arrival_s - ahead_s)
        return [replace(job, request=announced) if job is own else job for job in jobs]
    arrival_s = _seconds(fields.pop("at", ""), text)
    request = JobRequest(
        job_id=f"announced-{len(jobs)}",
        arrival_s=arrival_s,
        nodes=_count(fields.pop("nodes", ""), text),
        priority=max(job.request.priority for job in jobs) + 1,
        announced_s=arrival_s - ahead_s,
        pipeline_stages=_count(fields.pop("stages", "1"), text),
    )
    added = ClusterJob(request, _seconds(fields.pop("duration", "12h"), text))
    if fields:
        raise BadInput(
            f"{text!r} has the key {next(iter(fields))!r}", where="--announce", fix=_ANNOUNCE
        )
    return [*jobs, added]


def _fields(text: str) -> dict[str, str]:
    fields: dict[str, str] = {}
    for part in text.split(","):
        key, equals, value = part.strip().partition("=")
        if not (key and equals and value) or key in fields:
            raise BadInput(f"{text!r} announces nothing", where="--announce", fix=_ANNOUNCE)
        fields[key] = value
    return fields


def _seconds(value: str, text: str) -> float:
    match = _TIME.fullmatch(value)
    if match is None:
        raise BadInput(
            f"{text!r} has the time {value!r}", where="--announce", fix="write 90m, 4h or seconds"
        )
    return float(match[1]) * _UNITS_S[match[2] or "s"]


def _count(value: str, text: str) -> int:
    if not value.isdecimal() or int(value) < 1:
        raise BadInput(
            f"{text!r} has the count {value!r}", where="--announce", fix="give a number from 1"
        )
    return int(value)


def _print(runs: Sequence[QueueRun]) -> None:
    from rich.console import Console

    Console().print(_table(runs))


def _table(runs: Sequence[QueueRun]) -> Table:
    """Figures down, policies across: it fits a narrow terminal."""
    from rich.table import Table

    table = Table("", box=None)
    for run in runs:
        table.add_column(run.policy, justify="right")
    for each in zip(*(run.figures for run in runs), strict=True):
        table.add_row(f"{each[0].job_id} ({each[0].nodes:,} nodes)", style="bold")
        for name, text in _rows(each):
            table.add_row(name, *text)
    waits_s = [[outcome.wait_s for outcome in run.result.outcomes.values()] for run in runs]
    table.add_row("all jobs", style="bold")
    table.add_row("mean wait (s)", *(f"{sum(waits) / len(waits):,.0f}" for waits in waits_s))
    return table


def _rows(each: Sequence[QueueFigures]) -> list[tuple[str, list[str]]]:
    """One job's figures under each policy."""
    return [
        ("its nodes still held on arrival", [f"{f.retained_nodes:,}" for f in each]),
        ("its wait (s)", [f"{f.wait_s:,.0f}" for f in each]),
        ("its pipeline spread (pods)", [str(f.pipeline_spread) for f in each]),
        ("its data spread (pods)", [str(f.data_spread) for f in each]),
        ("allocation before arrival", [f"{f.allocation:.3f}" for f in each]),
        ("small jobs' mean wait (s)", [f"{f.small_wait_s:,.0f}" for f in each]),
        ("small jobs' 95 % wait (s)", [f"{f.small_wait_p95_s:,.0f}" for f in each]),
    ]
