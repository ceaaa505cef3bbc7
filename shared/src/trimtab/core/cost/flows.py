"""What a step sends over each link of a tree, and how many streams meet there."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from trimtab.core.collectives.network_tree import NetworkTree
from trimtab.core.collectives.schedule import Step

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

MOST_PAIRS = 2_000_000
"""Beyond so many pairs of a sender and a link, streams of several groups are counted apart."""


@dataclass(frozen=True)
class _Tier:
    """The points of one depth that groups touch, one row for each group and point.

    Attributes:
        group, point: of each row.
        senders, receivers: of the group below the point.
        leaving, entering: whether its group sends out of the point, or into it.
        sender_row: the row of each sender.
    """

    group: Ints
    point: Ints
    senders: Ints
    receivers: Ints
    leaving: NDArray[np.bool_]
    entering: NDArray[np.bool_]
    sender_row: Ints


@dataclass(frozen=True)
class Flows:
    """One round of a step on a tree.

    Attributes:
        up, down: bytes over the link of each point to its parent and back, in parts of the
            payload's `UNIT` (V).
        tiers: what the widths are counted from, from the root's children down.
        source, source_group: the ranks that send and their groups.
        exchanged: the messages themselves.
        sums: for each part that is added up the operands, the size and the rank.
    """

    up: Floats
    down: Floats
    tiers: list[_Tier]
    source: Ints
    source_group: Ints
    exchanged: _Messages
    sums: tuple[Ints, Floats, Ints]

    def messages(self, ranks: int) -> Ints:
        """How many messages each rank sends and receives, either way round (N)."""
        return self.exchanged.of_each(ranks)

    @classmethod
    def of(cls, tree: NetworkTree, step: Step, first: int, *, gather: bool) -> Flows:
        """The flows of the round ``first`` of a step (and of those like it behind it).

        Args:
            tree: the network.
            step: whose groups exchange.
            first: rounds that are over: direct groups take part in the first one alone.
            gather: whether owners send to senders, as in the all-gather.
        """
        messages = _Messages.of(step, first)
        up, down = np.zeros(len(tree.names)), np.zeros(len(tree.names))
        tiers = []
        for depth in range(1, len(tree.paths)):
            tier, ups, downs = _tier(tree, messages, depth, gather)
            np.add.at(up, tier.point, ups)
            np.add.at(down, tier.point, downs)
            tiers.append(tier)
        senders, owners = (
            (messages.sender, messages.sender_group),
            (messages.owner, messages.owner_group),
        )
        source, source_group = owners if gather else senders
        sums = (messages.operands, messages.size, messages.owner)
        return cls(up, down, tiers, source, source_group, messages, sums)


@dataclass(frozen=True)
class _Messages:
    """The groups of a round; each member of a ring is one group with the member before it."""

    sender_group: Ints
    sender: Ints
    owner_group: Ints
    owner: Ints
    size: Floats
    operands: Ints
    groups: int

    @cached_property
    def is_among_senders(self) -> bool:
        """Whether the owners are the senders, one by one."""
        return np.array_equal(self.sender, self.owner) and np.array_equal(
            self.sender_group, self.owner_group
        )

    def of_each(self, ranks: int) -> Ints:
        """How many messages each rank sends or receives: one for each part that another owns (N).

        What a rank owns of its own group's is no message.
        """
        parts = np.bincount(self.owner_group, minlength=self.groups)
        senders = np.bincount(self.sender_group, minlength=self.groups)
        sent = np.bincount(self.sender, parts[self.sender_group], minlength=ranks)
        received = np.bincount(self.owner, senders[self.owner_group], minlength=ranks)
        own = self.owner_group * ranks + self.owner
        kept = np.isin(own, self.sender_group * ranks + self.sender)
        found: Ints = np.rint(sent + received).astype(np.int64)
        return found - 2 * np.bincount(self.owner[kept], minlength=ranks)

    @classmethod
    def of(cls, step: Step, first: int) -> _Messages:
        senders_in = step.senders_in
        direct_in = ~step.ring & (first == 0)
        by_sender, by_owner = direct_in[step.sender_group], direct_in[step.owner_group]
        group = [step.sender_group[by_sender]]
        sender = [step.sender[by_sender]]
        owner_group = [step.owner_group[by_owner]]
        owner = [step.owner[by_owner]]
        size = [(step.end - step.begin)[by_owner].astype(np.float64)]
        operands = [senders_in[step.owner_group[by_owner]]]
        groups = step.groups
        going = step.ring & (senders_in - 1 > first)
        if going.any():
            kept = going[step.sender_group]
            members, of = step.sender[kept], step.sender_group[kept]
            stretch = np.bincount(
                step.owner_group, (step.end - step.begin), minlength=step.groups
            ) / np.maximum(senders_in, 1)
            numbers = groups + np.arange(len(members))
            group.append(numbers)
            sender.append(members)
            owner_group.append(numbers)
            owner.append(_following(members, of))
            size.append(stretch[of])
            operands.append(np.full(len(members), 2))
            groups += len(members)
        return cls(
            np.concatenate(group),
            np.concatenate(sender),
            np.concatenate(owner_group),
            np.concatenate(owner),
            np.concatenate(size),
            np.concatenate(operands),
            groups,
        )


def _following(members: Ints, group: Ints) -> Ints:
    """The next member of each one's ring; members of a ring lie together."""
    following = np.roll(members, -1)
    starts = np.flatnonzero(np.append(True, group[1:] != group[:-1]))
    ends = np.append(starts[1:], len(members)) - 1
    following[ends] = members[starts]
    return following


