"""``trimtab plan branches``: N, M and T for a load, a table, and on request a page with curves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from trimtab.core.plan import Plan


def branches(
    lengths: Path = typer.Option(
        help="Recorded branches, one JSON object a line: question, tokens, finished, and where"
        " known correct and score."
    ),
    rate: float = typer.Option(help="Requests a second that one engine gets."),
    slo: str = typer.Option(
        help="What must hold: accuracy>=0.8, latency<=30s or p97<=90s, with commas between. With an"
        " accuracy the mean latency is made short, without one the accuracy high."
    ),
    profile: Path | None = typer.Option(
        None, help="What trimtab profile vllm wrote; else an engine like a 14B model on an H100."
    ),
    prompt: int = typer.Option(200, help="Tokens of a prompt."),
    accuracy: float | None = typer.Option(
        None, help="Share of right branches; else that of the recorded ones."
    ),
    auroc: float | None = typer.Option(
        None, help="How often a right branch outscores a wrong one; else that of the recorded."
    ),
    most: int = typer.Option(16, min=1, max=32, help="The largest N to try."),
    seed: int = typer.Option(0, min=0, help="Seed of the simulated questions."),
    out: Path | None = typer.Option(None, help="Write the plan to this file."),
    json_: bool = typer.Option(False, "--json", help="Print the plan as one JSON object."),
    report: Path | None = typer.Option(None, help="Write a page with curves to this file."),
) -> None:
    """Plan how many branches a request gets, and after how many it is answered."""
    from trimtab.branches.demand import Demand, Slo
    from trimtab.branches.lengths import read_lengths
    from trimtab.branches.planner import plan_branches
    from trimtab.branches.simulated_serving import H100_LIKE
    from trimtab.core.cost.step import EngineProfile

    objective = Slo.parse(slo)
    demand = Demand(
        read_lengths(lengths),
        rate,
        H100_LIKE if profile is None else EngineProfile.read(profile),
        prompt,
        accuracy,
        auroc,
    )
    plan = plan_branches(demand, objective, most=most, seed=seed)
    if out is not None:
        plan.write(out)
    if report is not None:
        from trimtab.branches.report import write_report

        write_report(plan, report)
    if json_:
        typer.echo(plan.model_dump_json(indent=2))
    else:
        _show(plan, out)


def _show(plan: Plan, out: Path | None) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("figure", "value", "unit", title=f"Branches for {plan.details['slo']}")
    for name, figure in plan.expected.items():
        table.add_row(name, f"{figure.value:.4g}", figure.unit)
    Console().print(table)
    for warning in plan.warnings:
        typer.echo(f"trimtab: {warning}", err=True)
    typer.echo("Start vLLM with")
    typer.echo(
        f"  --scheduler-cls trimtab.hosts.vllm.Scheduler --additional-config '{pasted(plan)}'"
    )
    if out is not None:
        typer.echo(f"The plan is in {out}.")


def pasted(plan: Plan) -> str:
    """The value of vLLM's ``--additional-config`` that puts a plan into effect."""
    return json.dumps({"trimtab": {"branches": plan.details["config"]}})
