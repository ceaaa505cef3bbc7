"""Branches in vLLM's real scheduler and pool of blocks, on a clock that no other process disturbs.

A step takes ``t0 + tb B + tk K`` seconds for B sequences that hold K tokens of KV. Requests arrive
on the same clock; each branch ends where its draw says, unless the policy ends it.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from trimtab.branches.drawn import Kind, Question
from trimtab.branches.figures import EXPECTED_ACCURACY, METRICS, Metric, Served, cases_of
from trimtab.branches.note import Note
from trimtab.branches.sides import (
    BEST_OF_N,
    EARLY_STOP,
    OURS,
    PAPER,
    PRUNING,
    SELF_CONSISTENCY,
    STEP,
    VANILLA,
    Side,
    deepconf,
    lowest_scores,
)
from trimtab.core.benchmark import Case, Options, Progress
from trimtab.hosts.vllm.dry_engine import DryEngine
from trimtab.hosts.vllm.scheduler import Scheduler

STEP_S, SEQUENCE_S, KV_TOKEN_S = 10.5e-3, 20e-6, 0.059e-6
BLOCKS, BLOCK_TOKENS, SEATS = 140, 32, 48
KIND = Kind(mean_tokens=83.0, between=0.35, within=0.6, prompt_tokens=100, score_every=8)
RATES = {"stable": 2.0, "overload": 10.0, "all-loaded": 20.0}
AUROCS = (0.55, 0.65, 0.75, 0.85, 0.95)
QUESTIONS, SEEDS = 200, 5
SWEEP_QUESTIONS = 400
"""Over rewards of each quality it is a point or two that counts."""
QUICK_QUESTIONS, QUICK_SEEDS = 10, 1
QUICK_RATES = ("stable", "overload")
QUICK_AUROCS = (0.75,)
_ANSWER_TOKENS = 100
"""Answers are told apart by the last token but one; numbers from here on stand for them."""


def cases(options: Options, progress: Progress) -> list[Case]:
    """Ours against every baseline, at each rate, and over signals of each quality."""
    questions = QUICK_QUESTIONS if options.quick else QUESTIONS
    seeds = range(options.seed, options.seed + (QUICK_SEEDS if options.quick else SEEDS))
    found: list[Case] = []
    for name in QUICK_RATES if options.quick else RATES:
        rate = RATES[name]
        progress(f"vLLM's scheduler on a virtual clock: {name}, {rate:g} requests/s")
        found += _compare(f"virtual/{name}", KIND, rate, questions, seeds)
    for auroc in QUICK_AUROCS if options.quick else AUROCS:
        progress(f"vLLM's scheduler on a virtual clock: rewards of AUROC {auroc:g}")
        kind = replace(KIND, auroc=auroc)
        questions = QUICK_QUESTIONS if options.quick else SWEEP_QUESTIONS
        found += _compare(
            f"virtual/auroc-{auroc:g}",
            kind,
            RATES["stable"],
            questions,
            seeds,
            (BEST_OF_N,),
            (*METRICS, EXPECTED_ACCURACY),
        )
    return found


def _compare(
    where: str,
    kind: Kind,
    rate_per_s: float,
    questions: int,
    seeds: Iterable[int],
    rivals: Sequence[Side] | None = None,
    metrics: Sequence[Metric] = METRICS,
) -> list[Case]:
    runs: dict[str, list[Served]] = {}
    for seed in seeds:
        crowd = kind.draw(questions, rate_per_s, seed)
        sides = rivals or (
            VANILLA,
            SELF_CONSISTENCY,
            BEST_OF_N,
            EARLY_STOP,
            PRUNING,
            deepconf(lowest_scores(kind.draw(16, 1.0, seed + 1_000_003))),
            STEP,
        )
        for side in (*sides, PAPER, OURS):
            runs.setdefault(side.name, []).append(serve(crowd, side, kind.score_every))
    ours = {PAPER.name, OURS.name}
    return [
        case
        for name in (PAPER.name, OURS.name)
        for rival in runs
        if rival not in ours
        for case in cases_of(f"{where}/{name}", metrics, rival, runs[rival], runs[name])
    ]


@dataclass(slots=True)
class _Open:
    """A question that is being answered."""

    question: Question
    notes: dict[int, Note | None]
    left: int


def serve(crowd: Sequence[Question], side: Side, score_every: int) -> Served:
    """Serves a crowd one way, and says what came of it."""
    engine = DryEngine(
        Scheduler,
        blocks=BLOCKS + 1,
        block_size=BLOCK_TOKENS,
        max_num_seqs=SEATS,
        max_num_batched_tokens=8192,
        additional_config={"trimtab": {"branches": _options(side, score_every)}},
    )
    pool = engine.scheduler.kv_cache_manager.block_pool
    served = Served()
    waiting = deque(enumerate(crowd))
    open_: dict[int, _Open] = {}
    now_s = busy_s = 0.0
    while waiting or open_:
        if not open_:
            now_s = max(now_s, waiting[0][1].arrival_s)
        while waiting and waiting[0][1].arrival_s <= now_s:
            number, question = waiting.popleft()
            _ask(engine, number, question, side)
            open_[number] = _Open(question, {}, side.branches)
        used = BLOCKS - pool.get_num_free_blocks()
        scheduled, outputs = engine.step()
        step_s = STEP_S + SEQUENCE_S * len(scheduled.num_scheduled_tokens)
        step_s += KV_TOKEN_S * used * BLOCK_TOKENS
        now_s, busy_s = now_s + step_s, busy_s + step_s
        served.kv_block_s += used * step_s
        served.preemptions += len(scheduled.preempted_req_ids or ())
        for output in (o for client in outputs.values() for o in client.outputs):
            served.tokens += len(output.new_token_ids)
            if output.finish_reason is None:
                continue
            branch, number = map(int, output.request_id.split("_"))
            asked = open_[number]
            asked.notes[branch] = Note.read(output.stop_reason)
            asked.left -= 1
            if not asked.left:
                del open_[number]
                served.answer(asked.question, side, asked.notes, now_s)
    served.busy_s = busy_s
    served.until_s = now_s
    return served


def _options(side: Side, score_every: int) -> Mapping[str, object]:
    return {
        "signals": {"replay": 1.0},
        "score_every": score_every,
        "answer": side.answer,
        # Without a tokenizer a text is its tokens' numbers; the last but one tells the answer.
        "extract": r"regex:(\d+) \d+$",
        **side.options,
    }


def _ask(engine: DryEngine, number: int, question: Question, side: Side) -> None:
    said = {f"trimtab.{key}": value for key, value in side.fields.items()}
    if side.branches > 1:
        said["trimtab.branches"] = side.branches
        said["trimtab.replay"] = json.dumps(question.rewards[: side.branches])
    prompt = [3 + number % 900, 3 + number // 900 % 900] * (question.prompt_tokens // 2)
    for branch in range(side.branches):
        engine.add(
            f"{branch}_{number}",
            prompt,
            4 * max(question.lengths),
            xargs=said,
            ends_after=question.lengths[branch],
            last_token=_ANSWER_TOKENS + question.answers[branch],
        )
