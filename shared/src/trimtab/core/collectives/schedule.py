"""The steps of an AllReduce: a reduce-scatter written out, and an all-gather that mirrors it.

A step is a set of groups that exchange at the same time. In a group each *sender* holds a partial
sum over one stretch of the payload; the stretch is cut into parts, and each part's *owner* gets
that part from all senders and adds them up at once. Every algorithm is made of such groups: direct
exchange has all senders as owners of equal parts, reduce-broadcast and folding have one owner,
moving data to another rank has one sender that is no owner. A *ring* passes the parts around among
its members in as many rounds as there are members but one. The all-gather runs the steps backwards:
each owner sends its part to all senders of the group. In a *one-shot* group each sender gets the
whole stretch of all others and adds it up itself, so that nothing is left to gather.

Positions are whole numbers of the payload's `UNIT`-th part, so that no plan depends on its size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, zip_longest
from math import lcm

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from trimtab.core.documents import Document, InvalidValue

UNIT = lcm(*range(1, 41))
"""Into so many parts the payload is cut: a multiple of every number to 40."""

Ints = NDArray[np.int64]

_EVERYTHING = np.array([0, UNIT], dtype=np.int64)


@dataclass(frozen=True)
class Layout:
    """Who owns which part of the payload.

    Attributes:
        bounds: positions (M + 1), from 0 to `UNIT`, rising.
        owners: the rank that owns each stretch between two bounds (M).
    """

    bounds: Ints
    owners: Ints

    @classmethod
    def whole(cls, rank: int) -> Layout:
        """Everything belongs to one rank."""
        return cls(_EVERYTHING, np.array([rank], dtype=np.int64))

    def shifted(self, by: int) -> Layout:
        """The same for ranks whose numbers are higher by so many."""
        return Layout(self.bounds, self.owners + by)

    def at(self, bounds: Ints) -> Ints:
        """The owners of the stretches of a finer cut (M)."""
        return self.owners[np.searchsorted(self.bounds, bounds[:-1], side="right") - 1]


@dataclass(frozen=True)
class Step:
    """Groups that exchange at the same time; all arrays are of whole numbers.

    Attributes:
        sender_group, sender: each sender and the group it belongs to.
        owner_group, owner: each owner of a part, likewise.
        begin, end: where the owner's part begins and ends; never empty.
        ring: whether each group is a ring; its owners then are its senders in the same order.
        one_shot: whether each group is one; each sender then owns all of the stretch.
    """

    sender_group: Ints
    sender: Ints
    owner_group: Ints
    owner: Ints
    begin: Ints
    end: Ints
    ring: NDArray[np.bool_]
    one_shot: NDArray[np.bool_]

    @property
    def groups(self) -> int:
        """How many groups there are."""
        return len(self.ring)

    @cached_property
    def senders_in(self) -> Ints:
        """How many senders each group has."""
        return np.bincount(self.sender_group, minlength=self.groups)

    @cached_property
    def is_even(self) -> bool:
        """Whether each group is a direct exchange of equal parts among its senders."""
        if (self.ring | self.one_shot).any() or not np.array_equal(self.sender, self.owner):
            return False
        if not np.array_equal(self.sender_group, self.owner_group):
            return False
        size, place = self.end - self.begin, np.cumsum(self.senders_in) - self.senders_in
        first: Ints = size[place][self.owner_group]
        return bool((np.abs(size - first) <= 1).all())

    @cached_property
    def rounds(self) -> int:
        """Rounds of communication, one after the other."""
        rings = self.senders_in[self.ring] - 1
        direct = not self.ring.all()
        return int(max(rings.max(initial=0), int(direct)))

    def shifted(self, by: int) -> Step:
        """The same among ranks whose numbers are higher by so many."""
        return replace(self, sender=self.sender + by, owner=self.owner + by)

    def renumbered(self, ranks: Ints) -> Step:
        """The same with rank ``ranks[i]`` in the place of rank ``i``."""
        return replace(self, sender=ranks[self.sender], owner=ranks[self.owner])

    @cached_property
    def gathered(self) -> Step:
        """The groups that the all-gather mirrors."""
        if not self.one_shot.any():
            return self
        kept = ~self.one_shot
        number = np.cumsum(kept) - 1
        sends, owns = kept[self.sender_group], kept[self.owner_group]
        return Step(
            number[self.sender_group[sends]],
            self.sender[sends],
            number[self.owner_group[owns]],
            self.owner[owns],
            self.begin[owns],
            self.end[owns],
            self.ring[kept],
            self.one_shot[kept],
        )

    @classmethod
    def together(cls, steps: Sequence[Step]) -> Step:
        """The groups of several steps at the same time."""
        if len(steps) == 1:
            return steps[0]
        offsets = [0, *accumulate(step.groups for step in steps)]
        pairs = list(zip(steps, offsets, strict=False))
        return cls(
            np.concatenate([s.sender_group + o for s, o in pairs]),
            np.concatenate([s.sender for s in steps]),
            np.concatenate([s.owner_group + o for s, o in pairs]),
            np.concatenate([s.owner for s in steps]),
            np.concatenate([s.begin for s in steps]),
            np.concatenate([s.end for s in steps]),
            np.concatenate([s.ring for s in steps]),
            np.concatenate([s.one_shot for s in steps]),
        )


def merged(parallel: Iterable[Sequence[Step]]) -> list[Step]:
    """The steps of plans that begin at the same time among different ranks."""
    return [
        Step.together([step for step in steps if step is not None])
        for steps in zip_longest(*parallel)
    ]


class GroupDocument(Document):
    """A group as it stands in a file; owners of rings and one-shot groups are their senders.

    Attributes:
        senders: ranks.
        owners: ranks; None for the senders, in their order.
        cuts: where the parts begin, and where the last one ends; a one-shot group has one part.
        ring: whether the parts go round.
        one_shot: whether each sender owns all of the one part.
    """

    senders: tuple[NonNegativeInt, ...] = Field(min_length=1)
    owners: tuple[NonNegativeInt, ...] | None = None
    cuts: tuple[int, ...] = Field(min_length=2)
    ring: bool = False
    one_shot: bool = False

    @property
    def parts(self) -> Iterator[tuple[int, int, int]]:
        """The owner, the beginning and the end of each part."""
        owners = self.senders if self.owners is None else self.owners
        if self.one_shot:
            return ((owner, self.cuts[0], self.cuts[1]) for owner in owners)
        return zip(owners, self.cuts, self.cuts[1:], strict=False)

    @model_validator(mode="after")
    def _whole(self) -> GroupDocument:
        owners = self.senders if self.owners is None else self.owners
        parts = 1 if self.one_shot else len(owners)
        if len(self.cuts) != parts + 1:
            raise InvalidValue(
                f"{parts} parts have {len(self.cuts)} cuts",
                at=("cuts",),
                fix="give one more than there are parts: one for each owner, or one in one shot",
            )
        rising = all(a <= b for a, b in zip(self.cuts, self.cuts[1:], strict=False))
        if not (rising and self.cuts[0] >= 0 and self.cuts[-1] <= UNIT):
            raise InvalidValue(
                "the cuts do not rise within the payload", at=("cuts",), fix=f"cut 0 to {UNIT}"
            )
        if self.ring and self.one_shot:
            raise InvalidValue("a ring is not one-shot", at=("one_shot",), fix="leave one out")
        if (self.ring or self.one_shot) and self.owners is not None:
            raise InvalidValue(
                "rings and one-shot groups have their senders as owners",
                at=("owners",),
                fix="leave out",
            )
        return self


class Schedule(Document):
    """An AllReduce: the steps of its reduce-scatter; its all-gather mirrors all but one-shot ones.

    Attributes:
        ranks: how many take part.
        unit: into how many parts the payload is cut; this version cuts into `UNIT`.
        chunks: pieces of the payload that go through the steps one behind the other.
        steps: the groups of each step.
    """

    ranks: PositiveInt
    unit: PositiveInt = UNIT
    chunks: PositiveInt = 1
    steps: tuple[tuple[GroupDocument, ...], ...]

    @model_validator(mode="after")
    def _known(self) -> Schedule:
        if self.unit != UNIT:
            raise InvalidValue(f"the unit is {self.unit}", at=("unit",), fix=f"plan with {UNIT}")
        for number, groups in enumerate(self.steps):
            for group in groups:
                named = max(max(group.senders), max(group.owners or (0,)))
                if named >= self.ranks:
                    raise InvalidValue(
                        f"a group names the rank {named} of {self.ranks}", at=("steps", number)
                    )
        return self

    @classmethod
    def of(cls, ranks: int, steps: Sequence[Step], chunks: int = 1) -> Schedule:
        """The document of some steps."""
        return cls(ranks=ranks, chunks=chunks, steps=tuple(_documents(step) for step in steps))

    @cached_property
    def arrays(self) -> list[Step]:
        """The steps as arrays."""
        return [_step(groups) for groups in self.steps]


def _documents(step: Step) -> tuple[GroupDocument, ...]:
    senders: list[list[int]] = [[] for _ in range(step.groups)]
    owned: list[list[tuple[int, int, int]]] = [[] for _ in range(step.groups)]
    for group, rank in zip(step.sender_group.tolist(), step.sender.tolist(), strict=True):
        senders[group].append(rank)
    columns = (step.owner_group, step.begin, step.end, step.owner)
    for group, begin, end, rank in zip(*(c.tolist() for c in columns), strict=True):
        owned[group].append((begin, end, rank))
    found: list[GroupDocument] = []
    kinds = zip(step.ring.tolist(), step.one_shot.tolist(), strict=True)
    for who, parts, (ring, one_shot) in zip(senders, owned, kinds, strict=True):
        owners = [rank for _, _, rank in parts]
        begins = [begin for begin, _, _ in parts[: 1 if one_shot else None]]
        found.append(
            GroupDocument(
                senders=tuple(who),
                owners=None if owners == who else tuple(owners),
                cuts=(*begins, parts[-1][1]),
                ring=bool(ring),
                one_shot=bool(one_shot),
            )
        )
    return tuple(found)


def _step(groups: Sequence[GroupDocument]) -> Step:
    kept = [
        (number, rank, begin, end)
        for number, group in enumerate(groups)
        for rank, begin, end in group.parts
        if begin < end or group.ring
    ]
    columns = np.array(kept, dtype=np.int64).reshape(-1, 4).T
    sizes = [len(g.senders) for g in groups]
    return Step(
        np.repeat(np.arange(len(groups)), sizes),
        np.array([rank for g in groups for rank in g.senders], dtype=np.int64),
        columns[0],
        columns[1],
        columns[2],
        columns[3],
        np.array([g.ring for g in groups], dtype=np.bool_),
        np.array([g.one_shot for g in groups], dtype=np.bool_),
    )
