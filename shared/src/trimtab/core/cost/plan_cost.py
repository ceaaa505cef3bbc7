"""GenModel's general form: what any plan costs on any tree, with shared links and incast.

Each step takes the time of its busiest link, then that of the rank that adds up most. A link costs
β̂ = β + max(w - w_t, 0)·ε for each byte; a sum of k operands costs (k - 1)·γ + (k + 1)·δ
(arXiv:2409.04202 gives the terms for one switch; what a width is on a link between switches is
read in three ways here, see `Constants.width`, which are the same on one switch).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PositiveInt

from trimtab.core.collectives.network_tree import NetworkTree
from trimtab.core.collectives.schedule import UNIT, Step
from trimtab.core.cost.flows import Flows, Widths
from trimtab.core.cost.model_fit import ModelFit
from trimtab.core.documents import Document, write_atomic
from trimtab.core.errors import BadInput
from trimtab.core.units import Seconds

Floats = NDArray[np.float64]

Width = Literal["rate", "ports", "sources"]

MOST_CHUNKS = 64

LEAST_GAIN = 0.002
"""What a doubling of the chunks must gain."""


class Constants(Document):
    """The constants of GenModel beside what the tree's links say.

    Attributes:
        alpha_s: what each round costs beside the latency of the links.
        beta_ratio: what a byte takes on a link, as a multiple of what its bandwidth says.
        gamma_s_per_byte: one operand added to another.
        delta_s_per_byte: one byte read or written by a sum; None for what the devices' memory says.
        epsilon_ratio: ε as a share of the link's β, for each sender beyond the threshold.
        incast_threshold: the largest width that costs nothing extra; a width counts the receiver.
        message_s: what a rank does for each message that it sends or receives (LogP's overhead o).
        processors: how many all ranks share for that, as where one machine runs them all; they
            work while bytes are on their way. None where each rank has its own.
        width: what meets in a link's queue. ``sources``: the ranks whose data cross it; ``ports``:
            the ports of the switch that feed it; ``rate``: how often these ports' rates hold the
            link's own.
        fitted: the runs' fit that the constants were taken from, where there was one.
    """

    alpha_s: Seconds = Field(50e-6, ge=0)
    beta_ratio: float = Field(1.0, gt=0)
    gamma_s_per_byte: float = Field(0.0, ge=0)
    delta_s_per_byte: float | None = Field(None, ge=0)
    epsilon_ratio: float = Field(1 / 16, ge=0)
    incast_threshold: int = Field(9, ge=2)
    message_s: Seconds = Field(0.0, ge=0)
    processors: PositiveInt | None = None
    width: Width = "rate"
    fitted: ModelFit | None = None

    @classmethod
    def of_fit(cls, fit: ModelFit, tree: NetworkTree) -> Constants:
        """What was fitted on ranks below one switch, beside what a network says of their links.

        Args:
            fit: of the runs.
            tree: the network of the ranks that took part.

        Raises:
            BadInput: the runs show no bandwidth.
        """
        links = list(tree.leaves)
        beta = float(np.median(tree.up_s_per_byte[links]))
        fitted = fit.beta_s_per_byte.value
        if min(beta, fitted) <= 0:
            raise BadInput(
                "the runs show no bandwidth", fix="time larger payloads, of which bandwidth decides"
            )
        latency_s = 2 * float(np.median(tree.latency_s[links]))
        return cls(
            alpha_s=max(fit.alpha_s.value - latency_s, 0.0),
            beta_ratio=fitted / beta,
            gamma_s_per_byte=fit.gamma_s_per_byte.value,
            delta_s_per_byte=fit.delta_s_per_byte.value,
            epsilon_ratio=fit.epsilon_s_per_byte.value / fitted,
            incast_threshold=fit.incast_threshold,
            message_s=fit.message_s.value,
            fitted=fit,
        )

    def write(self, path: str | Path) -> None:
        """Writes a YAML file, whole or not at all.

        Raises:
            BadInput: the folder is missing or may not be written, or the disk is full.
        """
        import yaml

        data = self.model_dump(mode="json", exclude_defaults=True)
        write_atomic(path, yaml.safe_dump(data, sort_keys=False))


@dataclass(frozen=True)
class ExchangeCost:
    """What a step costs for each byte of the payload.

    Attributes:
        rounds: of communication.
        latency_s: of all rounds, and of their messages where no processors are shared.
        messages_s: what the busiest rank of each round does for its messages, or what all keep
            the processors that they share busy.
        seconds_per_byte: of its messages and sums.
        up_busy, down_busy: seconds for each byte that the links to the parents are busy (V).
        memory_busy: likewise each rank's memory (N).
        width: the widest incast.
    """

    rounds: int
    latency_s: float
    messages_s: float
    seconds_per_byte: float
    up_busy: Floats
    down_busy: Floats
    memory_busy: Floats
    width: int


@dataclass(frozen=True)
class PlanCost:
    """What steps cost, one after the other or with chunks of the payload behind one another.

    Attributes:
        rounds: A.
        latency_s: as in `ExchangeCost`.
        seconds_per_byte: of the steps one after the other.
        busy_s_per_byte: how long the busiest link or memory is in use.
        alpha_s: what a further chunk costs beside its messages and bytes.
        messages_s: as in `ExchangeCost`, once for each chunk.
        width: the widest incast.
        shares_processors: whether the messages are the work of processors that all ranks share.
    """

    rounds: int
    latency_s: float
    seconds_per_byte: float
    busy_s_per_byte: float
    alpha_s: float
    messages_s: float
    width: int
    shares_processors: bool = False

    def seconds(self, payload_bytes: float, chunks: int = 1) -> float:
        """How long it takes with so many bytes on each rank.

        Ranks handle the messages of a chunk while bytes of others are on their way; processors
        that they share do so all the time.
        """
        part = payload_bytes / chunks
        first_s = part * self.seconds_per_byte
        if self.shares_processors:
            first_s = max(first_s, self.messages_s)
        further_s = self.alpha_s + max(self.messages_s, part * self.busy_s_per_byte)
        return self.latency_s + first_s + (chunks - 1) * further_s

    def best_chunks(self, payload_bytes: float) -> int:
        """How many chunks are fastest, a power of two; more only where they gain something."""
        best = 1
        for power in range(1, MOST_CHUNKS.bit_length()):
            gained = self.seconds(payload_bytes, 1 << power)
            if gained < (1 - LEAST_GAIN) * self.seconds(payload_bytes, best):
                best = 1 << power
        return best


class PlanEvaluator:
    """Costs plans on one tree.

    Args:
        tree: the network.
        constants: of the model.
    """

    def __init__(self, tree: NetworkTree, constants: Constants) -> None:
        self.tree, self.constants = tree, constants
        self._widths = Widths(tree, constants.width)
        self._epsilon, self._beta_ratio = constants.epsilon_ratio, constants.beta_ratio
        self._symmetric = np.array_equal(tree.up_s_per_byte, tree.down_s_per_byte)

    def cost(self, steps: Sequence[Step]) -> PlanCost:
        """What an AllReduce costs: the steps of its reduce-scatter, and their mirror."""
        return total([c for step in steps for c in self.both(step)], self.constants)

    def both(self, step: Step) -> tuple[ExchangeCost, ExchangeCost]:
        """What a step costs in the reduce-scatter and, mirrored, in the all-gather."""
        reduce = self.step(step)
        if not (self._symmetric and step.is_even):
            return reduce, self.step(step.gathered, gather=True)
        # The same messages the other way round, and the same widths; only the sums fall away.
        sums_s_per_byte = float(reduce.memory_busy.max())
        gather = replace(
            reduce,
            seconds_per_byte=reduce.seconds_per_byte - sums_s_per_byte,
            up_busy=reduce.down_busy,
            down_busy=reduce.up_busy,
            memory_busy=np.zeros(self.tree.size),
        )
        return reduce, gather

    def step(self, step: Step, *, gather: bool = False) -> ExchangeCost:
        """What one step costs."""
        points, leaves = len(self.tree.names), self.tree.size
        if not step.groups:
            nothing = np.zeros(points)
            return ExchangeCost(0, 0.0, 0.0, 0.0, nothing, nothing, np.zeros(leaves), 1)
        latency_s, messages_s, slope, width = 0.0, 0.0, 0.0, 1
        up, down = np.zeros(points), np.zeros(points)
        memory = np.zeros(leaves)
        lengths = _round_lengths(step)
        for first, last in pairwise([0, *lengths]):
            flows = Flows.of(self.tree, step, first, gather=gather)
            ups, downs, widest = self._busy(flows)
            sums = np.zeros(leaves) if gather else self._sums(flows)
            rounds = last - first
            latency_s += rounds * self._latency_s(flows)
            messages_s += rounds * self._messages_s(flows)
            slope += rounds * (max(ups.max(), downs.max()) + sums.max())
            up += rounds * ups
            down += rounds * downs
            memory += rounds * sums
            width = max(width, widest)
        if not self.constants.processors:
            latency_s += messages_s
        return ExchangeCost(lengths[-1], latency_s, messages_s, slope, up, down, memory, width)

    def _busy(self, flows: Flows) -> tuple[Floats, Floats, int]:
        """Seconds for each byte of the payload that each link is busy, and the widest incast."""
        tree, constants = self.tree, self.constants
        up_wide, down_wide = self._widths.of(flows)
        busy = []
        for load, wide, beta in (
            (flows.up, up_wide, tree.up_s_per_byte),
            (flows.down, down_wide, tree.down_s_per_byte),
        ):
            excess = np.maximum(wide - constants.incast_threshold, 0)
            busy.append(load / UNIT * self._beta_ratio * beta * (1 + excess * self._epsilon))
        return busy[0], busy[1], int(max(up_wide.max(), down_wide.max()))

    def _latency_s(self, flows: Flows) -> float:
        """The longest way that a message may have gone: the slowest links of each depth."""
        used = np.where((flows.up > 0) | (flows.down > 0), self.tree.latency_s, 0.0)
        return self.constants.alpha_s + 2 * float(sum(used[points].max() for points in self._tiers))

    def _messages_s(self, flows: Flows) -> float:
        """What the busiest rank of a round does for its messages, or all on shared processors."""
        each_s, processors = self.constants.message_s, self.constants.processors
        if not each_s:
            return 0.0
        messages = flows.messages(self.tree.size)
        return each_s * float(messages.sum() / processors if processors else messages.max())

    @cached_property
    def _tiers(self) -> list[NDArray[np.int64]]:
        # A leaf that is less deep stays where it is, and counts at its own depth.
        return [np.unique(here[here != above]) for above, here in pairwise(self.tree.paths)]

    def _sums(self, flows: Flows) -> Floats:
        operands, size, owner = flows.sums
        gamma, delta = self.constants.gamma_s_per_byte, self._delta[owner]
        each = np.where(operands > 1, (operands - 1) * gamma + (operands + 1) * delta, 0)
        return np.bincount(owner, size / UNIT * each, minlength=self.tree.size).astype(np.float64)

    @cached_property
    def _delta(self) -> Floats:
        return memory_s_per_byte(self.tree, self.constants)


def memory_s_per_byte(tree: NetworkTree, constants: Constants) -> Floats:
    """Seconds that each rank's memory takes to read or write a byte (N)."""
    given = constants.delta_s_per_byte
    if given is not None or not tree.memory_bytes_per_s:
        return np.full(tree.size, given or 0.0)
    return np.array([1 / rate if rate > 0 else 0.0 for rate in tree.memory_bytes_per_s])


def total(costs: Sequence[ExchangeCost], constants: Constants) -> PlanCost:
    """The cost of steps one after the other."""
    shares = constants.processors is not None
    if not costs:
        return PlanCost(0, 0.0, 0.0, 0.0, constants.alpha_s, 0.0, 1, shares)
    busy = max(
        float(sum(c.up_busy for c in costs).max()),  # type: ignore[union-attr]
        float(sum(c.down_busy for c in costs).max()),  # type: ignore[union-attr]
        float(sum(c.memory_busy for c in costs).max()),  # type: ignore[union-attr]
    )
    return PlanCost(
        sum(c.rounds for c in costs),
        sum(c.latency_s for c in costs),
        sum(c.seconds_per_byte for c in costs),
        busy,
        constants.alpha_s,
        sum(c.messages_s for c in costs),
        max(c.width for c in costs),
        shares,
    )


def _round_lengths(step: Step) -> list[int]:
    """The rounds after which some groups of a step are done, in rising order."""
    rings = np.unique(step.senders_in[step.ring] - 1).tolist()
    return sorted({*rings, *([] if step.ring.all() else [1])} - {0}) or [1]
