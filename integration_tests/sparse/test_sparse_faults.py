"""Odd and wrong input to sparse attention: what must not leak, overflow, grow, or go unsaid.

The Triton kernels get the same in `interpreted_faults.py`, the compiled blocks in
`test_block_sparse_builds.py`.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from math import isnan
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
from vllm import logger as vllm_logger
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from trimtab.core.errors import BadInput
from trimtab.hosts.vllm import general, gpu_attention
from trimtab.hosts.vllm.attention import TrimtabCpuAttention
from trimtab.hosts.vllm.prefills import prefiller
from trimtab.hosts.vllm.small_model import small_model
from trimtab.kernels.sparse import (
    Paging,
    SparseShape,
    Windows,
    blockwise,
    compressed_attention,
    naive,
    native_sparse_attention,
    operators,
    paged_native_sparse_attention,
    paged_selected_attention,
    published,
    select_blocks,
    selected_attention,
    sliding_attention,
)
from trimtab.sparse import SparseConfig
from trimtab.sparse.in_transformers import register
from trimtab.sparse.nsa import NSAAttention

pytestmark = pytest.mark.integration

SMALL = SparseShape(window=8, stride=4, block=16, top=3, first=1, recent=1, sliding=24)
WAYS = pytest.mark.parametrize("as_published", [False, True])


def ends(*lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def drawn(seed, *shapes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def gradients(leaves, *outs):
    torch.autograd.backward(outs, [x.detach().sin() for x in outs])
    return [x.grad for x in leaves]


@WAYS
@pytest.mark.parametrize("fault", [float("nan"), float("inf")])
def test_nothing_leaks_from_blocks_that_other_queries_chose(as_published, fault):
    """Even queries choose blocks 0 and 2, odd ones 1 and 3, of which 1 holds no numbers."""
    ids = torch.tensor([[0, 2], [1, 3]]).int()[torch.arange(48) % 2][None]
    found = []
    for added in (0.0, fault):
        leaves = drawn(1, (48, 2, 8), (64, 1, 8), (64, 1, 8))
        leaves[2][16:32] += added
        leaves = [x.requires_grad_() for x in leaves]
        out, lse = selected_attention(
            *leaves, ids, ends(48), ends(64), block=16, as_published=as_published
        )
        dq, dk, dv = gradients(leaves, out)
        even = [x.unflatten(0, (-1, 32))[:, :16] for x in (dk, dv)]
        found.append([out[::2], lse, dq[::2], *even])
        assert out[1::2].isfinite().all() == (added == 0)
    for clean, faulty in zip(*found, strict=True):
        assert torch.equal(clean, faulty)


def packed_branches():
    """Each branch of two sequences packed after one another, and its tensors."""
    lengths = (29, 11)
    cu, cu_entries = ends(*lengths), ends(*map(SMALL.entries, lengths))
    tensors = drawn(12, (40, 2, 8), (40, 1, 8), (40, 1, 8), (40, 2, 8))
    q, k, v, above = tensors
    ids = torch.rand(1, 40, 3, generator=torch.Generator().manual_seed(12)).argsort(-1)[..., :2]
    few = int(cu_entries[-1])
    for as_published in (False, True):
        way = {"block": 16, "as_published": as_published}
        yield (
            lambda *x, way=way: selected_attention(*x, ids.int(), cu, cu, **way),
            tensors,
            (20, 31),
        )
    yield lambda *x: sliding_attention(*x, cu, cu, window=9), tensors, (20, 31)
    yield (
        lambda *x: compressed_attention(*x, cu, cu, cu_entries, SMALL),
        (q, k[:few], v[:few], above),
        (3, few - 1),
    )


def found(attend, leaves, above):
    leaves = [x.clone().requires_grad_() for x in leaves]
    out, lse = attend(*leaves)
    out.backward(above)
    return out.detach(), lse.detach(), leaves[0].grad


def put(x, token, value):
    x = x.clone()
    x[token, 0, 3] = value
    return x


def test_what_is_infinite_or_no_number_reaches_those_that_see_it_and_no_others():
    """Who sees a token is told by those whose output another value of it changes."""
    for attend, (q, k, v, above), tokens in packed_branches():
        clean = found(attend, (q, k, v), above)
        for token in tokens:
            sees = (attend(q, k, put(v, token, 5.0))[0] != clean[0]).any(-1)
            assert sees.any()
            assert not sees.all()
            for odd in (float("nan"), float("inf"), float("-inf")):
                expected = clean[0].clone()
                expected[..., 3] = expected[..., 3].masked_fill(sees, odd)
                of_v, of_k = (
                    found(attend, x, above)
                    for x in ((q, k, put(v, token, odd)), (q, put(k, token, odd), v))
                )
                torch.testing.assert_close(of_v[0], expected, atol=0, rtol=0, equal_nan=True)
                assert torch.equal(of_v[1], clean[1])
                for faulty, wanted in zip((*of_v[2:], *of_k), (*clean[2:], *clean), strict=True):
                    assert torch.equal(faulty[~sees], wanted[~sees])
                assert not isnan(odd) or of_k[0][sees].isnan().all()


def branches(q, k, v):
    """Each branch of one sequence, and its twin."""
    ids = torch.arange(4).int().expand(k.shape[1], len(q), 4)
    cu, scale, entries = (ends(len(q)), ends(len(k))), q.shape[-1] ** -0.5, SMALL.entries(len(k))
    few_k, few_v = k[:entries], v[:entries]
    yield (
        lambda q, k, v: selected_attention(q, k, v, ids, *cu, block=16),
        lambda q, k, v: naive.selected(q, k, v, ids, 16, scale),
        (q, k, v),
    )
    yield (
        lambda q, k, v: selected_attention(q, k, v, ids, *cu, block=16, as_published=True),
        lambda q, k, v: naive.selected(q, k, v, ids, 16, scale),
        (q, k, v),
    )
    yield (
        lambda q, k, v: sliding_attention(q, k, v, *cu, window=24),
        lambda q, k, v: naive.sliding(q, k, v, 24, scale),
        (q, k, v),
    )
    yield (
        lambda q, k, v: compressed_attention(q, k, v, *cu, ends(entries), SMALL),
        lambda q, k, v: naive.compressed(q, k, v, len(cu[1]) and int(cu[1][-1]), SMALL, scale)[:2],
        (q, few_k, few_v),
    )


def test_logits_of_ten_thousand_in_half_precision_stay_finite_in_every_branch():
    q, k, v = drawn(2, (40, 2, 16), (64, 1, 16), (64, 1, 16), dtype=torch.float16)
    q, k = q * 100, k * 100
    logits = torch.einsum("qhd,kd->hqk", q.double(), k[:, 0].double()) / 4
    assert logits.min() < -10_000
    for attend, twin, tensors in branches(q, k, v):
        leaves = [x.clone().requires_grad_() for x in tensors]
        out, lse = attend(*leaves)
        expected, expected_lse = twin(*(x.double() for x in tensors))
        seen = ~expected_lse.isinf()
        assert expected_lse[seen].max() > 10_000
        torch.testing.assert_close(out.double(), expected, atol=2e-3, rtol=0)
        torch.testing.assert_close(lse.double(), expected_lse, atol=0, rtol=1e-6)
        assert all(x.isfinite().all() for x in gradients(leaves, out))
    entries = naive.mean_compress(k, SMALL)
    chosen = select_blocks(q, entries, ends(40), ends(64), ends(len(entries)), SMALL)
    assert torch.equal(chosen, naive.select(q.double(), entries.double(), 64, SMALL, 0.25))


@pytest.mark.parametrize(
    "sizes",
    [(7, 1, 80, 96), (3, 3, 192, 128), (5, 1, 96, 80), (2, 2, 256, 256), (1, 1, 3, 1)],
)
def test_heads_of_any_width_and_group_are_those_of_plain_torch(sizes):
    heads, kv_heads, d, d_v = sizes
    tensors = drawn(3, (40, heads, d), (64, kv_heads, d), (64, kv_heads, d_v))
    for attend, twin, given in branches(*tensors):
        found = []
        for way in (attend, twin):
            leaves = [x.clone().requires_grad_() for x in given]
            out, lse = way(*leaves)
            found.append([out, lse, *gradients(leaves, out)])
        torch.testing.assert_close(*found)


@WAYS
def test_queries_that_choose_nothing_leave_no_trace_beside_those_that_do(as_published):
    tensors = drawn(4, (30, 4, 8), (64, 2, 8), (64, 2, 8))
    ids = torch.randint(0, 4, (2, 30, 3), generator=torch.Generator().manual_seed(4)).int()
    ids[:, ::3] = torch.tensor([-1, 9, 2**31 - 1]).int()  # absent, future and out of range
    leaves = [x.requires_grad_() for x in tensors]
    out, lse = selected_attention(
        *leaves, ids, ends(30), ends(64), block=16, as_published=as_published
    )
    assert not out[::3].any()
    assert torch.isneginf(lse[::3]).all()
    dq, *others = gradients(leaves, out)
    assert not dq[::3].any()
    kept = torch.arange(30) % 3 > 0
    part = [tensors[0].detach()[kept], *(x.detach() for x in tensors[1:])]
    expected = naive.masked(
        *part, naive.block_mask(ids, 30, 64, 16)[:, kept], tensors[0].shape[-1] ** -0.5
    )
    torch.testing.assert_close((out[kept], lse[kept]), expected[:2])
    assert all(x.isfinite().all() for x in others)


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor of numbers that is made."""

    def __init__(self):
        super().__init__()
        self.found = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (list, tuple)) else (out,):
            if isinstance(x, torch.Tensor) and x.is_floating_point():
                self.found = max(self.found, x.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("way", [blockwise, published])
def test_a_block_that_all_chose_takes_no_more_room_than_the_workspace(way):
    """The published buffer would be as long as the longest list, for every block."""
    tokens, top, workspace = 4096, 4, 1 << 20
    tensors = drawn(5, (tokens, 2, 16), (tokens, 1, 16), (tokens, 1, 16), dtype=torch.float32)
    recent = torch.arange(tokens)[:, None] // 64 - torch.arange(top - 1)
    crowd = torch.cat([torch.zeros(tokens, 1), recent], 1).int()[None]
    spread = torch.randint(
        0, 64, (1, tokens, top), generator=torch.Generator().manual_seed(5)
    ).int()
    found = {}
    for name, ids in (("crowd", crowd), ("spread", spread)):
        # Below the operator, in which nobody may look.
        cu = ends(tokens), ends(tokens)
        chosen = operators._chosen(*tensors, ids, *cu, 64, 0.25, workspace)
        with Largest() as largest:
            out, _ = way.forward(chosen)
        found[name] = largest.found
        rows = slice(tokens - 50, tokens)
        expected, _ = naive.selected(tensors[0][rows], *tensors[1:], ids[:, rows], 64, 0.25)
        torch.testing.assert_close(out[rows], expected, atol=1e-5, rtol=1e-4)
    assert found["crowd"] <= workspace
    assert found["crowd"] <= found["spread"]


def test_tensors_that_lie_apart_give_the_same_bits():
    def apart(x):
        return x.mT.contiguous().mT

    cu = ends(50), ends(90)
    windows = Windows.of(cu[1], 90, SMALL)
    shapes = (50, 4, 8), (90, 2, 8), (90, 2, 12), (50, 4, 3), (50, 4, 12)
    *dense, above = drawn(6, *shapes)
    dense += [windows.mean(x) for x in dense[1:3]]
    ids = torch.randint(-1, 6, (2, 50, 4), generator=torch.Generator().manual_seed(6)).int()
    found = []
    for change in (torch.clone, apart):
        leaves = [change(x).requires_grad_() for x in dense]
        assert all(x.is_contiguous() == (change is torch.clone) for x in leaves)
        q, k, v, gates, *entries = leaves
        chosen = select_blocks(q, entries[0], *cu, windows.ends, SMALL)
        mixed = native_sparse_attention(q, k, v, *entries, gates, *cu, windows.ends, SMALL)
        fine, lse = selected_attention(q, k, v, change(ids), *cu, block=16)
        torch.autograd.backward((mixed, fine), (change(above), change(above)))
        found.append([chosen, mixed, fine, lse, *(x.grad for x in leaves)])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int64])
