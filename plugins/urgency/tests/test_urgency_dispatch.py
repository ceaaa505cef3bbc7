from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.core.errors import BadInput
from trimtab.core.simulate import simulate
from trimtab.core.workload import Request
from trimtab.urgency.dispatch import RULES, Backlog, Prediction, RoutedCall, Rule, rule
from trimtab.urgency.paper.hardware import A100, A6000, L40S
from trimtab.urgency.paper.orders import router_order
from trimtab.urgency.simulated_router import HoldingRouter

CLUSTER = (A100, A6000, L40S)


@dataclass
class Fixed:
    """An instance whose figures are given."""

    number: int
    comp_s: float = 1.0
    queued_s: float = 0.0
    in_flight: int = 0
    seats: int = 4
    decoding: int = 0
    busy_s: float = 0.0
    ahead_s: float = 0.0
    haste: float = 0.0
    share: float = 0.0

    def work_s(self, now_s: float) -> float:
        return self.busy_s

    def prefill_s(self, now_s: float) -> float:
        return self.ahead_s

    def prefill_share(self, now_s: float) -> float:
        return self.share

    def haste_per_s(self, now_s: float) -> float:
        return self.haste

    def predict(self, call: RoutedCall) -> Prediction:
        return Prediction(self.comp_s / 2, self.comp_s / 2)


CALL = RoutedCall(100, 10.0, workflow="w")
POSITIVE = st.integers(1, 1000).map(lambda n: n / 10)
FIXED = st.builds(
    Fixed,
    number=st.just(0),
    comp_s=POSITIVE,
    queued_s=POSITIVE,
    in_flight=st.integers(0, 3),
    busy_s=POSITIVE,
    ahead_s=POSITIVE,
)


def numbered(instances: list[Fixed]) -> list[Fixed]:
    for number, instance in enumerate(instances):
        instance.number = number
    return instances


@given(st.lists(FIXED, min_size=1, max_size=6).map(numbered))
def test_alpha_one_takes_the_fastest_and_alpha_zero_the_shortest_queue(instances):
    fastest = rule("paper", alpha=1.0).choose(CALL, instances, 0.0)
    shortest = rule("paper", alpha=0.0).choose(CALL, instances, 0.0)
    assert instances[fastest].comp_s == min(i.comp_s for i in instances)
    assert instances[shortest].queued_s == min(i.queued_s for i in instances)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6))
def test_equal_instances_and_no_estimates_mean_the_least_loaded(loads):
    instances = [
        Fixed(number, comp_s=0.0, in_flight=load, seats=10) for number, load in enumerate(loads)
    ]
    assert rule("least-requests").choose(CALL, instances, 0.0) == loads.index(min(loads))
    for instance in instances:
        instance.comp_s, instance.busy_s = 1.0, float(instance.in_flight)
        instance.ahead_s = instance.queued_s = float(instance.in_flight)
    for name in ("least-work", "product", "paper"):
        assert rule(name).choose(CALL, instances, 0.0) == loads.index(min(loads))
    for name in ("pft", "auto"):
        options = {"holds": False} if name == "pft" else {"prefill_cap_s": 1e9}
        assert rule(name, **options).choose(CALL, instances, 0.0) == loads.index(min(loads))


@given(st.lists(FIXED, min_size=2, max_size=6).map(numbered), st.randoms())
@pytest.mark.parametrize(
    "name", ["least-requests", "least-work", "product", "paper", "pft", "auto", "session"]
)
def test_the_order_in_which_instances_are_listed_changes_nothing(name, instances, chance):
    shuffled = chance.sample(instances, len(instances))
    here = rule(name).choose(CALL, instances, 0.0)
    there = rule(name).choose(CALL, shuffled, 0.0)
    if here is None or there is None:
        assert here is there
    else:
        assert instances[here].number == shuffled[there].number


def test_released_ratio_remembers_work_that_has_ended():
    instances = [Fixed(0, comp_s=1.0), Fixed(1, comp_s=2.0)]
    chooser = rule("ratio", alpha=0.5)
    # Assigned (1, 0), then the idle one: .5 * .5 - 0 beats .5 - .5; then 2 / 1 repels.
    assert [chooser.choose(CALL, instances, 0.0) for _ in range(4)] == [0, 1, 0, 0]


