"""Strip covers: placements that the published MIP cannot express.

The stages are cut into strips of neighbouring columns, and in each strip the rows are dealt to as
few pods as hold them. One strip of whole rows is Arnold's placement with row spread 1; one strip
with split rows is its row spread 2. More strips trade pipeline spread for data spread, and the
same with rows and columns swapped. Every grid is built and its spreads counted: nothing is
believed of a model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trimtab.placement.grid import Candidate, Demand, PodGrid, Spread

Counts = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]
_MOST_STRIPS = 24

Deal = list[tuple[int, int]]
"""``(pod, segments)`` (whole rows) or ``(pod, cells)`` (split rows), in filling order."""


def widths(columns: int, strips: int) -> list[int]:
    """Cuts columns into strips whose widths differ by at most one, the wider first."""
    base, extra = divmod(columns, strips)
    return [base + 1] * extra + [base] * (strips - extra)


def _pick(units: Counts, need: int, opened: Flags) -> int | None:
    """The smallest pod that holds all of the need, opened ones first; else the largest."""
    enough = np.flatnonzero(units >= need)
    if len(enough):
        return int(enough[np.lexsort((units[enough], ~opened[enough]))[0]])
    largest = units.max(initial=0)
    if largest == 0:
        return None
    return int(np.flatnonzero(units == largest)[np.argmax(opened[units == largest])])


def _deal(demand: Demand, strip_widths: Sequence[int], split: bool) -> list[Deal] | None:
    """Deals each strip's rows to pods, greedily; None where the pods do not hold them."""
    free = np.array(demand.capacities)
    opened = np.zeros(len(free), dtype=bool)
    deals: list[Deal] = []
    for width in strip_widths:
        need = demand.rows * width if split else demand.rows
        # A pod that gets less than a segment could meet a third pod in its row.
        units = np.where(free >= width, free, 0) if split else free // width
        deal: Deal = []
        while need:
            pod = _pick(units, need, opened)
            if pod is None:
                return None
            count = min(int(units[pod]), need)
            if split and 0 < need - count < width:
                count = need - width
                if count < width:
                    return None
            deal.append((pod, count))
            need -= count
            free[pod] -= count if split else count * width
            opened[pod] = True
            units[pod] = 0
        deals.append(deal)
    return deals


def _segments(deal: Deal, width: int, split: bool) -> PodGrid:
    """A strip's row segments in dealing order; shape (rows, width)."""
    pods: PodGrid = np.repeat([pod for pod, _ in deal], [count for _, count in deal])
    return pods.reshape(-1, width) if split else np.repeat(pods[:, None], width, axis=1)


def _aligned(segments: PodGrid, anchor: PodGrid, barred: set[int]) -> PodGrid:
    """Puts a strip's segments into rows: split ones apart from earlier splits, others by pod.

    Args:
        segments: shape (rows, width).
        anchor: the pod that each row had last, so that rows keep their pods where they can.
        barred: rows that are split in an earlier strip; this strip's are added.
    """
    rows = len(segments)
    is_split = (segments != segments[:, :1]).any(axis=1)
    placed = np.full(rows, -1)
    open_rows = [row for row in range(rows) if row not in barred]
    splits = np.flatnonzero(is_split)
    if len(splits) > len(open_rows):
        open_rows += sorted(barred)
    for segment, row in zip(splits, open_rows, strict=False):
        placed[row] = segment
        barred.add(row)
    waiting: dict[int, list[int]] = {}
    for segment in np.flatnonzero(~is_split)[::-1]:
        waiting.setdefault(int(segments[segment, 0]), []).append(int(segment))
    empty = [int(row) for row in np.flatnonzero(placed < 0)]
    for row in empty:
        same = waiting.get(int(anchor[row]))
        if same:
            placed[row] = same.pop()
    rest = [segment for pod in sorted(waiting) for segment in reversed(waiting[pod])]
    for row, segment in zip((r for r in empty if placed[r] < 0), rest, strict=True):
        placed[row] = segment
    in_rows: PodGrid = segments[placed]
    return in_rows


def _build(deals: Sequence[Deal], strip_widths: Sequence[int], split: bool) -> PodGrid:
    parts: list[PodGrid] = []
    barred: set[int] = set()
    for deal, width in zip(deals, strip_widths, strict=True):
        segments = _segments(deal, width, split)
        anchor = parts[-1][:, -1] if parts else segments[:, 0]
        parts.append(_aligned(segments, anchor, barred))
    return np.concatenate(parts, axis=1)


@dataclass(frozen=True, slots=True)
class StripCover:
    """A strip cover that was dealt and not yet built.

    Attributes:
        demand: whose columns are cut; transposed where strips are of rows.
        deals: of each strip.
        widths: of each strip.
        split: whether rows may be cut inside a strip.
        by_rows: whether the strips are of rows.
    """

    demand: Demand
    deals: tuple[Deal, ...]
    widths: tuple[int, ...]
    split: bool
    by_rows: bool

    @property
    def spread(self) -> Spread:
        """The spread as dealt; a row that finds its pod again has less."""
        cut = self.split and any(len(deal) > 1 for deal in self.deals)
        spread = Spread(len(self.widths) + cut, max(map(len, self.deals)))
        return spread.swapped if self.by_rows else spread

    def built(self) -> Candidate | None:
        """The placement; None where it does not fit."""
        mode, kind = "split" if self.split else "whole", "row" if self.by_rows else "column"
        grid = _build(self.deals, self.widths, self.split)
        name = f"{len(self.widths)} {mode} {kind} strips"
        candidate = Candidate.built(self.demand, grid, name)
        return candidate.transposed if candidate is not None and self.by_rows else candidate


def _one_way(demand: Demand, most: int, by_rows: bool) -> Iterator[StripCover]:
    for strips in range(1, most + 1):
        cut = tuple(widths(demand.columns, strips))
        for split in (False, True) if strips < demand.columns else (False,):
            deals = _deal(demand, cut, split)
            if deals is not None:
                yield StripCover(demand, tuple(deals), cut, split, by_rows)


def strip_deals(demand: Demand) -> Iterator[StripCover]:
    """All strip covers, along the columns and along the rows; few, and each quickly dealt."""
    # More strips than pods never help, nor do very many: each adds to the other spread.
    pods = min(len(demand.capacities) + 1, _MOST_STRIPS)
    yield from _one_way(demand, min(demand.columns, pods), by_rows=False)
    yield from _one_way(demand.transposed, min(demand.rows, pods), by_rows=True)


def strip_covers(demand: Demand) -> Iterator[Candidate]:
    """All strip covers, built and counted."""
    yield from (built for cover in strip_deals(demand) if (built := cover.built()) is not None)


def promising_covers(demand: Demand) -> list[Candidate]:
    """The strip covers that no other beats before they are built; a quick part of all."""
    covers = list(strip_deals(demand))
    spreads = {cover.spread for cover in covers}
    best = {s for s in spreads if not any(other.dominates(s) for other in spreads)}
    return [
        built for cover in covers if cover.spread in best and (built := cover.built()) is not None
    ]
