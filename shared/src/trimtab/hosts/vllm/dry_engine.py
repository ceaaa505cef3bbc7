"""vLLM's real scheduler and block pool, driven without a model.

For benchmarks and tests that need the scheduler's decisions and not the tokens: each step "samples"
one fixed token for every request whose prompt is computed, or the end of the text.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.config import CacheConfig, DeviceConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import LogprobsLists, ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

_MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "max_position_embeddings": 65536,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "torch_dtype": "float32",
    "vocab_size": 1000,
}
_END_TOKEN = 2
_TOKEN = 7


class DryEngine:
    """A scheduler of a given class with a block pool of a given size.

    Args:
        scheduler_cls: vLLM's own scheduler or a subclass.
        blocks: size of the block pool, in blocks of ``block_size`` tokens.
        max_num_seqs, max_num_batched_tokens, policy: as the flags of ``vllm serve``.
        async_scheduling: whether to run one step ahead of the outputs, as on a GPU.
        additional_config: as vLLM's ``--additional-config``.
        prefix_caching: whether prompts share blocks.
        logprobs: of the next tokens of requests, by their ids, the logprobs: float32
            [requests, 1 + k], the tokens' own and the k largest; only asked where a request of the
            step wants some.
    """

    def __init__(
        self,
        scheduler_cls: type[Scheduler],
        *,
        blocks: int = 10_000,
        block_size: int = 16,
        max_num_seqs: int = 16,
        max_num_batched_tokens: int = 2048,
        policy: Literal["fcfs", "priority"] = "fcfs",
        async_scheduling: bool = False,
        additional_config: Mapping[str, Any] | None = None,
        prefix_caching: bool = True,
        logprobs: Callable[[Sequence[str]], NDArray[np.float32]] | None = None,
    ) -> None:
        init_none_hash(sha256)
        self._logprobs_of = logprobs
        self._no_ids = np.zeros((0, 0), dtype=np.int32)
        self._asking: set[str] = set()
        self._hasher = get_request_block_hasher(block_size, sha256)
        self._in_flight: list[SchedulerOutput] = []
        self._ends: dict[str, tuple[int, int]] = {}
        self._ahead = 1 if async_scheduling else 0
        config = _config(
            blocks, block_size, max_num_seqs, max_num_batched_tokens, policy, prefix_caching
        )
        config.additional_config = dict(additional_config or {})
        # VllmConfig switches it off on the CPU platform, where no step is in flight.
        config.scheduler_config.async_scheduling = async_scheduling
        spec = FullAttentionSpec(
            block_size=block_size, num_kv_heads=1, head_size=1, dtype=torch.float32
        )
        self.scheduler = scheduler_cls(
            vllm_config=config,
            kv_cache_config=KVCacheConfig(
                num_blocks=blocks,
                kv_cache_tensors=[],
                kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
            ),
            structured_output_manager=StructuredOutputManager(config),
            block_size=block_size,
            log_stats=True,
        )

    def add(
        self,
        request_id: str,
        prompt: list[int],
        max_tokens: int,
        *,
        priority: int = 0,
        arrival_time: float = 0.0,
        xargs: Mapping[str, Any] | None = None,
        ends_after: int | None = None,
        last_token: int = _TOKEN,
    ) -> Request:
        """Hands a request to the scheduler.

        Its text ends by itself with token ``ends_after``; the one before that is ``last_token``.
        """
        if ends_after is not None:
            self._ends[request_id] = (ends_after, last_token)
        sampling = SamplingParams(max_tokens=max_tokens, extra_args=dict(xargs or {}))
        sampling.update_from_generation_config({}, eos_token_id=_END_TOKEN)
        request = Request(
            request_id=request_id,
            prompt_token_ids=prompt,
            sampling_params=sampling,
            pooling_params=None,
            arrival_time=arrival_time,
            priority=priority,
            block_hasher=self._hasher,
        )
        self.scheduler.add_request(request)
        return request

    def step(self) -> tuple[SchedulerOutput, dict[int, EngineCoreOutputs]]:
        """Schedules a step and takes in the outputs of the step that is due."""
        scheduled = self.scheduler.schedule()
        self._in_flight.append(scheduled)
        outputs: dict[int, EngineCoreOutputs] = {}
        if len(self._in_flight) > self._ahead:
            due = self._in_flight.pop(0)
            outputs = self.scheduler.update_from_output(due, self._sampled(due))
        return scheduled, outputs

    def drain(self) -> None:
        """Takes in the outputs of all steps in flight."""
        while self._in_flight:
            due = self._in_flight.pop(0)
            self.scheduler.update_from_output(due, self._sampled(due))

    def _sampled(self, scheduled: SchedulerOutput) -> ModelRunnerOutput:
        ids = list(scheduled.num_scheduled_tokens)
        starts = {new.req_id: new.num_computed_tokens for new in scheduled.scheduled_new_reqs}
        cached = scheduled.scheduled_cached_reqs
        starts.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        return ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={request_id: index for index, request_id in enumerate(ids)},
            sampled_token_ids=[
                [self._token(i)] if self._samples(i, starts[i], scheduled) else [] for i in ids
            ],
            logprobs=self._logprobs(ids, scheduled),
            prompt_logprobs_dict={},
            pooler_output=[],
        )

    def _logprobs(self, ids: list[str], scheduled: SchedulerOutput) -> LogprobsLists | None:
        """A row for each request of the step, where some request that runs has asked for one."""
        if self._logprobs_of is None:
            return None
        for new in scheduled.scheduled_new_reqs:
            if new.sampling_params is not None and new.sampling_params.logprobs is not None:
                self._asking.add(new.req_id)
        if self._asking.isdisjoint(ids):
            return None
        table = self._logprobs_of(ids)
        if self._no_ids.shape != table.shape:
            self._no_ids = np.zeros(table.shape, dtype=np.int32)
        return LogprobsLists(self._no_ids, table, self._no_ids[:, 0])

    def _generated(self, request_id: str) -> int:
        request = self.scheduler.requests.get(request_id)
        return 0 if request is None else request.num_output_tokens

    def _token(self, request_id: str) -> int:
        if request_id not in self._ends:
            return _TOKEN
        length, last_token = self._ends[request_id]
        left = length - self._generated(request_id)
        return _END_TOKEN if left <= 1 else last_token if left == 2 else _TOKEN

    def _samples(self, request_id: str, start: int, scheduled: SchedulerOutput) -> bool:
        """Whether a step computes the last known token of a request, so that a new one follows."""
        request = self.scheduler.requests.get(request_id)
        end = start + scheduled.num_scheduled_tokens[request_id]
        return request is None or end >= request.num_tokens


def _config(
    blocks: int,
    block_size: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    policy: Literal["fcfs", "priority"],
    prefix_caching: bool,
) -> VllmConfig:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(_MODEL))
        model = ModelConfig(
            model=folder, skip_tokenizer_init=True, dtype="float32", max_model_len=32768
        )
    cache = CacheConfig(block_size=block_size, enable_prefix_caching=prefix_caching)
    cache.num_gpu_blocks = blocks
    return VllmConfig(
        model_config=model,
        cache_config=cache,
        device_config=DeviceConfig("cpu"),
        scheduler_config=SchedulerConfig(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=32768,
            is_encoder_decoder=False,
            enable_chunked_prefill=True,
            policy=policy,
        ),
    )
