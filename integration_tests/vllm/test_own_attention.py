"""Models whose attention is a plugin's own: how vLLM learns of them, and what is refused."""

from __future__ import annotations

from importlib.metadata import EntryPoint, EntryPoints
from types import SimpleNamespace

import pytest
import torch
from vllm import ModelRegistry
from vllm.platforms import current_platform

from trimtab.core.errors import BadInput
from trimtab.hosts.vllm import general, own_attention
from trimtab.hosts.vllm.own_attention import LayerSizes, OwnAttentionLayer, made

pytestmark = pytest.mark.integration

SIZES = LayerSizes(hidden=64, heads=4, kv_heads=2, head_size=16)


def test_vllm_learns_every_architecture_that_plugins_have_attention_for():
    general.register()
    known = own_attention.architectures()
    assert known.keys() <= set(ModelRegistry.get_supported_archs())
    assert known["TrimtabNativeLlamaForCausalLM"] == "trimtab.sparse.paged_native:make"


def test_the_first_architecture_that_a_plugin_knows_says_whose_attention_it_is(monkeypatch):
    ours = EntryPoint("OwnForCausalLM", "builtins:divmod", own_attention.GROUP)
    everything = EntryPoints([ours])
    monkeypatch.setattr(own_attention, "entry_points", everything.select)
    assert made_of("LlamaForCausalLM", "OwnForCausalLM") == "attention"
    with pytest.raises(BadInput, match=r"no plugin has attention for Llama.*OwnForCausalLM"):
        made_of("LlamaForCausalLM")


def made_of(*architectures):
    class Config:
        def __divmod__(self, sizes):
            return "attention" if sizes is SIZES else None

    config = Config()
    config.architectures = list(architectures)
    return made(config, SIZES)


def engine(cache="auto", *, drafts=None, contexts=1):
    return SimpleNamespace(
        cache_config=SimpleNamespace(cache_dtype=cache),
        speculative_config=drafts,
        parallel_config=SimpleNamespace(decode_context_parallel_size=contexts),
        model_config=SimpleNamespace(
            architectures=["OwnForCausalLM"],
            dtype=torch.float32,
            get_total_num_kv_heads=lambda: 2,
        ),
    )


@pytest.mark.parametrize(
    ("options", "ranks", "cpu", "fault"),
    [
        ({"cache": "fp8"}, 1, True, "the cache is in fp8"),
        ({"drafts": object()}, 1, True, "tokens are drafted"),
        ({"contexts": 2}, 1, True, "contexts are split over ranks"),
        ({}, 4, True, "4 ranks share 2 KV heads"),
        ({}, 1, False, "the device is"),
    ],
)
def test_what_such_layers_do_not_know_is_refused_in_a_sentence(
    monkeypatch, options, ranks, cpu, fault
):
    monkeypatch.setattr(own_attention, "get_current_vllm_config", lambda: engine(**options))
    monkeypatch.setattr(own_attention, "get_tensor_model_parallel_world_size", lambda: ranks)
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: cpu)
    with pytest.raises(BadInput, match=fault):
        OwnAttentionLayer(SimpleNamespace(architectures=[]), SIZES, None, "layers.0.attn")
