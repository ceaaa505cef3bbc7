"""The backend ``CUSTOM`` on GPUs, as far as it can be told without one; on a GPU, its numbers."""

from __future__ import annotations

import inspect
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.platforms.interface import DeviceCapability
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from trimtab.hosts.vllm import general, gpu_attention
from trimtab.hosts.vllm.cache_layout import PagedKeys
from trimtab.hosts.vllm.prefills import LayerShape, Prefill
from trimtab.kernels.sparse.paged_prefill import PagedCache
from trimtab.kernels.sparse.prefill import Plan
from trimtab.kernels.sparse.selectors import Selection
from trimtab.sparse import vllm_prefill
from trimtab.sparse.gpu_plan import plan_on_gpu

pytestmark = pytest.mark.integration

BACKENDS = ("TrimtabFlashAttention", "TrimtabTritonAttention")


def run(script, *arguments):
    """On the GPU if there is one, else in Triton's interpreter."""
    how = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    environment = {**os.environ, **how, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, Path(__file__).with_name(script), *arguments]
    subprocess.run(command, env=environment, check=True, timeout=300)


def test_the_kernels_agree_with_dense_attention_and_with_the_cpus():
    run("checked_prefill.py")


def test_a_mixed_batch_is_what_a_cpu_and_dense_attention_make_of_it():
    run("checked_backend.py", *BACKENDS)


@pytest.mark.parametrize("name", BACKENDS)
def test_the_classes_have_all_that_vllm_asks_of_a_backend(name):
    backend = getattr(gpu_attention, name)
    parent = backend.__mro__[1]
    pairs = [
        (backend, parent),
        (backend.get_impl_cls(), parent.get_impl_cls()),
        (backend.get_builder_cls(), parent.get_builder_cls()),
    ]
    for ours, theirs in pairs:
        assert issubclass(ours, theirs)
        assert not ours.__abstractmethods__
        for method, function in vars(ours).items():
            if inspect.isroutine(function) and not method.startswith("_"):
                assert hasattr(theirs, method)
            if callable(getattr(ours, method)) and hasattr(theirs, method) and method[0] != "_":
                wanted = inspect.signature(getattr(theirs, method)).parameters
                assert list(inspect.signature(getattr(ours, method)).parameters) == list(wanted)


@pytest.mark.parametrize("name", BACKENDS)
def test_vllm_finds_the_class_again_and_takes_it_for_what_its_parent_takes(name):
    backend = getattr(gpu_attention, name)
    module, qualified = backend.full_cls_name()
    assert resolve_obj_by_qualname(f"{module}.{qualified}") is backend
    assert AttentionBackendEnum[backend.get_name()] is AttentionBackendEnum.CUSTOM
    asked = {
        "head_size": 128,
        "dtype": torch.bfloat16,
        "kv_cache_dtype": "auto",
        "block_size": 16,
        "use_mla": False,
        "has_sink": False,
        "use_sparse": False,
        "use_mm_prefix": False,
        "use_per_head_quant_scales": False,
        "device_capability": DeviceCapability(9, 0),
        "attn_type": AttentionType.DECODER,
    }
    assert backend.validate_configuration(**asked) == []
    assert backend.validate_configuration(**{**asked, "use_mla": True}) != []
    assert backend.validate_configuration(**asked, use_adaptive_verification=True) != []


@pytest.mark.parametrize(("nvidia", "name"), [(True, BACKENDS[0]), (False, BACKENDS[1])])
def test_custom_is_registered_where_there_is_a_gpu(monkeypatch, nvidia, name):
    from vllm import platforms

    class Gpu:
        is_cpu = staticmethod(lambda: False)
        is_cuda_alike = staticmethod(lambda: True)
        is_cuda = staticmethod(lambda: nvidia)

    monkeypatch.setattr(platforms, "current_platform", Gpu)
    try:
        general.register()
        assert AttentionBackendEnum.CUSTOM.get_class() is getattr(gpu_attention, name)
    finally:
        AttentionBackendEnum.CUSTOM.clear_override()


