"""Which instance a call goes to: the dispatch rules, for a live router and for the simulator.

A rule sees calls and instances through two small views (`RoutedCall`, `Instance`) that a router can
offer as well as a simulator. It returns the instance's place in the list it was given, or None:
the call is then held at the router, and offered again in a later round. `Backlog` is an `Instance`
made from what every router knows: what it has sent where, and what has come back.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol
from zlib import crc32

from trimtab.core.documents import nearest
from trimtab.core.errors import BadInput


@dataclass(frozen=True, slots=True, eq=False)
class RoutedCall:
    """A call on its way to an instance; compared and hashed by identity.

    Attributes:
        prompt_tokens: length of the prompt.
        output_tokens: predicted length of the output.
        class_: the kind of workflow.
        stage: the stage of the workflow.
        workflow: the workflow; None for a single call.
        due_s: when its workflow should be over; infinite without a deadline.
    """

    prompt_tokens: int
    output_tokens: float
    class_: str = ""
    stage: str = ""
    workflow: str | None = None
    due_s: float = math.inf

    def haste_per_s(self, own_s: float, now_s: float) -> float:
        """What a second of delay costs: its share of the time that the workflow has left.

        A workflow has at least the time left that its call takes, however late it is; one without
        a deadline counts as due in an hour.

        Args:
            own_s: what the call takes.
            now_s: the present.
        """
        left_s = self.due_s - now_s if self.due_s < math.inf else _PATIENCE_S
        return 1 / max(left_s, own_s, _LEAST_LEFT_S)


@dataclass(frozen=True, slots=True)
class Prediction:
    """How long a call is expected to take on an instance that has nothing else to do."""

    prefill_s: float
    """Of the prompt tokens that are not in the instance's prefix cache."""
    decode_s: float

    @property
    def total_s(self) -> float:
        """The paper's ``t_comp``."""
        return self.prefill_s + self.decode_s


class Instance(Protocol):
    """What a rule may know of an instance that can serve the call."""

    @property
    def number(self) -> int:
        """Its stable number; breaks ties."""

    @property
    def seats(self) -> int:
        """Calls that it runs at once."""

    @property
    def in_flight(self) -> int:
        """Calls that were sent to it and have not ended."""

    @property
    def decoding(self) -> int:
        """Those of them that have begun to give tokens."""

    @property
    def queued_s(self) -> float:
        """The paper's ``t_queue``: predicted time of the calls that wait in it, each alone."""

    def work_s(self, now_s: float) -> float:
        """Predicted rest of all calls in flight, each alone."""

    def prefill_s(self, now_s: float) -> float:
        """Predicted prefill that it has before it."""

    def prefill_share(self, now_s: float) -> float:
        """The share of its time that it has spent on prefill of late, below 1."""

    def haste_per_s(self, now_s: float) -> float:
        """What a second of delay costs the calls in flight; see `RoutedCall.haste_per_s`."""

    def predict(self, call: RoutedCall) -> Prediction:
        """What the call would take there, alone, with what its prefix cache holds of the prompt."""


class Rule(Protocol):
    """A dispatch rule. It may keep state, so each router has its own."""

    def begin_round(self) -> None:
        """From here on the held calls are offered again, the first in the queue's order first.

        A round is due when a call has ended or has given its first token, and when a call arrives
        while others are held. It may end as soon as the rule is `closed`.
        """

    def closed(self, instances: Sequence[Instance], now_s: float) -> bool:
        """Whether any call would be held now."""

    def choose(self, call: RoutedCall, instances: Sequence[Instance], now_s: float) -> int | None:
        """The place in ``instances`` (healthy ones, at least one) that gets the call.

        None holds it, which no rule does while nothing is in flight. What is chosen is sent.
        """


