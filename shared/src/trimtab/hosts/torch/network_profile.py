"""Measures bandwidth and latency between each two hosts of a job, and infers the network's tiers.

Run as a training job is run, e.g. ``torchrun ... -m trimtab.hosts.torch.network_profile --out
matrix.json``. One rank of each host takes part; when all ranks share one machine, all do. With
``--constants`` it also times collectives among hosts below one switch and fits GenModel to them.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from trimtab.core.cost.model_fit import TERMS
from trimtab.core.documents import write_atomic
from trimtab.core.errors import BadInput, TrimtabError
from trimtab.core.topology import read_topology
from trimtab.core.topology.assumptions import Assumed
from trimtab.core.topology.measured import Measurement, draft_of_measurement, tiers_of
from trimtab.core.topology.writing import write_cluster
from trimtab.hosts.host_order import own_host

if TYPE_CHECKING:
    import torch

    from trimtab.core.cluster import Cluster
    from trimtab.core.cost import Constants
    from trimtab.hosts.torch.collective_profile import Effort

SIZES_BYTES = (2**20, 2**22, 2**24)
PINGS = 10
MAX_SIZE_BYTES = 2**32

PAYLOADS = "256KiB,1MiB,4MiB"
LEAST_HOSTS = 3
"""So many hosts tell the constants of collectives apart."""
NO_LATENCY = "no latency of a round or message shows: time smaller --payloads or more --repeats"

Pair = tuple[int, int]
Figures = tuple[float, float]
"""Bandwidth in bytes per second, and latency in seconds."""


@dataclass(frozen=True, slots=True)
class Options:
    """How pairs are measured.

    Attributes:
        sizes_bytes: of the messages sent.
        repeats: how often each is sent; medians count.
        at_once: whether disjoint pairs are measured at one time, so that they share links as the
            groups of a job do; else each pair has the network to itself.
    """

    sizes_bytes: tuple[int, ...] = SIZES_BYTES
    repeats: int = 5
    at_once: bool = False


def rounds(count: int) -> list[list[Pair]]:
    """Each pair of ``count`` players once, in as few rounds of disjoint pairs as there can be.

    The circle method: one stays, the others move on by one place after each round.
    """
    players: list[int | None] = [*range(count), *([None] if count % 2 else [])]
    half, found = len(players) // 2, []
    for _ in range(len(players) - 1):
        facing = zip(players[:half], reversed(players[half:]), strict=True)
        found.append([(min(a, b), max(a, b)) for a, b in facing if a is not None and b is not None])
        players[1:] = [players[-1], *players[1:-1]]
    return found


def bandwidth_bytes_per_s(seconds: Mapping[int, float], latency_s: float) -> float:
    """The bandwidth that the times of messages of several sizes show.

    It is the median slope between each two sizes (Theil 1950, Sen 1968), so that what each message
    costs beside its bytes cancels out, but no more than the longest message shows by itself once
    the time of an empty one is taken off.

    Args:
        seconds: the time of a message by its size in bytes.
        latency_s: of an empty one.
    """
    points = sorted(seconds.items())
    slopes = [(t2 - t1) / (s2 - s1) for (s1, t1), (s2, t2) in combinations(points, 2)]
    slope = median(slopes) if slopes else 0.0
    size, longest_s = points[-1]
    at_most = size / max(longest_s - latency_s, longest_s / 10)
    return min(1 / slope, at_most) if slope > 0 else at_most


class _Peer:
    """This rank's end of the exchange with another."""

    def __init__(self, other: int, device: torch.device) -> None:
        import torch
        import torch.distributed as dist

        self._other, self._device = other, device
        self._send, self._recv = dist.send, dist.recv
        self._small = torch.zeros(1, dtype=torch.uint8, device=device)

    def ping_s(self) -> float:
        """The time there and back of a small message, as the one who asks sees it."""
        begin = time.perf_counter()
        self._send(self._small, self._other)
        self._recv(self._small, self._other)
        self._settle()
        return time.perf_counter() - begin

    def pong(self) -> None:
        """Answers one `ping_s`."""
        self._recv(self._small, self._other)
        self._send(self._small, self._other)
        self._settle()

    def send_s(self, payload: torch.Tensor) -> float:
        """The time until a large message has arrived and a small answer has come."""
        begin = time.perf_counter()
        self._send(payload, self._other)
        self._recv(self._small, self._other)
        self._settle()
        return time.perf_counter() - begin

    def receive(self, payload: torch.Tensor) -> None:
        """Answers one `send_s`."""
        self._recv(payload, self._other)
        self._send(self._small, self._other)
        self._settle()

    def _settle(self) -> None:
        if self._device.type == "cuda":
            import torch

            torch.cuda.synchronize(self._device)


