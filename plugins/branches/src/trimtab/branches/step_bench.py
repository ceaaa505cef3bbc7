"""What branches cost the engine's loop: the scheduler's step with and without the plugin."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from statistics import median

import numpy as np
from numpy.typing import NDArray

from trimtab.core.benchmark import Case, Options, Progress
from trimtab.hosts.vllm.dry_engine import DryEngine
from trimtab.hosts.vllm.scheduler import Scheduler

GROUPS, BRANCHES = 32, 8
REPEATS, QUICK_REPEATS = 7, 2
SCORE_EVERY = 400
"""Tokens between two scorings, the default; in as many timed steps each is scored once."""

_PLUGIN = {"max_pruned": 0}
"""The default mode judges branches and prunes none: the engine stays as full."""


def cases(options: Options, progress: Progress) -> list[Case]:
    """CPU time of a step with 256 running calls: as branches, and as calls that ask for nothing."""
    progress(f"stepping with {GROUPS * BRANCHES} running branches")
    repeats = QUICK_REPEATS if options.quick else REPEATS
    rows = np.random.default_rng(options.seed).uniform(-9, -0.01, (GROUPS * BRANCHES, 21))
    table = rows.astype(np.float32)
    engines = {
        "bare": _loaded({}, {}, table),
        "silent": _loaded({"branches": _PLUGIN}, {}, table),
        "asked": _loaded({"branches": _PLUGIN}, {"trimtab.branches": BRANCHES}, table),
    }
    times: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(repeats):
        for name, engine in engines.items():
            times[name].append(_step_s(engine))
    return [
        _case("real/step/256-branches", times["bare"], times["asked"]),
        _case("real/step/256-calls-that-do-not-ask", times["bare"], times["silent"]),
    ]


def _case(name: str, bare: Sequence[float], ours: Sequence[float]) -> Case:
    # Whatever else the machine does only ever adds to a time.
    notes = (
        f"a step takes {(min(ours) - min(bare)) * 1e6:.0f} us more, by the fastest of {len(bare)} "
        f"runs of {SCORE_EVERY} steps; {(median(ours) - median(bare)) * 1e6:.0f} by their medians"
    )
    pairs = list(zip(bare, ours, strict=True))
    return Case.compare(
        name, "step_cpu", "s", "lower", "the host without policies", pairs, notes=notes
    )


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


def _step_s(engine: DryEngine) -> float:
    begun_s = time.process_time()
    for _ in range(SCORE_EVERY):
        engine.step()
    return (time.process_time() - begun_s) / SCORE_EVERY