def test_ids_and_ends_in_other_whole_numbers_are_the_same(dtype):
    tensors = drawn(7, (20, 4, 8), (40, 2, 8), (40, 2, 8))
    ids = torch.randint(-1, 3, (2, 20, 3), generator=torch.Generator().manual_seed(7))
    found = [
        selected_attention(*tensors, ids.to(x), ends(20).to(x), ends(40).to(x), block=16)[0]
        for x in (torch.int32, dtype)
    ]
    assert torch.equal(*found)


def test_other_types_of_keys_are_refused_and_of_entries_taken_as_the_queries_is():
    q, k, v = drawn(8, (20, 2, 16), (40, 1, 16), (40, 1, 16), dtype=torch.float32)
    cu = ends(20), ends(40)
    few = naive.mean_compress(k, SMALL)
    for attend in (
        lambda q, k, v: sliding_attention(q, k, v, *cu, window=4),
        lambda q, k, v: selected_attention(
            q, k, v, torch.zeros(1, 20, 1).int(), *cu, block=16, as_published=True
        ),
        lambda q, k, v: compressed_attention(
            q, k[: len(few)], v[: len(few)], *cu, ends(len(few)), SMALL
        ),
    ):
        for given in ((q.bfloat16(), k, v), (q, k.half(), v), (q, k, v.double())):
            with pytest.raises(ValueError, match="give one dtype"):
                attend(*given)
    chosen = select_blocks(q.bfloat16(), few, *cu, ends(len(few)), SMALL)
    same = select_blocks(q.bfloat16(), few.bfloat16(), *cu, ends(len(few)), SMALL)
    assert torch.equal(chosen, same)


