"""Ways in which parties, each with a whole partial sum, become one: a party is a rank or a subtree.

Each takes the parties' layouts and gives the steps of a reduce-scatter and the layout behind them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod

import numpy as np

from trimtab.core.collectives.schedule import UNIT, Ints, Layout, Step, merged

Weights = Sequence[float] | None
"""The share of each party; None for equal shares."""

SHARES = 1024
"""Plans side by side get whole numbers of such parts of the payload."""


def exchange(parties: Sequence[Layout], weights: Weights = None) -> tuple[Step, Layout]:
    """Direct exchange: all send to all, and each ends with its share of every stretch."""
    bounds, owners = _refined(parties)
    cuts = _cuts(bounds, len(parties), weights)
    return _step(owners, cuts, ring=False), _layout(owners, cuts)


def ring(parties: Sequence[Layout]) -> tuple[Step, Layout]:
    """A ring in the order of the parties, around which equal shares of every stretch go."""
    bounds, owners = _refined(parties)
    cuts = _cuts(bounds, len(parties), None)
    return _step(owners, cuts, ring=True), _layout(owners, cuts)


def staged(
    parties: Sequence[Layout], factors: Sequence[int], one_shots: int = 0
) -> tuple[list[Step], Layout]:
    """Direct exchange in groups of ``factors[0]``, then in groups of ``factors[1]`` among those.

    Groups differ by at most one where a factor does not divide the parties; the last stage takes
    all that are left.

    Args:
        parties: their layouts.
        factors: the sizes of the groups.
        one_shots: so many of the last stages are one-shot (recursive doubling where their factors
            are 2); all of these but the first have factors that divide what is left. The layout is
            that of one of the ranks that then hold each stretch.
    """
    steps: list[Step] = []
    left = list(parties)
    sharing = len(factors) - one_shots
    for number, factor in enumerate(factors[:sharing]):
        last = number == len(factors) - 1
        left, more = _in_groups(left, [len(left)] if last else even_sizes(len(left), factor))
        steps += more
    if one_shots:
        return [*steps, *_in_one_shots(left, factors[sharing:])], left[0]
    return steps, left[0]


def _in_one_shots(parties: Sequence[Layout], factors: Sequence[int]) -> list[Step]:
    if len({id(party.bounds) for party in parties}) == 1:
        bounds, owners = _refined(parties)
        return _in_equal_one_shots(bounds, owners.T, factors)
    # Behind a stage all members of a group hold its sum; those in one place go on together.
    holders = [[party] for party in parties]
    steps = []
    for size in _sizes_to_the_end(len(parties), factors):
        groups = [holders[begin : begin + size] for begin in range(0, len(holders), size)]
        together = [members for group in groups for members in zip(*group, strict=True)]
        refined = [_refined(members) for members in together]
        steps.append(Step.together([_one_shot(bounds, owners) for bounds, owners in refined]))
        holders = [[layout for party in group for layout in party] for group in groups]
    return steps


def _in_equal_one_shots(bounds: Ints, owners: Ints, factors: Sequence[int]) -> list[Step]:
    """As `_in_one_shots`, at once: all groups share the same stretches (M), of any owners (K, M).

    Who holds a stretch stands in an array of parties, places in them and stretches.
    """
    holders, steps = owners[:, None, :], []
    for size in _sizes_to_the_end(len(owners), factors):
        _, places, stretches = holders.shape
        groups = holders.reshape(-1, size, places, stretches)
        steps.append(_one_shot(bounds, groups.transpose(0, 2, 3, 1).reshape(-1, size)))
        holders = groups.reshape(-1, size * places, stretches)
    return steps


def _sizes_to_the_end(parties: int, factors: Sequence[int]) -> list[int]:
    """The sizes of the groups of each stage, of which the last one takes all that are left."""
    left = parties // prod(factors[:-1])
    return [size for size in (*factors[:-1], left) if size > 1]


def _one_shot(bounds: Ints, owners: Ints) -> Step:
    """Groups that share the stretches between bounds (M + 1), all in turn, by group and member."""
    count, size = owners.shape
    groups = np.repeat(np.arange(count, dtype=np.int64), size)
    begin, end = (np.tile(each, count // len(each)) for each in (bounds[:-1], bounds[1:]))
    return Step(
        groups,
        owners.ravel(),
        groups,
        owners.ravel(),
        np.repeat(begin, size),
        np.repeat(end, size),
        np.zeros(count, dtype=np.bool_),
        np.ones(count, dtype=np.bool_),
    )


def folded(
    parties: Sequence[Layout], extras: Sequence[int], factors: Sequence[int]
) -> tuple[list[Step], Layout]:
    """Some parties first give all to a partner; then the others go on as `staged`.

    Args:
        parties: their layouts.
        extras: the parties that fold in; at most half of them.
        factors: the stages of the rest; empty for a ring.
    """
    gone = set(extras)
    kept = [index for index in range(len(parties)) if index not in gone]
    folds = [
        exchange([parties[partner], parties[extra]], (1, 0))
        for partner, extra in zip(kept, extras, strict=False)
    ]
    rest = [layout for _, layout in folds] + [parties[i] for i in kept[len(folds) :]]
    # Back into the order of the parties, so that neighbours stay neighbours.
    first = Step.together([step for step, _ in folds])
    if not factors:
        step, layout = ring(rest)
        return [first, step], layout
    steps, layout = staged(rest, factors)
    return [first, *steps], layout


def concentrated(layout: Layout, owners: Sequence[int]) -> tuple[Step, Layout] | None:
    """Data rearrangement: what others own moves to a few owners, each taking an equal stretch.

    Returns:
        None where nothing has to move.
    """
    target = Layout(
        np.array([UNIT * i // len(owners) for i in range(len(owners) + 1)], dtype=np.int64),
        np.array(owners, dtype=np.int64),
    )
    bounds = np.union1d(layout.bounds, target.bounds)
    before, after = layout.at(bounds), target.at(bounds)
    moving = np.flatnonzero(before != after)
    if not len(moving):
        return None
    groups = np.arange(len(moving), dtype=np.int64)
    step = Step(
        groups,
        before[moving],
        groups,
        after[moving],
        bounds[:-1][moving],
        bounds[1:][moving],
        np.zeros(len(moving), dtype=np.bool_),
        np.zeros(len(moving), dtype=np.bool_),
    )
    return step, Layout(bounds, after)


def beside(
    one: tuple[Sequence[Step], Layout],
    other: tuple[Sequence[Step], Layout],
    share: int,
    *,
    late: bool = False,
) -> tuple[list[Step], Layout]:
    """Two plans at the same time, each for its part of the payload.

    Args:
        one: steps and the layout behind them, for the payload's begin.
        other: those for its rest.
        share: how many of `SHARES` parts the first one has, neither none nor all.
        late: whether their last steps meet, and not their first ones.
    """
    steps, layout = _squeezed(one, 0, share)
    more, rest = _squeezed(other, share, SHARES)
    if late:
        together = merged([steps[::-1], more[::-1]])[::-1]
    else:
        together = merged([steps, more])
    bounds = np.concatenate([layout.bounds, rest.bounds[1:]])
    return together, Layout(bounds, np.concatenate([layout.owners, rest.owners]))


def _squeezed(
    plan: tuple[Sequence[Step], Layout], first: int, last: int
) -> tuple[list[Step], Layout]:
    """A plan for the stretch between two of `SHARES` parts of the payload alone."""
    before, over = divmod(UNIT * first, SHARES)

    def moved(positions: Ints) -> Ints:
        whole, rest = np.divmod(positions, SHARES)
        # In two parts, so that no product overflows.
        found: Ints = before + whole * (last - first) + (over + rest * (last - first)) // SHARES
        return found

    steps, layout = plan
    squeezed = [replace(s, begin=moved(s.begin), end=moved(s.end)) for s in steps]
    return squeezed, Layout(moved(layout.bounds), layout.owners)


def even_sizes(count: int, factor: int) -> list[int]:
    """Sizes of as few groups of at most ``factor`` as hold all, which differ by at most one."""
    groups = -(-count // factor)
    return [count // groups + (index < count % groups) for index in range(groups)]


def _in_groups(parties: Sequence[Layout], sizes: Sequence[int]) -> tuple[list[Layout], list[Step]]:
    if (
        len(set(sizes)) == 1
        and sizes[0] > 1
        and all(p.bounds is parties[0].bounds for p in parties)
    ):
        return _in_equal_groups(parties, sizes[0])
    begin, done = 0, []
    for size in sizes:
        done.append(_group(parties[begin : begin + size]))
        begin += size
    return [layout for _, layout in done], merged(steps for steps, _ in done)


def _in_equal_groups(parties: Sequence[Layout], size: int) -> tuple[list[Layout], list[Step]]:
    """As `_in_groups`, at once: all groups cut the same stretches alike."""
    bounds = parties[0].bounds
    cuts = _cuts(bounds, size, None)
    count, stretches = len(parties) // size, len(bounds) - 1
    by_group = np.stack([p.owners for p in parties]).reshape(count, size, stretches)
    owners = by_group.transpose(0, 2, 1).reshape(count * stretches, size)
    step = _step(owners, np.tile(cuts, (count, 1)), ring=False)
    begin, end = cuts[:, :-1].ravel(), cuts[:, 1:].ravel()
    kept = begin < end
    finer = np.append(begin[kept], UNIT).astype(np.int64)
    rows = owners.reshape(count, stretches * size)[:, kept]
    return [Layout(finer, row) for row in rows], [step]


def _group(parties: Sequence[Layout]) -> tuple[list[Step], Layout]:
    if len(parties) == 1:
        return [], parties[0]
    step, layout = exchange(parties)
    return [step], layout


def _refined(parties: Sequence[Layout]) -> tuple[Ints, Ints]:
    """The common refinement of the layouts (M + 1), and the owners by stretch and party (M, K)."""
    bounds = parties[0].bounds
    if any(p.bounds is not bounds and not np.array_equal(p.bounds, bounds) for p in parties[1:]):
        bounds = np.unique(np.concatenate([p.bounds for p in parties]))
        return bounds, np.stack([p.at(bounds) for p in parties], axis=1)
    return bounds, np.stack([p.owners for p in parties], axis=1)


def _cuts(bounds: Ints, count: int, weights: Weights) -> Ints:
    """Where the parts of each stretch begin, and where the last one ends (M, K + 1)."""
    if weights is None:
        steps: Ints = np.arange(count + 1, dtype=np.int64)
        whole = count
    else:
        shares = np.concatenate([[0.0], np.cumsum(np.asarray(weights, dtype=np.float64))])
        whole = 1 << 20
        steps = np.rint(shares / shares[-1] * whole).astype(np.int64)
    lengths = np.diff(bounds)
    quotient, rest = np.divmod(lengths, whole)
    # In two parts, so that the product of a length and a share does not overflow.
    offsets: Ints = quotient[:, None] * steps + rest[:, None] * steps // whole
    return bounds[:-1, None] + offsets


def _step(owners: Ints, cuts: Ints, *, ring: bool) -> Step:
    stretches, count = owners.shape
    groups = np.repeat(np.arange(stretches, dtype=np.int64), count)
    begin, end = cuts[:, :-1].ravel(), cuts[:, 1:].ravel()
    kept = np.ones(len(begin), dtype=np.bool_) if ring else begin < end
    return Step(
        groups,
        owners.ravel(),
        groups[kept],
        owners.ravel()[kept],
        begin[kept],
        end[kept],
        np.full(stretches, ring, dtype=np.bool_),
        np.zeros(stretches, dtype=np.bool_),
    )


def _layout(owners: Ints, cuts: Ints) -> Layout:
    begin, end = cuts[:, :-1].ravel(), cuts[:, 1:].ravel()
    kept = begin < end
    return Layout(np.append(begin[kept], UNIT).astype(np.int64), owners.ravel()[kept])
