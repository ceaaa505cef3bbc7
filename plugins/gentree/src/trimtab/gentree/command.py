"""``trimtab plan allreduce``: a plan file and a table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import typer

if TYPE_CHECKING:
    from trimtab.core.plan import Plan
    from trimtab.gentree.gentree import Search

Method = Literal["search", "single", "paper"]


def allreduce(
    cluster: Path = typer.Option(help="The network: a cluster file, or what an importer knows."),
    size: list[str] = typer.Option(
        ["64MiB"], help="The payload on each rank, such as 64MiB; repeatable."
    ),
    out: Path | None = typer.Option(None, help="Write the plan to this file."),
    hosts: Path | None = typer.Option(
        None, help="A hostfile (HOST slots=N): the ranks in its order; else every device."
    ),
    constants: Path | None = typer.Option(None, help="Constants of the cost model (YAML or JSON)."),
    method: Method = typer.Option(
        "search",
        help="search: the better search; single: without two plans that share a payload "
        "or stages in one shot, as MSCCL wants it; "
        "paper: GenTree as published.",
    ),
    breakpoints: bool = typer.Option(
        False, help="Also say from which size on which plan is best, 1 KiB to 4 GiB."
    ),
    report: Path | None = typer.Option(None, help="Write a page with pictures to this file."),
    json_: bool = typer.Option(False, "--json", help="Print the plan as one JSON object."),
) -> None:
    """Plan the AllReduce of a training job on a network that is a tree."""
    from trimtab.core.topology import read_topology
    from trimtab.gentree.constants_file import read_constants
    from trimtab.gentree.planner import plan_allreduce

    network = read_topology(cluster)
    plan = plan_allreduce(
        network,
        [_bytes(text) for text in size],
        constants=None if constants is None else read_constants(constants),
        slots=None if hosts is None else _slots(hosts),
        search=_search(method),
        breakpoints=breakpoints,
    )
    if out is not None:
        plan.write(out)
    if report is not None:
        from trimtab.gentree.report import write_report

        write_report(plan, network, report)
    if json_:
        typer.echo(plan.model_dump_json(indent=2))
    else:
        _show(plan, out, report)


def _bytes(text: str) -> float:
    from trimtab.core.errors import BadInput
    from trimtab.core.units import parse_bytes

    try:
        return float(str(parse_bytes(text)))
    except ValueError:
        raise BadInput(f"--size is {text!r}", fix="write a size such as 64MiB") from None


def _slots(hosts: Path) -> list[tuple[str, int]]:
    from trimtab.hosts.deepspeed.launching import read_hostfile

    return [(name, index) for name, count in read_hostfile(hosts).items() for index in range(count)]


def _search(method: Method) -> Search:
    from trimtab.gentree.gentree import PAPER, Search

    wide = method == "search"
    return PAPER if method == "paper" else Search(beside=wide, one_shot=wide)


def _show(plan: Plan, out: Path | None, report: Path | None) -> None:
    from rich.console import Console

    from trimtab.gentree.table import plan_table

    Console().print(plan_table(plan))
    if out is not None:
        typer.echo(f"The plan is in {out}.")
    if report is not None:
        typer.echo(f"The page is in {report}.")