def _tier(
    tree: NetworkTree, messages: _Messages, depth: int, gather: bool
) -> tuple[_Tier, Floats, Floats]:
    """The rows of one depth, and the bytes up and down of each; leaves above it are left out."""
    here, above = tree.paths[depth], tree.paths[depth - 1]
    points = len(tree.names)
    keys = messages.sender_group * points + here[messages.sender]
    if messages.is_among_senders:
        rows, sender_row = np.unique(keys, return_inverse=True)
        owner_row = sender_row
    else:
        keys = np.append(keys, messages.owner_group * points + here[messages.owner])
        rows, row_of = np.unique(keys, return_inverse=True)
        sender_row, owner_row = np.split(row_of, [len(messages.sender)])
    group, point = rows // points, rows % points
    senders = np.bincount(sender_row, minlength=len(rows))
    parts = np.bincount(owner_row, minlength=len(rows))
    size = np.bincount(owner_row, messages.size, minlength=len(rows))
    all_senders = np.bincount(messages.sender_group, minlength=messages.groups)[group]
    all_parts = np.bincount(messages.owner_group, minlength=messages.groups)[group]
    all_size = np.bincount(messages.owner_group, messages.size, minlength=messages.groups)[group]
    out = senders * (all_size - size)
    into = (all_senders - senders) * size
    # A leaf that is less deep stays where it is, and has been counted there.
    real = np.zeros(points, dtype=np.bool_)
    real[here[here != above]] = True
    out, into = np.where(real[point], out, 0.0), np.where(real[point], into, 0.0)
    if gather:
        out, into = into, out
        senders, parts, all_senders, all_parts = parts, senders, all_parts, all_senders
        sender_row = owner_row
    leaving = (senders > 0) & (all_parts > parts) & real[point]
    entering = (parts > 0) & (all_senders > senders) & real[point]
    tier = _Tier(group, point, senders, parts, leaving, entering, sender_row)
    return tier, out, into


