"""GenModel: what an AllReduce costs, memory access and incast included (arXiv:2409.04202).

``T = A·α + B·β + C·γ + D·δ + max(w - w_t, 0)·B·ε``: rounds, bytes through the busiest port, bytes
reduced and bytes accessed by the busiest rank, and the bytes that arrive in an incast of width
``w``. A width counts the receiver: ``w - 1`` ranks send to one.

To these a message may add what its sender and its receiver do for it, whatever its size: LogP's
overhead ``o``, which the paper leaves out and which many small messages are made of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from trimtab.core.errors import BadInput


@dataclass(frozen=True, slots=True)
class GenModel:
    """The constants of one class of links and the memory behind them.

    Attributes:
        alpha_s: latency of a round.
        beta_s_per_byte: inverse bandwidth of a port.
        gamma_s_per_byte: one operand added to another.
        delta_s_per_byte: one byte read or written by a reduction.
        epsilon_s_per_byte: per sender in excess of the threshold.
        incast_threshold: the largest width that costs nothing extra.
        message_s: what a rank does for each message that it sends or receives (o).
    """

    alpha_s: float
    beta_s_per_byte: float
    gamma_s_per_byte: float = 0.0
    delta_s_per_byte: float = 0.0
    epsilon_s_per_byte: float = 0.0
    incast_threshold: int = 2
    message_s: float = 0.0

    def seconds(self, collective: Collective, payload_bytes: float) -> float:
        """How long an AllReduce of so many bytes on each rank takes."""
        per_byte = (
            collective.reduced * self.gamma_s_per_byte + collective.accessed * self.delta_s_per_byte
        )
        for share, width in collective.traffic:
            excess = max(width - self.incast_threshold, 0)
            per_byte += share * (self.beta_s_per_byte + excess * self.epsilon_s_per_byte)
        latency_s = collective.rounds * self.alpha_s + collective.messages * self.message_s
        return latency_s + payload_bytes * per_byte


@dataclass(frozen=True, slots=True)
class Collective:
    """An AllReduce algorithm on one switch, each quantity for one byte of payload.

    Attributes:
        rounds: A.
        traffic: B in parts: the share of the payload that passes the busiest port, and the width
            of the incast that it arrives in.
        reduced: C.
        accessed: D.
        messages: that the busiest rank sends and receives, whatever the payload.
    """

    rounds: int
    traffic: tuple[tuple[float, int], ...]
    reduced: float
    accessed: float
    messages: int = 0


def ring(ranks: int) -> Collective:
    """Reduce-scatter and all-gather around a ring."""
    share = _share(ranks)
    rounds = 2 * (ranks - 1)
    return Collective(rounds, ((2 * share, 2),), share, 3 * share, 2 * rounds)


def reduce_broadcast(ranks: int) -> Collective:
    """Everyone sends to one root, which reduces once and sends the sum to everyone."""
    _share(ranks)
    others = ranks - 1
    return Collective(
        2 * min(others, 1),
        ((2.0 * others, ranks),),
        others,
        (ranks + 1) * (others > 0),
        2 * others,
    )


def halving_doubling(ranks: int) -> Collective:
    """Recursive halving and doubling; ranks beyond a power of two fold in first and out last."""
    _share(ranks)
    stages = ranks.bit_length() - 1
    core = 2**stages
    share = _share(core)
    if core == ranks:
        return Collective(2 * stages, ((2 * share, 2),), share, 3 * share, 4 * stages)
    return Collective(
        2 * stages + 2, ((2 * share + 2, 2),), share + 1, 3 * share + 3, 4 * stages + 2
    )


def co_located_ps(ranks: int) -> Collective:
    """Each rank is the parameter server of one block: one round in, one out (direct exchange)."""
    return hierarchical_ps([ranks])


def hierarchical_ps(factors: Sequence[int]) -> Collective:
    """Direct exchange in groups of ``factors[0]``, then of ``factors[1]`` among those, and so on.

    Each stage works on what the one before left, so later stages carry less.

    Raises:
        BadInput: a factor is less than 1, or there is none.
    """
    if not factors or min(factors) < 1:
        raise BadInput(f"the group sizes are {list(factors)}", fix="give whole numbers from 1")
    groups = [f for f in factors if f > 1]
    left = [1 / prod(groups[:i]) for i in range(len(groups))]
    shares = [(f - 1) / f * size for f, size in zip(groups, left, strict=True)]
    return Collective(
        rounds=2 * len(groups),
        traffic=tuple((2 * s, f) for s, f in zip(shares, groups, strict=True)),
        reduced=sum(shares),
        accessed=sum((f + 1) / f * size for f, size in zip(groups, left, strict=True)),
        messages=sum(4 * (f - 1) for f in groups),
    )


def least_accessed(ranks: int, width: int) -> float:
    """Fewest bytes a rank can access for one byte of payload when no incast is wider than given.

    Combining ``n`` contributions in ``m`` reductions takes ``n - 1 + 2m`` accesses, and ``m`` is at
    least ``(n - 1) / (width - 1)``.
    """
    _share(ranks)
    if ranks == 1:
        return 0.0
    if width < 2:
        raise BadInput(f"an incast of width {width} has no sender", fix="give at least 2")
    return (ranks - 1 + 2 * -(-(ranks - 1) // (width - 1))) / ranks


def _share(ranks: int) -> float:
    if ranks < 1:
        raise BadInput(f"there are {ranks} ranks", fix="give at least 1")
    return (ranks - 1) / ranks
