"""What vLLM calls in each of its processes, before it chooses an attention backend."""

from __future__ import annotations


def register() -> None:
    """Registers the attention backend on a CPU; elsewhere vLLM keeps its own."""
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if current_platform.is_cpu():
        register_backend(
            AttentionBackendEnum.CPU_ATTN, "trimtab.hosts.vllm.attention.TrimtabCpuAttention"
        )
