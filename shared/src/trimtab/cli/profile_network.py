"""``trimtab profile network``: bandwidth between hosts, the tiers it shows, and collectives."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import typer


def network(
    out: Path = typer.Option(..., help="The matrix file to write (JSON)."),
    cluster: Path | None = typer.Option(None, help="The inferred cluster file to write (YAML)."),
    nproc: int = typer.Option(1, min=1, help="Processes on this machine."),
    nnodes: int = typer.Option(1, min=1, help="Machines; run the command on each."),
    node_rank: int = typer.Option(0, min=0, help="Which of them this is."),
    master_addr: str = typer.Option("", help="The first machine, where there are several."),
    master_port: int = typer.Option(29500, min=1, max=65535, help="A free port of it."),
    pairs: str = typer.Option("alone", help="alone, or at-once: disjoint pairs share the links."),
    sizes: str = typer.Option("1MiB,4MiB,16MiB", help="The messages that are sent."),
    repeats: int = typer.Option(5, min=1, help="How often each is sent; medians count."),
    backend: str | None = typer.Option(None, help="gloo or nccl; by default nccl with GPUs."),
    device: str = typer.Option("H100-SXM", help="The devices of the cluster's nodes."),
    devices_per_node: int = typer.Option(8, min=1, help="How many each node has."),
    constants: Path | None = typer.Option(
        None, help="Time collectives too, and write the constants that fit them here (YAML)."
    ),
    payloads: str = typer.Option("256KiB,1MiB,4MiB", help="The payloads of these collectives."),
    topology: Path | None = typer.Option(
        None, help="The network that the constants are for; by default the inferred one."
    ),
) -> None:
    """Measure each pair of hosts with a real job over gloo or NCCL, and infer the network's tiers.

    With --constants it also fits the cost model that trimtab plan allreduce and the backend gentree
    plan by: latency, bandwidth, sums, memory and incast, each with an interval.

    On several machines, run it on each with its own --node-rank, or run the module
    trimtab.hosts.torch.network_profile with the launcher you have.
    """
    from trimtab.cli.launch import become
    from trimtab.core.errors import BadInput
    from trimtab.hosts.torch.network_profile import parse_sizes
    from trimtab.hosts.versions import require

    require("torch")
    if pairs not in ("alone", "at-once"):
        raise BadInput(f"--pairs is {pairs!r}", fix="give alone or at-once")
    if backend not in (None, "gloo", "nccl"):
        raise BadInput(f"--backend is {backend!r}", fix="give gloo or nccl")
    if nnodes > 1 and not master_addr:
        raise BadInput("there are several machines and no --master-addr", fix="give the first's")
    if nnodes * nproc < 2:
        raise BadInput("there is one process alone", fix="give --nproc 4, or --nnodes")
    parse_sizes(sizes)
    _check_fit(constants, payloads, topology, backend, nnodes * nproc)
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(nproc)]
    if nnodes == 1:
        words += ["--standalone"]
    else:
        words += ["--nnodes", str(nnodes), "--node-rank", str(node_rank)]
        words += ["--master-addr", master_addr, "--master-port", str(master_port)]
    words += ["-m", "trimtab.hosts.torch.network_profile", "--out", str(out), "--pairs", pairs]
    words += ["--sizes", sizes, "--repeats", str(repeats), "--device", device]
    words += ["--devices-per-node", str(devices_per_node)]
    words += ["--cluster", str(cluster)] if cluster is not None else []
    words += ["--backend", backend] if backend is not None else []
    words += ["--constants", str(constants), "--payloads", payloads] if constants else []
    words += ["--topology", str(topology)] if constants and topology else []
    become(words, {"OMP_NUM_THREADS": "1", **os.environ})


def _check_fit(
    constants: Path | None, payloads: str, topology: Path | None, backend: str | None, ranks: int
) -> None:
    from trimtab.core.errors import BadInput
    from trimtab.core.topology import read_topology
    from trimtab.hosts.torch.network_profile import LEAST_HOSTS, parse_sizes

    if constants is None:
        if topology is not None:
            raise BadInput("--topology is for --constants alone", fix="give both or none")
        return
    if len(parse_sizes(payloads, "--payloads")) < 2:
        raise BadInput(f"--payloads is {payloads!r}", fix="give at least two sizes")
    if ranks < LEAST_HOSTS:
        raise BadInput(f"--constants needs {LEAST_HOSTS} processes", fix="give --nproc 4")
    if backend == "nccl":
        raise BadInput("constants are fitted over gloo", fix="leave out --backend nccl")
    if topology is not None:
        read_topology(topology)
