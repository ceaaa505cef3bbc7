"""What the host costs: ``schedule()`` of vLLM's scheduler and of ours, side by side."""

from __future__ import annotations

import gc
import time
from statistics import median
from typing import Any

from trimtab.core.benchmark import Benchmark, Case, Options, Progress
from trimtab.core.hooks import discover

RUNNING = 256


def _filled(scheduler_cls: type[Any], waiting: int, config: dict[str, Any]) -> Any:
    """An engine with a full batch that decodes, and ``waiting`` requests behind it."""
    from trimtab.hosts.vllm.dry_engine import DryEngine

    engine = DryEngine(
        scheduler_cls,
        blocks=200_000,
        max_num_seqs=RUNNING,
        max_num_batched_tokens=8192,
        additional_config=config,
        prefix_caching=False,
    )
    for index in range(RUNNING + waiting):
        xargs = {"trimtab.workflow": f"w{index // 4}", "trimtab.stage": f"s{index % 4}"}
        deadline = {"trimtab.deadline_s": 60.0 + index % 97}
        engine.add(f"r{index}", [5] * 32, 20_000, arrival_time=float(index), xargs=xargs | deadline)
    while len(engine.scheduler.running) < RUNNING:
        engine.step()
    return engine


def _schedule_s(engine: Any, steps: int) -> float:
    """Median seconds of one ``schedule()`` call; outputs are taken in outside the clock."""
    times = []
    original = engine.scheduler.schedule

    def timed() -> Any:
        start = time.perf_counter()
        scheduled = original()
        times.append(time.perf_counter() - start)
        return scheduled

    engine.scheduler.schedule = timed
    try:
        for _ in range(steps):
            engine.step()
    finally:
        del engine.scheduler.schedule
    return median(times)


def _compare(name: str, ours: Any, theirs: Any, rounds: int, steps: int, notes: str) -> Case:
    """Rounds of both in alternating order, so that a slow moment hits both alike."""
    pairs = []
    for turn in range(rounds):
        first, second = (ours, theirs) if turn % 2 else (theirs, ours)
        timed = {id(first): _schedule_s(first, steps), id(second): _schedule_s(second, steps)}
        pairs.append((timed[id(theirs)], timed[id(ours)]))
    return Case.compare(name, "schedule_s", "s", "lower", "vllm-scheduler", pairs, notes=notes)


def run(options: Options, progress: Progress) -> list[Case]:
    """Compares with no policy and with each serving plugin, at 1,000 and 10,000 waiting."""
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler

    from trimtab.hosts.vllm.scheduler import Scheduler

    rounds, steps = (8, 40) if options.quick else (40, 60)
    configs: dict[str, dict[str, Any]] = {"no-policy": {}}
    for found in discover()[0]:
        if found.has_serving_policy:
            configs[found.name] = {"trimtab": {found.name: {}}}
    cases = []
    queues = (1_000,) if options.quick else (1_000, 10_000)
    for waiting in queues:
        progress(f"filling vLLM's scheduler with {waiting} waiting requests")
        theirs = _filled(AsyncScheduler, waiting, {})
        for index, (label, config) in enumerate(configs.items()):
            progress(f"{label}, {waiting} waiting", index / len(configs))
            ours = _filled(Scheduler, waiting, config)
            gc.collect()
            gc.freeze()
            _schedule_s(ours, 20), _schedule_s(theirs, 20)
            cases.append(
                _compare(
                    f"real/{label}/{RUNNING}-running-{waiting}-waiting",
                    ours,
                    theirs,
                    rounds,
                    steps,
                    f"median of {steps} calls, {rounds} alternating rounds",
                )
            )
            gc.unfreeze()
    return cases


HOST = Benchmark("host", "Cost of a schedule() call with and without policies.", run)
