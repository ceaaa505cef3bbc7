"""The host scheduler: vLLM's own, with trimtab's policies deciding what they are about.

Every override is a public method of `vllm.v1.core.sched.interface.SchedulerInterface`; what else of
vLLM this relies on is listed in `trimtab.hosts.vllm.contract` and checked by a test.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import create_request_queue
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from trimtab.core.policy import Call, Load, Outcome
from trimtab.core.policy_stack import PolicyStack, StackKey
from trimtab.hosts import versions
from trimtab.hosts.vllm import call_fields, options
from trimtab.hosts.vllm.waiting_queue import PolicyQueue

logger = logging.getLogger(__name__)

_OUTCOMES = {
    RequestStatus.FINISHED_ABORTED: Outcome.ABORTED,
    RequestStatus.FINISHED_IGNORED: Outcome.FAILED,
    RequestStatus.FINISHED_ERROR: Outcome.FAILED,
}


class Scheduler(AsyncScheduler):
    """``vllm serve --scheduler-cls trimtab.hosts.vllm.Scheduler``.

    The policies are those of the plugins named in ``--additional-config '{"trimtab": {...}}'``.
    With none it decides exactly as vLLM's scheduler does.

    Raises:
        BadInput: a plugin of the configuration is not installed, or its options are wrong.
        Unsupported: the vLLM that runs is outside the verified range.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        versions.require("vllm")
        self._stack = PolicyStack(options.policies(self.vllm_config.additional_config))
        self._calls: dict[str, Call] = {}
        self._queue: PolicyQueue | None = None
        if self._stack.orders or self._stack.gates:
            self._queue = self.waiting = PolicyQueue(self._key_of, self.policy)
        if self._stack:
            logger.info("trimtab policies at work: %s", ", ".join(self._stack.names))

    def add_request(self, request: Request) -> None:
        if self._stack and request.request_id not in self.requests:
            self._register(request)
        super().add_request(request)

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        if not self._calls:
            return super().schedule(throttle_prefills)
        now_s = time.monotonic()
        self._refresh_queue(now_s)
        scheduled = super().schedule(throttle_prefills)
        self._note_admissions(scheduled, now_s)
        return scheduled

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        if self._calls:
            self._note_outputs(outputs)
        return outputs

    def finish_requests(
        self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus
    ) -> list[Request]:
        finished: list[Request] = super().finish_requests(request_ids, finished_status)
        if self._calls:
            outcome = _OUTCOMES.get(finished_status, Outcome.COMPLETED)
            for request in finished:
                self._unregister(request.request_id, outcome)
        return finished

    def _register(self, request: Request) -> None:
        now_s = time.monotonic()
        sampling = request.sampling_params
        call = Call(
            call_id=request.request_id,
            arrival_s=now_s,
            prompt_tokens=request.num_prompt_tokens,
            max_output_tokens=request.max_tokens,
            fields=call_fields.from_engine(
                sampling.extra_args if sampling is not None else None, options.call_fields()
            ),
            priority=request.priority,
        )
        self._calls[request.request_id] = call
        self._stack.on_arrival(call, now_s)

    def _unregister(self, request_id: str, outcome: Outcome) -> None:
        call = self._calls.pop(request_id, None)
        if call is not None:
            self._stack.on_finish(call, outcome, time.monotonic())

    def _key_of(self, request: Request) -> StackKey:
        call = self._calls.get(request.request_id)
        return () if call is None else self._stack.key(call, time.monotonic())

    def _refresh_queue(self, now_s: float) -> None:
        """Brings the queue up to date; peeks and pops within a step then always agree."""
        stale = self._stack.stale_calls(now_s)
        if self._queue is None:
            return
        if self._stack.reordered:
            self._stack.reordered = False
            self._rebuild_queue()
        elif stale:
            self._queue.rekey(
                self.requests[call.call_id] for call in stale if call.call_id in self.requests
            )
        if self._queue is not None:
            self._queue.open_step(self._refusal(now_s) if self._stack.gates else None)

    def _rebuild_queue(self) -> None:
        """Sorts all waiting requests anew after a policy was left out."""
        waiting = sorted(self.waiting, key=lambda r: (r.arrival_time, r.request_id))
        if self._stack.orders or self._stack.gates:
            self._queue = self.waiting = PolicyQueue(self._key_of, self.policy)
        else:
            self._queue = None
            self.waiting = create_request_queue(self.policy)
        for request in waiting:
            self.waiting.add_request(request)

    def _refusal(self, now_s: float) -> Callable[[Request], bool]:
        """The admission test of this step; nothing is refused while the engine is idle."""
        decided: dict[Request, bool] = {}
        kv_usage = self.get_kv_cache_usage()

        def refuses(request: Request) -> bool:
            call = self._calls.get(request.request_id)
            if call is None or not self.running:
                return False
            if request not in decided:
                load = Load(len(self.running), len(self.waiting), kv_usage)
                decided[request] = not self._stack.admits(call, load, now_s)
            return decided[request]

        return refuses

    def _note_admissions(self, scheduled: SchedulerOutput, now_s: float) -> None:
        admitted = [new.req_id for new in scheduled.scheduled_new_reqs]
        admitted.extend(scheduled.scheduled_cached_reqs.resumed_req_ids)
        for request_id in admitted:
            call = self._calls.get(request_id)
            if call is None:
                continue
            if call.admitted_s is None:
                call.admitted_s = now_s
            if self._stack.watches_admissions:
                self._stack.on_admission(call, now_s)

    def _note_outputs(self, outputs: dict[int, EngineCoreOutputs]) -> None:
        progressed = []
        for client in outputs.values():
            for output in client.outputs:
                call = self._calls.get(output.request_id)
                if call is None:
                    continue
                call.output_tokens += len(output.new_token_ids)
                if output.finish_reason is not None and self._has_left(output.request_id):
                    self._unregister(output.request_id, Outcome.COMPLETED)
                else:
                    progressed.append(call)
        if self._stack.steps and progressed:
            self._end(self._stack.on_step(progressed, time.monotonic()), outputs)

    def _has_left(self, request_id: str) -> bool:
        """Whether a request is over; a streaming session goes on after its turn's finish reason."""
        request = self.requests.get(request_id)
        return request is None or request.is_finished()

    def _end(self, ended: set[Call], outputs: dict[int, EngineCoreOutputs]) -> None:
        """Ends calls for a policy: blocks are free and clients told in this same step."""
        by_id = {call.call_id: call for call in ended if call.call_id in self._calls}
        if not by_id:
            return
        for request_id in by_id:
            self._unregister(request_id, Outcome.ENDED_BY_POLICY)
        for request in super().finish_requests(list(by_id), RequestStatus.FINISHED_STOPPED):
            client = outputs.setdefault(request.client_index, EngineCoreOutputs())
            client.outputs.append(
                EngineCoreOutput(
                    request_id=request.request_id,
                    new_token_ids=[],
                    finish_reason=request.get_finished_reason(),
                    events=request.take_events(),
                    trace_headers=request.trace_headers,
                )
            )