class Backlog:
    """An instance as its router sees it: the calls sent, those that give tokens, those that ended.

    Args:
        number: see `Instance`.
        seats: see `Instance`.
        predict: what a call takes on it, alone.
    """

    def __init__(
        self, number: int, seats: int, predict: Callable[[RoutedCall], Prediction]
    ) -> None:
        self.number = number
        self.seats = seats
        self.predict = predict
        self._unstarted: dict[RoutedCall, Prediction] = {}
        self._decoding: dict[RoutedCall, tuple[float, float]] = {}
        self._prefill_since_s = 0.0
        self._lately = (0.0, 0.0)

    @property
    def in_flight(self) -> int:
        """Calls that were sent and have not ended."""
        return len(self._unstarted) + len(self._decoding)

    @property
    def decoding(self) -> int:
        """Calls that have begun to give tokens."""
        return len(self._decoding)

    @property
    def queued_s(self) -> float:
        """Predicted time of the calls for which there is no seat, the last ones sent."""
        seated = max(0, self.seats - len(self._decoding))
        return sum(p.total_s for p in list(self._unstarted.values())[seated:])

    def work_s(self, now_s: float) -> float:
        """Predicted rest of all calls in flight, each alone."""
        ahead_s = sum(p.total_s for p in self._unstarted.values())
        return ahead_s + sum(
            max(decode_s - (now_s - since_s), _LEAST_REST * decode_s)
            for decode_s, since_s in self._decoding.values()
        )

    def prefill_s(self, now_s: float) -> float:
        """Predicted prefill of the calls that have given no token, less what must be done of it."""
        if not self._unstarted:
            return 0.0
        costs = [prediction.prefill_s for prediction in self._unstarted.values()]
        return sum(costs) - min(now_s - self._prefill_since_s, costs[0])

    def prefill_share(self, now_s: float) -> float:
        """The prefill sent lately, by the time in which it was sent; older sendings count less."""
        return min(_MOST_PREFILL, self._prefill_lately_s(now_s) / _LATELY_S)

    def _prefill_lately_s(self, now_s: float) -> float:
        prefill_s, at_s = self._lately
        return prefill_s * math.exp((at_s - now_s) / _LATELY_S)

    def haste_per_s(self, now_s: float) -> float:
        """Over all calls in flight; those that others have sent count as without a deadline."""
        unstarted = sum(c.haste_per_s(p.total_s, now_s) for c, p in self._unstarted.items())
        decoding = sum(c.haste_per_s(own_s, now_s) for c, (own_s, _) in self._decoding.items())
        strangers = self.in_flight - len(self._unstarted) - len(self._decoding)
        return unstarted + decoding + strangers / _PATIENCE_S

    def sent(self, call: RoutedCall, now_s: float) -> None:
        """Notes a call that was sent."""
        if not self._unstarted:
            self._prefill_since_s = now_s
        prediction = self._unstarted[call] = self.predict(call)
        self._lately = (self._prefill_lately_s(now_s) + prediction.prefill_s, now_s)

    def started(self, call: RoutedCall, now_s: float) -> None:
        """Notes a call's first token."""
        self._decoding[call] = (self._unstarted.pop(call).decode_s, now_s)
        self._prefill_since_s = now_s

    def ended(self, call: RoutedCall, now_s: float) -> None:
        """Notes that a call has ended, whatever the reason."""
        if self._decoding.pop(call, None) is None and self._unstarted.pop(call, None) is not None:
            self._prefill_since_s = now_s


_LEAST_REST = 0.1
"""A call that has outlasted its prediction is expected to take this share of it yet."""

_LATELY_S = 60.0
_MOST_PREFILL = 0.9

_PATIENCE_S = 3600.0
_LEAST_LEFT_S = 1e-3


def _first_least(costs: Sequence[tuple[float, ...]]) -> int:
    return costs.index(min(costs))


class _Stateless:
    def begin_round(self) -> None:
        """Nothing is kept from round to round."""

    def closed(self, instances: Sequence[Instance], now_s: float) -> bool:
        """Never: nothing is held."""
        return False


class RoundRobin(_Stateless):
    """Each instance in turn."""

    def __init__(self) -> None:
        self._next = 0

    def choose(self, call: RoutedCall, instances: Sequence[Instance], now_s: float) -> int | None:
        """The next instance."""
        self._next += 1
        return (self._next - 1) % len(instances)


class Random(_Stateless):
    """Any instance, by a seeded generator."""

    def __init__(self, seed: int = 0) -> None:
        self._chance = random.Random(seed)

    def choose(self, call: RoutedCall, instances: Sequence[Instance], now_s: float) -> int | None:
        """A random instance."""
        return self._chance.randrange(len(instances))


class TwoChoices(_Stateless):
    """The one with fewer calls of two random instances."""

    def __init__(self, seed: int = 0) -> None:
        self._chance = random.Random(seed)

    def choose(self, call: RoutedCall, instances: Sequence[Instance], now_s: float) -> int | None:
        """The less busy of two."""
        pair = self._chance.sample(range(len(instances)), min(2, len(instances)))
        return min(pair, key=lambda i: (instances[i].in_flight, instances[i].number))


class Scored(_Stateless):
    """The instance of the least score, by `score`; ties by earliest finish, then by number."""

    def score(self, call: RoutedCall, instance: Instance, now_s: float) -> float:
        """What is minimised."""
        raise NotImplementedError

    def choose(self, call: RoutedCall, instances: Sequence[Instance], now_s: float) -> int | None:
        """The instance of the least score."""
        scores = [self.score(call, instance, now_s) for instance in instances]
        least = min(scores)
        ties = [i for i, score in enumerate(scores) if score == least]
        if len(ties) == 1:
            return ties[0]
        return min(ties, key=lambda i: _tie(call, instances[i], now_s))


