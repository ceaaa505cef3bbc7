"""Which ranks own an exact N-th of the payload between the phases of a plan."""

from __future__ import annotations

from math import prod

import pytest

from trimtab.core.collectives import Layout, Schedule
from trimtab.core.collectives.combine import exchange, ring, staged
from trimtab.hosts.torch.plan_runner import PlannedRank

pytestmark = pytest.mark.integration


def whole(count: int) -> list[Layout]:
    return [Layout.whole(rank) for rank in range(count)]


@pytest.mark.parametrize("factors", [(7,), (5, 3), (2, 2, 3), (3, 7, 2), (13, 11)])
def test_even_stages_leave_each_rank_an_exact_part(factors: tuple[int, ...]) -> None:
    steps, layout = staged(whole(size := prod(factors)), factors)
    places = PlannedRank(Schedule.of(size, steps), 0).places
    assert places is not None
    assert sorted(places) == list(range(size))
    assert [layout.owners.tolist().index(rank) for rank in range(size)] == list(places)


def test_so_does_a_ring() -> None:
    assert PlannedRank(Schedule.of(6, [ring(whole(6))[0]]), 0).places == tuple(range(6))


@pytest.mark.parametrize("off", [1e-7, 2e-4, 0.3])
def test_parts_that_are_nearly_equal_are_not_exact(off: float) -> None:
    """Reduce-scatter would take elements of a neighbour's part for its own."""
    step, _ = exchange(whole(5), [1.0, 1.0 + off, 1.0, 1.0 - off, 1.0])
    assert PlannedRank(Schedule.of(5, [step]), 0).places is None