class Widths:
    """Counts what meets in the queue before each link of a tree.

    Args:
        tree: the network.
        mode: as in `Constants.width`.
    """

    def __init__(self, tree: NetworkTree, mode: Literal["rate", "ports", "sources"]) -> None:
        self._tree, self._mode = tree, mode
        self._parents = np.array(tree.parents)

    def of(self, flows: Flows) -> tuple[Floats, Floats]:
        """The width at each link up and down, its receiver included (V)."""
        points = len(self._tree.names)
        up, down = np.zeros(points), np.zeros(points)
        for depth, tier in enumerate(flows.tiers):
            if self._mode == "sources":
                self._add_sources(flows, tier, up, down)
            else:
                below = flows.tiers[depth + 1] if depth + 1 < len(flows.tiers) else None
                self._add_ports(tier, below, up, down)
        up[list(self._tree.hosts)] = 0  # what a host itself sends meets in no switch's queue
        rounding = 1e-9 if self._mode == "rate" else 0.0
        return 1 + np.ceil(up - rounding), 1 + np.ceil(down - rounding)

    def _add_sources(self, flows: Flows, tier: _Tier, up: Floats, down: Floats) -> None:
        size = self._tree.size
        out = tier.leaving[tier.sender_row]
        pairs = _distinct(tier.point[tier.sender_row][out] * size + flows.source[out])
        np.add.at(up, pairs // size, 1)
        entering = np.flatnonzero(tier.entering)
        all_senders = np.bincount(flows.source_group, minlength=int(tier.group.max(initial=0)) + 1)
        if all_senders[tier.group[entering]].sum() > MOST_PAIRS or len(all_senders) == 1:
            outside = all_senders[tier.group[entering]] - tier.senders[entering]
            np.add.at(down, tier.point[entering], outside)
            return
        order = np.argsort(flows.source_group, kind="stable")
        rows, members = _joined(tier.group[entering], flows.source_group[order])
        source, point = flows.source[order][members], tier.point[entering][rows]
        spans = np.array(self._tree.spans)
        outside = (source < spans[point, 0]) | (source >= spans[point, 1])
        pairs = _distinct(point[outside] * size + source[outside])
        np.add.at(down, pairs // size, 1)

    def _add_ports(self, tier: _Tier, below: _Tier | None, up: Floats, down: Floats) -> None:
        parents = self._parents
        # Into a point: from its siblings, and from above its parent.
        sending, entering = np.flatnonzero(tier.senders), np.flatnonzero(tier.entering)
        points = len(parents)
        places = tier.group * points + parents[tier.point]
        order = np.argsort(places[sending], kind="stable")
        sending = sending[order]
        starts = np.searchsorted(places[sending], places[entering], side="left")
        ends = np.searchsorted(places[sending], places[entering], side="right")
        if (ends - starts).sum() > MOST_PAIRS:
            siblings = ends - starts - (tier.senders[entering] > 0)
            np.add.at(down, tier.point[entering], siblings)
            np.minimum(down, self._fan, out=down)
        else:
            rows, members = _ranges(starts, ends)
            into, out = tier.point[entering][rows], tier.point[sending][members]
            others = into != out
            pairs, streams = _summed(
                (into * points + out)[others], tier.senders[sending][members][others]
            )
            into, out = pairs // points, pairs % points
            np.add.at(down, into, self._rate(out, into, streams, up_port=True))
        self._add_from_above(tier, down)
        if below is not None:
            self._add_from_below(tier, below, up)

    @property
    def _fan(self) -> Floats:
        return np.array([len(self._tree.children[p]) if p >= 0 else 0 for p in self._parents])

    def _add_from_above(self, tier: _Tier, down: Floats) -> None:
        """A stream into a point that begins above its parent comes by the parent's own port."""
        parents, points = self._parents, len(self._parents)
        places = tier.group * points + parents[tier.point]
        place_of = _numbered(places)
        beside = np.bincount(place_of, tier.senders)[place_of]
        everyone = np.bincount(tier.group, tier.senders)[tier.group]
        coming = tier.entering & (everyone > beside)
        above, streams = _summed(tier.point[coming], (everyone - beside)[coming])
        np.add.at(down, above, self._rate(parents[above], above, streams, up_port=False))

    def _add_from_below(self, tier: _Tier, below: _Tier, up: Floats) -> None:
        """A stream out of a point comes by the ports of its children."""
        points = len(self._parents)
        leaving = (tier.group * points + tier.point)[tier.leaving]  # rising
        keys = below.group * points + self._parents[below.point]
        place = np.searchsorted(leaving, keys)
        found = below.senders > 0
        found &= np.append(leaving, -1)[place] == keys
        ports, streams = _summed(below.point[found], below.senders[found])
        into = self._parents[ports]
        np.add.at(up, into, self._rate(ports, into, streams, up_port=True, up_link=True))

    def _rate(
        self, port: Ints, link: Ints, streams: Floats, *, up_port: bool, up_link: bool = False
    ) -> Floats:
        """What each port counts: 1, or how often its rate holds that of the link.

        However fast a port is, it brings no more than the streams that come by it.
        """
        if self._mode == "ports":
            return np.ones(len(port))
        tree = self._tree
        port_beta = (tree.up_s_per_byte if up_port else tree.down_s_per_byte)[port]
        link_beta = (tree.up_s_per_byte if up_link else tree.down_s_per_byte)[link]
        rate = np.divide(link_beta, port_beta, out=np.ones(len(port)), where=port_beta > 0)
        carried: Floats = np.minimum(rate, streams)
        return carried


def _distinct(values: Ints) -> Ints:
    """Each value once, in rising order; faster than `numpy.unique` on so few."""
    ordered = np.sort(values)
    kept = np.ones(len(ordered), dtype=np.bool_)
    np.not_equal(ordered[1:], ordered[:-1], out=kept[1:])
    return ordered[kept]


def _summed(keys: Ints, values: Ints) -> tuple[Ints, Floats]:
    """Each key once, in rising order, and the sum of its values."""
    if not len(keys):
        return keys, np.zeros(0)
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))
    sums: Floats = np.add.reduceat(values[order], starts).astype(np.float64)
    return ordered[starts], sums


def _numbered(values: Ints) -> Ints:
    """A number for each value, the same for equal ones, from 0 in rising order."""
    if (values[1:] >= values[:-1]).all():  # as a rule, as points are numbered depth first
        return np.cumsum(np.append(0, values[1:] != values[:-1]))[: len(values)]
    numbers: Ints = np.unique(values, return_inverse=True)[1]
    return numbers


def _joined(keys: Ints, ordered: Ints) -> tuple[Ints, Ints]:
    """Each pair of an index into ``keys`` and one into ``ordered`` (sorted) of the same value."""
    starts = np.searchsorted(ordered, keys, side="left")
    ends = np.searchsorted(ordered, keys, side="right")
    return _ranges(starts, ends)


def _ranges(starts: Ints, ends: Ints) -> tuple[Ints, Ints]:
    """The numbers of all ranges, one behind the other, and which range each belongs to."""
    lengths = ends - starts
    rows = np.repeat(np.arange(len(starts)), lengths)
    first = np.repeat(np.cumsum(lengths) - lengths, lengths)
    return rows, np.repeat(starts, lengths) + np.arange(len(rows)) - first