def test_time_left_decides_between_an_early_end_and_stalling_others():
    fast = Fixed(0, comp_s=4.0, in_flight=3, seats=8, haste=3 / 60)
    slow = Fixed(1, comp_s=8.0)
    patient, late = (RoutedCall(100, 10.0, due_s=due_s) for due_s in (600.0, 5.0))
    chooser = rule("auto")
    # 3 calls that have a minute left would stand still for 2 s: 0.1. To end 4 s sooner is worth
    # 4 / 600 or 4 / 5.
    assert chooser.choose(patient, [fast, slow], 0.0) == 1
    assert chooser.choose(late, [fast, slow], 0.0) == 0
    fast.haste = 3.0
    assert chooser.choose(late, [fast, slow], 0.0) == 1


@given(st.lists(FIXED, min_size=1, max_size=5).map(numbered), st.floats(-100, 1000))
def test_where_nobody_else_is_delayed_a_call_goes_where_it_ends_first_however_late(
    instances, due_s
):
    call = RoutedCall(100, 10.0, due_s=due_s)
    wanted = rule("pft", prefill_cap_s=math.inf).choose(call, instances, 0.0)
    assert rule("auto", prefill_cap_s=math.inf).choose(call, instances, 0.0) == wanted


def test_decode_is_expected_to_stand_still_during_the_prefill_of_calls_that_come():
    busy, slow = Fixed(0, comp_s=4.0, share=0.8), Fixed(1, comp_s=6.0)
    assert rule("pft").choose(CALL, [busy, slow], 0.0) == 1
    busy.share = 0.1
    assert rule("pft").choose(CALL, [busy, slow], 0.0) == 0


def test_a_second_costs_a_workflow_its_share_of_the_time_that_is_left():
    call = RoutedCall(100, 10.0, due_s=50.0)
    assert call.haste_per_s(2.0, now_s=10.0) == 1 / 40
    assert call.haste_per_s(2.0, now_s=49.0) == call.haste_per_s(2.0, now_s=99.0) == 1 / 2
    assert call.haste_per_s(0.0, now_s=99.0) < math.inf
    assert 0 < RoutedCall(100, 10.0).haste_per_s(2.0, now_s=1e6) < 1 / 600


def test_full_instance_holds_what_only_it_would_end_soon():
    fast = Fixed(0, comp_s=1.0, in_flight=4, busy_s=4.0, decoding=4)
    slow = Fixed(1, comp_s=100.0)
    chooser = rule("pft")
    chooser.begin_round()
    assert chooser.choose(CALL, [fast, slow], 0.0) is None
    assert not chooser.closed([fast, slow], 0.0)
    slow.in_flight = 4
    assert chooser.closed([fast, slow], 0.0)


def test_held_calls_book_their_place_so_that_others_go_elsewhere():
    fast = Fixed(0, comp_s=1.0, in_flight=4, busy_s=40.0, decoding=4)
    slow = Fixed(1, comp_s=10.0)
    chooser = rule("pft")
    chooser.begin_round()
    answers = [chooser.choose(CALL, [fast, slow], 0.0) for _ in range(6)]
    assert answers[0] is None
    assert 1 in answers
    chooser.begin_round()
    assert chooser.choose(CALL, [fast, slow], 0.0) is None


@given(st.sampled_from(["pft", "auto"]), st.lists(POSITIVE, min_size=1, max_size=5))
def test_nothing_is_held_while_nothing_is_in_flight(name, comps):
    instances = [Fixed(number, comp_s=comp_s) for number, comp_s in enumerate(comps)]
    assert rule(name, prefill_cap_s=0.0).choose(CALL, instances, 0.0) is not None


