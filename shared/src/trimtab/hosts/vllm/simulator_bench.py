"""``trimtab bench simulator``: the simulator against the real engine, and against its slow twin."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import mean, median

from trimtab.core.benchmark import Benchmark, Case, Options, Progress
from trimtab.core.cost.step import (
    EngineLimits,
    EngineProfile,
    MeasuredStep,
    StepBatch,
    StepCost,
)
from trimtab.core.simulate import ReplicaSpec, naive, simulate
from trimtab.core.simulate.dispatch import LeastRequests
from trimtab.core.workload import Request
from trimtab.hosts.vllm.profiling import EngineProcess, Replay, Round, Scene, profile_of
from trimtab.hosts.vllm.small_model import small_model

ENGINE = {
    "max_model_len": 1024,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 256,
    "block_size": 32,
    "num_gpu_blocks_override": 40,
    "enable_prefix_caching": True,
    "enforce_eager": True,
    "kv_cache_memory_bytes": 256 * 2**20,
}
"""A small engine whose KV cache holds less than its seats can fill."""

THREADS = 1
"""With one a core, every layer would wait for the thread whose core another process took."""

SCENES: Sequence[Scene] = (
    (1, 40, 3),
    (2, 150, 4),
    (4, 40, 5),
    (8, 60, 6),
    (4, 200, 5),
    (1, 600, 3),
)
QUICK_SCENES: Sequence[Scene] = ((1, 40, 6), (4, 40, 6), (8, 40, 8), (5, 150, 8), (1, 500, 6))
"""What is measured before and after each workload: requests, prompt and output tokens."""

CALM = 1.12
"""A run counts if the same work took at most this much more CPU time after it than before, or less,
and if it took at most this much longer than its CPU time."""

RETRIES = 4
"""How many runs that were not calm are taken again, in all; none with ``--quick``."""

AGREEMENT = 0.2
"""The relative error that predictions have to stay within."""


@dataclass(frozen=True, slots=True)
class Figures:
    """A run of a workload in two figures."""

    mean_latency_s: float
    output_tokens_per_s: float


@dataclass(frozen=True, slots=True)
class Run:
    """A workload that the real engine has run, between two rounds of measuring."""

    requests: Sequence[Request]
    replay: Replay
    before: int
    """The number of the round before it; the next one is the round after it."""


@dataclass(frozen=True, slots=True)
class Trial:
    """A workload measured on the engine, and predicted in two ways."""

    measured: Figures
    predicted: Figures
    constant_rate: Figures
    preemptions: int
    cpu_share: float


def chat(size: int, second: float, rng: random.Random) -> list[Request]:
    """A steady stream of short prompts and answers, Poisson, at two thirds of the engine's rate."""
    at = 0.0
    requests = []
    for number in range(size):
        at += rng.expovariate(2.0 / second)
        prompt, output = rng.randrange(30, 150), rng.randrange(12, 48)
        requests.append(Request(f"chat-{number}", at, prompt, output))
    return requests


def bursts(size: int, second: float, rng: random.Random) -> list[Request]:
    """Bursts of three long prompts, each longer than the engine's token budget."""
    return [
        Request(
            f"burst-{number}",
            number // 3 * 3.2 * second,
            rng.randrange(300, 600),
            rng.randrange(8, 28),
        )
        for number in range(size)
    ]


def crowd(size: int, second: float, rng: random.Random) -> list[Request]:
    """Many at once that share a prefix and answer at length: the KV cache overflows."""
    return [
        Request(
            f"crowd-{number}",
            number * 0.12 * second,
            96 + rng.randrange(8, 40),
            rng.randrange(90, 180),
            prefix="system",
            prefix_tokens=96,
        )
        for number in range(size)
    ]


WORKLOADS: Sequence[tuple[str, Callable[[int, float, random.Random], list[Request]], int]] = (
    ("steady-chat", chat, 20),
    ("long-prompt-bursts", bursts, 12),
    ("crowded-shared-prefix", crowd, 12),
)
"""Name, generator and number of requests."""


def run(options: Options, progress: Progress) -> list[Case]:
    """Runs the benchmark."""
    with EngineProcess(small_model(), ENGINE, THREADS) as engine:
        progress("simulating 16 replicas while the engine starts", 0.0)
        speed = _speed(options)
        return _real(engine, options, progress) + [speed]


