"""What branches cost the engine's loop: the scheduler's step with and without the plugin."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from trimtab.core.benchmark import Case, Options, Progress, without_collector
from trimtab.hosts.vllm.dry_engine import DryEngine
from trimtab.hosts.vllm.scheduler import Scheduler

GROUPS, BRANCHES = 32, 8
SETS = 3
"""Where an engine lies in memory makes up some of its time, so that there are several of each."""

REPEATS, QUICK_REPEATS = 4, 1
SCORE_EVERY = 400
"""Tokens between two scorings, the default; in as many timed steps each is scored once."""
TURN = 20

_PLUGIN = {"max_pruned": 0}
"""The default mode judges branches and prunes none: the engine stays as full."""


def cases(options: Options, progress: Progress) -> list[Case]:
    """CPU time of a step with 256 running calls: as branches, and as calls that ask for nothing."""
    repeats, sets = (QUICK_REPEATS, 1) if options.quick else (REPEATS, SETS)
    rows = np.random.default_rng(options.seed).uniform(-9, -0.01, (GROUPS * BRANCHES, 21))
    table = rows.astype(np.float32)
    kinds: list[tuple[str, Mapping[str, object], Mapping[str, object]]] = [
        ("bare", {}, {}),
        ("silent", {"branches": _PLUGIN}, {}),
        ("asked", {"branches": _PLUGIN}, {"trimtab.branches": BRANCHES}),
    ]
    times: dict[str, list[list[float]]] = {name: [] for name, *_ in kinds}
    for number in range(sets):
        progress(f"stepping with {GROUPS * BRANCHES} running branches", number / sets)
        turned = [*kinds[number:], *kinds[:number]]
        engines = {name: _loaded(plugins, said, table) for name, plugins, said in turned}
        with without_collector():
            for _ in range(repeats):
                for name, turns in _turns(engines).items():
                    times[name].append(turns)
    return [
        _case("real/step/256-branches", times["bare"], times["asked"]),
        _case("real/step/256-calls-that-do-not-ask", times["bare"], times["silent"]),
    ]


def _turns(engines: Mapping[str, DryEngine]) -> dict[str, list[float]]:
    """Seconds of all steps between two scorings, in short turns that share slow moments."""
    turns: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(SCORE_EVERY // TURN):
        for name, engine in engines.items():
            turns[name].append(_turn_s(engine))
    return turns


def _case(name: str, bare: Sequence[Sequence[float]], ours: Sequence[Sequence[float]]) -> Case:
    added_s = _fastest_s(ours) - _fastest_s(bare)
    notes = (
        f"a step takes {added_s * 1e6:.0f} us more, by the fastest of {len(bare)} runs of each "
        f"{TURN} of {SCORE_EVERY} steps"
    )
    pairs = [(sum(a) / SCORE_EVERY, sum(b) / SCORE_EVERY) for a, b in zip(bare, ours, strict=True)]
    return Case.compare(
        name, "step_cpu", "s", "lower", "the host without policies", pairs, notes=notes
    )


def _fastest_s(runs: Sequence[Sequence[float]]) -> float:
    """Of a step: whatever else the machine does only ever adds to a time."""
    fastest: list[float] = [min(turns) for turns in zip(*runs, strict=True)]
    return sum(fastest) / SCORE_EVERY


def _loaded(
    plugins: Mapping[str, object], said: Mapping[str, object], table: NDArray[np.float32]
) -> DryEngine:
    """An engine in which all calls run, and none ends soon."""
    engine = DryEngine(
        Scheduler,
        blocks=40_000,
        max_num_seqs=GROUPS * BRANCHES,
        max_num_batched_tokens=16_384,
        additional_config={"trimtab": dict(plugins)},
        logprobs=lambda ids: table[: len(ids)],
    )
    for group in range(GROUPS):
        for branch in range(BRANCHES):
            engine.add(f"{branch}_g{group}", [3 + group] * 32, 30_000, xargs=said)
    for _ in range(5):
        engine.step()
    return engine


def _turn_s(engine: DryEngine) -> float:
    begun_s = time.process_time()
    for _ in range(TURN):
        engine.step()
    return time.process_time() - begun_s
