"""Sizes, numbers and choices that do not fit: each is refused in a sentence that names it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from trimtab.hosts.vllm.prefills import LayerShape
from trimtab.kernels.sparse import (
    NewTokens,
    Paging,
    SparseShape,
    Windows,
    compressed_attention,
    native_sparse_attention,
    select_blocks,
    sliding_attention,
)
from trimtab.kernels.sparse.prefill import plan
from trimtab.kernels.sparse.selectors import Selection
from trimtab.sparse.config import SparseConfig
from trimtab.sparse.gpu_plan import plan_on_gpu
from trimtab.sparse.nsa import NSAAttention
from trimtab.sparse.selection import selection

pytestmark = pytest.mark.integration

SMALL = SparseShape(window=8, stride=4, block=16, top=3, first=1, recent=1, sliding=24)
CU = torch.tensor([0, 40], dtype=torch.int32)
WINDOWS = Windows.of(CU, 40, SMALL)


def zeros(*shape):
    return torch.zeros(shape)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mass": 2}, "mass is 2; give a share above 0, and at most 1"),
        ({"mass": 0.0}, "mass is 0.0"),
        ({"mass": float("nan")}, "mass is nan"),
        ({"mass": "0.9"}, "mass is '0.9'"),
        ({"selector": "fixed", "stride": -1}, "stride is -1; give a whole number from 0 on"),
        ({"stride": 4}, "stride 4 is for the selector fixed, not mass"),
        ({"first": -1}, "first is -1; give a whole number from 0 on"),
        ({"recent": 1.5}, r"recent is 1\.5; give a whole number"),
        ({"top": 0}, "top is 0; give a whole number from 1 on"),
        ({"top": True}, "top is True; give a whole number"),
        (
            {"selector": "top", "top": 4, "first": 2, "recent": 3},
            "2 first and 3 recent blocks are more than top, 4",
        ),
        ({"selector": ["mass"]}, r"selector \['mass'\] is none of 'mass', 'pooled'"),
        ({"by": "head"}, "by 'head' is none of 'tile', 'query'"),
    ],
)
def test_a_selection_of_wrong_numbers_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        Selection(**options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"window": 0}, "window is 0; give a whole number from 1 on"),
        ({"sliding": -3}, "sliding is -3"),
        ({"top": 2.0}, r"top is 2\.0; give a whole number"),
        ({"recent": -1}, "recent is -1; give a whole number from 0 on"),
        ({"top": 2}, "1 first and 2 recent blocks are more than top, 2"),
        ({"stride": 5}, "the stride 5 must divide window 32 and block 64"),
        ({"window": 128}, "the window 128 is longer than the block 64"),
    ],
)
def test_a_shape_of_wrong_numbers_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        SparseShape(**options)


small = st.integers(-1, 20)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "selector": st.sampled_from(["mass", "top", "minmax", "fixed", "antidiagonal", "none"]),
            "mass": st.sampled_from([-0.5, 0, 0.5, 1, 1.5]),
            "top": small,
            "first": small,
            "recent": st.integers(1, 20),
            "stride": st.integers(-1, 2),
            "by": st.sampled_from(["tile", "query", "head"]),
        },
    )
)
@example({"selector": "minmax", "first": 15, "recent": 2})
@example({"selector": "fixed", "first": 15, "recent": 2, "stride": 1})
def test_the_kernels_take_the_very_selections_that_the_configuration_takes(options):
    try:
        config = SparseConfig(**options)
    except ValidationError:
        with pytest.raises(ValueError, match=r"is|are|antidiagonals"):
            Selection(**options)
    else:
        assert selection(config) == Selection(**options)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Windows(CU, CU, 0), "window is 0"),
        (lambda: Windows.of(CU.float(), 40, SMALL), r"cu_keys is \(2,\) in torch.float32"),
        (lambda: Windows.of(CU[None], 40, SMALL), r"cu_keys is \(1, 2\)"),
        (lambda: Windows.of(CU, -1, SMALL), "tokens is -1"),
        (
            lambda: WINDOWS.linear(zeros(40, 2, 6), zeros(2, 8, 6)),
            r"weight is \(2, 8, 6\); it must be \[kv_heads, window \* d, out\], \[2, 8 \* 6, out\]",
        ),
        (lambda: WINDOWS.linear(zeros(40, 2, 6), zeros(1, 48, 6)), r"weight is \(1, 48, 6\)"),
        (lambda: WINDOWS.linear(zeros(40, 2, 6), zeros(48, 6)), r"weight is \(48, 6\)"),
        (
            lambda: WINDOWS.linear(zeros(40, 2, 6), zeros(2, 48, 6), zeros(6, 8)),
            r"position is \(6, 8\); it must be \[window, d\], \[8, 6\]",
        ),
        (lambda: WINDOWS.linear(zeros(1, 40, 2, 6), zeros(2, 48, 6)), "x has 4 dimensions"),
        (lambda: WINDOWS.mean(zeros(40, 6)), r"x has 2 dimensions; it needs 3, \[tokens"),
        (lambda: NewTokens.of(Paging(CU[None], CU, CU), 0, SMALL), "page_tokens is 0"),
    ],
)
def test_windows_and_pages_of_wrong_sizes_are_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"gate": "heads"}, "gate 'heads' is none of 'token', 'head'"),
        ({"compress": "max"}, "compress 'max' is none of 'mean', 'linear', 'mlp'"),
        ({"value_size": 0}, "value_size is 0; give a whole number from 1 on"),
        ({"kv_heads": 0}, "kv_heads is 0"),
        ({"kv_heads": 3}, "4 heads do not divide into 3 KV heads"),
    ],
)
def test_a_module_of_wrong_sizes_or_kinds_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        NSAAttention(**{"hidden_size": 32, "heads": 4, "kv_heads": 2, "head_size": 8, **options})


def test_a_batch_is_told_of_the_queries_first():
    batch, entries = zeros(1, 40, 2, 8), zeros(9, 2, 8)
    every = (entries, entries, zeros(1, 40, 2, 3), CU, CU, WINDOWS.ends, SMALL)
    said = r"q has 4 dimensions; it needs 3, \[tokens, heads, size\], the sequences of a batch end"
    with pytest.raises(ValueError, match=said):
        native_sparse_attention(batch, batch, batch, *every)


@pytest.mark.parametrize(
    ("attend", "said"),
    [
        (
            lambda q: compressed_attention(q, q[None], q[None], CU, CU, WINDOWS.ends, SMALL),
            "entries_k has 4 dimensions",
        ),
        (
            lambda q: compressed_attention(q, q, q[:9], CU, CU, WINDOWS.ends, SMALL),
            r"entries_k \(40, 2, 8\) and entries_v \(9, 2, 8\) do not fit",
        ),
        (
            lambda q: select_blocks(q, q[0], CU, CU, WINDOWS.ends, SMALL),
            r"entries has 2 dimensions; it needs 3, \[tokens, kv_heads, size\]",
        ),
        (lambda q: sliding_attention(q, q, q, CU, CU, window=-1), "window is -1"),
    ],
)
def test_a_branch_names_the_tensor_by_the_name_it_was_given_under(attend, said):
    with pytest.raises(ValueError, match=said):
        attend(zeros(40, 2, 8))


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ((4096, 2048, 3), "4096 queries are more than 2048 keys.* give keys from 4096 on"),
        ((0, 4096, 3), "queries is 0"),
        ((64, 4096, 0), "group is 0"),
        ((64, 4096.5, 3), r"keys is 4096\.5"),
    ],
)
def test_a_plan_for_sizes_that_cannot_be_is_refused(sizes, said):
    with pytest.raises(ValueError, match=said):
        plan(*sizes, Selection())


def test_a_plan_for_a_gpu_refuses_them_too():
    layers = LayerShape(32, 8, 128, 16, 9, "FLASH_ATTN")
    with pytest.raises(ValueError, match="4096 queries are more than 2048 keys"):
        plan_on_gpu(4096, 2048, layers, Selection())