def layers(dense="FLASH_ATTN", heads=32, head_size=128):
    return LayerShape(heads, heads // 4, head_size, 16, 9, dense)


selections = st.builds(
    Selection,
    st.sampled_from(["mass", "pooled", "antidiagonal", "top", "minmax", "fixed", "oracle"]),
    top=st.integers(3, 64),
)


@given(
    st.integers(64, 1 << 17),
    st.integers(0, 1 << 17),
    st.sampled_from([1, 8, 64]),
    st.sampled_from([64, 128, 256]),
    st.sampled_from(["FLASH_ATTN", "TRITON_ATTN"]),
    selections,
)
def test_what_is_chosen_is_never_predicted_slower_than_dense(
    queries, before, heads, head_size, dense, selection
):
    shape = layers(dense, heads, head_size)
    found = plan_on_gpu(queries, before + queries, shape, selection)
    assert 0 < found.chosen_s <= found.dense_s
    assert (found.path == "sparse") == (found.dense_s >= 1.1 * found.sparse_s)


def test_short_prompts_stay_dense_and_long_ones_of_few_blocks_do_not():
    few = Selection("top", top=16)
    assert plan_on_gpu(2048, 2048, layers(), few).path == "dense"
    long = plan_on_gpu(65536, 65536, layers(), few)
    assert long.path == "sparse"
    assert long.explain().startswith("sparse: predicted ")
    assert "FLASH_ATTN" in long.explain()
    beneath = [
        plan_on_gpu(65536, 65536, layers(n), few).dense_s for n in ("TRITON_ATTN", "FLASH_ATTN")
    ]
    assert beneath[0] > beneath[1]


def test_the_plugin_takes_what_the_model_says_pays():
    taker = vllm_prefill.make({"selector": "top"})
    assert taker.wants(65536, 65536, layers())
    assert not taker.wants(2048, 2048, layers())
    assert not taker.wants(65536, 65536, layers(head_size=512))
    assert not taker.wants(1, 65536, layers())
    assert not vllm_prefill.make({"mass": 1}).wants(65536, 65536, layers())
    assert vllm_prefill.make({"selector": "top", "least_gain": 0}).wants(2048, 2048, layers())


def prefill_of(tokens, layer, last=None):
    """A request's prefill on a CPU, in pages of 64 tokens, and its dense attention.

    Only the last queries are new, if their number is given.
    """
    generator = torch.Generator().manual_seed(tokens)
    q = torch.randn(tokens, 2, 16, generator=generator)
    k, v = (torch.randn(tokens, 1, 16, generator=generator) for _ in range(2))
    pages = torch.randperm(-(-tokens // 64), generator=generator)
    storage = torch.zeros(len(pages), 1, 64, 32)
    at = torch.arange(tokens)
    storage[pages[at // 64], :, at % 64] = torch.cat([k, v], -1)
    dims, places = torch.arange(16), torch.arange(64) * 32
    cache = PagedKeys(storage, 64, 1, 64 * 32, 64 * 32, places, places, dims, dims + 16)
    heads_first = (x.transpose(0, 1) for x in (q, k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(
        *heads_first, is_causal=True, scale=1.0, enable_gqa=True
    ).transpose(0, 1)
    new = slice(tokens - (last or tokens), tokens)
    q, k, expected = q[new], k[new], expected[new]
    return Prefill(layer, q, k, torch.empty_like(q), cache, pages, tokens, 1.0), expected


def test_what_would_keep_all_blocks_is_left_to_dense_attention_unless_asked_for():
    """So that where the selection covers everything, vLLM's own bits come out."""
    on_cpu = LayerShape(9, 3, 64, 128, 0, "CPU_ATTN")
    every = {"selector": "top", "top": 1000, "min_prompt": 128}
    for queries, keys in ((512, 700), (20_000, 40_000)):
        assert not vllm_prefill.make(every).wants(queries, keys, on_cpu)
        assert vllm_prefill.make({**every, "least_gain": 0}).wants(queries, keys, on_cpu)
    assert vllm_prefill.make({"selector": "top"}).wants(4096, 4096, on_cpu)


def test_the_first_layers_stay_dense_where_they_are_told_to():
    few = {"selector": "fixed", "first": 0, "recent": 1, "min_prompt": 64, "dense_layers": 2}
    taker = vllm_prefill.make(few)
    for number in range(4):
        work, expected = prefill_of(300, f"model.layers.{number}.self_attn.attn", last=200)
        taker.prefill(work)
        off = float((work.out - expected).abs().max())
        assert (off < 1e-5) == (number < 2)


def test_a_prefill_is_told_of_with_what_was_predicted_for_it(monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    monkeypatch.setattr(vllm_prefill, "plan", lambda q, k, *_: Plan("compiled", {"dense": q / k}))
    caplog.set_level(logging.INFO, "vllm.trimtab.sparse")
    taker = vllm_prefill.make({"selector": "top", "top": 3, "min_prompt": 64})
    on_cpu = LayerShape(2, 1, 16, 64, 0, "CPU_ATTN")
    for queries, keys in ((200, 400), (300, 300), (100, 300)):
        assert taker.wants(queries, keys, on_cpu)
    for last in (300, 200):
        work, _ = prefill_of(300 if last == 300 else 400, "layers.5.attn", last)
        taker.prefill(work)
    assert caplog.messages == []  # layers may follow until the next step begins
    for _ in range(2):
        assert not taker.wants(1, 301, on_cpu)
    (line,) = caplog.messages
    assert "sparse prefill of 300 tokens" in line
    assert Plan("compiled", {"dense": 1.0}).explain() in line


def test_the_log_tells_the_mean_of_the_layers_that_were_sparse(monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    monkeypatch.setattr(vllm_prefill, "plan", lambda *_: Plan("compiled", {"dense": 1.0}))
    shares = iter([1.0, 0.8, 0.3, 0.4, 0.1, 0.1])
    monkeypatch.setattr(vllm_prefill, "sparse_prefill", lambda **_: next(shares))
    caplog.set_level(logging.INFO, "vllm.trimtab.sparse")
    taker = vllm_prefill.make({"min_prompt": 64, "dense_layers": 1})
    on_cpu = LayerShape(2, 1, 16, 64, 0, "CPU_ATTN")
    for _ in range(2):  # one request: the second's shares are not looked at
        assert taker.wants(300, 300, on_cpu)
        for layer in range(4 if not caplog.messages else 2):
            work, _ = prefill_of(300, f"layers.{layer}.attn", 300)
            taker.prefill(work)
    (line,) = caplog.messages
    assert "of 300 tokens kept 50 % of the blocks, the mean of 3 layers with 30 to 80 %" in line


def test_a_cache_whose_keys_and_values_lie_differently_is_refused():
    page = torch.zeros(3, 2, 16, 32)
    k, v = page.split(16, -1)
    pages = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="same sizes and strides"):
        PagedCache(k, v.contiguous(), pages)
    with pytest.raises(ValueError, match="side by side"):
        PagedCache(k.mT, v.mT, pages)