def test_no_sequences_and_empty_ones_are_no_fault():
    tensors = drawn(9, (0, 4, 8), (0, 2, 8), (0, 2, 12), (0, 4, 3))
    q, k, v, gates = tensors
    for cu in (ends(), ends(0), ends(0, 0, 0)):
        windows = Windows.of(cu, 0, SMALL)
        entries = windows.mean(k), windows.mean(v)
        out = native_sparse_attention(q, k, v, *entries, gates, cu, cu, windows.ends, SMALL)
        assert out.shape == (0, 4, 12)
        assert select_blocks(q, entries[0], cu, cu, windows.ends, SMALL).shape == (2, 0, 3)
        pages = torch.zeros(len(cu) - 1, 0, dtype=torch.int32)
        cache = [torch.zeros(3, 2, 16, size, dtype=q.dtype) for size in (8, 12)]
        few = [x[:, :, :4] for x in cache]
        paging = Paging(pages, cu, cu)
        out = paged_native_sparse_attention(q, *cache, *few, gates, paging, SMALL)
        assert out.shape == (0, 4, 12)
    q, k, v, gates = drawn(9, (50, 4, 8), (50, 2, 8), (50, 2, 12), (50, 4, 3))
    found = []
    for cu in (ends(30, 20), ends(0, 30, 0, 0, 20, 0)):
        windows = Windows.of(cu, 50, SMALL)
        entries = windows.mean(k), windows.mean(v)
        found.append(native_sparse_attention(q, k, v, *entries, gates, cu, cu, windows.ends, SMALL))
    assert torch.equal(*found)


