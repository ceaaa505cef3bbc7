"""``trimtab plan placement``: a plan file, a table, and on request a page with pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import typer

from trimtab.placement.config import Effort

if TYPE_CHECKING:
    from trimtab.core.cluster import Cluster
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
        "allocate",
        help="allocate: choose nodes, among --hosts if given; reorder: only order all --hosts.",
    ),
    hosts: Path | None = typer.Option(
        None, help="A hostfile, or one host a line: the only nodes that may have ranks."
    ),
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

    network, training = read_topology(cluster), TrainingJob.read(job)
    listed = None if hosts is None else _hosts(hosts)
    if listed is not None:
        sized = training.sized(len(listed)) if mode == "reorder" else training
        _check_slots(listed, sized.ranks_per_node)
    plan = plan_placement(
        network,
        training,
        alpha=alpha,
        mode=mode,
        hosts=None if listed is None else [host.name for host in listed],
        states=states_of(busy, drained, movable),
        tier=tier,
        effort=effort,
    )
    _write(plan, network, out, report)
    if json_:
        typer.echo(plan.model_dump_json(indent=2))
    else:
        _show(plan, out)


@dataclass(frozen=True, slots=True)
class _Host:
    """A line of a hostfile.

    Attributes:
        name: of the host.
        slots: processes that may run on it; None where the file does not say.
        where: the file and the line.
    """

    name: str
    slots: int | None
    where: str


def _hosts(path: Path) -> list[_Host]:
    """The hosts of a file, each the first word of a line, with its ``slots=COUNT`` if it has any.

    Raises:
        BadInput: there are none, one comes twice, or its slots are no number.
    """
    from trimtab.core.documents import read_lines
    from trimtab.core.errors import BadInput

    found: dict[str, _Host] = {}
    for number, line in read_lines(path):
        words, where = line.split("#", 1)[0].split(), f"{path}:{number}"
        if not words:
            continue
        name, slots = words[0], None
        if name in found:
            raise BadInput(f"the host {name!r} is given twice", where=where, fix="give it once")
        for word in words[1:]:
            key, _, count = word.partition("=")
            if key == "slots":
                if not (count.isascii() and count.isdigit()):
                    raise BadInput(f"{word!r} is no count", where=where, fix="write slots=COUNT")
                slots = int(count)
        found[name] = _Host(name, slots, where)
    if not found:
        raise BadInput("there is no host", where=str(path), fix="add a line for each host")
    return list(found.values())


def _check_slots(hosts: Sequence[_Host], ranks: int) -> None:
    """Refuses hosts that may not run as many processes as the job has ranks on each node.

    Raises:
        BadInput: it names the host and its line.
    """
    from trimtab.core.errors import BadInput

    for host in hosts:
        if host.slots is not None and host.slots < ranks:
            raise BadInput(
                f"the host {host.name!r} has slots={host.slots}, and the job {ranks} ranks on"
                " each node",
                where=host.where,
                fix=f"write slots={ranks}, leave the host out, or lower the job's gpus_per_node",
            )


def _write(plan: Plan, network: Cluster, out: Path | None, report: Path | None) -> None:
    """Writes the page and the plan, or neither.

    Raises:
        BadInput: a file cannot be written.
    """
    if report is None:
        if out is not None:
            plan.write(out)
        return
    from trimtab.core.documents import write_atomic
    from trimtab.core.errors import BadInput
    from trimtab.placement.report import report_page

    page, target = report_page(plan, network), report.resolve()
    is_new = not target.exists()
    before = target.read_bytes() if target.is_file() else None
    write_atomic(report, page)
    try:
        if out is not None:
            plan.write(out)
    except BadInput:
        # What went into a pipe or a device is gone.
        if is_new:
            target.unlink(missing_ok=True)
        elif before is not None:
            write_atomic(target, before)
        raise


def _show(plan: Plan, out: Path | None) -> None:
    from rich.console import Console

    from trimtab.placement.table import plan_table

    Console().print(plan_table(plan))
    for warning in plan.warnings:
        typer.echo(f"trimtab: {warning}", err=True)
    if out is not None:
        typer.echo(f"The plan is in {out}.")
