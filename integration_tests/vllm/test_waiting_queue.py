"""The waiting queue against a plain sorted list, and what one change costs it."""

from __future__ import annotations

from functools import total_ordering
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.v1.core.sched.request_queue import SchedulingPolicy

from trimtab.hosts.vllm.waiting_queue import PolicyQueue

pytestmark = pytest.mark.integration


class Waiting(SimpleNamespace):
    """As much of a request as the queue looks at."""

    __hash__ = object.__hash__
    __eq__ = object.__eq__


def queue_of(key=lambda request: (request.rank,)) -> PolicyQueue:
    return PolicyQueue(key, SchedulingPolicy.FCFS)


CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["add", "prepend", "pop", "remove", "rekey", "refuse", "step"]),
        st.integers(0, 5),
    ),
    max_size=60,
)


@given(CHANGES)
def test_the_queue_is_a_list_sorted_by_key_then_by_the_engines_order(changes):
    queue = queue_of()
    known: list[tuple[int, Waiting]] = []
    refused: set[Waiting] = set()
    first = last = 0
    queue.open_step(refused.__contains__)
    for what, number in changes:
        in_order = [r for _, r in sorted(known, key=lambda entry: (entry[1].rank, entry[0]))]
        open_to = [request for request in in_order if request not in refused]
        assert list(queue) == in_order
        assert len(queue) == len(in_order)
        assert bool(queue) == bool(open_to)
        chosen = in_order[number % len(in_order)] if in_order else None
        if what == "add":
            last += 1
            known.append((last, Waiting(rank=number)))
            queue.add_request(known[-1][1])
        elif what == "prepend":
            first -= 1
            known.append((first, Waiting(rank=number)))
            queue.prepend_request(known[-1][1])
        elif what == "step":
            refused.clear()
            queue.open_step(refused.__contains__)
        elif what == "pop" and open_to:
            assert queue.peek_request() is queue.pop_request() is open_to[0]
            known = [entry for entry in known if entry[1] is not open_to[0]]
        elif chosen is not None and what == "remove":
            queue.remove_request(chosen)
            known = [entry for entry in known if entry[1] is not chosen]
        elif chosen is not None and what == "rekey":
            chosen.rank = number
            queue.rekey([chosen, Waiting(rank=0)])
        elif chosen is not None and what == "refuse":
            refused.add(chosen)


def test_an_empty_queue_says_so():
    queue = queue_of()
    assert not queue
    with pytest.raises(IndexError):
        queue.pop_request()
    with pytest.raises(KeyError):
        queue.remove_request(Waiting(rank=0))


@total_ordering
class Counted:
    """A key that counts how often it is compared."""

    compared = 0

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Counted) and self.rank == other.rank

    def __lt__(self, other: Counted) -> bool:
        Counted.compared += 1
        return self.rank < other.rank


def test_no_change_pays_for_those_before_it():
    """Counted, not timed: ten thousand wait, all get new keys, and most leave."""
    queue = queue_of(lambda request: (Counted(request.rank),))
    requests = [Waiting(rank=number * 7919 % 10_007) for number in range(10_000)]
    most = 0
    for change in (queue.add_request, lambda request: queue.rekey([request]), queue.remove_request):
        for request in requests:
            Counted.compared = 0
            change(request)
            assert queue or request is requests[-1]
            most = max(most, Counted.compared)
    assert most <= 64
