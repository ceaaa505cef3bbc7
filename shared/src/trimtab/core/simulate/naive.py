"""The serving simulator's obvious twin: every step by itself, every block by itself, lists alone.

It is what the simulator is compared with, result by result, and what its speed is measured against.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from trimtab.core.cost.step import EngineProfile, StepBatch
from trimtab.core.policy import Call, Load, Outcome, ServingPolicy
from trimtab.core.simulate.policies import Policies
from trimtab.core.simulate.serving import KvLink, ReplicaSpec
from trimtab.core.workload import Request


@dataclass(eq=False)
class Block:
    """One block of the KV cache, and what can be read in it: a name and the index under it."""

    tag: tuple[object, int] | None = None


@dataclass(eq=False)
class Generation:
    """A request, or a branch of one, on its way; its first ``shared`` blocks are its prefix's.

    ``prefix`` are all of the prefix's blocks that it holds, which may be more.
    """

    request: Request
    number: int
    branch: int = 0
    order: float = 0.0
    generated: int = 0
    computed: int = 0
    blocks: list[Block] = field(default_factory=list)
    shared: int = 0
    prefix: list[Block] = field(default_factory=list)
    prefilling: bool = True
    kv_arrives: bool = False
    preemptions: int = 0
    first_s: float = -1.0
    issued_s: float = -1.0
    finished_s: float = -1.0
    missing: int = 0
    key: tuple[Any, ...] = ()
    call: Call | None = None
    outcome: str = "completed"

    @property
    def output_tokens(self) -> int:
        """What it generates unless it is ended."""
        lengths = self.request.branch_tokens
        return lengths[self.branch] if lengths else self.request.output_tokens

    @property
    def shared_name(self) -> object:
        """The name of the part of its prompt that others may read: for branches all of it."""
        request = self.request
        return ("prompt of", request.request_id) if request.branch_tokens else request.prefix

    @property
    def shared_tokens(self) -> int:
        """The length of that part."""
        request = self.request
        return request.prompt_tokens if request.branch_tokens else request.prefix_tokens

    @property
    def tokens(self) -> int:
        """Prompt and output so far."""
        return self.request.prompt_tokens + self.generated


class Engine:
    """One engine."""

    def __init__(self, spec: ReplicaSpec, policies: Sequence[ServingPolicy]) -> None:
        self.profile: EngineProfile = spec.profile
        self.role = spec.role
        limits = spec.profile.limits
        self.size, self.seats = limits.block_size, limits.max_num_seqs
        self.budget, self.caches = limits.max_num_batched_tokens, limits.prefix_caching
        self.free = [Block() for _ in range(limits.kv_blocks)]
        self.holders: dict[Block, int] = {}
        self.waiting: list[Generation] = []
        self.running: list[Generation] = []
        self.scheduled: list[tuple[Generation, int]] = []
        self.sending: list[Generation] = []
        self.relieved: list[Generation] = []
        self.policies = Policies(policies)
        self.incoming = 0
        self.arrivals = 0
        self.preempted = 0
        self.now_s = 0.0

    def take(self, generation: Generation, tokens: int) -> None:
        """Allocates blocks for this many tokens, those released longest ago first."""
        while len(generation.blocks) * self.size < tokens:
            block = self.free.pop(0)
            block.tag = None
            self.holders[block] = 1
            generation.blocks.append(block)

    def drop(self, generation: Generation) -> None:
        """Gives back all blocks, the last first; one that is not full is used again first."""
        private = generation.blocks[generation.shared :]
        unfilled = generation.blocks[-1] if generation.computed % self.size else None
        for block in [*reversed(private), *reversed(generation.prefix)]:
            self.holders[block] -= 1
            if not self.holders[block]:
                del self.holders[block]
                full = block is not unfilled
                self.free.insert(len(self.free) if full else 0, block)
        generation.blocks, generation.shared, generation.prefix = [], 0, []

    def readable(self, name: object) -> list[Block]:
        """The blocks that hold what this name stands for, in order."""
        tagged = [(b.tag[1], b) for b in [*self.free, *self.holders] if b.tag and b.tag[0] == name]
        return [block for _, block in sorted(tagged, key=lambda pair: pair[0])]

    def cached(self, generation: Generation) -> tuple[list[Block], list[Block], list[Block]]:
        """The prefix's blocks that it would hold, those of them it would use, and its own."""
        if not self.caches or generation.kv_arrives:
            return [], [], []
        last = (generation.tokens - 1) // self.size
        name = generation.shared_name
        whole = self.readable(name) if name else []
        used = whole[: min(self.prefix_blocks(generation), last)]
        own = self.readable(generation)
        if own and own[0].tag != (generation, len(used)):
            own = []
        held = bool(used) and used[0] in self.holders
        return whole if held else used, used, own

    def prefix_blocks(self, generation: Generation) -> int:
        """How many whole blocks its prefix fills."""
        return min(generation.shared_tokens, generation.request.prompt_tokens) // self.size

    def arrive(self, generation: Generation, now_s: float) -> None:
        """Queues a generation."""
        self.now_s = now_s
        self.arrivals += 1
        generation.order = self.arrivals
        if self.policies:
            request = generation.request
            said = {
                "workflow": request.workflow,
                "stage": request.stage,
                "deadline_s": request.deadline_s,
                "branches": len(request.branch_tokens) or None,
                **request.fields,
            }
            branched = f"{generation.branch}_" if request.branch_tokens else ""
            generation.call = Call(
                branched + request.request_id,
                now_s,
                request.prompt_tokens,
                self.profile.limits.max_model_len - request.prompt_tokens,
                {k: v for k, v in said.items() if v is not None},
                request_id=request.request_id,
                branch=generation.branch,
            )
            self.policies.on_arrival(generation.call, now_s)
            generation.key = self.policies.key(generation.call, now_s)
        self.waiting.append(generation)

    def preempt(self) -> None:
        """Sends the generation admitted last back to the queue; its whole blocks stay readable."""
        victim = self.running.pop()
        for index in range(victim.shared, victim.computed // self.size):
            victim.blocks[index].tag = (victim, index)
        self.drop(victim)
        victim.computed = 0
        victim.kv_arrives = False
        victim.prefilling = True
        victim.preemptions += 1
        self.preempted += 1
        victim.order = -self.preempted
        if victim.call is not None:
            victim.key = self.policies.key(victim.call, self.now_s)
        self.waiting.append(victim)

    def start(self, now_s: float) -> float | None:
        """Begins a step and returns how long it takes; None if there is nothing to do."""
        self.now_s = now_s
        if self.policies:
            stale = set(self.policies.take_stale(now_s))
            for generation in self.waiting:
                if generation.call in stale:
                    generation.key = self.policies.key(generation.call, now_s)
        self.relieve()
        self.scheduled = []
        budget, preempted, index = self.budget, False, 0
        while index < len(self.running):
            generation = self.running[index]
            chunk = min(self.todo(generation), budget)
            needed = -(-(generation.computed + chunk) // self.size) - len(generation.blocks)
            while generation in self.running and needed > len(self.free):
                self.preempt()
                preempted = True
            if generation not in self.running:
                break
            self.take(generation, generation.computed + chunk)
            self.scheduled.append((generation, chunk))
            self.publish(generation, generation.computed + chunk)
            budget -= chunk
            index += 1
        if not preempted:
            self.admit(budget)
        if not self.scheduled:
            return self.start(now_s) if preempted else None
        return self.profile.step.seconds(self.batch())

    def relieve(self) -> None:
        """Lets policies give up calls until the running ones have room for their next tokens."""
        while self.policies.relieves and self.wanted_blocks() > len(self.free):
            call = self.policies.relieve(self.now_s)
            ended = [g for g in [*self.running, *self.waiting] if call and g.call is call]
            if not ended:
                return
            self.leave(ended[0], Outcome.ENDED_BY_POLICY)
            self.relieved += ended

    def wanted_blocks(self) -> int:
        """The blocks that the running generations take in the next step."""
        budget, wanted = self.budget, 0
        for generation in self.running:
            chunk = min(self.todo(generation), budget)
            budget -= chunk
            tokens = generation.computed + chunk
            wanted += -(-tokens // self.size) - len(generation.blocks)
        return wanted

    def todo(self, generation: Generation) -> int:
        """Tokens to compute before the next one can be sampled."""
        return generation.tokens - generation.computed

    def admit(self, budget: int) -> None:
        """Admits waiting generations up to the first that does not fit."""
        refused: set[Generation] = set()
        while budget > 0 and len(self.running) < self.seats:
            head = self.head(refused)
            if head is None:
                return
            whole, used, own = self.cached(head)
            idle = [b for b in whole if b not in self.holders]
            if -(-head.tokens // self.size) - len(used) + len(idle) > len(self.free):
                return
            self.seat(head, whole, used, own)
            chunk = min(self.todo(head), budget)
            self.take(head, head.computed + chunk)
            self.scheduled.append((head, chunk))
            self.publish(head, head.computed + chunk)
            budget -= chunk

    def head(self, refused: set[Generation]) -> Generation | None:
        """The next in the queue that is not refused."""
        for candidate in sorted(self.waiting, key=lambda g: (g.key, g.order)):
            if candidate in refused:
                continue
            if candidate.call and self.running and not self.admits(candidate.call):
                refused.add(candidate)
                continue
            return candidate
        return None

    def seat(
        self, head: Generation, whole: list[Block], used: list[Block], own: list[Block]
    ) -> None:
        """Moves a generation into the batch, with the blocks it can read."""
        self.waiting.remove(head)
        self.running.append(head)
        for block in [*whole, *own]:
            if block in self.holders:
                self.holders[block] += 1
            else:
                self.free.remove(block)
                self.holders[block] = 1
        for block in self.readable(head.shared_name) if used else ():
            if block not in self.holders:
                self.free.remove(block)
                self.free.insert(0, block)
                block.tag = None
        head.blocks, head.shared, head.prefix = [*used, *own], len(used), whole
        head.computed = len(head.blocks) * self.size
        if head.kv_arrives:
            head.computed, head.prefilling = head.tokens - 1, False
        if head.call is not None:
            if head.call.admitted_s is None:
                head.call.admitted_s = self.now_s
            self.policies.on_admission(head.call, self.now_s)

    def admits(self, call: Call) -> bool:
        """Whether the policies let it in."""
        usage = 1.0 - len(self.free) / self.profile.limits.kv_blocks
        load = Load(len(self.running), len(self.waiting), usage)
        return self.policies.admits(call, load, self.now_s)

    def publish(self, generation: Generation, computed: int) -> None:
        """Lets others read the prefix's blocks once all of them are computed."""
        name, count = generation.shared_name, self.prefix_blocks(generation)
        if not (self.caches and name and count and generation.prefilling) or generation.shared:
            return
        if computed >= count * self.size and not self.readable(name):
            for index, block in enumerate(generation.blocks[:count]):
                block.tag = (name, index)
            generation.shared, generation.prefix = count, generation.blocks[:count]

    def batch(self) -> StepBatch:
        """What the step works on."""
        decodes = kv = prefills = tokens = 0
        pairs = 0.0
        for generation, chunk in self.scheduled:
            if generation.prefilling:
                prefills, tokens = prefills + 1, tokens + chunk
                pairs += chunk * (generation.computed + chunk / 2)
            else:
                decodes, kv = decodes + 1, kv + generation.computed + 1
        return StepBatch(decodes, kv, prefills, tokens, pairs)

    def finish(self, now_s: float) -> tuple[list[Generation], list[Generation]]:
        """Ends a step; returns the generations that are done and those that are sent on."""
        self.now_s = now_s
        done, sent, progressed = [], [], []
        for generation, chunk in self.scheduled:
            generation.computed += chunk
            if generation.computed < generation.tokens:
                continue
            generation.prefilling = False
            generation.generated += 1
            if generation.first_s < 0:
                generation.first_s = now_s
            if generation.generated == generation.output_tokens:
                done.append(generation)
            elif self.role == "prefill":
                sent.append(generation)
            else:
                progressed.append(generation)
        for generation in done:
            self.leave(generation, Outcome.COMPLETED)
        for generation in sent:
            self.running.remove(generation)
            if generation.call:
                self.policies.on_finish(generation.call, Outcome.COMPLETED, now_s)
        self.tell(progressed, done)
        return done, sent

    def tell(self, progressed: list[Generation], done: list[Generation]) -> None:
        """Tells the policies of the step, and ends what they want ended."""
        calls = []
        for generation in progressed:
            if generation.call:
                generation.call.output_tokens = generation.generated
                calls.append(generation.call)
        if self.policies.steps and (calls or done):
            ended = self.policies.on_step(calls, self.now_s)
            for generation in sorted([*self.running, *self.waiting], key=lambda g: g.number):
                if generation.call in ended:
                    self.leave(generation, Outcome.ENDED_BY_POLICY)
                    done.append(generation)

    def leave(self, generation: Generation, outcome: Outcome) -> None:
        """Takes a generation out for good."""
        (self.running if generation in self.running else self.waiting).remove(generation)
        self.drop(generation)
        generation.finished_s, generation.outcome = self.now_s, outcome.value
        if generation.call:
            generation.call.output_tokens = generation.generated
            self.policies.on_finish(generation.call, outcome, self.now_s)


def simulate(
    requests: Sequence[Request],
    replicas: Sequence[ReplicaSpec],
    *,
    policies: Callable[[], Sequence[ServingPolicy]] = tuple,
    kv_link: KvLink | None = None,
) -> list[Generation]:
    """Serves a workload round robin (decode: least requests); the generations in order of ends."""
    cluster = Cluster(requests, replicas, policies, kv_link)
    while cluster.issues or cluster.deliveries or cluster.ends:
        cluster.instant()
    return cluster.finished


class Cluster:
    """Engines, and the events to come."""

    def __init__(
        self,
        requests: Sequence[Request],
        replicas: Sequence[ReplicaSpec],
        policies: Callable[[], Sequence[ServingPolicy]],
        kv_link: KvLink | None,
    ) -> None:
        self.engines = [Engine(spec, policies()) for spec in replicas]
        self.entries = [e for e in self.engines if e.role != "decode"]
        self.decoders = [e for e in self.engines if e.role == "decode"]
        self.link = kv_link or KvLink(math.inf, 0.0)
        self.link_free = dict.fromkeys(self.engines, 0.0)
        self.generations = [
            Generation(request, 0, branch, missing=len(request.depends_on))
            for request in requests
            for branch in range(len(request.branch_tokens) or 1)
        ]
        for number, generation in enumerate(self.generations):
            generation.number = number
        self.serial = len(self.generations)
        self.turn = 0
        self.issues = [
            (s.request.arrival_s, number, s)
            for number, s in enumerate(self.generations)
            if not s.missing and not s.branch
        ]
        self.deliveries: list[tuple[float, int, Generation, Engine, Engine]] = []
        self.ends: dict[Engine, float] = {}
        self.finished: list[Generation] = []

    def instant(self) -> None:
        """Everything that happens at the next instant, the beginning of new steps last."""
        now = min([t for t, *_ in self.issues + self.deliveries] + list(self.ends.values()))
        touched: set[Engine] = set()
        while True:
            if self.issues and min(self.issues)[0] == now:
                touched.add(self.issue(now))
            elif self.deliveries and min(self.deliveries)[0] == now:
                touched |= self.deliver(now)
            elif now in self.ends.values():
                engine = next(e for e in self.engines if self.ends.get(e) == now)
                self.end(engine, now)
                touched.add(engine)
            else:
                break
        for engine in self.engines:
            if engine in touched and engine not in self.ends:
                seconds = engine.start(now)
                if seconds is not None:
                    self.ends[engine] = now + seconds
                relieved, engine.relieved = engine.relieved, []
                self.conclude(relieved, now)

    def issue(self, now: float) -> Engine:
        """Sends the next request to an engine."""
        item = min(self.issues)
        self.issues.remove(item)
        engine = self.entries[self.turn % len(self.entries)]
        self.turn += 1
        for generation in self.generations:
            if generation.request is item[2].request:
                generation.issued_s = now
                engine.arrive(generation, now)
        return engine

    def deliver(self, now: float) -> set[Engine]:
        """Moves the next generation from its prefill engine to its decode engine."""
        item = min(self.deliveries)
        self.deliveries.remove(item)
        _, _, generation, source, target = item
        source.drop(generation)
        generation.kv_arrives = True
        target.incoming -= 1
        target.arrive(generation, now)
        return {source, target}

    def end(self, engine: Engine, now: float) -> None:
        """Ends an engine's step."""
        del self.ends[engine]
        done, sent = engine.finish(now)
        for generation in sent:
            loads = [len(e.running) + len(e.waiting) + e.incoming for e in self.decoders]
            target = self.decoders[loads.index(min(loads))]
            target.incoming += 1
            sent_bytes = generation.computed * self.link.kv_bytes_per_token
            start = max(now, self.link_free[engine])
            self.link_free[engine] = start + sent_bytes / self.link.bandwidth_bytes_per_s
            self.serial += 1
            at = self.link_free[engine] + self.link.latency_s
            self.deliveries.append((at, self.serial, generation, engine, target))
        self.conclude(done, now)

    def conclude(self, done: list[Generation], now: float) -> None:
        """Notes the end of generations, and issues what waited for the last of a request's."""
        for generation in done:
            self.finished.append(generation)
            name = generation.request.request_id
            mine = [g for g in self.generations if g.request.request_id == name]
            if any(g not in self.finished for g in mine):
                continue
            for other in self.generations:
                if name in other.request.depends_on and not other.branch:
                    other.missing -= 1
                    if not other.missing:
                        self.serial += 1
                        at = max(now + other.request.gap_s, other.request.arrival_s)
                        self.issues.append((at, self.serial, other))
