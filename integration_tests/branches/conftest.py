"""What the tests of branches in vLLM's scheduler share: an engine that remembers what came out."""

from __future__ import annotations

import json
from collections import Counter, defaultdict

import pytest
from vllm.v1.core.sched.output import SchedulerOutput

from trimtab.branches.note import Fate, Note
from trimtab.hosts.vllm.dry_engine import DryEngine
from trimtab.hosts.vllm.scheduler import Scheduler


class Bed(DryEngine):
    """vLLM's real scheduler and pool of blocks with the plugin, no model, and a memory.

    Args:
        scheduler: the class.
        branches, plugins: options of the plugin, and of others.
        settings: as `DryEngine` takes them.
    """

    def __init__(self, scheduler=Scheduler, *, branches=None, plugins=None, **settings):
        options = {"signals": {"replay": 1.0}, **(branches or {})}
        config = {"trimtab": {**(plugins or {}), "branches": options}}
        super().__init__(
            scheduler,
            additional_config=config if scheduler is Scheduler else None,
            **{"blocks": 200, "max_num_seqs": 16, **settings},
        )
        self.steps = 0
        self.ends: dict[str, list[Note | None]] = defaultdict(list)
        self.reasons: dict[str, list[str]] = defaultdict(list)
        self.ended_at: dict[str, int] = {}
        self.tokens: Counter[str] = Counter()
        self.preempted: list[str] = []
        self.told: dict[str, set[int]] = defaultdict(set)
        self.logprobs: dict[str, list] = defaultdict(list)

    @property
    def free_blocks(self):
        return self.pool.get_num_free_blocks()

    @property
    def pool(self):
        return self.scheduler.kv_cache_manager.block_pool

    @property
    def running(self):
        return {request.request_id for request in self.scheduler.running}

    def held(self, request_id):
        """The numbers of the blocks that a request holds."""
        return self.scheduler.kv_cache_manager.get_block_ids(request_id)[0]

    def ask(
        self,
        name,
        lengths,
        *,
        scores=None,
        prompt=40,
        token=None,
        max_tokens=200,
        first=0,
        priority=0,
        change=None,
        **fields,
    ):
        """Hands in a request with a branch of each length, as vLLM's front end does.

        The prompt is one token over and over; ``change`` gets every branch's `Request`.
        """
        said = {f"trimtab.{key}": value for key, value in fields.items()}
        said.setdefault("trimtab.branches", len(lengths))
        if scores is not None:
            said["trimtab.replay"] = json.dumps(scores)
        tokens = [3 + sum(name.encode()) % 500 if token is None else token] * prompt
        for index, length in enumerate(lengths, first):
            request = self.add(
                f"{index}_{name}",
                tokens,
                max_tokens,
                xargs=said,
                ends_after=length,
                priority=priority,
            )
            if change is not None:
                change(request)

    def step(self):
        scheduled, outputs = super().step()
        self._remember(scheduled, outputs)
        self.steps += 1
        return scheduled, outputs

    def run(self, each_step=None, limit=5_000):
        """Steps until all that was asked is over."""
        for step in range(limit):
            if each_step is not None:
                each_step(step)
            self.step()
            if not self.scheduler.get_num_unfinished_requests():
                self.drain()
                return self
        raise AssertionError("the engine does not come to an end")

    def fates(self, name):
        """How a request's branches ended, those with a note."""
        found = {i: n for i, n in self.ends.items() if i.endswith(f"_{name}")}
        return {int(i.split("_")[0]): n[0].fate for i, n in found.items() if n[0] is not None}

    def count(self, name):
        """Its branches by how they ended."""
        return Counter(self.fates(name).values())

    def finished(self, name):
        """Those of its branches that finished by themselves."""
        return {i for i, fate in self.fates(name).items() if fate is Fate.FINISHED}

    def _remember(self, scheduled: SchedulerOutput, outputs):
        self.preempted += scheduled.preempted_req_ids or ()
        for client, of_client in outputs.items():
            for output in of_client.outputs:
                name = output.request_id
                self.told[name].add(client)
                self.tokens[name] += len(output.new_token_ids)
                if output.new_logprobs is not None:
                    self.logprobs[name].append(output.new_logprobs)
                if output.finish_reason is not None:
                    self.ends[name].append(Note.read(output.stop_reason))
                    self.reasons[name].append(str(output.finish_reason))
                    self.ended_at[name] = self.steps


@pytest.fixture(scope="session")
def bed():
    """The class, to be made with the options that a test is about."""
    return Bed
