"""``trimtab profile vllm``: measures the steps of a real vLLM engine and fits what they cost."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from trimtab.core.benchmark import Progress
from trimtab.core.cost.step import (
    EngineLimits,
    EngineProfile,
    MeasuredStep,
    StepBatch,
    fit_step_cost,
)
from trimtab.core.errors import BadInput, TrimtabError
from trimtab.core.workload import Request
from trimtab.hosts import versions
from trimtab.hosts.vllm.model_check import check_model

Scene = tuple[int, int, int]
"""A batch of like requests: how many, their prompt tokens, their output tokens."""


@dataclass(frozen=True, slots=True)
class Round:
    """A round of measuring.

    Attributes:
        steps: the engine's steps.
        add_s: median seconds that adding a request took.
        cpu_share: CPU seconds per second of its steps that the engine's process got; with one
            thread, what is missing to 1 other processes took.
    """

    steps: list[MeasuredStep]
    add_s: float
    cpu_share: float


@dataclass(frozen=True, slots=True)
class Replay:
    """A workload that the engine ran in real time.

    Attributes:
        ends: when each request ended, in seconds after the workload's start.
        cpu_share: as in `Round`.
    """

    ends: list[float]
    cpu_share: float


class EngineFailed(TrimtabError):
    """The measured engine ended by itself."""


class EngineProcess:
    """A measured vLLM engine in a process of its own, for the length of a ``with`` block.

    Args:
        model: a folder with a Hugging Face model, or a model's name.
        engine_args: further arguments of vLLM's ``EngineArgs`` by name.
        threads: CPU threads of the engine; None for its own choice.
    """

    def __init__(
        self,
        model: Path | str,
        engine_args: Mapping[str, object] | None = None,
        threads: int | None = None,
    ) -> None:
        self.model = model
        self._engine_args = {**(engine_args or {}), "model": str(model)}
        self._threads = threads
        self._limits: EngineLimits | None = None
        self._device = ""

    def __enter__(self) -> Self:
        """Starts the engine; what is asked of it waits until it is ready.

        Raises:
            BadInput: there is no such model, or vLLM is missing or not verified.
        """
        versions.require("vllm")
        check_model(self.model)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "trimtab.hosts.vllm.measured_engine"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=self._environment(),
        )
        self._send({"engine_args": self._engine_args})
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Ends the engine, gently where nothing went wrong."""
        if kind is not None:
            self._process.kill()
        try:
            self._process.communicate(timeout=10)
        except (subprocess.TimeoutExpired, BrokenPipeError):
            self._process.kill()
            self._process.wait()

    def wait_ready(self) -> EngineLimits:
        """Waits until the engine takes commands; returns the limits of its scheduler.

        Raises:
            BadInput: vLLM refuses the model or the arguments.
            EngineFailed: it did not start for another reason.
        """
        if self._limits is None:
            answer = self._receive()
            self._limits = EngineLimits(**answer["limits"])
            self._device = answer["device"]
        return self._limits

    @property
    def device(self) -> str:
        """What the engine runs on."""
        self.wait_ready()
        threads = f", {self._threads} threads" if self._threads else ""
        return f"{self._device}{threads}"

    def measure(self, scenes: Sequence[Scene]) -> Round:
        """Runs batches of like requests, each to its end."""
        answer = self._ask({"do": "measure", "scenes": scenes})
        steps = [MeasuredStep(StepBatch(*batch), seconds) for *batch, seconds in answer["steps"]]
        return Round(steps, answer["add_s"], answer["cpu_share"])

    def replay(self, requests: Sequence[Request], seed: int) -> Replay:
        """Runs a workload without dependencies in real time."""
        fields = [asdict(request) for request in requests]
        return Replay(**self._ask({"do": "replay", "requests": fields, "seed": seed}))

    def _ask(self, command: dict[str, object]) -> dict[str, Any]:
        self.wait_ready()
        self._send(command)
        return self._receive()

    def _send(self, command: dict[str, object]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise EngineFailed("the measured engine has ended") from None

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise EngineFailed(f"the measured engine ended with status {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if answer.get("users") and self._limits is None:
            raise BadInput(f"vLLM does not start with these arguments ({answer['error']})")
        if "error" in answer:
            raise EngineFailed(f"the measured engine failed: {answer['error']}")
        return answer

    def _environment(self) -> dict[str, str]:
        environment = {
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "TOKENIZERS_PARALLELISM": "false",
            **os.environ,
            # Steps are timed where they are called.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        }
        if Path(self.model).is_dir():
            environment["HF_HUB_OFFLINE"] = "1"
        if self._threads is not None:
            environment["OMP_NUM_THREADS"] = str(self._threads)
        return environment


def scenes(limits: EngineLimits, seed: int) -> list[Scene]:
    """The batches of one round of measuring, from one seat to all, short prompts and long.

    Batches whose prompts exceed the token budget give steps that decode and prefill at once.
    """
    seats = limits.max_num_seqs
    counts = sorted({1, max(1, seats // 4), max(1, seats // 2), seats})
    short = max(1, min(32, limits.max_model_len // 8))
    long = max(1, min(limits.max_model_len // 2, limits.max_num_batched_tokens))
    capacity = limits.kv_blocks * limits.block_size
    found = [(count, short, 6) for count in counts]
    found += [(count, long // 2, 6) for count in counts if count * long // 2 < capacity / 2]
    longest = min(limits.max_model_len - 8, 3 * limits.max_num_batched_tokens, capacity - 8)
    found += [(2, long, 8), (1, max(1, longest), 6)]
    random.Random(seed).shuffle(found)
    return found


def profile(engine: EngineProcess, *, rounds: int, seed: int, progress: Progress) -> EngineProfile:
    """Measures an engine: one round to warm up, then ``rounds`` in different orders."""
    progress("starting the engine")
    limits = engine.wait_ready()
    engine.measure(scenes(limits, seed))
    steps: list[MeasuredStep] = []
    adding: list[float] = []
    for number in range(rounds):
        progress("measuring steps", number / rounds)
        measured = engine.measure(scenes(limits, seed + number + 1))
        steps += measured.steps
        adding.append(measured.add_s)
    return profile_of(engine, steps, min(adding))


def profile_of(engine: EngineProcess, steps: Sequence[MeasuredStep], add_s: float) -> EngineProfile:
    """The profile of an engine that took these steps."""
    cost, residuals = fit_step_cost(steps)
    return EngineProfile(
        model=Path(engine.model).name,
        device=engine.device,
        engine=f"vllm {versions.installed('vllm')}",
        limits=engine.wait_ready(),
        step=cost,
        request_overhead_s=add_s,
        residuals=residuals,
    )


def measure_to_file(
    model: str,
    out: Path,
    engine_args: Mapping[str, object],
    *,
    threads: int | None,
    rounds: int,
    progress: Progress,
) -> EngineProfile:
    """Measures an engine and writes its profile.

    Raises:
        BadInput: the model does not exist, or the file cannot be written.
    """
    if not out.resolve().parent.is_dir():
        raise BadInput("its folder does not exist", where=str(out), fix="make it first")
    with EngineProcess(model, engine_args, threads) as engine:
        measured = profile(engine, rounds=rounds, seed=0, progress=progress)
    measured.write(out)
    return measured
