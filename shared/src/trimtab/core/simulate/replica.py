"""One simulated engine: continuous batching as vLLM v1 does it, many equal steps in one jump."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from trimtab.core.cost.step import EngineProfile
from trimtab.core.policy import Call, Load, Outcome, ServingPolicy
from trimtab.core.simulate.job import Job
from trimtab.core.simulate.kv_cache import KvCache
from trimtab.core.simulate.policies import Policies
from trimtab.core.simulate.waiting import FifoQueue, KeyQueue

Role = Literal["both", "prefill", "decode"]


@dataclass(slots=True)
class StepResult:
    """What a jump of engine steps ended with."""

    finished: list[Job] = field(default_factory=list)
    prefilled: list[Job] = field(default_factory=list)
    """Jobs that a prefill replica hands over; their KV stays here until `Replica.handed_over`."""
    started: list[Job] = field(default_factory=list)
    """Jobs that have given their first token and give more."""


@dataclass(slots=True)
class _Prefill:
    """The prompt work of one step."""

    sequences: int = 0
    tokens: int = 0
    pairs: float = 0.0


class Replica:
    """A serving engine.

    In a step all decoding sequences get one token each, in the order of their admission; then a
    prompt that was begun goes on; then waiting jobs are admitted while the token budget, the seats
    and the KV cache hold, up to the first that does not fit. When the cache overflows the job
    admitted last is preempted: its KV is dropped and computed again. While no prompt is worked on
    all steps are alike, so they are taken in one jump to the next event, in closed form.

    Args:
        replica: its number.
        profile: what its steps cost and its limits.
        role: whether it prefills, decodes or does both.
        policies: the serving policies that steer it.
        max_output_tokens: the most tokens a call may generate as far as policies know; None for
            what the model's context leaves.
    """

    def __init__(
        self,
        replica: int,
        profile: EngineProfile,
        role: Role = "both",
        policies: Sequence[ServingPolicy] = (),
        max_output_tokens: int | None = None,
    ) -> None:
        limits = profile.limits
        self.replica = replica
        self.profile = profile
        self.role = role
        self.incoming = 0
        self.waiting_tokens = 0
        self.version = 0
        self.busy_s = 0.0
        self.kv_block_s = 0.0
        self.steps = 0
        self.preemptions = 0
        self.peak_running = 0
        self.least_free = limits.kv_blocks
        self._cost = profile.step
        self._block = limits.block_size
        self._seats = limits.max_num_seqs
        self._budget = limits.max_num_batched_tokens
        self._caches = limits.prefix_caching
        self._max_output_tokens = max_output_tokens
        self._kv = KvCache(limits.kv_blocks, keeps=limits.prefix_caching)
        self._policies = Policies(policies)
        self._jobs: dict[Call, Job] = {}
        self._queue: FifoQueue | KeyQueue = FifoQueue()
        if self._policies.orders or self._policies.gates:
            self._queue = KeyQueue(self._key_of)
        self._running: dict[Job, None] = {}
        self._relieved: list[Job] = []
        self._admissions = 0
        self._partial: Job | None = None
        self._completing: list[Job] = []
        # Decoding sequences: how many, the sum of their bases, when each ends, and how many need a
        # block at each residue of the step count.
        self._decodes = 0
        self._bases = 0
        self._ends: list[tuple[int, int, Job]] = []
        self._residues = [0] * self._block
        # The jump under way: its start, its steps, the first step's time and each next one's gain.
        self._now_s = 0.0
        self._start_s = 0.0
        self._start_free = limits.kv_blocks
        self._jump = 0
        self._first_s = 0.0
        self._gain_s = 0.0

    # What dispatchers see.

    @property
    def running(self) -> int:
        """Requests in the batch."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Requests in the queue, and on their way to it."""
        return len(self._queue) + self.incoming

    @property
    def kv_usage(self) -> float:
        """Share of the KV cache's blocks in use."""
        return self._kv.usage

    @property
    def idle(self) -> bool:
        """Whether no step is under way."""
        return self._jump == 0

    # What happens to a replica.

    def arrive(self, job: Job, now_s: float) -> None:
        """Queues a job."""
        self._now_s = now_s
        job.replica = self.replica
        self.waiting_tokens += job.request.prompt_tokens
        if self._policies:
            self._introduce(job, now_s)
        self._queue.push(job)

    def cut(self, job: Job, now_s: float) -> bool:
        """Shortens the jump under way if the job that has just arrived changes what comes next."""
        if self._jump <= 1 or not self._matters(job):
            return False
        steps = self._steps_until(now_s)
        if steps >= self._jump:
            return False
        self._jump = steps
        return True

    def take_relieved(self) -> list[Job]:
        """The jobs that policies have given up since the last call, to make room."""
        relieved, self._relieved = self._relieved, []
        return relieved

    def start(self, now_s: float) -> bool:
        """Begins the next step or jump; False when there is nothing to do."""
        self._now_s = now_s
        self._refresh_queue(now_s)
        preempted, prefill = self._continue_running()
        if not preempted:
            self._admit(prefill)
        if not self._decodes and not prefill.tokens:
            return preempted and self.start(now_s)
        self._begin_jump(now_s, prefill, preempted)
        return True

    @property
    def end_s(self) -> float:
        """When the jump under way ends."""
        return self._after(self._jump)

    def finish(self, now_s: float) -> StepResult:
        """Ends the jump under way."""
        steps, self._jump = self._jump, 0
        self._now_s = now_s
        self.busy_s += now_s - self._start_s
        if steps > 1:
            self._allocate(self._blocks_of_steps(self.steps + 1, steps - 1))
        used = self._kv.blocks - (self._start_free + self._kv.free) / 2
        self.kv_block_s += used * (now_s - self._start_s)
        self.steps += steps
        result = StepResult()
        self._end_decodes(result, now_s)
        self._end_prefills(result, now_s)
        if self._policies:
            self._tell_policies(result, now_s)
        return result

    def handed_over(self, job: Job) -> None:
        """Gives back the KV of a job whose transfer is done."""
        self._release(job, job.computed)

    # The step: running jobs first, then admissions.

    def _continue_running(self) -> tuple[bool, _Prefill]:
        """Makes room for the running jobs, preempting from the end; returns whether it had to."""
        preempted = False
        while True:
            blocks = self._residues[-self.steps % self._block]
            chunk = 0
            partial = self._partial
            if partial is not None:
                chunk = min(partial.tokens - partial.computed, self._budget - self._decodes)
                blocks += self._blocks(partial.computed + chunk) - self._blocks(partial.computed)
            if blocks <= self._kv.free:
                break
            if self._relieve():
                continue
            self._preempt()
            preempted = True
        self._allocate(blocks)
        prefill = _Prefill()
        if partial is not None:
            self._compute(partial, chunk, prefill)
        return preempted, prefill

    def _relieve(self) -> bool:
        """Lets a policy give up a job, so that none has to be preempted."""
        call = self._policies.relieve(self._now_s) if self._policies.relieves else None
        if call is None or call not in self._jobs:
            return False
        self._relieved.append(self._end_for_policy(call, self._now_s))
        return True

    def _admit(self, prefill: _Prefill) -> None:
        budget = self._budget - self._decodes - prefill.tokens
        queue = self._queue
        while budget > 0 and len(self._running) < self._seats:
            job = queue.head()
            if job is None:
                return
            shared, own = self._cached_blocks(job)
            taken = self._blocks(job.tokens) - shared
            if shared and job.prefix:
                taken += self._kv.holding_cost(job.prefix, shared)
            if taken > self._kv.free:
                return
            queue.pop()
            self._seat(job, shared, own)
            if job.kv_arrives:
                self._allocate(self._blocks(job.tokens))
                self._decode(job, job.tokens - 1)
                budget -= 1
                continue
            chunk = min(job.tokens - job.computed, budget)
            self._allocate(self._blocks(job.computed + chunk) - shared - own)
            self._compute(job, chunk, prefill)
            budget -= chunk

    def _seat(self, job: Job, shared: int, own: int) -> None:
        self._admissions += 1
        job.admission = self._admissions
        self._running[job] = None
        self.peak_running = max(self.peak_running, len(self._running))
        self.waiting_tokens -= job.request.prompt_tokens
        if shared and job.prefix:
            self._kv.hold(job.prefix, shared)
        if own:
            self._kv.take_back(job.own_name)
        job.shared_blocks = shared
        job.computed = (shared + own) * self._block
        job.cached_tokens += job.computed
        if job.admitted_s < 0:
            job.admitted_s = self._now_s
        if job.call is not None:
            if job.call.admitted_s is None:
                job.call.admitted_s = self._now_s
            self._policies.on_admission(job.call, self._now_s)

    def _cached_blocks(self, job: Job) -> tuple[int, int]:
        """Blocks of a waiting job that are still readable: its prefix's, then its own."""
        if not self._caches or job.kv_arrives:
            return 0, 0
        last = (job.tokens - 1) // self._block
        shared = own = 0
        if job.prefix:
            shared = min(self._kv.readable(job.prefix), self._prefix_blocks(job), last)
        if job.preemptions and job.own_start == shared:
            own = self._kv.readable(job.own_name)
        return shared, own

    def _compute(self, job: Job, chunk: int, prefill: _Prefill) -> None:
        prefill.sequences += 1
        prefill.tokens += chunk
        prefill.pairs += chunk * (job.computed + chunk / 2)
        job.computed += chunk
        if job.computed == job.tokens:
            self._completing.append(job)
            self._partial = None
        else:
            self._partial = job
        if job.prefix and self._caches and not job.shared_blocks:
            blocks = self._prefix_blocks(job)
            computed = job.computed >= blocks * self._block
            if blocks and computed and self._kv.publish(job.prefix, blocks):
                job.shared_blocks = blocks

    def _preempt(self) -> None:
        job, _ = self._running.popitem()
        if job is self._partial:
            self._partial = None
            computed = job.computed
        else:
            computed = job.base + self.steps
            self._stop_decoding(job)
        job.preemptions += 1
        whole = computed // self._block - job.shared_blocks
        self._kv.release_unfilled(self._blocks(computed) - computed // self._block)
        self._kv.release(whole, job.own_name)
        job.own_start = job.shared_blocks
        if job.shared_blocks and job.prefix:
            self._kv.let_go(job.prefix)
        job.shared_blocks = 0
        job.tokens = job.request.prompt_tokens + job.generated
        job.computed = 0
        job.kv_arrives = False
        self.preemptions += 1
        self.waiting_tokens += job.request.prompt_tokens
        self._queue.push_front(job)

    # The jump.

    def _begin_jump(self, now_s: float, prefill: _Prefill, preempted: bool) -> None:
        cost = self._cost
        kv_tokens = self._bases + self._decodes * (self.steps + 1)
        self._start_s = now_s
        self._start_free = self._kv.free
        self._first_s = cost.base_s + cost.decode_s * self._decodes + cost.kv_token_s * kv_tokens
        self._gain_s = cost.kv_token_s * self._decodes
        self._jump = 1
        if prefill.tokens:
            self._first_s += (
                cost.prefill_s * prefill.sequences
                + cost.prefill_token_s * prefill.tokens
                + cost.prefill_pair_s * prefill.pairs
            )
        elif not preempted:
            quiet = self._quiet_steps()
            if quiet > 1:
                self._jump = int(min(quiet, self._like_steps()))

    def _quiet_steps(self) -> float:
        """Steps in which no policy does anything, if nothing happens until then."""
        policies = self._policies
        if not policies:
            return math.inf
        if policies.has_stale():
            return 1
        # A job that does not fit may be refused later, and then those behind it pass.
        asks = policies.gates and len(self._queue) and len(self._running) < self._seats
        return policies.quiet_steps() if policies.steps or asks else math.inf

    def _like_steps(self) -> int:
        """Steps until a sequence ends, the KV cache overflows, or a timer is due."""
        ends = self._ends
        while ends[0][2].finish_step != ends[0][0] or ends[0][2].admission != ends[0][1]:
            heapq.heappop(ends)
        steps = ends[0][0] - self.steps
        decodes, free = self._decodes, self._kv.free
        if decodes * (steps // self._block + 1) > free:
            steps = 1 + self._steps_within(self.steps + 1, steps - 1, free)
        if self._policies.timed:
            self._jump = steps
            timer_s = self._policies.next_timer_s()
            if timer_s < self._after(steps):
                steps = self._steps_until(timer_s)
        return steps

    def _after(self, steps: int) -> float:
        """When the first ``steps`` steps of the jump are done."""
        return self._start_s + (steps * self._first_s + self._gain_s * (steps * (steps - 1) // 2))

    def _steps_until(self, time_s: float) -> int:
        """The fewest steps, at least one, that end at a time or after it."""
        seconds, half = time_s - self._start_s, self._gain_s / 2
        if seconds <= 0:
            return 1
        linear = self._first_s - half
        root = math.sqrt(linear * linear + 4 * half * seconds)
        steps = max(1, min(self._jump, int(2 * seconds / (linear + root))))
        while steps > 1 and self._after(steps - 1) >= time_s:
            steps -= 1
        while self._after(steps) < time_s:
            steps += 1
        return steps

    def _blocks_of_steps(self, first: int, steps: int) -> int:
        """Blocks that the decoding sequences need in ``steps`` steps from step ``first`` on."""
        cycles, rest = divmod(steps, self._block)
        residues, size = self._residues, self._block
        blocks = cycles * self._decodes
        for step in range(first, first + rest):
            blocks += residues[-step % size]
        return blocks

    def _steps_within(self, first: int, steps: int, free: int) -> int:
        """How many of the steps from ``first`` on the free blocks suffice for."""
        cycles = min(steps // self._block, free // self._decodes)
        done = cycles * self._block
        free -= cycles * self._decodes
        while done < steps:
            free -= self._residues[-(first + done) % self._block]
            if free < 0:
                break
            done += 1
        return done

    def _matters(self, job: Job) -> bool:
        """Whether a job that has just arrived may change the next step."""
        policies = self._policies
        if policies and (
            policies.steps or policies.timed or policies.gates or policies.has_stale()
        ):
            return True
        return len(self._running) < self._seats and self._queue.head() is job

    # The end of a step.

    def _decode(self, job: Job, computed: int) -> None:
        """Lets a job decode from the next counted step on."""
        job.base = computed - self.steps
        job.finish_step = self.steps + job.output_tokens - job.generated
        self._decodes += 1
        self._bases += job.base
        self._residues[job.base % self._block] += 1
        heapq.heappush(self._ends, (job.finish_step, job.admission, job))

    def _stop_decoding(self, job: Job) -> None:
        job.generated = job.output_tokens - (job.finish_step - self.steps)
        job.finish_step = -1
        self._decodes -= 1
        self._bases -= job.base
        self._residues[job.base % self._block] -= 1

    def _end_decodes(self, result: StepResult, now_s: float) -> None:
        ends = self._ends
        while ends and ends[0][0] <= self.steps:
            step, admission, job = heapq.heappop(ends)
            if job.finish_step == step and job.admission == admission:
                self._stop_decoding(job)
                self._leave(job, job.base + self.steps, now_s)
                result.finished.append(job)

    def _end_prefills(self, result: StepResult, now_s: float) -> None:
        for job in self._completing:
            job.generated += 1
            first = job.first_token_s < 0
            if first:
                job.first_token_s = now_s
            if first and job.generated < job.output_tokens:
                result.started.append(job)
            if job.generated == job.output_tokens:
                self._leave(job, job.computed, now_s)
                result.finished.append(job)
            elif self.role == "prefill":
                del self._running[job]
                result.prefilled.append(job)
            else:
                self._decode(job, job.computed)
        self._completing.clear()

    def _leave(self, job: Job, computed: int, now_s: float) -> None:
        del self._running[job]
        self._release(job, computed)
        job.finished_s = now_s

    def _release(self, job: Job, computed: int) -> None:
        self._kv.release_unfilled(self._blocks(computed) - computed // self._block)
        self._kv.release(computed // self._block - job.shared_blocks)
        if job.shared_blocks and job.prefix:
            self._kv.let_go(job.prefix)
        job.shared_blocks = 0

    # Policies.

    def _introduce(self, job: Job, now_s: float) -> None:
        request = job.request
        said = {
            "workflow": request.workflow,
            "stage": request.stage,
            "deadline_s": request.deadline_s,
            "branches": len(request.branch_tokens) or None,
            **request.fields,
        }
        room = self.profile.limits.max_model_len - request.prompt_tokens
        job.call = Call(
            call_id=job.name,
            arrival_s=now_s,
            prompt_tokens=request.prompt_tokens,
            max_output_tokens=min(self._max_output_tokens or room, room),
            fields={name: value for name, value in said.items() if value is not None},
            request_id=request.request_id,
            branch=job.branch,
        )
        self._jobs[job.call] = job
        self._policies.on_arrival(job.call, now_s)

    def _key_of(self, job: Job) -> tuple[tuple[float, ...], ...]:
        return () if job.call is None else self._policies.key(job.call, self._now_s)

    def _refresh_queue(self, now_s: float) -> None:
        if not self._policies:
            return
        stale = self._policies.take_stale(now_s)
        self._queue.rekey(self._jobs[call] for call in stale if call in self._jobs)
        self._queue.open_step(self._refusal() if self._policies.gates else None)

    def _refusal(self) -> Callable[[Job], bool]:
        """The admission test of this step; nothing is refused while the engine is idle."""
        decided: dict[Job, bool] = {}

        def refuses(job: Job) -> bool:
            if job.call is None or not self._running:
                return False
            if job not in decided:
                load = Load(len(self._running), len(self._queue), self._kv.usage)
                decided[job] = not self._policies.admits(job.call, load, self._now_s)
            return decided[job]

        return refuses

    def _tell_policies(self, result: StepResult, now_s: float) -> None:
        for job in result.finished + result.prefilled:
            if job.call is not None:
                job.call.output_tokens = job.generated
                del self._jobs[job.call]
                self._policies.on_finish(job.call, Outcome.COMPLETED, now_s)
        progressed = []
        for job in self._running:
            if job.call is not None and job is not self._partial:
                left = job.finish_step - self.steps
                job.call.output_tokens = job.output_tokens - left
                progressed.append(job.call)
        if self._policies.steps and (progressed or result.finished):
            for call in self._in_order(self._policies.on_step(progressed, now_s)):
                result.finished.append(self._end_for_policy(call, now_s))

    def _in_order(self, calls: set[Call]) -> list[Call]:
        return sorted((c for c in calls if c in self._jobs), key=lambda c: self._jobs[c].number)

    def _end_for_policy(self, call: Call, now_s: float) -> Job:
        job = self._jobs.pop(call)
        if job not in self._running:
            self._queue.remove(job)
            self.waiting_tokens -= job.request.prompt_tokens
            job.finished_s = now_s
        elif job is self._partial:
            self._partial = None
            self._leave(job, job.computed, now_s)
        else:
            self._stop_decoding(job)
            self._leave(job, job.base + self.steps, now_s)
        job.outcome = Outcome.ENDED_BY_POLICY
        self._policies.on_finish(call, Outcome.ENDED_BY_POLICY, now_s)
        return job

    # Blocks.

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self._block)

    def _prefix_blocks(self, job: Job) -> int:
        return min(job.prefix_tokens, job.request.prompt_tokens) // self._block

    def _allocate(self, blocks: int) -> None:
        self._kv.allocate(blocks)
        self.least_free = min(self.least_free, self._kv.free)
