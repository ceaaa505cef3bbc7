"""A real vLLM engine in this process whose every step is timed.

Run as a module it is the far end of `trimtab.hosts.vllm.profiling.EngineProcess`: it takes one JSON
command a line on stdin and answers each with one JSON line on what was stdout.
"""

from __future__ import annotations

import json
import os
import platform
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TextIO

from vllm import EngineArgs, SamplingParams
from vllm.platforms import current_platform
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.llm_engine import LLMEngine

from trimtab.core.cost.step import MeasuredStep, StepBatch
from trimtab.core.workload import Request
from trimtab.hosts import versions


class RecordingScheduler(Scheduler):
    """vLLM's scheduler, which keeps what its last step works on."""

    last_batch = StepBatch()

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """Schedules as vLLM does."""
        scheduled = super().schedule(throttle_prefills)
        self.last_batch = self._batch(scheduled)
        return scheduled

    def _batch(self, scheduled: SchedulerOutput) -> StepBatch:
        decodes = kv_tokens = prefills = tokens = 0
        pairs = 0.0
        for request_id, count in scheduled.num_scheduled_tokens.items():
            request = self.requests[request_id]
            # vLLM counts the scheduled tokens as computed once they are scheduled.
            before = request.num_computed_tokens - count
            if count == 1 and before >= request.num_prompt_tokens:
                decodes, kv_tokens = decodes + 1, kv_tokens + before + 1
            else:
                prefills, tokens = prefills + 1, tokens + count
                pairs += count * (before + count / 2)
        return StepBatch(decodes, kv_tokens, prefills, tokens, pairs)


class MeasuredEngine:
    """A vLLM engine that is stepped by hand.

    Args:
        engine_args: vLLM's engine arguments by name.

    Attributes:
        steps_s: seconds that the steps since the last command took.
        cpu_s: CPU seconds that this process got during them.
    """

    def __init__(self, engine_args: dict[str, Any]) -> None:
        self._engine = LLMEngine.from_engine_args(
            EngineArgs(**engine_args, async_scheduling=False, scheduler_cls=RecordingScheduler)
        )
        core: Any = self._engine.engine_core  # in this process, since multiprocessing is off
        self._scheduler: RecordingScheduler = core.engine_core.scheduler
        self.steps_s = self.cpu_s = 0.0
        self._random = random.Random(0)
        self._ids = 0
        self._prefixes: dict[str, list[int]] = {}
        self._vocabulary = self._engine.model_config.get_vocab_size()

    def limits(self) -> dict[str, Any]:
        """The scheduler's limits, as `EngineLimits` takes them."""
        scheduler, config = self._scheduler, self._engine.vllm_config
        return {
            "max_num_seqs": config.scheduler_config.max_num_seqs,
            "max_num_batched_tokens": scheduler.max_num_scheduled_tokens,
            "max_model_len": scheduler.max_model_len,
            "block_size": scheduler.block_size,
            # One block of the pool is vLLM's placeholder.
            "kv_blocks": scheduler.kv_cache_manager.block_pool.get_num_free_blocks(),
            "prefix_caching": bool(config.cache_config.enable_prefix_caching),
        }

    def add(self, request: Request, seed: int) -> str:
        """Adds a request with random tokens, the same in its prefix as others of that name."""
        prompt = self._prefix(f"{seed}:{request.prefix}", request.prefix_tokens)
        prompt = prompt + self._tokens(request.prompt_tokens - len(prompt))
        self._ids += 1
        self._engine.add_request(
            str(self._ids),
            {"prompt_token_ids": prompt},
            SamplingParams(
                max_tokens=request.output_tokens, ignore_eos=True, temperature=0.0, detokenize=False
            ),
        )
        return str(self._ids)

    def step(self) -> tuple[MeasuredStep, list[str]]:
        """One step: what it worked on and took, and the requests it ended."""
        begin, cpu_begin = time.perf_counter(), time.process_time()
        outputs = self._engine.step()
        seconds = time.perf_counter() - begin
        self.cpu_s += time.process_time() - cpu_begin
        self.steps_s += seconds
        step = MeasuredStep(self._scheduler.last_batch, seconds)
        return step, [output.request_id for output in outputs if output.finished]

    @property
    def busy(self) -> bool:
        """Whether requests are left."""
        return self._engine.has_unfinished_requests()

    def _prefix(self, name: str, length: int) -> list[int]:
        known = self._prefixes.setdefault(name, [])
        known.extend(self._tokens(length - len(known)))
        return known[:length]

    def _tokens(self, count: int) -> list[int]:
        return [self._random.randrange(10, self._vocabulary) for _ in range(count)]


