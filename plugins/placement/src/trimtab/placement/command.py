"""``trimtab plan placement``: a plan file, a table, and on request a page with pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import typer

from trimtab.placement.config import Effort

if TYPE_CHECKING:
    from trimtab.core.plan import Plan

Mode = Literal["allocate", "reorder"]


def placement(
    cluster: Path = typer.Option(help="The network: a cluster file, or what an importer knows."),
    job: Path = typer.Option(help="The job file: its parallelism and its model."),
    out: Path | None = typer.Option(None, help="Write the plan to this file."),
    alpha: float | None = typer.Option(
        None, help="Weight of data parallel spread, 0 to 1; else the job's own."
    ),
    mode: Mode = typer.Option(
        "allocate", help="allocate: choose nodes; reorder: only order those of --hosts."
    ),
    hosts: Path | None = typer.Option(None, help="A hostfile, or one host a line."),
    tier: str | None = typer.Option(None, help="Domains whose crossing costs; else the widest."),
    effort: Effort = typer.Option(
        "full", help="quick: strips and packings in under a second; full: until nothing helps."
    ),
    busy: list[str] = typer.Option([], help="A node that runs another job; repeatable."),
    drained: list[str] = typer.Option([], help="A node that must not be used; repeatable."),
    movable: list[str] = typer.Option([], help="A node whose job may be moved; repeatable."),
    json_: bool = typer.Option(False, "--json", help="Print the plan as one JSON object."),
    report: Path | None = typer.Option(None, help="Write a page with pictures to this file."),
) -> None:
    """Plan which node of a cluster runs which rank of a training job."""
    from trimtab.core.topology import read_topology
    from trimtab.placement.fabric import states_of
    from trimtab.placement.job import TrainingJob
    from trimtab.placement.planner import plan_placement

    network = read_topology(cluster)
    plan = plan_placement(
        network,
        TrainingJob.read(job),
        alpha=alpha,
        mode=mode,
        hosts=None if hosts is None else _hosts(hosts),
        states=states_of(busy, drained, movable),
        tier=tier,
        effort=effort,
    )
    if out is not None:
        plan.write(out)
    if report is not None:
        from trimtab.placement.report import write_report

        write_report(plan, network, report)
    if json_:
        typer.echo(plan.model_dump_json(indent=2))
    else:
        _show(plan, out)


def _hosts(path: Path) -> list[str]:
    """The first word of each line that is not empty."""
    from trimtab.core.documents import read_lines

    lines = (line.split("#", 1)[0].split() for _, line in read_lines(path))
    return [words[0] for words in lines if words]


def _show(plan: Plan, out: Path | None) -> None:
    from rich.console import Console

    from trimtab.placement.table import plan_table

    Console().print(plan_table(plan))
    for warning in plan.warnings:
        typer.echo(f"trimtab: {warning}", err=True)
    if out is not None:
        typer.echo(f"The plan is in {out}.")
