"""``trimtab simulate serving``: a workload on simulated engines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from trimtab.core.policy import ServingPolicy


def serving(
    workload: Path = typer.Option(..., help="The requests: one JSON object a line."),
    profile: Path = typer.Option(..., help="What trimtab profile wrote."),
    replicas: int = typer.Option(1, min=1, max=100_000, help="Engines like the profile's."),
    policy: list[str] = typer.Option(
        [],
        help='A plugin\'s serving policy, e.g. urgency or urgency={"order": "fcfs"}; repeatable.',
    ),
    dispatch: str = typer.Option(
        "least-requests", help="round-robin, least-requests or least-prompt-tokens."
    ),
    trace: Path | None = typer.Option(None, help="Also write a trace for Perfetto to this file."),
    log: Path | None = typer.Option(None, help="Also write one JSON line for each request."),
    json_: bool = typer.Option(False, "--json", help="Print one JSON object on stdout."),
) -> None:
    """Serve a workload on simulated engines: latency, throughput and deadlines met."""
    import json

    from trimtab.cli.console import chatter_on_stderr, print_out
    from trimtab.core.cost.step import EngineProfile
    from trimtab.core.documents import digest, write_atomic
    from trimtab.core.simulate import ReplicaSpec, dispatcher, simulate
    from trimtab.core.traces import read_workload

    engine = EngineProfile.read(profile)
    with chatter_on_stderr():
        result = simulate(
            read_workload(workload),
            [ReplicaSpec(engine)] * replicas,
            dispatcher=dispatcher(dispatch),
            policies=_policies(policy),
        )
    if trace is not None:
        write_atomic(trace, json.dumps(result.chrome_trace()))
    if log is not None:
        write_atomic(log, result.log())
    summary = result.summary()
    if json_:
        inputs = {"workload_sha256": digest(workload), "profile_sha256": digest(profile)}
        chosen = {"replicas": replicas, "dispatch": dispatch, "policies": policy}
        typer.echo(json.dumps({**inputs, **chosen, **summary}, indent=2))
    else:
        print_out(_table(summary))


def _policies(chosen: Sequence[str]) -> Callable[[], list[ServingPolicy]]:
    """Makes the named plugins' policies anew for each replica."""
    from trimtab.core.documents import parse_json
    from trimtab.core.errors import BadInput
    from trimtab.core.hooks import plugin

    enabled = []
    for choice in chosen:
        name, _, options = choice.partition("=")
        parsed = parse_json(options or "{}", where=f"--policy {name}")
        enabled.append((plugin(name), parsed))

    def make() -> list[ServingPolicy]:
        policies = []
        for found, options in enabled:
            policy = found.serving_policy(options)
            if policy is None:
                raise BadInput(f"the plugin {found.name!r} has no serving policy")
            policies.append(policy)
        return policies

    return make


def _table(summary: dict[str, float | int]) -> Table:
    from rich.table import Table

    table = Table("figure", "value", box=None)
    for name, value in summary.items():
        table.add_row(name, f"{value:,}" if isinstance(value, int) else f"{value:,.4g}")
    return table
