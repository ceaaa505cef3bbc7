"""``trimtab import``: a cluster file from what a scheduler, a fabric or a measurement says."""

from __future__ import annotations

from pathlib import Path

import typer


def import_topology(
    file: Path = typer.Argument(
        help="Slurm's topology.conf or .yaml, Topograph's graph, kubectl get nodes -o json, an"
        " NCCL topology or graph dump, ibnetdiscover's output, a measured matrix, a hostfile."
    ),
    out: Path | None = typer.Option(None, help="The cluster file; else it is printed."),
    device: str = typer.Option("H100-SXM", help="The devices of nodes whose kind is not given."),
    devices_per_node: int = typer.Option(8, min=1, help="How many, where it is not given."),
    bandwidth: str = typer.Option("400 Gb/s", help="Of a node's link, where it is not given."),
    latency: str = typer.Option("1 us", help="Of a message over one link, where it is not given."),
    oversubscription: float = typer.Option(
        1.0, min=0.01, help="What links below a switch carry, over those above it."
    ),
) -> None:
    """Make a cluster file of a topology in another format; its content tells which.

    The file may be edited: every figure that was not given stands in it as it was assumed.
    """
    from collections import Counter

    from trimtab.core.topology import Assumed, read_topology, write_cluster
    from trimtab.core.topology.writing import cluster_yaml
    from trimtab.core.units import parse_bytes_per_s, parse_seconds

    assumed = Assumed(
        device,
        devices_per_node,
        _positive("--bandwidth", bandwidth, parse_bytes_per_s),
        _positive("--latency", latency, parse_seconds),
        oversubscription,
    )
    cluster = read_topology(file, assumed)
    if out is None:
        typer.echo(cluster_yaml(cluster), nl=False)
        return
    write_cluster(cluster, out)
    kinds = Counter(node.device for node in cluster.nodes for _ in range(node.count))
    devices = ", ".join(f"{count} {name}" for name, count in kinds.items())
    typer.echo(
        f"{out}: {len(cluster.nodes)} nodes ({devices}), {len(cluster.switches)} switches,"
        f" {len(cluster.links)} links"
    )


def _positive(option: str, text: str, parse: object) -> float:
    from trimtab.core.documents import shown
    from trimtab.core.errors import BadInput

    assert callable(parse)
    try:
        value = float(parse(text))
    except ValueError as error:
        raise BadInput(f"{option} is {shown(text)}", fix=getattr(error, "fix", "")) from None
    if not 0 < value < float("inf"):
        raise BadInput(f"{option} is {shown(text)}", fix="give a positive quantity")
    return value
