"""Gives the Triton kernels what is odd or wrong; fails where they differ from the mathematics.

On a GPU, or without one in Triton's interpreter.
"""

from __future__ import annotations

from importlib import import_module

import torch

from trimtab.kernels.sparse import (
    SparseShape,
    compressed_attention,
    naive,
    select_blocks,
    selected_attention,
    selected_plan,
    sliding_attention,
    tables,
)
from trimtab.kernels.sparse.chosen import Chosen
from trimtab.kernels.sparse.configurations import KERNELS, configuration
from trimtab.kernels.sparse.launch import Near, interpreted
from trimtab.kernels.sparse.selected_plan import SelectedPlan

selected_plan.SelectedPlan.dense_until = lambda *_: 0  # so that what is short has far blocks
DEVICE = "cpu" if interpreted() else "cuda"
torch.set_default_device(DEVICE)
SHAPE = SparseShape(window=8, stride=4, block=16, top=3, first=1, recent=1, sliding=24)
ODD = [[-7, 3, 3, 40, 1], [2, -1, 2, 8, 2**30], [-1] * 5, [1, 0, 2, 1, 0]]


def ends(count):
    return torch.tensor([0, count], dtype=torch.int32)


def drawn(dtype, queries, keys, heads, kv_heads, d, d_v):
    generator = torch.Generator(DEVICE).manual_seed(keys)
    shapes = (queries, heads, d), (keys, kv_heads, d), (keys, kv_heads, d_v), (queries, heads, d_v)
    return [torch.randn(s, generator=generator).to(dtype) for s in shapes]


def odd_ids(queries, kv_heads):
    return torch.tensor(ODD).int()[torch.arange(queries * kv_heads) % 4].view(kv_heads, queries, 5)


def agrees(dtype, tolerance, sizes, ids, *, scale=0.3, **way):
    """Forward and backward pass."""
    *qkv, above = drawn(dtype, *sizes)
    ours = [x.clone().requires_grad_() for x in qkv]
    theirs = [x.double().requires_grad_() for x in qkv]
    cu = ends(sizes[0]), ends(sizes[1])
    out, lse = selected_attention(*ours, ids, *cu, block=16, scale=scale, **way)
    expected, expected_lse = naive.selected(*theirs, ids, 16, scale)
    near = {"atol": tolerance, "rtol": tolerance}
    torch.testing.assert_close(out.double(), expected, **near)
    torch.testing.assert_close(lse.double(), expected_lse, **near)
    out.backward(above)
    expected.backward(above.double())
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad.double(), b.grad, **near)


class Watched:
    """A kernel whose launches are noted: of which types its whole numbers were."""

    def __init__(self, name, kernel, noted):
        self.name, self.kernel, self.noted = name, kernel, noted
        self.arg_names = kernel.arg_names

    def __getitem__(self, grid):
        def launch(*given, **options):
            named = zip(self.arg_names, given, strict=False)
            types = {name: x.dtype for name, x in named if isinstance(x, torch.Tensor)}
            self.noted.append((self.name, types))
            return self.kernel[grid](*given, **options)

        return launch


def watched():
    """Notes all launches from here on."""
    noted, known = [], {}
    for name, of in KERNELS.items():
        if of.module != "triton_prefill" and not name.startswith("published"):
            known[of.module, of.function] = name
    for (where, function), name in known.items():
        module = import_module(f"trimtab.kernels.sparse.{where}")
        setattr(module, function, Watched(name, getattr(module, function), noted))
    return noted, set(known.values())


def whole_numbers_are_as_compiled(noted, names):
    """Those of kernels that were launched here are those that are compiled without a GPU."""
    to = {torch.int32: "*i32", torch.int64: "*i64"}
    launched = {name for name, _ in noted}
    most = {"forward", "far", "near_and_join", "backward", "span", "span_dkv", "best_blocks"}
    assert most <= launched <= names
    declared = {name: configuration(name, "cuda", (64, 64)).types for name in names}
    for name, types in noted:
        for argument, dtype in types.items():
            if dtype in to:
                assert to[dtype] == declared[name][argument], (name, argument, dtype)


def odd_ids_and_sizes():
    for sizes in ((8, 60, 7, 1, 80, 96), (4, 20, 3, 1, 192, 128), (4, 60, 16, 1, 16, 16)):
        agrees(torch.float32, 1e-4, sizes, odd_ids(sizes[0], sizes[3]))
    sizes = (4, 60, 5, 1, 96, 80)
    agrees(torch.float32, 1e-4, sizes, odd_ids(4, 1), as_published=True)


def rows_of_nothing():
    q, k, v, above = drawn(torch.float32, 6, 20, 2, 1, 16, 16)
    for as_published in (False, True):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        none = torch.full((1, 6, 2), -1).int()
        out, lse = selected_attention(
            *leaves, none, ends(6), ends(20), block=16, as_published=as_published
        )
        assert not out.any()
        assert torch.isneginf(lse).all()
        out.backward(above)
        assert not any(x.grad.any() for x in leaves)


