"""The policy: scores each request's branches, ends those that are not needed, bends to load."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, get_args

import numpy as np

from trimtab.branches import agreement
from trimtab.branches.bars import FixedBar, History, LikeWithLike, PaperBars
from trimtab.branches.bending import Bend
from trimtab.branches.config import BranchesConfig, Pruning
from trimtab.branches.extract import Extractor, extractor, load_function, normalised
from trimtab.branches.group import Bars, Branch, BranchGroup, Rules
from trimtab.branches.note import Fate, Note
from trimtab.branches.scoring import Score
from trimtab.core.errors import BadInput
from trimtab.core.policy import Call, Engine, FieldValue, Outcome, ServingPolicy

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from trimtab.core.branch_scoring import BranchScorer

PAPER_ALPHA = 0.5
_REMEMBERED = 4096
_ANSWER_TOKENS = 1024
"""The end of a text in which its answer is looked for while the engine waits."""
_VOTES = ("majority", "weighted")
_FATES = {
    Outcome.COMPLETED: Fate.FINISHED,
    Outcome.CUT: Fate.LENGTH,
    Outcome.REPEATED: Fate.REPEATED,
}


@dataclass(slots=True, eq=False)
class _Asked:
    """A request with branches."""

    request_id: str
    group: BranchGroup
    extract: Extractor | None
    """Finds the answer in a text; None where no vote is taken."""
    calls: dict[int, Call] = field(default_factory=dict)
    lost: int = 0
    """How many places of lost branches its waiting ones have moved up."""
    scores: dict[int, float] = field(default_factory=dict)
    """The last scores of the branches that have ended."""
    weighs: bool = False
    """Whether a vote counts as much as its branch's score."""
    votes: list[tuple[str, float | None]] = field(default_factory=list)
    """The finished branches' answers, with their scores."""
    awaited_votes: dict[int, int] = field(default_factory=dict)
    """Where the votes stand whose scores are awaited, by their branches."""
    aborted: list[tuple[Branch, str | None]] = field(default_factory=list)
    """Branches ended from outside of which it is not known yet why, with their answers."""