def _tie(call: RoutedCall, instance: Instance, now_s: float) -> tuple[float, int]:
    return instance.work_s(now_s) + instance.predict(call).total_s, instance.number


class LeastRequests(Scored):
    """The instance with the fewest calls in flight."""

    def score(self, call: RoutedCall, instance: Instance, now_s: float) -> float:
        """The calls in flight."""
        return instance.in_flight


class LeastWork(Scored):
    """The instance with the least predicted work in flight."""

    def score(self, call: RoutedCall, instance: Instance, now_s: float) -> float:
        """The predicted rest of the calls in flight."""
        return instance.work_s(now_s)


class Product(Scored):
    """Prefill to come, the call's own included, times the size of the batch it joins (LMetric)."""

    def score(self, call: RoutedCall, instance: Instance, now_s: float) -> float:
        """The product."""
        prefill_s = instance.prefill_s(now_s) + instance.predict(call).prefill_s
        return prefill_s * (instance.in_flight + 1)


class Paper(Scored):
    """HexGen-Text2SQL's score, ``(1 - alpha) beta / t_queue - alpha t_comp``; the largest wins.

    ``t_queue`` is 0 for every instance whose queue is empty and counts as at least ``least_s``.

    Args:
        alpha: 1 for the fastest instance, 0 for the shortest queue.
        beta_s2: what makes the two terms comparable; the paper gives no value. Some seconds
            squared, those of a usual call.
        least_s: about a decode step.
    """

    def __init__(self, alpha: float = 0.5, beta_s2: float = 4.0, least_s: float = 0.02) -> None:
        if not 0 <= alpha <= 1:
            raise BadInput(f"alpha is {alpha}", fix="give a number between 0 and 1")
        self._alpha, self._beta_s2, self._least_s = alpha, beta_s2, least_s

    def score(self, call: RoutedCall, instance: Instance, now_s: float) -> float:
        """The score with its sign turned."""
        queue_s = max(instance.queued_s, self._least_s)
        comp_s = instance.predict(call).total_s
        return self._alpha * comp_s - (1 - self._alpha) * self._beta_s2 / queue_s


class Ratio(_Stateless):
    """The rule of the paper's released programme: work ever assigned, against speed.

    The work is cumulative, as released: what has ended still counts. The first instance is the
    baseline that the others are compared with.

    Args:
        alpha: the weight of speed.
        factors: by number, what an instance's work is multiplied by; 1 where not given.
    """

    def __init__(self, alpha: float = 0.5, factors: Mapping[int, float] | None = None) -> None:
        if not 0 <= alpha <= 1:
            raise BadInput(f"alpha is {alpha}", fix="give a number between 0 and 1")
        self._alpha, self._factors = alpha, dict(factors or {})
        self._assigned_s: dict[int, float] = {}

    def choose(self, call: RoutedCall, instances: Sequence[Instance], now_s: float) -> int | None:
        """The instance of the largest priority; the baseline while nothing was assigned to it."""
        costs = [instance.predict(call).total_s for instance in instances]
        base_s = self._assigned_s.get(instances[0].number, 0.0)
        chosen = 0
        if base_s > 0:
            priorities = [
                self._alpha * costs[0] / max(cost, 1e-12)
                - (1 - self._alpha) * self._weighted_s(instance) / base_s
                for cost, instance in zip(costs, instances, strict=True)
            ]
            chosen = priorities.index(max(priorities))
        number = instances[chosen].number
        self._assigned_s[number] = self._assigned_s.get(number, 0.0) + costs[chosen]
        return chosen

    def _weighted_s(self, instance: Instance) -> float:
        number = instance.number
        return self._assigned_s.get(number, 0.0) * self._factors.get(number, 1.0)


class Session(_Stateless):
    """All calls of a workflow to one instance, by rendezvous hashing."""

    def choose(self, call: RoutedCall, instances: Sequence[Instance], now_s: float) -> int | None:
        """The instance whose number and the workflow's name hash highest."""
        if call.workflow is None:
            return _first_least([(i.in_flight, i.number) for i in instances])
        hashes = [crc32(f"{call.workflow}\0{i.number}".encode()) for i in instances]
        return hashes.index(max(hashes))


@dataclass(slots=True)
class _Booked:
    """What the calls held for an instance in this round will be to those behind them."""

    calls: int = 0
    prefill_s: float = 0.0
    haste_per_s: float = 0.0