def _real(engine: EngineProcess, options: Options, progress: Progress) -> list[Case]:
    progress("starting the engine", 0.02)
    engine.wait_ready()
    repeats, share, retries = (1, 0.5, 0) if options.quick else (3, 1.0, RETRIES)
    lab = _Lab(engine, QUICK_SCENES if options.quick else SCENES)
    runs: dict[str, list[Run]] = {name: [] for name, _, _ in WORKLOADS}
    for repeat in range(repeats):
        for index, (name, generate, size) in enumerate(WORKLOADS):
            done = (repeat * len(WORKLOADS) + index + 1) / (repeats * len(WORKLOADS) + 1)
            progress(f"{name} on the engine in real time", done)
            rng = random.Random(options.seed * 1000 + repeat)
            requests = generate(max(3, int(size * share)), lab.second, rng)
            run = lab.run(requests)
            while retries and not lab.calm(run):
                retries -= 1
                progress(f"{name} again, since the machine was disturbed", done)
                run = lab.run(requests)
            runs[name].append(run)
    return [
        case for name, found in runs.items() for case in _cases(name, [lab.trial(r) for r in found])
    ]


class _Lab:
    """An engine whose steps are measured before and after each workload it runs.

    Every round of measuring does the same work. A workload is predicted from the steps of all
    rounds, brought to the pace of the two around it and to the share of the CPU that the engine got
    in the workload: other processes slow the machine in spells.
    """

    def __init__(self, engine: EngineProcess, scenes: Sequence[Scene]) -> None:
        self._engine = engine
        self._scenes = scenes
        self._rounds: list[Round] = []
        engine.measure([(2, 40, 2), (1, 300, 2)])  # warms up
        self._measure()
        first = self._rounds[0]
        step = profile_of(engine, first.steps, first.add_s).step
        self.second = step.seconds(StepBatch(decodes=8, kv_tokens=800)) / 0.05
        """What the engine needs for the work of one second on the machine of reference."""

    def run(self, requests: Sequence[Request]) -> Run:
        """Runs a workload in real time, then measures again."""
        before = len(self._rounds) - 1
        replay = self._engine.replay(requests, seed=before)
        self._measure()
        return Run(requests, replay, before)

    def calm(self, run: Run) -> bool:
        """Whether the engine had its CPU for itself, as fast after the run as before it."""
        took = [self._cpu_s(run.before), self._cpu_s(run.before + 1)]
        return max(took) <= CALM * min(took) and run.replay.cpu_share * CALM >= 1

    def trial(self, run: Run) -> Trial:
        """Predicts a run from the measured steps."""
        cpu_s = mean((self._cpu_s(run.before), self._cpu_s(run.before + 1)))
        pace = cpu_s / run.replay.cpu_share
        steps = [
            MeasuredStep(step.batch, step.seconds * pace / self._took(number))
            for number, measured in enumerate(self._rounds)
            for step in measured.steps
        ]
        profile = profile_of(self._engine, steps, min(r.add_s for r in self._rounds))
        result = simulate(run.requests, [ReplicaSpec(profile)])
        end_of = {call.request_id: call.finished_s for call in result.calls}
        return Trial(
            measured=_figures(run.requests, run.replay.ends),
            predicted=_figures(run.requests, [end_of[r.request_id] for r in run.requests]),
            constant_rate=_figures(run.requests, _constant_rate(run.requests, steps)),
            preemptions=result.replicas[0].preemptions,
            cpu_share=run.replay.cpu_share,
        )

    def _measure(self) -> None:
        self._rounds.append(self._engine.measure(self._scenes))

    def _took(self, number: int) -> float:
        return sum(step.seconds for step in self._rounds[number].steps)

    def _cpu_s(self, number: int) -> float:
        return self._took(number) * self._rounds[number].cpu_share


def _constant_rate(requests: Sequence[Request], steps: Sequence[MeasuredStep]) -> list[float]:
    """When each request would end on a server that works one by one at a constant token rate."""
    tokens = sum(s.batch.decodes + s.batch.prefill_tokens for s in steps)
    token_s = sum(s.seconds for s in steps) / tokens
    ends: list[float] = []
    free_s = 0.0
    for request in requests:
        work_s = (request.prompt_tokens + request.output_tokens) * token_s
        free_s = max(free_s, request.arrival_s) + work_s
        ends.append(free_s)
    return ends


