"""The host scheduler: vLLM's own, with trimtab's policies deciding what they are about.

Every override is a public method of `vllm.v1.core.sched.interface.SchedulerInterface`; what else of
vLLM this relies on is listed in `trimtab.hosts.vllm.contract` and checked by a test.
"""

from __future__ import annotations

import copy
import logging
import re
import time
from collections.abc import Callable, Iterable
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import SchedulingPolicy, create_request_queue
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from trimtab.core.policy import Call, Load, Outcome
from trimtab.core.policy_stack import PolicyStack, StackKey
from trimtab.hosts import versions
from trimtab.hosts.vllm import call_fields, options
from trimtab.hosts.vllm.blocks import blocks_short, private_blocks
from trimtab.hosts.vllm.engine_call import EngineCall
from trimtab.hosts.vllm.engine_view import EngineView
from trimtab.hosts.vllm.looks import Looks
from trimtab.hosts.vllm.token_logprobs import TokenLogprobs
from trimtab.hosts.vllm.waiting_queue import PolicyQueue

logger = logging.getLogger(__name__)

_OF_REASONS: dict[FinishReason | None, Outcome] = {
    FinishReason.LENGTH: Outcome.CUT,
    FinishReason.ERROR: Outcome.FAILED,
    FinishReason.ABORT: Outcome.ABORTED,
    FinishReason.REPETITION: Outcome.REPEATED,
}

_OUTCOMES = {
    RequestStatus.FINISHED_LENGTH_CAPPED: Outcome.CUT,
    RequestStatus.FINISHED_REPETITION: Outcome.REPEATED,
    RequestStatus.FINISHED_ABORTED: Outcome.ABORTED,
    RequestStatus.FINISHED_IGNORED: Outcome.FAILED,
    RequestStatus.FINISHED_ERROR: Outcome.FAILED,
}