def one_block_for_all_in_a_small_workspace():
    crowd = torch.zeros(1, 24, 1).int()
    for as_published in (False, True):
        agrees(
            *(torch.float32, 1e-4, (24, 30, 3, 1, 16, 16), crowd),
            workspace_bytes=4000,
            as_published=as_published,
        )


def nothing_leaks_from_what_others_chose():
    """Even queries and odd ones choose other blocks; those of the odd ones hold no numbers."""
    q, k, v, above = drawn(torch.float32, 8, 64, 2, 1, 16, 16)
    ids = torch.tensor([[0, 2], [1, 3]]).int()[torch.arange(8) % 2][None]
    found = []
    for fault in (0.0, float("nan")):
        leaves = [x.clone() for x in (q, k, v)]
        leaves[2][16:32] += fault
        for x in leaves:
            x.requires_grad_()
        out, lse = selected_attention(*leaves, ids, ends(8), ends(64), block=16)
        out.backward(above)
        even = [x.grad.unflatten(0, (-1, 32))[:, :16] for x in leaves[1:]]
        found.append([out[::2], lse, leaves[0].grad[::2], *even])
        assert out[1::2].isfinite().all() == (fault == 0)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def put(x, token, value):
    x = x.clone()
    x[token, 1, 3] = value
    return x


def alike(x, expected):
    """To the last bit where Triton interprets; a GPU's second launch is another program."""
    bits = {"atol": 0, "rtol": 0} if interpreted() else {}
    torch.testing.assert_close(x, expected, equal_nan=True, **bits)


def what_is_odd_reaches_those_that_see_it_and_no_others():
    """Infinities, and no numbers; who sees a token another value of it changes."""
    tensors = drawn(torch.float32, 40, 40, 6, 3, 16, 16)
    q, k, v, above = tensors
    cu = torch.tensor([0, 29, 40], dtype=torch.int32)
    cu_entries = torch.tensor([0, 6, 7], dtype=torch.int32)
    generator = torch.Generator(DEVICE).manual_seed(5)
    ids = torch.rand(3, 40, 2, generator=generator).argsort(-1).int()
    few = slice(7)

    def selected(*x):
        """In segments of two KV heads and of one."""
        return selected_attention(*x, ids, cu, cu, block=16, workspace_bytes=34_000)

    ways = {
        "near": (selected, k, v, 20),
        "far": (selected, k, v, 20),
        "sliding": (lambda *x: sliding_attention(*x, cu, cu, window=9), k, v, 31),
        "compressed": (
            lambda *x: compressed_attention(*x, cu, cu, cu_entries, SHAPE),
            *(k[few], v[few], 3),
        ),
    }

    def found(attend, *leaves):
        leaves = [x.clone().requires_grad_() for x in leaves]
        out, lse = attend(*leaves)
        out.backward(above)
        return out.detach(), lse.detach(), leaves[0].grad

    whole = SelectedPlan.dense_until
    for name, (attend, keys, values, token) in ways.items():
        SelectedPlan.dense_until = whole if name == "near" else lambda *_: 0
        clean = found(attend, q, keys, values)
        sees = (attend(q, keys, put(values, token, 5.0))[0] != clean[0]).any(-1)
        assert sees.any(), name
        assert not sees.all(), name
        for odd in (float("nan"), float("inf"), float("-inf")):
            out, lse, dq = found(attend, q, keys, put(values, token, odd))
            expected = clean[0].clone()
            expected[..., 3] = expected[..., 3].masked_fill(sees, odd)
            alike(out, expected)
            alike(lse, clean[1])
            alike(dq[~sees], clean[2][~sees])
        faulty = found(attend, q, put(keys, token, float("nan")), values)
        for x, wanted in zip(faulty, clean, strict=True):
            alike(x[~sees], wanted[~sees])
            assert x[sees].isnan().all(), name
    SelectedPlan.dense_until = whole


def odd_values_of_far_and_of_near_blocks_add_up():
    q, k, v, _ = drawn(torch.float32, 96, 96, 2, 1, 16, 16)
    every, cu = torch.arange(6).int().expand(1, 96, 6), ends(96)
    far, near, late = 20, 82, 90
    inf, nan = float("inf"), float("nan")
    for pair in ((nan, inf), (nan, -inf), (-inf, inf), (inf, -inf), (inf, inf), (nan, nan)):
        values = v.clone()
        values[far, 0, 3], values[near, 0, 3] = pair
        out, _ = selected_attention(q, k, values, every, cu, cu, block=16)
        wanted, _ = naive.selected(q, k, values, every, 16, 0.25)
        torch.testing.assert_close(out[late], wanted[late], equal_nan=True)