def _figures(requests: Sequence[Request], ends: Sequence[float]) -> Figures:
    latency_s = mean(end - r.arrival_s for r, end in zip(requests, ends, strict=True))
    tokens = sum(r.output_tokens for r in requests)
    return Figures(latency_s, tokens / (max(ends) - requests[0].arrival_s))


def _cases(name: str, trials: Sequence[Trial]) -> list[Case]:
    figures = (
        ("mean_latency", "s", lambda f: f.mean_latency_s),
        ("throughput", "output tokens/s", lambda f: f.output_tokens_per_s),
    )
    return [_case(name, metric, unit, figure, trials) for metric, unit, figure in figures]


def _case(
    name: str,
    metric: str,
    unit: str,
    figure: Callable[[Figures], float],
    trials: Sequence[Trial],
) -> Case:
    measured = median(figure(t.measured) for t in trials)
    predicted = median(figure(t.predicted) for t in trials)
    error = abs(predicted - measured) / measured
    verdict = "within" if error <= AGREEMENT else "NOT within"
    preemptions = sum(t.preemptions for t in trials)
    shares = sorted(t.cpu_share for t in trials)
    return Case.compare(
        f"real/{name}",
        f"{metric}_prediction_error",
        "1",
        "lower",
        "constant-rate model",
        [
            (_error(figure, t.constant_rate, t.measured), _error(figure, t.predicted, t.measured))
            for t in trials
        ],
        notes=(
            f"{metric} measured {measured:.3f} {unit}, predicted {predicted:.3f} {unit} (medians of"
            f" {len(trials)} runs): {error:.1%} off, {verdict} {AGREEMENT:.0%};"
            f" {preemptions} preemptions predicted; the"
            f" engine had {shares[0]:.0%} to {shares[-1]:.0%} of its core, which is allowed for"
        ),
    )


def _error(figure: Callable[[Figures], float], guess: Figures, truth: Figures) -> float:
    # Below a thousandth errors are not told apart, so that no ratio is infinite.
    return max(1e-3, abs(figure(guess) - figure(truth)) / figure(truth))


FLEET = EngineProfile(
    model="a 70B-like model",
    device="H100-like",
    engine="synthetic",
    limits=EngineLimits(
        max_num_seqs=256, max_num_batched_tokens=8192, max_model_len=32768, kv_blocks=20_000
    ),
    step=StepCost(
        base_s=0.012,
        decode_s=5e-5,
        kv_token_s=1e-7,
        prefill_token_s=4e-5,
        prefill_pair_s=1e-9,
    ),
)
REPLICAS = 16


def _speed(options: Options) -> Case:
    """Seconds for 100,000 requests on 16 replicas; the twin's from as much of it as it can bear."""
    whole = fleet_workload(20_000 if options.quick else 100_000, options.seed)
    part = [replace(r, prefix=None, prefix_tokens=0) for r in fleet_workload(150, options.seed)]
    replicas = [ReplicaSpec(FLEET)] * REPLICAS
    begin = time.process_time()
    simulate(whole, replicas, dispatcher=LeastRequests())
    ours_s = time.process_time() - begin
    begin = time.process_time()
    naive.simulate(part, replicas)
    twin_s = (time.process_time() - begin) * len(whole) / len(part)
    return Case.compare(
        "simulator/speed",
        f"cpu_time_of_{len(whole)}_requests",
        "s",
        "lower",
        "step-by-step simulation",
        [(twin_s, ours_s)],
        notes=f"{REPLICAS} replicas; the baseline's time is {len(part)} requests' scaled up, which"
        " flatters it: its queues and batches are shorter",
    )


def fleet_workload(size: int, seed: int) -> list[Request]:
    """Requests for the speed case: Poisson, lognormal lengths, twenty shared prefixes."""
    rng = random.Random(seed)
    requests = []
    at = 0.0
    for number in range(size):
        at += rng.expovariate(100.0)
        prompt = 257 + min(8000, int(rng.lognormvariate(6.0, 1.0)))
        output = 1 + min(2000, int(rng.lognormvariate(5.0, 0.8)))
        requests.append(
            Request(str(number), at, prompt, output, prefix=f"p{number % 20}", prefix_tokens=256)
        )
    return requests


SIMULATOR = Benchmark(
    name="simulator",
    summary="predicted against measured latency and throughput of the real engine; its speed",
    run=run,
)
