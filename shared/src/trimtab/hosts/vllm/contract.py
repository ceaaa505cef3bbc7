"""Every symbol of vLLM that the host relies on, and the check that it still has its shape.

`trimtab doctor` and a test call `broken`; a new vLLM that moved something is named here first.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from importlib import import_module

_FORWARD = (
    "self",
    "layer",
    "query",
    "key",
    "value",
    "kv_cache",
    "attn_metadata",
    "output",
    "output_scale",
    "output_block_scale",
)

METHODS: Mapping[str, tuple[str, ...]] = {
    "vllm.v1.core.sched.interface:SchedulerInterface.add_request": ("self", "request"),
    "vllm.v1.core.sched.interface:SchedulerInterface.schedule": ("self", "throttle_prefills"),
    "vllm.v1.core.sched.interface:SchedulerInterface.update_from_output": (
        "self",
        "scheduler_output",
        "model_runner_output",
    ),
    "vllm.v1.core.sched.interface:SchedulerInterface.finish_requests": (
        "self",
        "request_ids",
        "finished_status",
    ),
    "vllm.v1.core.sched.scheduler:Scheduler.get_kv_cache_usage": ("self",),
    "vllm.v1.core.block_pool:BlockPool.get_num_free_blocks": ("self",),
    "vllm.v1.core.kv_cache_manager:KVCacheManager.evict_blocks": ("self", "block_ids"),
    "vllm.v1.core.kv_cache_manager:KVCacheManager.get_block_ids": ("self", "request_id"),
    "vllm.v1.core.sched.request_queue:create_request_queue": ("policy",),
    "vllm.v1.core.sched.request_queue:RequestQueue.add_request": ("self", "request"),
    "vllm.v1.core.sched.request_queue:RequestQueue.pop_request": ("self",),
    "vllm.v1.core.sched.request_queue:RequestQueue.peek_request": ("self",),
    "vllm.v1.core.sched.request_queue:RequestQueue.prepend_request": ("self", "request"),
    "vllm.v1.core.sched.request_queue:RequestQueue.prepend_requests": ("self", "requests"),
    "vllm.v1.core.sched.request_queue:RequestQueue.remove_request": ("self", "request"),
    "vllm.v1.core.sched.request_queue:RequestQueue.remove_requests": ("self", "requests"),
    "vllm.v1.request:Request.get_finished_reason": ("self",),
    "vllm.v1.request:Request.is_finished": ("self",),
    "vllm.v1.request:Request.take_events": ("self",),
    "vllm.v1.attention.backends.registry:register_backend": ("backend", "class_path", "is_mamba"),
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionMetadataBuilder.build": (
        "self",
        "common_prefix_len",
        "common_attn_metadata",
        "fast_build",
    ),
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl.forward": _FORWARD,
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl.do_kv_cache_update": (
        "self",
        "layer",
        "key",
        "value",
        "kv_cache",
        "slot_mapping",
    ),
    "vllm.v1.attention.backend:AttentionMetadataBuilder.__init__": (
        "self",
        "kv_cache_spec",
        "layer_names",
        "vllm_config",
        "device",
    ),
    "vllm.model_executor.layers.attention_layer_base:AttentionLayerBase.get_kv_cache_spec": (
        "self",
        "vllm_config",
    ),
    "vllm.model_executor.models.llama:LlamaAttention.__init__": (
        "self",
        "config",
        "hidden_size",
        "num_heads",
        "num_kv_heads",
        "max_position_embeddings",
        "quant_config",
        "bias",
        "bias_o_proj",
        "cache_config",
        "prefix",
        "attn_type",
    ),
    "vllm.model_executor.models.llama:LlamaDecoderLayer.__init__": (
        "self",
        "vllm_config",
        "prefix",
        "config",
        "attn_layer_type",
    ),
    "vllm.model_executor.models.llama:LlamaForCausalLM.__init__": (
        "self",
        "vllm_config",
        "prefix",
        "layer_type",
    ),
    "vllm.model_executor.models.llama:LlamaForCausalLM.load_weights": ("self", "weights"),
    "vllm.v1.attention.backends.flash_attn:FlashAttentionMetadataBuilder.build": (
        "self",
        "common_prefix_len",
        "common_attn_metadata",
        "fast_build",
    ),
    "vllm.v1.attention.backends.flash_attn:FlashAttentionImpl.forward": _FORWARD,
    "vllm.v1.attention.backends.triton_attn:TritonAttentionMetadataBuilder.build": (
        "self",
        "common_prefix_len",
        "common_attn_metadata",
        "fast_build",
    ),
    "vllm.v1.attention.backends.triton_attn:TritonAttentionImpl.forward": _FORWARD,
    "vllm.v1.metrics.loggers:StatLoggerBase.record": (
        "self",
        "scheduler_stats",
        "iteration_stats",
        "mm_cache_stats",
        "engine_idx",
    ),
    "vllm.plugins.endpoint_plugins.interface:EndpointPlugin.attach_router": ("self", "app"),
    "vllm.plugins.endpoint_plugins.interface:EndpointPlugin.init_state": (
        "self",
        "engine_client",
        "state",
        "args",
    ),
}
"""Functions by ``module:name`` with their parameters' names."""