_CHILD = re.compile(r"(\d{1,9})_(.+)", re.DOTALL)
"""The id that vLLM gives to each call of a request with ``n`` > 1."""


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
        self._calls: dict[str, EngineCall] = {}
        self._looks = Looks(1 + self.num_spec_tokens)
        self._token_logprobs = TokenLogprobs()
        self._ended: list[tuple[Request, Call]] = []
        self._view = EngineView(
            self.vllm_config.model_config, by_priority=self.policy is SchedulingPolicy.PRIORITY
        )
        self._stack.attach(self._view)
        self._queue: PolicyQueue | None = None
        if self._stack.orders or self._stack.gates:
            self._queue = self.waiting = PolicyQueue(self._key_of, self.policy)
        if self._stack:
            logger.info("trimtab policies at work: %s", ", ".join(self._stack.names))

    def add_request(self, request: Request) -> None:
        if self._stack and request.request_id not in self.requests:
            self._register(request)
        super().add_request(request)
        if request.request_id in self._calls:
            self._watch(self._calls[request.request_id])

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        if not self._calls:
            return super().schedule(throttle_prefills)
        now_s = time.monotonic()
        if self._stack.relieves:
            self._make_room(now_s)
        self._refresh_queue(now_s)
        scheduled = super().schedule(throttle_prefills)
        self._note_admissions(scheduled, now_s)
        return scheduled

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        if self._calls:
            self._note_outputs(outputs, model_runner_output)
        if self._ended:
            self._tell_ended(outputs)
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
        child = _CHILD.fullmatch(request.request_id)
        call = EngineCall(
            request,
            now_s,
            call_fields.from_engine(
                sampling.extra_args if sampling is not None else None, options.call_fields()
            ),
            request_id=child[2] if child else request.request_id,
            branch=int(child[1]) if child else 0,
        )
        self._calls[request.request_id] = call
        self._view.requests[call] = request
        self._stack.on_arrival(call, now_s)
        if self._stack.reads_logprobs:
            wanted = self._stack.wants_logprobs(call)
            if wanted is not None:
                self._token_logprobs.add(call, wanted)

    def _watch(self, call: Call) -> None:
        """Has policies told of a call when it has come as far as one of them asks."""
        if self._stack.steps:
            self._looks.forget(call)
            tokens = self._stack.watches(call)
            if tokens is not None:
                self._looks.expect(call, tokens)

    def _unregister(self, request_id: str, outcome: Outcome) -> None:
        call = self._calls.pop(request_id, None)
        if call is not None:
            self._stack.on_finish(call, outcome, time.monotonic())
            self._looks.forget(call)
            self._token_logprobs.remove(request_id)
            del self._view.requests[call]
            call.leave()

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

    def _make_room(self, now_s: float) -> None:
        """Ends calls that policies give up, where vLLM would have to preempt one in this step."""
        while blocks_short(self) > 0:
            call = self._stack.relieve(now_s)
            if call is None or call.call_id not in self._calls:
                return
            self._end([call])

    def _note_admissions(self, scheduled: SchedulerOutput, now_s: float) -> None:
        if self._token_logprobs:
            self._ask_for_logprobs(scheduled)
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

    def _ask_for_logprobs(self, scheduled: SchedulerOutput) -> None:
        """Has the worker return logprobs that policies need; the request itself stays as it was."""
        for new in scheduled.scheduled_new_reqs:
            wanted, sampling = self._token_logprobs.wanted(new.req_id), new.sampling_params
            if wanted is None or sampling is None or sampling.logprobs == -1:
                continue
            if sampling.logprobs is None or sampling.logprobs < wanted:
                new.sampling_params = copy.copy(sampling)
                new.sampling_params.logprobs = wanted

    def _note_outputs(
        self, outputs: dict[int, EngineCoreOutputs], model_output: ModelRunnerOutput
    ) -> None:
        if self._token_logprobs and model_output.logprobs is not None:
            self._show_logprobs(outputs, model_output)
        for call, output in self._finished(outputs) if self.finished_req_ids else ():
            self._finish(call, output)
        if self._stack.steps and outputs:
            due = self._looks.due()
            self._end(self._stack.on_step(due, time.monotonic()))
            for call in due:
                if call.call_id in self._calls:
                    self._watch(call)

    def _finished(
        self, outputs: dict[int, EngineCoreOutputs]
    ) -> list[tuple[Call, EngineCoreOutput]]:
        return [
            (call, output)
            for client in outputs.values()
            for output in client.outputs
            if output.finish_reason is not None and self._has_left(output.request_id)
            if (call := self._calls.get(output.request_id)) is not None
        ]

    def _show_logprobs(
        self, outputs: dict[int, EngineCoreOutputs], model_output: ModelRunnerOutput
    ) -> None:
        for calls, logprobs in self._token_logprobs.by_round(outputs, model_output):
            self._stack.on_logprobs(calls, logprobs)

    def _finish(self, call: Call, output: EngineCoreOutput) -> None:
        """A call has come to its end: policies are told, and may say what its client is told."""
        self._view.stop_reasons[call] = output.stop_reason
        outcome = _OF_REASONS.get(output.finish_reason, Outcome.COMPLETED)
        self._unregister(call.call_id, outcome)
        del self._view.stop_reasons[call]
        if call.note is not None:
            output.stop_reason = call.note

    def _has_left(self, request_id: str) -> bool:
        """Whether a request is over; a streaming session goes on after its turn's finish reason."""
        request = self.requests.get(request_id)
        return request is None or request.is_finished()

    def _end(self, ended: Iterable[Call]) -> None:
        """Ends calls for a policy: their blocks are free at once."""
        by_id = {call.call_id: call for call in ended if call.call_id in self._calls}
        if not by_id:
            return
        for request_id, call in by_id.items():
            if call.forget_kv:
                self.kv_cache_manager.evict_blocks(private_blocks(self, request_id))
        for request in super().finish_requests(list(by_id), RequestStatus.FINISHED_STOPPED):
            self._ended.append((request, by_id[request.request_id]))
        for request_id in by_id:
            self._unregister(request_id, Outcome.ENDED_BY_POLICY)

    def _tell_ended(self, outputs: dict[int, EngineCoreOutputs]) -> None:
        """Tells clients of the calls that were ended, with this step's outputs."""
        for request, call in self._ended:
            client = outputs.setdefault(request.client_index, EngineCoreOutputs())
            client.outputs.append(
                EngineCoreOutput(
                    request_id=request.request_id,
                    new_token_ids=[],
                    finish_reason=request.get_finished_reason(),
                    stop_reason=call.note,
                    events=request.take_events(),
                    trace_headers=request.trace_headers,
                )
            )
        self._ended.clear()