def measure(
    engine: MeasuredEngine, scenes: Sequence[tuple[int, int, int]]
) -> tuple[list[MeasuredStep], float]:
    """Runs closed batches of like requests, each to its end.

    Args:
        engine: an idle engine.
        scenes: ``(requests, prompt tokens, output tokens)`` of each batch.

    Returns:
        The steps, and the median seconds that adding a request took.
    """
    steps: list[MeasuredStep] = []
    adding: list[float] = []
    for count, prompt_tokens, output_tokens in scenes:
        for _ in range(count):
            begin = time.perf_counter()
            engine.add(Request("", 0.0, prompt_tokens, output_tokens), 0)
            adding.append(time.perf_counter() - begin)
        while engine.busy:
            steps.append(engine.step()[0])
    return [step for step in steps if step.batch != StepBatch()], sorted(adding)[len(adding) // 2]


def replay(engine: MeasuredEngine, requests: Sequence[Request], seed: int) -> list[float]:
    """Runs a workload on the engine in real time.

    Args:
        engine: an idle engine.
        requests: without dependencies, by arrival.
        seed: of this run: prompts of different runs share nothing.

    Returns:
        When each request ended, in seconds after the workload's start.
    """
    ends = [0.0] * len(requests)
    index_of: dict[str, int] = {}
    arriving = 0
    start = time.perf_counter()
    while arriving < len(requests) or engine.busy:
        now_s = time.perf_counter() - start
        while arriving < len(requests) and requests[arriving].arrival_s <= now_s:
            index_of[engine.add(requests[arriving], seed)] = arriving
            arriving += 1
        if not engine.busy:
            time.sleep(max(0.0, requests[arriving].arrival_s - now_s))
            continue
        _, ended = engine.step()
        for name in ended:
            ends[index_of[name]] = time.perf_counter() - start
    return ends


def _answer(engine: MeasuredEngine, command: dict[str, Any]) -> dict[str, Any]:
    engine.steps_s = engine.cpu_s = 0.0
    if command["do"] == "measure":
        steps, add_s = measure(engine, command["scenes"])
        rows = [[*_row(step.batch), step.seconds] for step in steps]
        answer = {"steps": rows, "add_s": add_s}
    else:
        requests = [Request(**fields) for fields in command["requests"]]
        answer = {"ends": replay(engine, requests, command["seed"])}
    return {**answer, "cpu_share": engine.cpu_s / engine.steps_s}


def _row(batch: StepBatch) -> list[float]:
    return [
        batch.decodes,
        batch.kv_tokens,
        batch.prefills,
        batch.prefill_tokens,
        batch.prefill_pairs,
    ]


def _device() -> str:
    """The name of what vLLM runs on."""
    if current_platform.is_cpu():
        return f"CPU {platform.processor() or platform.machine()}"
    name: str = current_platform.get_device_name()
    return name


def _commands(lines: TextIO) -> Iterator[dict[str, Any]]:
    for line in lines:
        yield json.loads(line)


def _serve(say: Callable[[dict[str, Any]], None]) -> None:
    commands = _commands(sys.stdin)
    versions.require("vllm")
    engine = MeasuredEngine(next(commands)["engine_args"])
    say({"limits": engine.limits(), "device": _device()})
    for command in commands:
        say(_answer(engine, command))


def main() -> None:
    """Answers commands until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what frameworks print is no answer

    def say(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    try:
        _serve(say)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        users = isinstance(error, ValueError | TypeError | OSError)
        say({"error": reason[:400], "users": users})
        raise


if __name__ == "__main__":
    main()