def test_backlog_counts_what_is_left():
    backlog = Backlog(0, 1, lambda call: Prediction(2.0, call.output_tokens))
    first, second = RoutedCall(1, 10.0), RoutedCall(1, 20.0)
    backlog.sent(first, 0.0)
    backlog.sent(second, 0.0)
    assert (backlog.in_flight, backlog.decoding, backlog.queued_s) == (2, 0, 22.0)
    assert backlog.prefill_s(1.5) == 2.5
    assert backlog.prefill_s(9.0) == 2.0
    backlog.started(first, 3.0)
    assert (backlog.decoding, backlog.queued_s) == (1, 22.0)
    assert backlog.work_s(7.0) == 6.0 + 22.0
    assert backlog.work_s(99.0) == 1.0 + 22.0
    backlog.ended(first, 12.0)
    backlog.ended(first, 12.0)
    assert (backlog.in_flight, backlog.queued_s, backlog.work_s(12.0)) == (1, 0.0, 22.0)
    backlog.ended(second, 13.0)
    assert backlog.prefill_s(13.0) == 0.0


def test_backlog_knows_how_urgent_its_calls_are_and_how_much_prefill_it_had():
    backlog = Backlog(0, 4, lambda call: Prediction(3.0, call.output_tokens))
    first, second = RoutedCall(1, 10.0, due_s=100.0), RoutedCall(1, 20.0, due_s=60.0)
    assert backlog.haste_per_s(0.0) == backlog.prefill_share(0.0) == 0
    backlog.sent(first, 0.0)
    backlog.sent(second, 0.0)
    assert backlog.prefill_share(0.0) == pytest.approx(6 / 60)
    assert backlog.prefill_share(60.0) == pytest.approx(6 / 60 / math.e)
    assert backlog.haste_per_s(20.0) == pytest.approx(1 / 80 + 1 / 40)
    backlog.started(first, 30.0)
    assert backlog.haste_per_s(50.0) == pytest.approx(1 / 50 + 1 / 23)
    backlog.ended(first, 51.0)
    backlog.ended(second, 51.0)
    assert backlog.haste_per_s(51.0) == 0
    for _ in range(100):
        backlog.sent(RoutedCall(1, 20.0), 60.0)
    assert backlog.prefill_share(60.0) == 0.9


class Guest(Backlog):
    """A backlog of a server that serves others too."""

    @property
    def in_flight(self) -> int:
        return super().in_flight + 2


def test_calls_of_others_count_as_without_a_deadline():
    guest = Guest(0, 4, lambda call: Prediction(1.0, 1.0))
    assert guest.haste_per_s(0.0) == pytest.approx(2 * CALL.haste_per_s(1.0, 0.0))


@st.composite
def workloads(draw: st.DrawFn) -> list[Request]:
    requests: list[Request] = []
    for number in range(draw(st.integers(1, 12))):
        before = draw(st.sampled_from([(), *((r.request_id,) for r in requests[-3:])]))
        requests.append(
            Request(
                request_id=f"r{number}",
                arrival_s=draw(st.integers(0, 20)) / 4,
                prompt_tokens=draw(st.integers(1, 4000)),
                output_tokens=draw(st.integers(1, 40)),
                workflow=f"financial/{number % 4}",
                stage="revise",
                deadline_s=draw(st.sampled_from([None, 5.0, 50.0])),
                depends_on=before,
            )
        )
    return requests


def routed(request: Request) -> RoutedCall:
    return RoutedCall(request.prompt_tokens, 20.0, workflow=request.workflow)


def predictor(gpu):
    return lambda call: Prediction(
        gpu.prefill_s(call.prompt_tokens), gpu.decode_s(call.output_tokens)
    )


def run(rule_: Rule, requests: list[Request], held: str = "fcfs"):
    backlogs = [Backlog(number, 2, predictor(gpu)) for number, gpu in enumerate(CLUSTER)]
    router = HoldingRouter(rule_, backlogs, routed, router_order(held))
    result = simulate(requests, [gpu.replica(2) for gpu in CLUSTER], router=router)
    assert all(backlog.in_flight == 0 for backlog in backlogs)
    return result