@pytest.mark.parametrize("shape", [(0, 40, 16), (2, 0, 16), (0, 16)])
def test_a_module_takes_batches_of_nothing(shape):
    module = NSAAttention(16, 4, 2, 8, shape=SMALL, compress="mlp")
    hidden = torch.zeros(shape, requires_grad=True)
    out = module(hidden)
    assert out.shape == shape
    out.sum().backward()
    assert hidden.grad.shape == shape


def test_pages_of_half_precision_take_logits_of_ten_thousand():
    q, k, v = drawn(10, (2, 2, 16), (64, 1, 16), (64, 1, 16), dtype=torch.float16)
    q, k = q * 100, k * 100
    cache = [x.view(4, 16, 1, 16).transpose(1, 2) for x in (k, v)]
    ids = torch.arange(4).int().expand(1, 2, 4)
    paging = Paging(torch.arange(4)[None], ends(2), ends(64))
    out, lse = paged_selected_attention(q, *cache, ids, paging, block=16)
    expected, expected_lse = naive.selected(*(x.double() for x in (q, k, v)), ids, 16, 0.25)
    assert expected_lse.abs().max() > 10_000
    torch.testing.assert_close(out.double(), expected, atol=2e-3, rtol=0)
    torch.testing.assert_close(lse.double(), expected_lse, atol=0, rtol=1e-6)


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import torch
from trimtab.kernels.sparse import SparseShape, Windows
from trimtab.kernels.sparse.block_sparse import KeyStore
from trimtab.kernels.sparse.prefill import sparse_prefill
from trimtab.kernels.sparse.selectors import Selection
from trimtab.sparse.nsa import NSAAttention

module = NSAAttention(16, 4, 2, 8, shape=SparseShape(8, 4, 16, 3, 1, 1, 24))
out = module(torch.randn(2, 40, 16))
out.sum().backward()
assert all(p.grad is not None for p in module.parameters())
q = torch.randn(100, 2, 16)
cu = torch.tensor([0, 100], dtype=torch.int32)
sparse_prefill(q, lambda: q, KeyStore.packed(q, q, cu), 0, torch.empty_like(q), 0.25, Selection())
try:
    import triton
except ImportError:
    print("none")
