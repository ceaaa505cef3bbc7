"""What vLLM calls in each of its processes, before it chooses models and attention."""

from __future__ import annotations

from importlib.metadata import entry_points

_MODEL = "trimtab.hosts.vllm.llama:LlamaWithOwnAttention"


def register() -> None:
    """Registers models with attention of plugins' own, and the attention backend."""
    from vllm import ModelRegistry
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    for architecture in entry_points(group="trimtab.vllm_attention").names:
        ModelRegistry.register_model(architecture, _MODEL)
    if current_platform.is_cpu():
        register_backend(
            AttentionBackendEnum.CPU_ATTN, "trimtab.hosts.vllm.attention.TrimtabCpuAttention"
        )
    elif current_platform.is_cuda_alike():
        of = "TrimtabFlashAttention" if current_platform.is_cuda() else "TrimtabTritonAttention"
        register_backend(AttentionBackendEnum.CUSTOM, f"trimtab.hosts.vllm.gpu_attention.{of}")