@pytest.mark.parametrize("held", ["fcfs", "edd", "llf"])
@pytest.mark.parametrize("name", RULES)
@given(requests=workloads())
@settings(max_examples=15, deadline=None)
def test_every_call_ends_once_and_the_same_way_each_time(name, held, requests):
    result = run(rule(name), requests, held)
    assert sorted(c.request_id for c in result.calls) == sorted(r.request_id for r in requests)
    assert run(rule(name), requests, held).log() == result.log()


class Noting(Backlog):
    """A backlog that notes when the calls it is asked about are due."""

    def __init__(self, number: int) -> None:
        super().__init__(number, 4, self.note)
        self.due_s: list[float] = []

    def note(self, call: RoutedCall) -> Prediction:
        self.due_s.append(call.due_s)
        return Prediction(1.0, 1.0)


def test_all_calls_of_a_workflow_are_due_when_it_is():
    backlog = Noting(0)
    router = HoldingRouter(rule("pft"), [backlog], routed)
    call = Request("a", 3.0, 10, 5, workflow="financial/1", deadline_s=20.0)
    router.on_arrival(call, 3.0)
    router.on_first_token(call, 4.0)
    router.on_end(call, 5.0)
    router.on_arrival(replace(call, request_id="b", arrival_s=6.0), 6.0)
    router.on_arrival(Request("c", 7.0, 10, 5, deadline_s=20.0), 7.0)
    router.on_arrival(Request("d", 8.0, 10, 5), 8.0)
    assert set(backlog.due_s) == {23.0, 27.0, math.inf}


class Watched:
    """A rule that notes what it was offered, and when it left calls held."""

    def __init__(self, inner: Rule) -> None:
        self.inner = inner
        self.idle_while_holding = 0

    def begin_round(self) -> None:
        self.inner.begin_round()

    def closed(self, instances, now_s):
        return self.inner.closed(instances, now_s)

    def choose(self, call, instances, now_s):
        chosen = self.inner.choose(call, instances, now_s)
        if chosen is None and not any(instance.in_flight for instance in instances):
            self.idle_while_holding += 1
        return chosen


@given(requests=workloads())
@settings(max_examples=40, deadline=None)
def test_no_call_is_held_while_all_instances_are_idle(requests):
    watched = Watched(rule("auto", prefill_cap_s=0.1))
    run(watched, requests, "llf")
    assert watched.idle_while_holding == 0


class Silent:
    """A router that sends nothing."""

    def on_arrival(self, request, now_s):
        return ()

    on_first_token = on_end = on_arrival


class Stubborn(Silent):
    """A router that sends to a replica that is not there to serve."""

    def on_arrival(self, request, now_s):
        return [(request, 0), (request, 0)]


@pytest.mark.parametrize(
    ("router", "said"), [(Silent(), "never sent 1"), (Stubborn(), "replica 0")]
)
def test_router_that_loses_or_repeats_a_request_is_refused(router, said):
    with pytest.raises(BadInput, match=said):
        simulate([Request("a", 0.0, 10, 5)], [A100.replica()], router=router)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("atuo", {}, "atuo"),
        ("auto", {"alpha": 1}, "alpha"),
        ("paper", {"alpha": 2.0}, "alpha is 2.0"),
        ("ratio", {"alpha": -1.0}, "alpha is -1.0"),
    ],
)
def test_wrong_rules_and_options_are_refused(name, options, said):
    with pytest.raises(BadInput, match=said):
        rule(name, **options)


def test_session_keeps_a_workflow_together_and_moves_few_when_an_instance_goes():
    instances = [Fixed(number) for number in range(4)]
    session = rule("session")
    calls = [RoutedCall(1, 1.0, workflow=f"w{n}") for n in range(200)]
    before = [instances[session.choose(call, instances, 0.0)].number for call in calls]
    after = [instances[session.choose(call, instances[:3], 0.0)].number for call in calls]
    assert set(before) == {0, 1, 2, 3}
    assert all(b == a for b, a in zip(before, after, strict=True) if b != 3)
    idle = session.choose(RoutedCall(1, 1.0), [Fixed(0, in_flight=1), Fixed(1)], 0.0)
    assert idle == 1