def _measure(peer: _Peer, first: bool, options: Options, device: torch.device) -> Figures:
    """The figures from this rank to the other; the first of the two sends first."""
    import torch

    payloads = {s: torch.zeros(s, dtype=torch.uint8, device=device) for s in options.sizes_bytes}
    figures: Figures = (0.0, 0.0)
    for sending in (first, not first):
        if sending:
            latency_s = median(peer.ping_s() for _ in range(PINGS)) / 2
            seconds = {
                size: median(peer.send_s(payload) for _ in range(options.repeats))
                for size, payload in payloads.items()
            }
            # The answer is part of each time, and cancels out between sizes.
            figures = bandwidth_bytes_per_s(seconds, 2 * latency_s), latency_s
        else:
            for _ in range(PINGS):
                peer.pong()
            for payload in payloads.values():
                for _ in range(options.repeats):
                    peer.receive(payload)
    return figures


def measure(options: Options, backend: str) -> Measurement | None:
    """Measures all pairs of hosts; the default process group must be up on every rank.

    Args:
        options: how.
        backend: the group's, ``gloo`` or ``nccl``.

    Returns:
        The matrix on rank 0, None on the others.
    """
    import torch
    import torch.distributed as dist

    players = job_players()
    ranks = list(players)
    device = _device(torch, backend)
    mine: dict[int, Figures] = {}
    for pairs in _turns(len(ranks), options.at_once):
        dist.barrier()
        for a, b in pairs:
            if dist.get_rank() in (ranks[a], ranks[b]):
                first = dist.get_rank() == ranks[a]
                other = ranks[b] if first else ranks[a]
                mine[other] = _measure(_Peer(other, device), first, options, device)
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    if dist.get_rank():
        return None
    return _matrix(players, gathered, options.at_once)


def job_players() -> dict[int, str]:
    """The ranks that take part and the host that each stands for; every rank calls it."""
    import torch.distributed as dist

    everywhere: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(everywhere, own_host(os.environ))
    return _players(everywhere)


def nearest_ranks(found: Measurement, players: Mapping[int, str]) -> list[int]:
    """The ranks of the most hosts below one switch: the lowest that has enough; all of a machine.

    Args:
        found: the bandwidth between the hosts.
        players: the ranks that take part and the host of each, as of `job_players`.
    """
    own = own_host(os.environ)
    if all(host == f"{own}-{rank}" for rank, host in players.items()):
        return list(players)
    for tier in tiers_of(found):
        largest = max(dict.fromkeys(tier.domain_of), key=tier.domain_of.count)
        if tier.domain_of.count(largest) >= LEAST_HOSTS:
            below = {h for h, d in zip(found.hosts, tier.domain_of, strict=True) if d == largest}
            return [rank for rank, host in players.items() if host in below]
    return list(players)