class BranchesPolicy(ServingPolicy):
    """Ends branches by their scores, once enough have finished, and where memory is short.

    Args:
        config: the options.
        scorers: the signals with their weights; those of the options by default.
    """

    def __init__(
        self,
        config: BranchesConfig,
        scorers: Mapping[str, tuple[BranchScorer, float]] | None = None,
    ) -> None:
        super().__init__()
        self._config = config
        self._score = Score.of(config) if scorers is None else Score(scorers)
        self._engine: Engine | None = None
        self._by_priority = False
        self._asked: dict[str, _Asked] = {}
        self._closed: OrderedDict[str, None] = OrderedDict()
        self._slots: dict[Call, int] = {}
        self._free_slots: list[int] = []
        self._awaiting: dict[Call, tuple[int, Outcome]] = {}
        """The slots of the branches that have finished and whose scores are still to come."""
        self._due_at: dict[Call, int] = {}
        self._last_read: Sequence[Call] = ()
        self._last_slots = np.empty(0, dtype=np.intp)
        self._touched: dict[_Asked, None] = {}
        self._late: list[Call] = []
        self._histories: dict[int, History] = {}
        self._bend = Bend()
        self._unserved: set[str] = set()
        self._seated: set[Call] = set()
        self._running: Counter[str] = Counter()
        self._idle: OrderedDict[str, None] = OrderedDict()

    def attach(self, engine: Engine) -> None:
        """Remembers the engine, which knows the branches' texts."""
        self._engine = engine
        self._by_priority = engine.by_priority
        self._score.attach(engine)
        if self._config.answer in _VOTES:
            engine.decode(())  # a tokenizer takes its time to load: now, not while calls run

    def on_arrival(self, call: Call, now_s: float) -> None:
        """Puts a branch to its siblings."""
        self._unserved.add(call.request_id)
        branches = call.fields.get("branches")
        if not isinstance(branches, int) or branches < 2:
            return
        if call.request_id in self._closed:
            self._late.append(call)
            return
        asked = self._asked.get(call.request_id)
        if asked is None:
            asked = self._asked[call.request_id] = self._open(call, branches)
        self._idle.pop(call.request_id, None)
        asked.group.add(call.branch)
        asked.calls[call.branch] = call
        call.forget_kv = self._config.forget_pruned
        slot = self._free_slots.pop() if self._free_slots else self._new_slot()
        self._slots[call] = slot
        self._due_at[call] = asked.group.rules.score_every
        self._score.start(slot, call)

    def key(self, call: Call, now_s: float) -> tuple[float, float]:
        """The first branch of every request comes before the second of any, while calls wait.

        The place of a branch that ended without an answer is its next sibling's, so that no request
        waits for ever behind those that come. A preempted branch goes on at once.
        """
        rank = 0
        if self._config.bend and call in self._slots and call.admitted_s is None:
            asked = self._asked.get(call.request_id)
            rank = max(0, call.branch - asked.group.lost) if asked is not None else call.branch
        return (float(call.priority if self._by_priority else 0), float(rank))

    def on_admission(self, call: Call, now_s: float) -> None:
        """A call runs; after a preemption for the second time."""
        self._unserved.discard(call.request_id)
        if call in self._seated:
            return
        self._seated.add(call)
        self._running[call.request_id] += 1

    def watches(self, call: Call) -> int | None:
        """Until a branch must be scored; of other calls only their coming and going counts."""
        return self._due_at.get(call)

    def wants_logprobs(self, call: Call) -> int | None:
        """What the token signals need of a branch."""
        return self._score.top_logprobs if call in self._slots else None

    def on_logprobs(self, calls: Sequence[Call], logprobs: NDArray[np.float32]) -> None:
        """Moves the token signals on."""
        if calls is not self._last_read:  # from one step to the next they are mostly the same
            ours = [row for row, call in enumerate(calls) if call in self._slots]
            if len(ours) < len(calls):
                if ours:
                    self.on_logprobs([calls[row] for row in ours], logprobs[ours])
                return
            self._last_read = calls
            self._last_slots = np.array([self._slots[call] for call in calls], dtype=np.intp)
        self._score.observe(self._last_slots, logprobs)

    def on_finish(self, call: Call, outcome: Outcome, now_s: float) -> None:
        """A call has left the engine: its last score, its vote, and its note."""
        self._leave(call)
        slot = self._slots.get(call)
        if slot is None:
            self._dismiss(call)
            return
        asked = self._asked.get(call.request_id)
        if asked is not None:
            branch = asked.group.branches[call.branch]
            if branch.fate is None:
                self._end_of_its_own(asked, call, branch, outcome)
            self._touched[asked] = None
        self._bend.learn(call.output_tokens, whole=outcome is Outcome.COMPLETED)
        del self._slots[call], self._due_at[call]
        if call not in self._awaiting:
            self._free(slot, call, outcome)

    def on_step(self, progressed: Collection[Call], now_s: float) -> Collection[Call]:
        """Scores the branches that have come far enough, and names those to end."""
        due = self._due_at
        never = math.inf
        for call in progressed:
            if call.output_tokens >= due.get(call, never):
                self._score_now(call)
        for call, at_tokens in self._score.arrived():
            if call in self._awaiting:
                self._take_last_score(call)
            else:
                self._take_score(call, at_tokens)
        ended: list[Call] = []
        for call in tuple(self._late):
            self._dismiss(call)
            ended.append(call)
        while self._touched:
            asked, _ = self._touched.popitem()
            ended += self._decide(asked)
        return ended

    def _dismiss(self, call: Call) -> None:
        """Says of a sibling that came after the answer that it is none, however it ends."""
        if call in self._late:
            self._late.remove(call)
            call.note = Note(Fate.STOPPED, 2, None, call.output_tokens).to_text()

    def quiet_steps(self) -> int:
        """Tokens until some branch is scored next; until then `on_step` has nothing to do."""
        left = (at - call.output_tokens for call, at in self._due_at.items())
        return max(1, min(left, default=2**62))

    def relieve(self, now_s: float) -> Call | None:
        """The live branch with the lowest score of all those that pruning may spare."""
        if not self._config.relieve:
            return None
        weakest: tuple[float, Call, _Asked, Branch] | None = None
        for asked in self._asked.values():
            branch = asked.group.weakest()
            if branch is None or branch.score is None or asked.group.closed:
                continue
            if weakest is None or branch.score < weakest[0]:
                weakest = (branch.score, asked.calls[branch.index], asked, branch)
        if weakest is None:
            return None
        score, call, asked, branch = weakest
        asked.group.progress(branch.index, call.output_tokens)
        asked.group.evict(branch)
        asked.scores[branch.index] = score
        call.note = _note(asked, branch, None)
        return call

    def _open(self, call: Call, branches: int) -> _Asked:
        config, fields = self._config, call.fields
        pruning = self._pruning(fields)
        every = _whole(fields, "score_every", config.score_every)
        explored = branches // 2 if pruning in ("safe", "paper") else branches
        rules = Rules(
            branches=branches,
            enough=min(_whole(fields, "enough", config.m or -(-branches // 2)), branches),
            score_every=every,
            max_pruned=_whole(
                fields, "max_pruned", explored if config.max_pruned is None else config.max_pruned
            ),
            prunes=pruning != "off",
        )
        alpha = fields.get("prune_below", config.prune_below)
        bars = self._bars(pruning, every, None if alpha is None else float(alpha))
        weighs = fields.get("answer", config.answer) == "weighted"
        group = BranchGroup(rules, bars)
        return _Asked(call.request_id, group, self._extractor(fields), weighs=weighs)

    def _pruning(self, fields: Mapping[str, FieldValue]) -> Pruning:
        said = fields.get("pruning", self._config.pruning)
        for mode in get_args(Pruning):
            if said == mode:
                return mode  # type: ignore[no-any-return]
        return "paper" if set(self._config.signals) == {"prm"} else "safe"

    def _bars(self, pruning: Pruning, every: int, alpha: float | None) -> Bars:
        if pruning == "safe":
            history = self._histories.setdefault(every.bit_length(), History())
            return LikeWithLike(history, alpha)
        if pruning == "pressure":
            return FixedBar(-math.inf)
        fixed = PAPER_ALPHA if alpha is None else alpha
        return PaperBars(fixed) if pruning == "paper" else FixedBar(fixed)

    def _extractor(self, fields: Mapping[str, FieldValue]) -> Extractor | None:
        """What finds the answers that are voted on; None where no vote can end a request."""
        config = self._config
        if fields.get("answer", config.answer) not in _VOTES or config.certainty is None:
            return None
        rule = str(fields.get("extract", config.extract))
        if config.extractor is not None:
            return load_function(config.extractor, where="trimtab.branches.extractor")
        if rule.startswith("regex:") and "extract" in fields:
            return None  # a client's pattern may take its time, but not the engine's
        try:
            return extractor(rule)
        except BadInput:
            return None

    def _leave(self, call: Call) -> None:
        """Gives a call's seat back in the counts of who waits and who runs."""
        self._unserved.discard(call.request_id)
        if call not in self._seated:
            return
        self._seated.remove(call)
        self._running[call.request_id] -= 1
        if not self._running[call.request_id]:
            del self._running[call.request_id]

    def _end_of_its_own(self, asked: _Asked, call: Call, branch: Branch, outcome: Outcome) -> None:
        """A branch that nobody here asked to end."""
        branch.tokens = call.output_tokens
        slot = self._slots[call]
        if outcome is not Outcome.REPEATED:
            self._score.ask(slot, call)
            if self._score.awaits(slot, call):
                self._awaiting[call] = slot, outcome
        if outcome is Outcome.ABORTED:
            # Whether a stop string was found or the client has gone shows when all have been told.
            asked.aborted.append((branch, self._answer(asked, call)))
            return
        score = 0.0 if outcome is Outcome.REPEATED else self._score.score(slot, call)
        asked.group.score(branch.index, score, call.output_tokens)
        asked.group.finish(branch.index, _fate(outcome))
        self._remember_end(asked, branch, self._answer(asked, call))
        stop = self._engine.stop_reason(call) if self._engine is not None else None
        awaited = self._score.known(slot, call) if call in self._awaiting else None
        call.note = _note(asked, branch, stop, awaited)

    def _answer(self, asked: _Asked, call: Call) -> str | None:
        """A branch's answer, where answers are voted on."""
        if asked.extract is None or self._engine is None:
            return None
        tail = self._engine.output_ids(call)[-_ANSWER_TOKENS:]
        answer = asked.extract(self._engine.decode(tail))
        return None if answer is None else normalised(answer)

    def _remember_end(self, asked: _Asked, branch: Branch, answer: str | None) -> None:
        if branch.score is not None:
            asked.scores[branch.index] = branch.score
        if branch.fate is not Fate.FINISHED:
            return
        awaited = asked.calls[branch.index] in self._awaiting
        if branch.score is not None and not awaited:
            self._history(asked).finish(branch.trail, branch.score)
        if answer is not None:
            if awaited:
                asked.awaited_votes[branch.index] = len(asked.votes)
            asked.votes.append((answer, branch.score))

    def _history(self, asked: _Asked) -> History:
        return self._histories.setdefault(asked.group.rules.score_every.bit_length(), History())

    def _score_now(self, call: Call) -> None:
        asked = self._asked[call.request_id]
        every = asked.group.rules.score_every
        self._due_at[call] = (call.output_tokens // every + 1) * every
        self._score.ask(self._slots[call], call)
        self._take_score(call, call.output_tokens)

    def _take_score(self, call: Call, at_tokens: int) -> None:
        """Combines the signals of a branch that has new ones."""
        slot = self._slots.get(call)
        asked = self._asked.get(call.request_id)
        if slot is None or asked is None:
            return
        score = self._score.score(slot, call)
        first = asked.group.score(call.branch, score, at_tokens)
        if score is None or not math.isfinite(score):
            return
        if first:  # one branch's scores are alike, and those to compare with are to be of many
            self._history(asked).at(at_tokens).add(score)
        self._touched[asked] = None

    def _take_last_score(self, call: Call) -> None:
        """What was awaited of a branch that has finished."""
        slot, _ = self._awaiting[call]
        if self._score.awaits(slot, call):
            return  # that was the answer to an older question
        asked, score = self._asked[call.request_id], self._score.score(slot, call)
        branch = asked.group.branches[call.branch]
        if score is not None:
            asked.group.score_late(branch.index, score)
            asked.scores[branch.index] = score
            vote = asked.awaited_votes.pop(branch.index, None)
            if vote is not None:
                asked.votes[vote] = (asked.votes[vote][0], score)
        self._stop_awaiting(asked, call)
        self._touched[asked] = None

    def _stop_awaiting(self, asked: _Asked, call: Call) -> None:
        """The branch's score is what it is now."""
        slot, outcome = self._awaiting.pop(call)
        self._free(slot, call, outcome)
        branch = asked.group.branches[call.branch]
        whole = branch.score_at == branch.tokens
        if branch.fate is Fate.FINISHED and whole and branch.score is not None:
            self._history(asked).finish(branch.trail, branch.score)

    def _new_slot(self) -> int:
        return len(self._slots) + len(self._awaiting)

    def _free(self, slot: int, call: Call, outcome: Outcome) -> None:
        self._score.finish(slot, call, outcome)
        self._free_slots.append(slot)

    def _decide(self, asked: _Asked) -> list[Call]:
        group = asked.group
        if asked.aborted:
            self._settle_aborts(asked)
        for branch in group.living():
            group.progress(branch.index, asked.calls[branch.index].output_tokens)
        ended = []
        for branch in group.decide(self._enough(asked), certain=self._certain(asked)):
            call = asked.calls[branch.index]
            if branch.score is not None:
                asked.scores[branch.index] = branch.score
            call.note = _note(asked, branch, None)
            ended.append(call)
        if group.closed or group.complete:
            self._forget(asked)
        elif not group.live:
            self._await_siblings(asked)
        elif group.lost > asked.lost:
            self._move_up(asked)
        return ended

    def _move_up(self, asked: _Asked) -> None:
        """Branches that wait have another place now."""
        asked.lost = asked.group.lost
        self.stale.update(call for call in asked.calls.values() if call.admitted_s is None)

    def _settle_aborts(self, asked: _Asked) -> None:
        """Aborts of some branches were stop strings, those of all that lived a client that left."""
        aborted, asked.aborted = asked.aborted, []
        left = asked.group.live == len(aborted)
        for branch, answer in aborted:
            asked.group.finish(branch.index, Fate.STOPPED if left else Fate.FINISHED)
            self._remember_end(asked, branch, answer)

    def _enough(self, asked: _Asked) -> int:
        """The finished branches that answer a request at this load."""
        group, rules = asked.group, asked.group.rules
        if not self._config.bend or not group.done or rules.exhaustive:
            return rules.enough
        waiting = sum(asked.calls[b.index].admitted_s is None for b in group.living())
        seats = rules.branches - waiting - group.lost if waiting else rules.branches
        if self._unserved:
            requests = len(self._running) + len(self._unserved)
            seats = min(seats, max(1, len(self._seated) // requests))
        return self._bend.enough(seats, rules.branches, rules.enough)

    def _certain(self, asked: _Asked) -> bool:
        threshold, rules = self._config.certainty, asked.group.rules
        if not asked.votes or threshold is None or rules.exhaustive:
            return False
        weights = agreement.sums(asked.votes, weighted=asked.weighs)
        if agreement.decided(weights, rules.enough - asked.group.done):
            return True
        return len(asked.votes) > 1 and agreement.certainty(weights) >= threshold

    def _await_siblings(self, asked: _Asked) -> None:
        """All that have come are over, and some have not come: they may never do."""
        self._idle[asked.request_id] = None
        if len(self._idle) > _REMEMBERED:
            oldest, _ = self._idle.popitem(last=False)
            if oldest in self._asked:
                self._drop(self._asked[oldest])

    def _forget(self, asked: _Asked) -> None:
        """Drops a request whose branches have all ended or are ended now."""
        if len(asked.group.branches) < asked.group.rules.branches:
            self._closed[asked.request_id] = None
            if len(self._closed) > _REMEMBERED:
                self._closed.popitem(last=False)
        self._idle.pop(asked.request_id, None)
        self._drop(asked)

    def _drop(self, asked: _Asked) -> None:
        """Waits no more for the scores of a request's branches."""
        for call in asked.calls.values():
            if call in self._awaiting:
                self._stop_awaiting(asked, call)
        del self._asked[asked.request_id]


def _whole(fields: Mapping[str, FieldValue], name: str, otherwise: int) -> int:
    return int(fields.get(name, otherwise))


def _fate(outcome: Outcome) -> Fate:
    return _FATES.get(outcome, Fate.STOPPED)


def _note(
    asked: _Asked,
    branch: Branch,
    stop: int | str | None,
    awaited: tuple[float, float] | None = None,
) -> str:
    others = {i: score for i, score in asked.scores.items() if i != branch.index}
    assert branch.fate is not None
    note = Note(branch.fate, branch.phase, branch.score, branch.tokens, stop, others, awaited)
    return note.to_text()