"""


def test_a_cpu_needs_no_triton():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "none\n"


def test_vllm_may_load_the_plugin_twice():
    for _ in range(2):
        general.register()
        assert AttentionBackendEnum.CPU_ATTN.get_class() is TrimtabCpuAttention
    assert not AttentionBackendEnum.CUSTOM.is_overridden()
    one, two = (prefiller({"trimtab": {"sparse": {"top": 9}}}) for _ in range(2))
    assert one is two


def test_transformers_may_be_told_twice_and_the_second_time_counts():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 50, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).eval()
    first, second = [], []
    names = {
        register(SparseConfig(selector="top", top=5, min_prompt=64), kept.append)
        for kept in (first, second)
    }
    (name,) = names
    model.set_attn_implementation(name)
    with torch.no_grad():
        model(torch.arange(100)[None] % 50)
    assert (first, len(second)) == ([], 1)


def test_another_name_is_refused_beside_the_known_ones():
    with pytest.raises(ValueError, match=r"(?s)TRIMTAB.*CUSTOM"):
        EngineArgs(model=str(small_model()), attention_backend="TRIMTAB").create_engine_config()
    assert "trimtab_spars" not in AttentionInterface()
    model = LlamaForCausalLM(
        LlamaConfig(hidden_size=32, intermediate_size=48, vocab_size=50, num_hidden_layers=1)
    )
    with pytest.raises(ValueError, match="trimtab_spars"):
        model.set_attn_implementation("trimtab_spars")
    with pytest.raises(BadInput, match="selector is 'best'"):
        prefiller({"trimtab": {"sparse": {"selector": "best"}}})


@pytest.fixture
def said(monkeypatch, caplog):
    """What trimtab's attention says in vLLM's log."""
    log = logging.getLogger("vllm.trimtab.attention")
    monkeypatch.setattr(log, "propagate", False)  # vLLM's own logger may be captured too
    monkeypatch.setattr(log, "handlers", [caplog.handler])
    vllm_logger._print_warning_once.cache_clear()
    caplog.set_level(logging.INFO, log.name)
    return lambda: [r.getMessage() for r in caplog.records if r.name == log.name]


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"sliding_window": 64}, "sliding windows"),
        ({"alibi_slopes": [0.5] * 9}, "ALiBi"),
        ({"logits_soft_cap": 30.0}, "soft-capped logits"),
        ({"sinks": torch.zeros(9)}, "attention sinks"),
        ({"attn_type": AttentionType.ENCODER_ONLY}, "encoder-only attention"),
    ],
)
def test_what_is_not_known_is_left_to_vllm_with_one_line_for_all_layers(said, given, why):
    config = EngineArgs(
        model=str(small_model()),
        dtype="float32",
        max_model_len=512,
        enforce_eager=True,
        additional_config={"trimtab": {"sparse": {}}},
    ).create_engine_config()
    usual = {"alibi_slopes": None, "sliding_window": None, "kv_cache_dtype": "auto"}
    with set_current_vllm_config(config):
        of = TrimtabCpuAttention.get_impl_cls()
        layers = [of(9, 64, 0.125, 3, **(usual | given)) for _ in range(3)]
    assert {layer._refusal for layer in layers} == {why}
    assert not any(layer._readable(None, None) for layer in layers)
    assert said() == [f"trimtab leaves prefills to vLLM: {why}"]


def test_a_gpu_says_once_what_it_leaves_to_vllm(said):
    impl = SimpleNamespace(
        **dict.fromkeys(("logits_soft_cap", "sinks", "kv_sharing_target_layer_name")),
        sliding_window=(-1, -1),
        alibi_slopes=[0.5],
        kv_cache_dtype="fp8",
        attn_type=AttentionType.DECODER,
    )
    builder = SimpleNamespace(
        layer_names=["one", "two"],
        vllm_config=SimpleNamespace(
            additional_config={"trimtab": {"sparse": {}}},
            parallel_config=SimpleNamespace(
                decode_context_parallel_size=1, prefill_context_parallel_size=1
            ),
            model_config=SimpleNamespace(dtype=torch.bfloat16, rswa_window=None),
            compilation_config=SimpleNamespace(
                static_forward_context=dict.fromkeys(("one", "two"), SimpleNamespace(impl=impl))
            ),
        ),
    )
    batch = SimpleNamespace(
        seq_lens_cpu_upper_bound=torch.tensor([4096]), causal=True, mm_req_doc_ranges=None
    )
    for _ in range(2):
        taker = gpu_attention.Taker(builder, "FLASH_ATTN")
        assert taker.spans(batch) == taker.spans(batch) == {}
    assert said() == ["trimtab leaves prefills to vLLM: ALiBi, a cache in fp8"]


def test_the_triton_kernels_stand_what_is_odd_interpreted_where_there_is_no_gpu():
    script = Path(__file__).with_name("interpreted_faults.py")
    how = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    environment = {**os.environ, **how, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, script], env=environment, check=True, timeout=300)