def fit_constants(found: Measurement | None, effort: Effort, cluster: Cluster | None) -> Constants:
    """Times collectives among the nearest ranks and fits GenModel's constants; all ranks call it.

    Args:
        found: what `measure` returned.
        effort: how they are timed.
        cluster: the network that the constants are for, on rank 0.

    Returns:
        The same on every rank.

    Raises:
        BadInput: there are fewer than three hosts, or the network lacks one of them.
    """
    import torch.distributed as dist

    from trimtab.core.collectives import NetworkTree
    from trimtab.core.cost import Constants, fit_model
    from trimtab.hosts.torch.collective_profile import timed_runs

    players = job_players()
    ranks: list[Any] = [None if found is None else nearest_ranks(found, players)]
    dist.broadcast_object_list(ranks)
    if len(ranks[0]) < LEAST_HOSTS:
        raise BadInput(
            f"{len(ranks[0])} hosts do not tell the constants apart",
            fix=f"fit them among at least {LEAST_HOSTS}",
        )
    runs = timed_runs(ranks[0], effort)
    told: list[Any] = [None]
    if cluster is not None:
        try:
            tree = NetworkTree.of_cluster(cluster, [(players[rank], 0) for rank in ranks[0]])
            told = [Constants.of_fit(fit_model(runs), tree)]
        except TrimtabError as error:
            told = [error]
    # All ranks learn of an error, so that none waits for the first one.
    dist.broadcast_object_list(told)
    if isinstance(told[0], TrimtabError):
        raise told[0]
    assert isinstance(told[0], Constants)
    return told[0]


def _players(hosts: Sequence[str]) -> dict[int, str]:
    """The ranks that take part, and what each stands for."""
    if len(set(hosts)) == 1:
        return {rank: f"{host}-{rank}" for rank, host in enumerate(hosts)}
    first: dict[str, int] = {}
    for rank, host in enumerate(hosts):
        first.setdefault(host, rank)
    return {rank: host for host, rank in first.items()}


def _turns(count: int, at_once: bool) -> list[list[Pair]]:
    """The pairs that are measured together, turn by turn."""
    turns = rounds(count)
    return turns if at_once else [[pair] for turn in turns for pair in turn]


def _matrix(
    players: Mapping[int, str], gathered: Sequence[Mapping[int, Figures]], at_once: bool
) -> Measurement:
    def table(part: int) -> tuple[tuple[float | None, ...], ...]:
        return tuple(
            tuple(None if a == b else gathered[a][b][part] for b in players) for a in players
        )

    return Measurement(
        hosts=tuple(players.values()),
        bandwidth_bytes_per_s=table(0),
        latency_s=table(1),
        at_once=at_once,
    )


def _device(torch: Any, backend: str) -> torch.device:
    if backend != "nccl":
        return torch.device("cpu")  # type: ignore[no-any-return]
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device  # type: ignore[no-any-return]


def summary(found: Measurement) -> str:
    """The inferred tiers, a line each."""
    lines = [f"{len(found.hosts)} hosts"]
    for number, tier in enumerate(tiers_of(found), 1):
        count = len(set(tier.domain_of))
        domains = "1 domain" if count == 1 else f"{count} domains"
        lines.append(f"tier {number}: {domains}, {tier.bandwidth_bytes_per_s * 8e-9:.3g} Gb/s")
    return "\n".join(lines)


@contextmanager
def _group(backend: str, timeout_s: float) -> Iterator[None]:
    import torch.distributed as dist

    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR") if name not in os.environ]
    if missing:
        raise BadInput(
            f"{missing[0]} is not set, so this is no rank of a job",
            fix="run it with torchrun, or trimtab profile network --nproc 4",
        )
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    try:
        yield
    finally:
        dist.destroy_process_group()


