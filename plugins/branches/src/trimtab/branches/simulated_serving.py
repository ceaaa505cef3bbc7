"""A crowd of questions on the simulator, served by the very policy that steers vLLM."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trimtab.branches.config import BranchesConfig
from trimtab.branches.drawn import Question
from trimtab.branches.figures import Served
from trimtab.branches.note import Note
from trimtab.branches.policy import BranchesPolicy
from trimtab.branches.sides import Side
from trimtab.core.cost.step import EngineLimits, EngineProfile, StepCost
from trimtab.core.policy import Call, Outcome
from trimtab.core.simulate import ReplicaSpec, ServingResult, simulate
from trimtab.core.workload import Request

H100_LIKE = EngineProfile(
    model="14B",
    device="a GPU like an H100",
    engine="vLLM",
    limits=EngineLimits(
        max_num_seqs=256,
        max_num_batched_tokens=8192,
        max_model_len=200_000,
        block_size=16,
        kv_blocks=12_500,
    ),
    step=StepCost(base_s=10.5e-3, decode_s=20e-6, kv_token_s=0.059e-6),
)
"""A 14B model in bfloat16 with room for 200,000 tokens of KV."""

_ANSWER = r"regex:answer (\d+)$"


class _Answers:
    """Stands for the engine's texts: a branch's text says the answer that was drawn for it."""

    by_priority = False

    def __init__(self, crowd: Mapping[str, Question]) -> None:
        self._crowd = crowd

    def prompt_ids(self, call: Call) -> Sequence[int]:
        """No tokens: nobody reads prompts here."""
        return ()

    def output_ids(self, call: Call) -> Sequence[int]:
        """The drawn answer."""
        return (self._crowd[call.request_id].answers[call.branch],)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The answer as a text."""
        return f"answer {token_ids[-1]}" if token_ids else ""

    def stop_reason(self, call: Call) -> int | str | None:
        """Nothing but the end of the text."""
        return None


class RememberingPolicy(BranchesPolicy):
    """The policy, which remembers what it said of each end."""

    def __init__(self, config: BranchesConfig) -> None:
        super().__init__(config)
        self.notes: dict[str, str | None] = {}

    def on_finish(self, call: Call, outcome: Outcome, now_s: float) -> None:
        """Keeps the note for when the request is answered."""
        super().on_finish(call, outcome, now_s)
        self.notes[call.call_id] = call.note


def serve(
    crowd: Sequence[Question],
    side: Side,
    score_every: int,
    profile: EngineProfile = H100_LIKE,
) -> Served:
    """Serves a crowd one way on one simulated engine, and says what came of it.

    Args:
        crowd: the questions, by arrival.
        side: how they are answered.
        score_every: output tokens between two scorings.
        profile: what the engine's steps cost, and its limits.
    """
    return run(crowd, side, score_every, profile).answered(crowd, side)


def run(
    crowd: Sequence[Question],
    side: Side,
    score_every: int,
    profile: EngineProfile = H100_LIKE,
) -> Run:
    """What the engine makes of a crowd; arguments as for `serve`."""
    policy = policy_of(crowd, side, score_every)
    result = simulate(requests_of(crowd, side), [ReplicaSpec(profile)], policies=lambda: [policy])
    return Run(result, policy.notes)


@dataclass(frozen=True, slots=True)
class Run:
    """A crowd that has been served; which branch answers is not said yet.

    Attributes:
        result: what became of each branch.
        notes: what the policy said of each, by its call's id.
    """

    result: ServingResult
    notes: Mapping[str, str | None]

    def answered(self, crowd: Sequence[Question], side: Side) -> Served:
        """What comes of it where a side's branches were run and its answer is chosen."""
        questions = _by_name(crowd)
        notes: dict[str, dict[int, Note | None]] = {name: {} for name in questions}
        served = Served()
        for call in self.result.calls:
            name = f"{call.branch}_{call.request_id}" if side.branches > 1 else call.request_id
            served.tokens += call.output_tokens
            notes[call.request_id][call.branch] = Note.read(self.notes[name])
            if len(notes[call.request_id]) == side.branches:
                question = questions[call.request_id]
                served.answer(question, side, notes[call.request_id], call.finished_s)
                served.until_s = max(served.until_s, call.finished_s)
        (replica,) = self.result.replicas
        served.kv_block_s = replica.kv_block_s
        served.preemptions = replica.preemptions
        served.busy_s = replica.busy_s
        return served


def policy_of(crowd: Sequence[Question], side: Side, score_every: int) -> RememberingPolicy:
    """The policy that answers a crowd one way."""
    options = {
        "signals": {"replay": 1.0},
        "score_every": score_every,
        "answer": side.answer,
        "extract": _ANSWER,
        **side.options,
    }
    policy = RememberingPolicy(BranchesConfig.model_validate(options))
    policy.attach(_Answers(_by_name(crowd)))
    return policy


def requests_of(crowd: Sequence[Question], side: Side) -> list[Request]:
    """What a crowd asks of the engine, one way."""
    return [_request(name, question, side) for name, question in _by_name(crowd).items()]


def _by_name(crowd: Sequence[Question]) -> dict[str, Question]:
    return {str(number): question for number, question in enumerate(crowd)}


def _request(name: str, question: Question, side: Side) -> Request:
    lengths = question.lengths[: side.branches]
    several = len(lengths) > 1
    rewards = json.dumps(question.rewards[: side.branches])
    return Request(
        request_id=name,
        arrival_s=question.arrival_s,
        prompt_tokens=question.prompt_tokens,
        output_tokens=max(lengths),
        branch_tokens=lengths if several else (),
        fields={**side.fields, "replay": rewards} if several else {},
    )