class PredictedFinish:
    """The instance on which the call is predicted to end first; held while that one is full.

    The prediction counts the wait for a seat, the prefill that is ahead, and the decode among the
    calls that run, which stands still during the prefill of calls that will come. An instance is
    full when it has no free seat or when more than ``prefill_cap_s`` of prefill is ahead: what is
    sent there would only queue, out of the reach of a more urgent call. A call held for an instance
    books its place there, so that those behind it in the same round see it and go elsewhere rather
    than wait for the same seat.

    Args:
        prefill_cap_s: see above; infinite to fill the seats.
        holds: False to send at once, whatever waits.
        crowding: by how much each call in the batch slows a step down, as a share.
    """

    def __init__(
        self, prefill_cap_s: float = math.inf, *, holds: bool = True, crowding: float = 0.02
    ) -> None:
        self._prefill_cap_s, self._holds, self._crowding = prefill_cap_s, holds, crowding
        self._booked: defaultdict[int, _Booked] = defaultdict(_Booked)

    def begin_round(self) -> None:
        """Forgets what was booked in the last round."""
        self._booked.clear()

    def closed(self, instances: Sequence[Instance], now_s: float) -> bool:
        """Whether every instance is full."""
        return self._holds and all(self._full(instance, now_s) for instance in instances)

    def choose(self, call: RoutedCall, instances: Sequence[Instance], now_s: float) -> int | None:
        """The instance of the least score, or None while that one is full."""
        scores = self._scores(call, instances, now_s)
        numbers = [instance.number for instance in instances]
        chosen = _first_least(list(zip(scores, numbers, strict=True)))
        instance = instances[chosen]
        if not (self._holds and self._full(instance, now_s)):
            return chosen
        own, booked = instance.predict(call), self._booked[instance.number]
        booked.calls += 1
        booked.prefill_s += own.prefill_s
        booked.haste_per_s += call.haste_per_s(own.total_s, now_s)
        return None

    def _full(self, instance: Instance, now_s: float) -> bool:
        booked = self._booked[instance.number]
        if not instance.in_flight:
            return False
        return (
            booked.calls > 0
            or instance.in_flight >= instance.seats
            or instance.prefill_s(now_s) > self._prefill_cap_s
        )

    def _scores(self, call: RoutedCall, instances: Sequence[Instance], now_s: float) -> list[float]:
        return [self._finish_s(i.predict(call), i, now_s) for i in instances]

    def _finish_s(self, own: Prediction, instance: Instance, now_s: float) -> float:
        booked, in_flight = self._booked[instance.number], instance.in_flight
        excess = in_flight + booked.calls + 1 - instance.seats
        seat_s = 0.0
        if excess > 0 and in_flight:
            seat_s = excess * instance.work_s(now_s) / in_flight / instance.seats
        running = min(in_flight, instance.seats - 1)
        ahead_s = seat_s + instance.prefill_s(now_s) + booked.prefill_s
        decode_s = own.decode_s * (1 + self._crowding * running)
        return ahead_s + own.prefill_s + decode_s / (1 - instance.prefill_share(now_s))


class Auto(PredictedFinish):
    """The default: where the call costs all workflows together least of the time they have left.

    It costs its own workflow the time until its predicted finish, and every other one that has a
    call there the time of its prompt, during which they stand still. Each second counts for its
    share of what the workflow has left until its deadline: so the call of a workflow that is nearly
    late goes where it ends soonest, and others keep their prompts out of its way.

    Args:
        prefill_cap_s: see `PredictedFinish`.
    """

    def __init__(self, prefill_cap_s: float = 2.0) -> None:
        super().__init__(prefill_cap_s)

    def _scores(self, call: RoutedCall, instances: Sequence[Instance], now_s: float) -> list[float]:
        # A late workflow has at least what its call takes where that is least. Were it what it
        # takes on each instance, a slow one would seem to cost it no more than a fast one.
        own = [instance.predict(call) for instance in instances]
        own_per_s = call.haste_per_s(min(there.total_s for there in own), now_s)
        return [
            own_per_s * self._finish_s(there, instance, now_s)
            + (instance.haste_per_s(now_s) + self._booked[instance.number].haste_per_s)
            * there.prefill_s
            for instance, there in zip(instances, own, strict=True)
        ]


RULES: Mapping[str, Callable[..., Rule]] = {
    "auto": Auto,
    "pft": PredictedFinish,
    "paper": Paper,
    "ratio": Ratio,
    "product": Product,
    "least-work": LeastWork,
    "least-requests": LeastRequests,
    "p2c": TwoChoices,
    "session": Session,
    "round-robin": RoundRobin,
    "random": Random,
}
"""The rules by the names that configurations and reports use."""


def rule(name: str, **options: object) -> Rule:
    """A new rule by its name, with the options of its class.

    Raises:
        BadInput: none has this name, or it has no such option.
    """
    if name not in RULES:
        raise BadInput(f"there is no dispatch rule {name!r}", fix=nearest(name, RULES))
    try:
        return RULES[name](**options)
    except TypeError as error:
        raise BadInput(f"the dispatch rule {name!r} has other options: {error}") from None
