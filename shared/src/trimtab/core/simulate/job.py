"""One request on its way through the simulated cluster."""

from __future__ import annotations

from trimtab.core.policy import Call, Outcome
from trimtab.core.workload import Request


class Job:
    """A request and what has become of it; compared and hashed by identity.

    Attributes:
        request: the request; its realised output length is known here and hidden from policies.
        number: its place in the workload.
        call: the request as policies see it; None where there are none.
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
        "number",
        "outcome",
        "own_start",
        "preemptions",
        "replica",
        "request",
        "shared_blocks",
        "tokens",
    )

    def __init__(self, request: Request, number: int) -> None:
        self.request = request
        self.number = number
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

    @property
    def own_name(self) -> str:
        """The name its blocks are kept under since its last preemption; no prefix is called so."""
        return f"\0{self.preemptions}:{self.request.request_id}"