def parse_sizes(text: str, option: str = "--sizes") -> tuple[int, ...]:
    """Message sizes in bytes from text such as ``1MiB,16MiB``.

    Raises:
        BadInput: it is malformed, or a size is none that can be sent.
    """
    from trimtab.core.units import parse_bytes

    fix = "write sizes such as 256KiB,1MiB,16MiB"
    sizes = []
    for part in text.split(","):
        try:
            size = float(str(parse_bytes(part.strip())))
        except ValueError:
            raise BadInput(f"{option} has {part.strip()!r}", fix=fix) from None
        if not 1 <= size <= MAX_SIZE_BYTES:
            raise BadInput(f"{option} has {part.strip()!r}", fix="give from 1 byte to 4 GiB")
        sizes.append(int(size))
    return tuple(sorted(set(sizes)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Takes part in the measurement as one rank; the first rank writes what was found."""
    parser = argparse.ArgumentParser(prog="python -m trimtab.hosts.torch.network_profile")
    parser.add_argument("--out", type=Path, required=True, help="the matrix (JSON) to write")
    parser.add_argument("--cluster", type=Path, help="the inferred cluster (YAML) to write")
    parser.add_argument("--sizes", default="1MiB,4MiB,16MiB")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--pairs", choices=("alone", "at-once"), default="alone")
    parser.add_argument("--backend", choices=("gloo", "nccl"))
    parser.add_argument("--device", default=Assumed().device, help="of the cluster's nodes")
    parser.add_argument("--devices-per-node", type=int, default=Assumed().devices_per_node)
    parser.add_argument("--constants", type=Path, help="fitted constants (YAML) to write")
    parser.add_argument(
        "--payloads", default=PAYLOADS, help="of the collectives they are fitted to"
    )
    parser.add_argument("--topology", help="the network that the constants are for")
    parser.add_argument("--timeout", type=float, default=300, help="seconds a message may take")
    given = parser.parse_args(arguments)
    try:
        options = Options(parse_sizes(given.sizes), max(1, given.repeats), given.pairs == "at-once")
        backend = given.backend or ("gloo" if given.constants else _best_backend())
        with _group(backend, given.timeout):
            found = measure(options, backend)
            constants = _constants(found, given) if given.constants is not None else None
        if found is not None:
            _write(found, given)
            if constants is not None:
                constants.write(given.constants)
                print(fit_summary(constants))
    except TrimtabError as error:
        print(f"trimtab: {error}", file=sys.stderr)
        return error.exit_status
    return 0


def _best_backend() -> str:
    import torch

    return "nccl" if torch.cuda.is_available() else "gloo"


def _constants(found: Measurement | None, given: argparse.Namespace) -> Constants:
    from trimtab.hosts.torch.collective_profile import Effort

    payloads = parse_sizes(given.payloads, "--payloads")
    effort = Effort(payloads, max(1, given.repeats), given.timeout)
    cluster = None
    if found is not None:
        cluster = read_topology(given.topology) if given.topology else _inferred(found, given)
    return fit_constants(found, effort, cluster)


def _inferred(found: Measurement, given: argparse.Namespace) -> Cluster:
    assumed = Assumed(given.device, given.devices_per_node)
    return draft_of_measurement(found, str(given.out)).cluster(given.out.stem, assumed)


def _write(found: Measurement, given: argparse.Namespace) -> None:
    write_atomic(given.out, found.model_dump_json(indent=1) + "\n")
    if given.cluster is not None:
        write_cluster(_inferred(found, given), given.cluster)
    print(summary(found))


def fit_summary(constants: Constants) -> str:
    """The fitted terms with their intervals, a line each."""
    fit = constants.fitted
    assert fit is not None
    lines = [
        f"{name}: {(term := getattr(fit, name)).value:.3g} ({term.low:.3g} to {term.high:.3g})"
        for name in TERMS
    ]
    lines.append(f"incast_threshold: {fit.incast_threshold}")
    if fit.alpha_s.value + fit.message_s.value == 0:
        lines.append(NO_LATENCY)
    errors = f"{fit.error:.1%} on numbers of ranks left out, {fit.plain_error:.1%} without incast"
    return "\n".join([*lines, f"error: {errors} and memory ({fit.runs} runs)"])


if __name__ == "__main__":
    sys.exit(main())
