"""Several policies as one: composition, and the fence around a policy that fails."""

from __future__ import annotations

import math

import pytest

from trimtab.core.policy import Call, CallField, Outcome, ServingPolicy
from trimtab.core.policy_stack import PolicyStack


def call(name="c", **fields):
    return Call(call_id=name, arrival_s=0.0, prompt_tokens=1, max_output_tokens=1, fields=fields)


class Keyed(ServingPolicy):
    def __init__(self, *keys):
        super().__init__()
        self.keys = keys

    def key(self, call, now_s):
        return self.keys[0] if len(self.keys) == 1 else self.keys


class Silent(ServingPolicy):
    """Overrides nothing, so a host never calls it."""


def test_a_policy_that_overrides_nothing_costs_nothing():
    stack = PolicyStack([("silent", Silent())])
    assert stack
    used = [stack.orders, stack.gates, stack.steps, stack.watches_admissions]
    assert not any(used)
    assert stack.key(call(), 0.0) == ()
    assert stack.admits(call(), None, 0.0)


def test_the_first_ordering_policy_decides_and_the_next_breaks_ties():
    stack = PolicyStack([("a", Keyed(1.0)), ("b", Keyed(2.0, 3))])
    assert stack.key(call(), 0.0) == ((1.0,), (2.0, 3))


@pytest.mark.parametrize("bad", [None, "first", math.nan, (1.0, None), (math.nan,)])
def test_a_key_that_does_not_sort_leaves_its_policy_out(bad, caplog):
    class Bad(ServingPolicy):
        def key(self, call, now_s):
            return bad

    stack = PolicyStack([("bad", Bad()), ("good", Keyed(5.0))])
    assert stack.key(call(), 0.0) == ((5.0,),)
    assert stack.reordered
    assert stack.names == ["good"]
    assert len([r for r in caplog.records if "'bad'" in r.getMessage()]) == 1


def test_stale_calls_are_taken_once_and_finished_ones_never():
    policy = Keyed(1.0)
    stack = PolicyStack([("p", policy)])
    one, two = call("one"), call("two")
    policy.stale |= {one, two}
    stack.on_finish(two, Outcome.COMPLETED, 0.0)
    assert stack.stale_calls(0.0) == {one}
    assert stack.stale_calls(0.0) == set()


def test_all_must_admit_and_any_may_end():
    class Gate(ServingPolicy):
        def __init__(self, verdict):
            super().__init__()
            self.verdict = verdict

        def admits(self, call, load, now_s):
            return self.verdict

        def on_step(self, progressed, now_s):
            return [] if self.verdict else progressed

    one = call()
    stack = PolicyStack([("open", Gate(True)), ("closed", Gate(False))])
    assert not stack.admits(one, None, 0.0)
    assert stack.on_step([one], 0.0) == [one]


def test_the_policy_that_looks_first_is_heeded_and_a_wrong_answer_leaves_its_policy_out(caplog):
    class Watcher(ServingPolicy):
        def __init__(self, tokens):
            super().__init__()
            self.tokens = tokens

        def on_step(self, progressed, now_s):
            return []

        def watches(self, call):
            return self.tokens

    stack = PolicyStack([(str(n), Watcher(n)) for n in (9, None, 4)])
    assert stack.watches(call()) == 4
    assert PolicyStack([("never", Watcher(None))]).watches(call()) is None
    for wrong in ("7", True, 2.5):
        stack = PolicyStack([("good", Watcher(5)), ("bad", Watcher(wrong))])
        assert stack.watches(call()) == 5
        assert stack.names == ["good"]
        assert f"its watches {wrong!r} is no number of tokens" in caplog.text


@pytest.mark.parametrize(
    ("kind", "value", "ok"),
    [
        (str, "w1", True),
        (str, 1, False),
        (int, 3, True),
        (int, 3.0, False),
        (int, True, False),
        (float, 3, True),
        (float, 3.5, True),
        (float, "3", False),
        (float, math.inf, False),
        (float, [3], False),
        (float, None, False),
    ],
)
def test_call_fields_take_their_kind_only(kind, value, ok):
    from trimtab.core.errors import BadInput

    field = CallField(kind, "test", minimum=1)
    if ok:
        assert field.check("f", value) == value
    else:
        with pytest.raises(BadInput, match=r"trimtab\.f"):
            field.check("f", value)
