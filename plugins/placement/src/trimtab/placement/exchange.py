"""Pods of columns exchanged one by one, until enough rows fit between them.

Where no family of placements has a spread that the bound allows, it may still be had by columns
whose pods follow no pattern. How many rows fit is a linear programme (`row_fit`), and its prices
say what rows would cost that are not possible yet. A pod that makes cheap ones possible is given to
a block of columns, in the place of one that it had; what was taken away stays away for some steps,
so that the search gets across valleys (tabu search). Where that leads no further, it begins again
from the best so far with a pod exchanged at random (iterated local search; from a fixed seed, so
that equal input gives an equal placement). Few wide blocks go before many narrow ones.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from trimtab.placement.grid import Candidate, Demand, PodGrid, Spread
from trimtab.placement.row_choices import Pods
from trimtab.placement.row_fit import MOST_PODS, ROUNDING, Fit, Numbers, Rest, RowFit
from trimtab.placement.row_paths import even_cuts

_BLOCKS = (4, 8, 16)
_MUCH_BETTER = 1.02
"""Growth of the rows that fit at which an exchange is taken without looking at others."""

_TRIED = 6
"""Pods that are tried in a step, each in the place of all others of its block."""

_AWAY = 6
"""Steps for which a pod that a block has lost does not come back."""

_FIRST_WALK = 0.6
"""Share of the programmes that the first walk may take; it is the longest."""

_PATIENCE = 12
"""Steps without more rows after which a later walk is given up."""

_WALKS = 60
"""Of blocks of a width at most."""

_MOST_WHOLE = 30
"""Times that whole rows are looked for among blocks of a width."""


def exchanged(
    demand: Demand, spread: Spread, columns: Sequence[Pods], *, programmes: int, nodes: int
) -> Candidate | None:
    """A placement of at most the given spreads.

    Args:
        demand: the job's grid and the pods' free nodes.
        spread: what is asked for.
        columns: the pods of each column to begin with, at most as many as the data spread.
        programmes: linear ones to solve at most, for blocks of each width.
        nodes: of the search tree that makes rows whole.

    Returns:
        None where none was found, and where there are too many pods to look for it.
    """
    if len(demand.capacities) > MOST_PODS:
        return None
    for most in _BLOCKS:
        cuts = even_cuts(demand.columns, most)
        widths = [after - before for before, after in pairwise(cuts)]
        blocks = [columns[start] for start in cuts[:-1]]
        search = _Search(RowFit(demand, widths, spread.pipeline), spread.data, programmes)
        grid = search.run(blocks, nodes)
        if grid is not None:
            return Candidate.built(demand, np.repeat(grid, widths, axis=1), "exchanged pods")
        if len(widths) == demand.columns:
            break
        columns = [p for p, w in zip(search.best, widths, strict=True) for _ in range(w)]
    return None


class _Search:
    """Walks from the pods of blocks to others.

    Args:
        rows: tells how many rows fit.
        most: pods of a block.
        programmes: linear ones to solve at most.

    Attributes:
        best: the pods of blocks with the most rows so far.
    """

    def __init__(self, rows: RowFit, most: int, programmes: int) -> None:
        self._rows, self._most, self._programmes = rows, most, programmes
        self._away: dict[tuple[int, int], int] = {}
        self._random = random.Random(0)
        self._refused: set[tuple[Pods, ...]] = set()
        self._best_rows = 0.0
        self.best: list[Pods] = []

    def run(self, blocks: list[Pods], nodes: int) -> PodGrid | None:
        """The pod of each row and block; None where none was found."""
        self.best = blocks
        last = (1 - _FIRST_WALK) * self._programmes
        for walk in range(_WALKS):
            grid = self._walk(blocks, nodes, last if walk == 0 else None)
            if grid is not None or not self._programmes or len(self._refused) >= _MOST_WHOLE:
                return grid
            blocks = self._kicked(self.best)
        return None

    def _walk(self, blocks: list[Pods], nodes: int, last: float | None) -> PodGrid | None:
        """The pod of each row and block if the walk meets a placement.

        It goes on until so many programmes are left, or while it brings more rows.
        """
        self._away.clear()
        most, step, since = 0.0, 0, 0
        fit = self._first_fit(blocks)
        while fit is not None and (since <= _PATIENCE if last is None else self._programmes > last):
            grid = self._whole(blocks, fit, nodes)
            if grid is not None:
                return grid
            since += 1
            if fit.rows > most + ROUNDING:
                most, since = fit.rows, 0
            if fit.rows > self._best_rows:
                self.best, self._best_rows = blocks, fit.rows
            moved = self._moved(blocks, fit, step)
            if moved is None:
                break
            blocks, fit = moved
            step += 1
        return None

    def _first_fit(self, blocks: list[Pods]) -> Fit | None:
        prices = 1 / np.maximum(self._rows.demand.capacities, 1.0)
        rest = self._rows.without(blocks, 0, prices)
        return None if rest is None else self._fit(rest, blocks[0])

    def _whole(self, blocks: list[Pods], fit: Fit, nodes: int) -> PodGrid | None:
        """Whole rows of these pods, unless they have been looked for."""
        if fit.rows < self._rows.demand.rows - ROUNDING or tuple(blocks) in self._refused:
            return None
        self._refused.add(tuple(blocks))
        return self._rows.whole(fit, nodes)

    def _kicked(self, blocks: list[Pods]) -> list[Pods]:
        """With one pod of a block exchanged for another at random."""
        block = self._random.randrange(len(blocks))
        own = sorted(blocks[block])
        others = set(range(len(self._rows.demand.capacities))) - blocks[block]
        if len(own) >= self._most:
            own.remove(self._random.choice(own))
        if others:
            own.append(self._random.choice(sorted(others)))
        return [*blocks[:block], frozenset(own), *blocks[block + 1 :]]

    def _fit(self, rest: Rest, pods: Pods) -> Fit | None:
        if not self._programmes:
            return None
        self._programmes -= 1
        fit = self._rows.joined(rest, pods)
        return fit if len(fit.choices) else None

    def _moved(self, blocks: list[Pods], fit: Fit, step: int) -> tuple[list[Pods], Fit] | None:
        """The best of the exchanges that are tried; None where there is none left."""
        best: tuple[list[Pods], Fit] | None = None
        lost: tuple[int, int] | None = None
        tried = 0
        for rest, pod in self._promising(blocks, fit.prices):
            block = rest.block
            if self._away.get((block, pod), 0) > step:
                continue
            tried += 1
            full = len(blocks[block]) == self._most
            for other in sorted(blocks[block]) if full else [None]:
                kept = blocks[block] - {other} if full else blocks[block]
                now = self._fit(rest, kept | {pod})
                if now is None:
                    return None
                if best is None or now.rows > best[1].rows:
                    best = [*blocks[:block], kept | {pod}, *blocks[block + 1 :]], now
                    lost = None if other is None else (block, other)
                if now.rows > _MUCH_BETTER * fit.rows:
                    break
            if tried == _TRIED or (best is not None and best[1].rows > fit.rows + ROUNDING):
                break
        if lost is not None:
            self._away[lost] = step + _AWAY
        return best

    def _promising(self, blocks: list[Pods], prices: Numbers) -> Iterator[tuple[Rest, int]]:
        """Blocks and pods that make rows possible that cost less than one, the cheapest first."""
        cost = np.full((len(blocks), len(prices)), np.inf)
        rests: dict[int, Rest] = {}
        for block, pods in enumerate(blocks):
            rest = self._rows.without(blocks, block, prices)
            if rest is not None:
                rests[block] = rest
                cost[block] = self._rows.cheapest(rest)
                cost[block, sorted(pods)] = np.inf
        for at in np.argsort(cost, axis=None, kind="stable").tolist():
            block, pod = divmod(at, len(prices))
            if cost[block, pod] >= 1 - ROUNDING:
                return
            yield rests[block], pod
