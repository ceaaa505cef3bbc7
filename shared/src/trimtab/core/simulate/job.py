"""One call on its way through the simulated cluster: a request, or a branch of one."""

from __future__ import annotations

from collections.abc import Iterable

from trimtab.core.policy import Call, Outcome
from trimtab.core.workload import Request


class Job:
    """A call and what has become of it; compared and hashed by identity.

    Attributes:
        request: the request; its realised output length is known here and hidden from policies.
        number: the call's place in the workload.
        branch: which branch of the request it is, from 0.
        name: unique among calls.
        output_tokens: tokens that it generates unless it is ended.
        prefix: the name under which others can read its first ``prefix_tokens`` tokens; the
            branches of a request share the whole prompt.
        call: the call as policies see it; None where there are none.
        tokens: tokens whose KV must be computed before the next one can be sampled: the prompt, and
            after a preemption what was generated before it.
        computed: how many of them are computed, while the job is in its prefill.
        generated: output tokens so far, up to the last time the job's replica looked.
        base: context length minus the replica's step count, while the job decodes.
        finish_step: the replica's step count at which its last token is sampled, while it decodes.
        admission: running number of its admission to the batch.
        shared_blocks: KV blocks that it holds under its prefix's name.
        own_start: block at which the blocks kept from before a preemption begin.
        kv_arrives: whether its KV comes from a prefill replica.
    """

    __slots__ = (
        "admission",
        "admitted_s",
        "base",
        "branch",
        "cached_tokens",
        "call",
        "computed",
        "finish_step",
        "finished_s",
        "first_token_s",
        "generated",
        "issued_s",
        "kv_arrives",
        "missing",
        "name",
        "number",
        "outcome",
        "output_tokens",
        "own_start",
        "preemptions",
        "prefix",
        "prefix_tokens",
        "replica",
        "request",
        "shared_blocks",
        "tokens",
    )

    def __init__(self, request: Request, number: int, branch: int = 0) -> None:
        self.request = request
        self.number = number
        self.branch = branch
        self.name, self.output_tokens = request.request_id, request.output_tokens
        self.prefix, self.prefix_tokens = request.prefix, request.prefix_tokens
        if request.branch_tokens:
            self.name = f"{branch}_{request.request_id}"
            self.output_tokens = request.branch_tokens[branch]
            self.prefix, self.prefix_tokens = f"\0p{request.request_id}", request.prompt_tokens
        self.call: Call | None = None
        self.missing = len(request.depends_on)
        self.tokens = request.prompt_tokens
        self.computed = 0
        self.generated = 0
        self.base = 0
        self.finish_step = -1
        self.admission = -1
        self.shared_blocks = 0
        self.own_start = 0
        self.kv_arrives = False
        self.cached_tokens = 0
        self.preemptions = 0
        self.replica = -1
        self.issued_s = -1.0
        self.admitted_s = -1.0
        self.first_token_s = -1.0
        self.finished_s = -1.0
        self.outcome = Outcome.COMPLETED

    @classmethod
    def all_of(cls, requests: Iterable[Request]) -> list[list[Job]]:
        """The calls of each request: one, or one for each of its branches."""
        jobs: list[list[Job]] = []
        number = 0
        for request in requests:
            branches = range(len(request.branch_tokens) or 1)
            jobs.append([cls(request, number + branch, branch) for branch in branches])
            number += len(branches)
        return jobs

    @property
    def own_name(self) -> str:
        """The name its blocks are kept under since its last preemption; no prefix is called so."""
        return f"\0{self.preemptions}:{self.name}"