FIELDS: Mapping[str, tuple[str, ...]] = {
    "vllm.forward_context:ForwardContext": ("attn_metadata", "no_compile_layers"),
    "vllm.v1.attention.backend:CommonAttentionMetadata": (
        "block_table_tensor",
        "causal",
        "max_query_len",
        "mm_req_doc_ranges",
        "num_actual_tokens",
        "num_reqs",
        "positions",
        "query_start_loc",
        "query_start_loc_cpu",
        "seq_lens",
        "seq_lens_cpu_upper_bound",
        "slot_mapping",
    ),
    "vllm.v1.core.sched.output:NewRequestData": ("req_id", "sampling_params"),
    "vllm.v1.engine:EngineCoreOutput": (
        "finish_reason",
        "new_token_ids",
        "request_id",
        "stop_reason",
    ),
    "vllm.v1.engine:EngineCoreOutputs": ("outputs",),
    "vllm.v1.kv_cache_interface:FullAttentionSpec": (
        "block_size",
        "dtype",
        "head_size",
        "num_kv_heads",
        "state_content_bytes",
    ),
    "vllm.v1.outputs:LogprobsLists": ("logprobs", "cu_num_generated_tokens"),
    "vllm.v1.outputs:ModelRunnerOutput": (
        "logprobs",
        "req_ids",
        "sampled_token_ids",
    ),
}
"""Classes by ``module:name`` with the fields that are read or set on what they hold."""

SCHEDULER_ATTRIBUTES = (
    "connector",
    "finished_req_ids",
    "get_request_counts",
    "kv_cache_config",
    "kv_cache_manager",
    "max_num_scheduled_tokens",
    "num_spec_tokens",
    "policy",
    "requests",
    "running",
    "vllm_config",
    "waiting",
)
"""Attributes that the host reads or replaces on vLLM's scheduler."""

ABSTRACT_QUEUE = frozenset(
    {
        "__bool__",
        "__iter__",
        "__len__",
        "add_request",
        "peek_request",
        "pop_request",
        "prepend_request",
        "prepend_requests",
        "remove_request",
        "remove_requests",
    }
)
"""What a waiting queue must have; a new abstract method would make ours incomplete."""


def _found(path: str) -> object:
    module, _, qualified = path.partition(":")
    found: object = import_module(module)
    for part in qualified.split("."):
        found = getattr(found, part)
    return found


def _method_fault(path: str, parameters: tuple[str, ...]) -> str | None:
    try:
        found = _found(path)
    except (ImportError, AttributeError):
        return f"{path} is gone"
    actual = tuple(inspect.signature(found).parameters)  # type: ignore[arg-type]
    if actual != parameters:
        return f"{path} takes ({', '.join(actual)}), not ({', '.join(parameters)})"
    return None


def _field_faults() -> list[str]:
    faults = []
    for path, fields in FIELDS.items():
        try:
            known = set(inspect.signature(_found(path)).parameters)  # type: ignore[arg-type]
        except (ImportError, AttributeError):
            faults.append(f"{path} is gone")
            continue
        faults += [f"{path} has no field {name!r}" for name in fields if name not in known]
    return faults


def _attribute_faults() -> list[str]:
    from vllm.v1.core.sched.scheduler import Scheduler

    names = set(dir(Scheduler)) | set(Scheduler.__init__.__code__.co_names)
    return [
        f"vLLM's Scheduler has no {name!r}" for name in SCHEDULER_ATTRIBUTES if name not in names
    ]


def _queue_faults() -> list[str]:
    from vllm.v1.core.sched.request_queue import RequestQueue

    abstract = RequestQueue.__abstractmethods__
    return [f"RequestQueue has the new method {name!r}" for name in abstract - ABSTRACT_QUEUE]


def broken() -> list[str]:
    """One sentence for each symbol that vLLM, as installed, no longer has in this shape."""
    methods = (_method_fault(path, parameters) for path, parameters in METHODS.items())
    return [
        *(fault for fault in methods if fault),
        *_field_faults(),
        *_attribute_faults(),
        *_queue_faults(),
    ]
