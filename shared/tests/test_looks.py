"""The calendar of calls that policies wait for, against looking at all of them in every step."""

from __future__ import annotations

import gc
import weakref

from hypothesis import given
from hypothesis import strategies as st

from trimtab.core.policy import Call
from trimtab.hosts.vllm.looks import Looks

steps = st.lists(st.lists(st.integers(0, 3), min_size=4, max_size=4), max_size=60)
goals = st.lists(st.lists(st.integers(-2, 90), max_size=4), min_size=4, max_size=4)


@given(steps, goals, st.integers(0, 70))
def test_a_call_is_due_in_the_step_in_which_it_has_come_so_far(
    steps: list[list[int]], goals: list[list[int]], leaves_at: int
) -> None:
    looks = Looks(most_tokens=3)
    calls = [Call(str(n), 0.0, 1, 100) for n in range(4)]
    left = {call: list(own) for call, own in zip(calls, goals, strict=True)}
    wanted: dict[Call, int] = {}

    def next_goal(call: Call) -> None:
        if left[call]:
            wanted[call] = left[call].pop()
            looks.expect(call, wanted[call])

    for call in calls:
        next_goal(call)
    for step, tokens in enumerate(steps):
        if step == leaves_at:
            wanted.pop(calls[0], None)
            left[calls[0]].clear()
            looks.forget(calls[0])
        for call, more in zip(calls, tokens, strict=True):
            call.output_tokens += more
        due = looks.due()
        assert set(due) == {call for call, goal in wanted.items() if call.output_tokens >= goal}
        assert len(due) == len(set(due))
        for call in due:
            del wanted[call]
            next_goal(call)


def test_a_call_that_has_left_is_kept_nowhere() -> None:
    class Named(Call):
        """A call that can be watched as it goes."""

    looks = Looks()
    call = Named("a", 0.0, 1, 100)
    gone = weakref.ref(call)
    looks.expect(call, 10_000_000)
    looks.forget(call)
    looks.forget(call)
    del call
    gc.collect()
    assert gone() is None