def rows_behind_all_sequences_have_no_far_blocks():
    """So that there is room for the parts of all others."""
    q, k, v, _ = drawn(torch.float32, 64, 64, 2, 1, 16, 16)
    queries = tables.place_queries(ends(16), ends(64), 64, 16)
    ids = torch.arange(4).int().expand(1, 64, 4).contiguous()
    far = Near.of(Chosen(q, k, v, ids, 16, 0.25, queries, tables.cut(ends(64), 64, 16), 1 << 20))
    assert (far.far_ids() >= 0).any(-1).sum() == 16


def entries_that_no_query_gives_any_weight():
    q, k, _, _ = drawn(torch.float32, 40, 40, 2, 1, 16, 16)
    entries = naive.mean_compress(k, SHAPE)
    entries[:, :, 0] = float("-inf")
    cu = ends(40), ends(40), ends(len(entries))
    chosen = select_blocks(q.abs(), entries, *cu, SHAPE)
    full = (chosen >= 0).sum(-1)
    assert torch.equal(full[0], (torch.arange(40) // 16 + 1).clamp(max=SHAPE.top))


def logits_of_ten_thousand():
    q, k, v, above = drawn(torch.float16, 10, 64, 2, 1, 16, 16)
    q, k = q * 50, k * 50
    ids = torch.tensor([0, 1, 2, 3]).int().expand(1, 10, 4)
    cu, entries = (ends(10), ends(64)), SHAPE.entries(64)
    attends = {
        "own": lambda *x: selected_attention(*x, ids, *cu, block=16),
        "published": lambda *x: selected_attention(*x, ids, *cu, block=16, as_published=True),
        "sliding": lambda *x: sliding_attention(*x, *cu, window=24),
        "compressed": lambda q, k, v: compressed_attention(
            q, k[:entries], v[:entries], *cu, ends(entries), SHAPE
        ),
    }
    twins = {
        "own": lambda *x: naive.selected(*x, ids, 16, 0.25),
        "published": lambda *x: naive.selected(*x, ids, 16, 0.25),
        "sliding": lambda *x: naive.sliding(*x, 24, 0.25),
        "compressed": lambda q, k, v: naive.compressed(
            q, k[:entries], v[:entries], 64, SHAPE, 0.25
        )[:2],
    }
    for name, attend in attends.items():
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out, lse = attend(*leaves)
        expected, expected_lse = twins[name](*(x.double() for x in (q, k, v)))
        seen = expected_lse[~expected_lse.isinf()]
        assert seen.max() > 5000, name
        torch.testing.assert_close(out.double(), expected, atol=2e-3, rtol=0)
        torch.testing.assert_close(lse.double(), expected_lse, atol=0.02, rtol=0)
        out.backward(above)
        assert all(x.grad.isfinite().all() for x in leaves), name
    few = naive.mean_compress(k, SHAPE)
    chosen = select_blocks(q, few, *cu, ends(len(few)), SHAPE)
    assert torch.equal(chosen, naive.select(q.double(), few.double(), 64, SHAPE, 0.25))


def choices_of_groups_and_of_entries_in_another_type():
    generator = torch.Generator(DEVICE).manual_seed(3)
    q = torch.randn(20, 7, 16, generator=generator).half()
    k = torch.randn(70, 1, 16, generator=generator)
    entries = naive.mean_compress(k, SHAPE)
    few = entries.half().float()
    cu = ends(20), ends(70), ends(len(entries))
    wanted = naive.select(q.float(), few, 70, SHAPE, 0.25)
    assert torch.equal(select_blocks(q, entries, *cu, SHAPE), wanted)


def tensors_that_lie_apart():
    dense = drawn(torch.float32, 8, 20, 4, 2, 16, 12)
    ids = odd_ids(8, 2)
    found = []
    for strided in (False, True):
        tensors = [x.mT.contiguous().mT if strided else x.clone() for x in dense]
        lists = ids.mT.contiguous().mT if strided else ids
        leaves = [x.requires_grad_() for x in tensors[:3]]
        out, lse = selected_attention(*leaves, lists, ends(8), ends(20), block=16)
        near, near_lse = sliding_attention(*leaves, ends(8), ends(20), window=9)
        torch.autograd.backward((out, near), (tensors[3], tensors[3]))
        found.append([out, lse, near, near_lse, *(x.grad for x in leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


noted, names = watched()
odd_ids_and_sizes()
rows_of_nothing()
one_block_for_all_in_a_small_workspace()
nothing_leaks_from_what_others_chose()
what_is_odd_reaches_those_that_see_it_and_no_others()
odd_values_of_far_and_of_near_blocks_add_up()
rows_behind_all_sequences_have_no_far_blocks()
entries_that_no_query_gives_any_weight()
logits_of_ten_thousand()
choices_of_groups_and_of_entries_in_another_type()
tensors_that_lie_apart()
whole_numbers_are_as_compiled(noted, names)
