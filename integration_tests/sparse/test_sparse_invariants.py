"""What holds of sparse attention whatever the numbers are: shifts, merges, groups, order, runs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import AuxRequest, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from trimtab.kernels.sparse import (
    SparseShape,
    Windows,
    compressed_attention,
    keep_selection,
    naive,
    native_sparse_attention,
    select_blocks,
    selected_attention,
    sliding_attention,
)
from trimtab.sparse import SparseConfig
from trimtab.sparse.in_transformers import register

pytestmark = pytest.mark.integration

SMALL = SparseShape(window=8, stride=4, block=16, top=3, first=1, recent=1, sliding=24)
KEYS, QUERIES, HEADS, KV_HEADS, D, D_V = 90, 50, 6, 2, 8, 12
SEEDS = st.integers(0, 999)


def ends(*lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


CU = (ends(QUERIES), ends(KEYS))
CU_ENTRIES = ends(SMALL.entries(KEYS))


def drawn(seed, *shapes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def qkv(seed, heads=HEADS, kv_heads=KV_HEADS, dtype=torch.float64):
    shapes = (QUERIES, heads, D), (KEYS, kv_heads, D), (KEYS, kv_heads, D_V)
    return drawn(seed, *shapes, dtype=dtype)


def some_blocks(seed, top=4, kv_heads=KV_HEADS):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, 6, (kv_heads, QUERIES, top), generator=generator).int()


def selected(indices, *, as_published=False):
    def attend(q, k, v):
        return selected_attention(
            *(q, k, v, indices, *CU), block=16, scale=0.3, as_published=as_published
        )

    return attend


def sliding(q, k, v):
    return sliding_attention(q, k, v, *CU, window=24, scale=0.3)


def compressed(q, k, v):
    entries = slice(SMALL.entries(KEYS))
    return compressed_attention(q, k[entries], v[entries], *CU, CU_ENTRIES, SMALL, scale=0.3)


def by_name(seed):
    blocks = some_blocks(seed)
    return {
        "selected": selected(blocks),
        "published": selected(blocks, as_published=True),
        "sliding": sliding,
        "compressed": compressed,
    }


BRANCHES = list(by_name(0))


@pytest.mark.parametrize("branch", BRANCHES)
@settings(max_examples=10)
@given(SEEDS, st.sampled_from([1.0, 50.0, 1e4]))
def test_what_is_added_to_all_logits_of_a_query_shifts_its_logarithm_alone(branch, seed, size):
    q, k, v = qkv(seed)
    (shift,) = drawn(seed + 1, (QUERIES, HEADS))
    shift = shift * size
    attend = by_name(seed)[branch]
    out, lse = attend(q, k, v)
    # One more dimension adds it: every key has 1 there, and each query and head its own number.
    more_q, more_k = (
        torch.cat([q, shift[..., None] / 0.3], -1),
        torch.cat([k, k[..., :1] * 0 + 1], -1),
    )
    shifted, shifted_lse = attend(more_q, more_k, v)
    torch.testing.assert_close(shifted, out, atol=1e-10 * size, rtol=0)
    torch.testing.assert_close(shifted_lse, lse + shift, atol=1e-10 * size, rtol=1e-12)


@pytest.mark.parametrize("as_published", [False, True])
@settings(max_examples=15)
@given(SEEDS)
def test_two_disjoint_selections_merge_into_that_of_both(as_published, seed):
    tensors = qkv(seed)
    order = torch.rand(KV_HEADS, QUERIES, 6, generator=torch.Generator().manual_seed(seed))
    ids = order.argsort(-1).int()
    cuts = ids[..., :2], ids[..., 2:5]
    both = torch.cat(cuts, -1)
    out, lse = selected(both, as_published=as_published)(*tensors)
    outs, logarithms = zip(
        *(selected(part, as_published=as_published)(*tensors) for part in cuts), strict=True
    )
    merged = torch.logaddexp(*logarithms)
    torch.testing.assert_close(merged, lse)
    weights = [(one - merged).exp().nan_to_num(0.0)[..., None] for one in logarithms]
    torch.testing.assert_close(outs[0] * weights[0] + outs[1] * weights[1], out)


@pytest.mark.parametrize("group", [3, 5, 7])
@pytest.mark.parametrize("as_published", [False, True])
def test_heads_of_a_group_get_what_each_gets_with_keys_of_its_own(group, as_published):
    q, k, v = (x.requires_grad_() for x in qkv(3, 2 * group))
    blocks = some_blocks(3)
    together = selected(blocks, as_published=as_published)(q, k, v)
    together[0].sin().sum().backward()
    own = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    each = [own[0], *(x.repeat_interleave(group, 1) for x in own[1:])]
    alone = selected(blocks.repeat_interleave(group, 0), as_published=as_published)(*each)
    alone[0].sin().sum().backward()
    torch.testing.assert_close(together, alone)
    for ours, theirs in zip((q, k, v), own, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("group", [1, 3, 5, 7])
def test_a_group_chooses_by_the_sum_of_its_heads_scores(group):
    q, k, _ = qkv(4, 2 * group)
    entries = naive.mean_compress(k, SMALL)
    p = naive.compressed(q, entries, entries, KEYS, SMALL, 1.0)[2]
    each = naive.importance(p, KEYS, 2 * group, SMALL)  # as if every head had its own keys
    summed = torch.stack([part.sum(0) for part in each.split(group)])
    chosen = select_blocks(q, entries, *CU, CU_ENTRIES, SMALL, scale=1.0)
    assert torch.equal(chosen, naive.top_blocks(summed, KEYS, SMALL))
    first_heads = naive.top_blocks(each[::group], KEYS, SMALL)
    assert torch.equal(chosen, first_heads) == (group == 1)  # what published code looks at


@pytest.mark.parametrize("as_published", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_more_blocks_than_there_are_is_dense_attention(as_published, dtype):
    q, k, v = qkv(5, dtype=dtype)
    every = torch.arange(20).flip(0).int().expand(KV_HEADS, QUERIES, 20)
    out, _ = selected(every, as_published=as_published)(q, k, v)
    visible = torch.arange(KEYS) <= torch.arange(KEYS - QUERIES, KEYS)[:, None]
    dense = scaled_dot_product_attention(
        *(x.transpose(0, 1) for x in (q, k, v)), visible, scale=0.3, enable_gqa=True
    ).transpose(0, 1)
    torch.testing.assert_close(out, dense, atol=1e-5, rtol=0)
    shape = SparseShape(8, 4, 16, top=20, first=1, recent=1)
    entries = naive.mean_compress(k, shape)
    chosen = select_blocks(q, entries, *CU, CU_ENTRIES, shape)
    blocks = torch.arange(KEYS - QUERIES, KEYS) // 16 + 1
    assert torch.equal((chosen >= 0).sum(-1), blocks.expand(KV_HEADS, -1))
    chosen_out, _ = selected(chosen, as_published=as_published)(q, k, v)
    torch.testing.assert_close(chosen_out, dense, atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("as_published", [False, True])
def test_the_order_of_blocks_gives_what_torchs_flex_attention_gives(as_published):
    q, k, v = qkv(10)
    blocks = some_blocks(10)
    visible = naive.block_mask(blocks, QUERIES, KEYS, 16).repeat_interleave(HEADS // KV_HEADS, 0)

    def hide(score, batch, head, query, key):
        return torch.where(visible[head, query, key], score, -torch.inf)

    heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))
    expected, others = flex_attention(
        *heads_first, score_mod=hide, scale=0.3, enable_gqa=True, return_aux=AuxRequest(lse=True)
    )
    out, lse = selected(blocks, as_published=as_published)(q, k, v)
    torch.testing.assert_close(out, expected[0].transpose(0, 1).nan_to_num(0.0))
    torch.testing.assert_close(lse, others.lse[0].T)


def test_a_model_that_keeps_every_block_is_dense_to_the_last_bit():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 50, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4)).eval()
    ids, logits = torch.randint(50, (1, 150)), []
    for name in ("sdpa", register(SparseConfig(mass=1, min_prompt=64))):
        model.set_attn_implementation(name)
        with torch.no_grad():
            logits.append(model(ids).logits)
    assert torch.equal(*logits)


def test_runs_are_equal_to_the_last_bit():
    tensors = qkv(6, dtype=torch.float32)
    gates = torch.rand(QUERIES, HEADS, 3, generator=torch.Generator().manual_seed(6))
    windows = Windows.of(CU[1], KEYS, SMALL)

    def results():
        leaves = [x.clone().requires_grad_() for x in (*tensors, gates)]
        q, k, v, own_gates = leaves
        entries = windows.mean(k), windows.mean(v)
        chosen = select_blocks(q, entries[0], *CU, windows.ends, SMALL)
        out = native_sparse_attention(q, k, v, *entries, own_gates, *CU, windows.ends, SMALL)
        out.sin().sum().backward()
        published, lse = selected(chosen, as_published=True)(q, k, v)
        return [chosen, out, published, lse, *(x.grad for x in leaves)]

    first = results()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, results(), strict=True))


def test_gradients_of_odd_choices_are_those_of_finite_differences():
    """Every number of the Jacobian; ids are negative, repeated, future and out of range."""
    q, k, v = drawn(7, (5, 3, 2), (20, 1, 2), (20, 1, 3))
    odd = torch.tensor([[[-1, -1, -9], [0, 0, 1], [1, 0, 1], [7, 2**30, 0], [1, -5, 1]]]).int()

    def attend(*leaves):
        return selected_attention(*leaves, odd, ends(5), ends(20), block=16)[0]

    leaves = [x.requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(attend, leaves, atol=1e-7, rtol=1e-5)


def test_checkpointed_attention_compiles_into_one_graph_with_the_gradients_of_neither():
    tensors = qkv(8, dtype=torch.float32)
    gates = torch.rand(QUERIES, HEADS, 3, generator=torch.Generator().manual_seed(8))

    def attend(q, k, v, gates):
        windows = Windows.of(CU[1], KEYS, SMALL)
        entries = windows.mean(k), windows.mean(v)
        return native_sparse_attention(q, k, v, *entries, gates.sigmoid(), *CU, windows.ends, SMALL)

    def again(*leaves):
        return checkpoint(attend, *leaves, use_reentrant=False, context_fn=keep_selection)

    compiled = torch.compile(again, fullgraph=True, backend="aot_eager")
    found = []
    for function in (attend, again, compiled):
        leaves = [x.clone().requires_grad_() for x in (*tensors, gates)]
        out = function(*leaves)
        out.square().sum().backward()
        found.append([out.detach(), *(x.grad for x in leaves)])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


def test_the_backward_operators_keep_torchs_rules():
    q, k, v = qkv(9, dtype=torch.float32)
    blocks = some_blocks(9)
    operators = torch.ops.trimtab_sparse
    given = (blocks, *CU, 16, 0.3, 1 << 20)
    out, lse = operators.selected(q, k, v, *given, False)
    above = torch.ones_like(out)
    torch.library.opcheck(operators.selected_backward, (above, q, k, v, out, lse, *given))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(operators.selected, (*leaves, *given, True))
    q, k, v = (x.detach() for x in leaves)
    spans = torch.arange(QUERIES), torch.arange(QUERIES) + 9, 0.3
    out, lse = operators.span(q, k, v, *spans)
    torch.library.opcheck(operators.span_backward, (above, q, k, v, out, lse, *spans))
