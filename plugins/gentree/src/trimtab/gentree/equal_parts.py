"""Plans whose reduce-scatter leaves each rank one equal part, as torch's own does."""

from __future__ import annotations

import numpy as np

from trimtab.core.collectives import UNIT, Layout, NetworkTree, Step
from trimtab.core.collectives.schedule import Ints, merged

_ROUNDED = 16
"""By how many parts of `UNIT` the cuts of stages may be off."""


def equal_parts(count: int) -> Layout:
    """One equal part for each of so many ranks, in their order."""
    return Layout(_equal_bounds(count), np.arange(count, dtype=np.int64))


def has_equal_parts(layout: Layout) -> bool:
    """Whether each owner has one part, and all are equal."""
    count = len(layout.owners)
    if len(set(layout.owners.tolist())) < count:
        return False
    return bool((abs(layout.bounds - _equal_bounds(count)) <= _ROUNDED).all())


def towards_equal_parts(tree: NetworkTree, point: int) -> list[Step]:
    """Direct exchange at each switch, in which sums end where they belong.

    Below each child of a switch, the sum of what a rank there shall own is made at that rank at
    once; what ranks elsewhere shall own is shared among those below the child. So each link up is
    crossed by what others shall own, once, however unequal the children are.

    Args:
        tree: the network.
        point: below which all ranks take part; they are numbered from 0.
    """
    first, last = tree.spans[point]
    steps = _towards(tree, point, equal_parts(last - first).shifted(first))
    return [step.shifted(-first) for step in steps]


def _towards(tree: NetworkTree, point: int, target: Layout) -> list[Step]:
    children = tree.children[point]
    if not children:
        return []
    if len(children) == 1:
        return _towards(tree, children[0], target)
    parts = [_share(target, *tree.spans[child]) for child in children]
    below = [_towards(tree, *each) for each in zip(children, parts, strict=True)]
    return [*merged(below), _summed(parts, target)]


def _summed(parties: list[Layout], target: Layout) -> Step:
    """All that hold a stretch send it to the one that shall own it."""
    bounds = np.unique(np.concatenate([party.bounds for party in parties]))
    holders = np.stack([party.at(bounds) for party in parties], axis=1)
    stretches: Ints = np.arange(len(bounds) - 1, dtype=np.int64)
    return Step(
        np.repeat(stretches, len(parties)),
        holders.ravel(),
        stretches,
        target.at(bounds),
        bounds[:-1],
        bounds[1:],
        np.zeros(len(stretches), dtype=np.bool_),
        np.zeros(len(stretches), dtype=np.bool_),
    )


def _share(target: Layout, first: int, last: int) -> Layout:
    """Who holds what among some ranks: their own parts, and equal shares of what is others'."""
    begins, lengths = target.bounds[:-1], np.diff(target.bounds)
    foreign = (target.owners < first) | (target.owners >= last)
    ends = np.cumsum(lengths[foreign])
    if not len(ends):
        return target
    ranks = last - first
    places = np.array([int(ends[-1]) * i // ranks for i in range(1, ranks)], dtype=np.int64)
    at = np.searchsorted(ends, places, side="right")
    cuts = begins[foreign][at] + places - (ends - lengths[foreign])[at]
    bounds = np.union1d(target.bounds, cuts)
    owners = target.at(bounds).copy()
    others = (owners < first) | (owners >= last)
    ahead = np.cumsum(np.where(others, np.diff(bounds), 0)) - np.diff(bounds)
    owners[others] = first + np.searchsorted(places, ahead[others], side="right")
    return Layout(bounds, owners)


def _equal_bounds(count: int) -> Ints:
    return np.array([UNIT * i // count for i in range(count + 1)], dtype=np.int64)
