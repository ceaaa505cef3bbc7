"""The GPU kernels compiled for real targets, without a GPU: none may spill, nor need too much.

The shipped ones nearest to their limits; `trimtab bench sparse-static` compiles all of them.
"""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from itertools import product

import pytest
import torch

from trimtab.kernels.sparse import (
    SparseShape,
    configurations,
    gpu_tiles,
    launch,
    launch_published,
    launch_spans,
    operators,
    selected_plan,
    static_report,
    tables,
)
from trimtab.kernels.sparse.configurations import configuration
from trimtab.kernels.sparse.gpu_tiles import Need, Tile, merge_tile
from trimtab.kernels.sparse.paged_prefill import PagedCache, paged_prefill
from trimtab.kernels.sparse.selectors import Selection

pytestmark = pytest.mark.integration

TIGHTEST = {
    "sm_80": (
        "forward/bf16/d-64-64/block-128",
        "forward/bf16/d-256-256/block-128",
        "near_and_join/bf16/d-64-64/block-64",
        "by_query/bf16/d-256-256/block-64/group-32",
        "best_blocks/bf16/d-256-256/block-64",
        "backward/bf16/d-256-256/block-64",
        "span/bf16/d-128-128/block-64",
        "span_dkv/bf16/d-192-128/block-64",
        "prefill/bf16/d-256-256/block-64",
        "near_and_join/bf16/d-256-256/block-64/group-4/again",
        "span/bf16/d-256-256/block-64/group-4/again",
    ),
    "sm_90": (
        "forward/bf16/d-192-128/block-64",
        "forward/bf16/d-256-256/block-128",
        "near_and_join/bf16/d-192-128/block-64",
        "backward/bf16/d-256-256/block-64",
        "add_chunks/bf16/d-256-256/block-64",
        "span_dkv/bf16/d-192-128/block-64",
        "published_forward/bf16/d-128-128/block-128",
        "near_and_join/bf16/d-256-256/block-64/group-4/again",
        "backward/fp32/d-128-128/block-16/group-4/again",
    ),
    "sm_100": (
        "forward/bf16/d-256-256/block-128",
        "near_and_join/bf16/d-128-128/block-64",
        "backward/bf16/d-256-256/block-64",
        "add_chunks/bf16/d-256-256/block-64",
        "span/bf16/d-128-128/block-64",
        "span_dkv/bf16/d-192-128/block-64",
        "published_forward/bf16/d-128-128/block-128",
        "near_and_join/bf16/d-192-128/block-128/group-4/again",
        "prefill_by_query/fp32/d-128-128/block-64/group-4/again",
    ),
    "gfx942": (
        "forward/bf16/d-256-256/block-128",
        "forward/fp32/d-256-256/block-64",
        "near_and_join/fp32/d-256-256/block-64",
        "backward/bf16/d-192-128/block-64",
        "best_blocks/fp32/d-192-128/block-128",
        "prefill_estimate/fp32/d-256-256/block-64",
        "published_forward/bf16/d-128-128/block-128",
        "span_dq/fp32/d-256-256/block-64/group-4/again",
    ),
}
"""Those that took most of the registers or of the shared memory that there are, each kernel once or
twice a target, by `trimtab bench sparse-static --json`; groups are of 4 heads unless named."""


@pytest.fixture(autouse=True)
def compiler(tmp_path, monkeypatch):
    """Compiles anew, not as in earlier runs, and as at every run."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def listed(name, target):
    """The shipped configuration of a name in `TIGHTEST`."""
    found = {one.name: one for one in configurations.shipped(static_report.TARGETS[target].backend)}
    of = found.get(name) or found.get(f"{name}/group-4")
    assert of, f"{name} is no longer shipped for {target}: choose the tightest anew"
    return of


@pytest.mark.parametrize(
    ("target", "name"), [(target, name) for target in TIGHTEST for name in TIGHTEST[target]]
)
def test_the_tightest_kernels_do_not_spill(target, name):
    to, of = static_report.TARGETS[target], listed(name, target)
    used = static_report.measure(of, target)
    assert used.spilled_bytes == 0
    assert used.shared_bytes <= to.shared_bytes
    assert used.registers <= to.registers_at(of.tile.warps)
    products = of.dtype == "bf16" and of.kernel != "add_chunks"
    # What is odd in outputs is counted by products of float16.
    marks = of.again and of.kernel not in ("backward", "span_dq")
    assert bool(used.tensor_instructions) == (products or marks) or of.backend == "hip"


@pytest.mark.parametrize(
    ("target", "name"),
    [
        ("sm_80", "span/bf16/d-128-128/block-64"),
        ("sm_90", "near_and_join/bf16/d-192-128/block-64"),
        ("gfx942", "prefill/bf16/d-128-128/block-64"),
    ],
)
def test_the_launch_for_what_is_odd_fits_too(target, name):
    first, second = listed(name, target).launches
    used = static_report.measure(second, target)
    assert used.shared_bytes <= static_report.TARGETS[target].shared_bytes
    once = static_report.measure(replace(first, tile=second.tile), target)
    assert used.instructions > once.instructions


def test_the_launch_for_what_is_odd_has_the_tiles_of_the_one_before():
    for rules in gpu_tiles._RULES.values():
        for rule in rules:
            again = rule.tile.again()
            assert again.rows == rule.tile.rows
            assert again.chunk == rule.tile.chunk
    of = configuration("span", "cuda", (64, 64))
    first, second = of.launches
    assert first == of
    assert second.name == f"{of.name}/again"
    assert second.constants == {**of.constants, "AGAIN": True}
    assert list(configuration("far", "cuda", (64, 64)).launches) == [
        configuration("far", "cuda", (64, 64))
    ]


SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;                /* 0x00000a00ff017b82 */
        /*0010*/              @!P0 HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24, gsb0 ;
        /*0020*/                   BRA 0x60 ;
        /*0030*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0040*/                   HMMA.1688.F32.TF32 R4, R8, R12, R4 ;
        /*0050*/              @P1  BRA 0x30 ;
        /*0060*/                   UTCHMMA gdesc[UR8], gdesc[UR22], tmem[UR4], tmem[UR24], !UPT ;
        /*0070*/             @!UP2 BRA.U 0x10 ;
        /*0080*/                   NOP ;
        /*0090*/                   BRA 0x90 ;
"""
PTX = """
    mov.b32 %r101, 135268496;
    @%p29 tcgen05.mma.cta_group::1.kind::f16 [ %r753 + 0 ], %rd119, %rd120, %r101, %p28;
"""


def test_instructions_of_unlike_shapes_count_by_the_work_they_do():
    text = static_report.nvidia_text(SASS, PTX, warps=4)
    assert [i.flop for i in text if i.flop] == [
        2 * 64 * 128 * 16 / 4,  # of four warps together
        2 * 16 * 8 * 16,
        2 * 16 * 8 * 8,
        2 * 128 * 64 * 16 / 4,  # the descriptor's rows and columns, for the whole program
    ]
    assert len(text) == 9
    assert [(i.address, i.target) for i in text if i.target is not None] == [
        (0x20, 0x60),
        (0x50, 0x30),
        (0x70, 0x10),
        (0x90, 0x90),
    ]


def test_the_main_loop_is_the_innermost_that_does_most_on_the_tensor_cores():
    text = static_report.nvidia_text(SASS, PTX, warps=4)
    assert [i.address for i in static_report.main_loop(text)] == [0x30, 0x40, 0x50]
    without = [i for i in text if not i.opcode.startswith("HMMA")]
    assert next(i.address for i in static_report.main_loop(without)) == 0x10
    straight = [i for i in text if i.target is None]
    assert static_report.main_loop(straight) == straight


def test_a_listing_for_amd_has_its_loops_and_shapes():
    asm = "\n".join(
        [
            "main:",
            "\ts_load_dwordx2 s[0:1], s[4:5], 0x0",
            ".LBB0_1:",
            "\tv_mfma_f32_32x32x8_bf16_1k a[0:15], v[0:1], v[2:3], a[0:15]",
            "\tds_read_b128 v[0:3], v9",
            "\ts_cbranch_scc1 .LBB0_1",
            "\ts_branch .LBB0_2",
            ".LBB0_2:",
            "\ts_endpgm",
        ]
    )
    text = static_report.amd_text(asm)
    assert [(i.flop, i.target) for i in text[1:4]] == [(2 * 32 * 32 * 8, None), (0, None), (0, 1)]
    assert static_report.main_loop(text) == text[1:4]
    assert text[4].target is None


@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
def test_a_dense_loop_does_the_work_of_its_tile(target):
    to = static_report.TARGETS[target]
    of = replace(configuration("span", to.backend, (64, 64)), tile=Tile(128, 8, 2, 64))
    used = static_report.measure(of, target)
    assert used.loop_flop * of.tile.warps == 2 * 128 * 64 * (64 + 64)
    assert used.loop_instructions < used.instructions


def test_a_kernel_that_spills_is_seen():
    of = configuration("backward", "hip", (128, 128))
    spilling = replace(of, tile=replace(of.tile, warps=8))
    assert static_report.measure(spilling, "gfx942").spilled_bytes > 0


@pytest.mark.parametrize("backend", ["cuda", "hip"])
def test_every_kernel_has_a_tile_for_every_size(backend):
    found = {one.name for one in configurations.shipped(backend)}
    for kernel, of in configurations.KERNELS.items():
        for d, d_v in configurations.HEAD_SIZES:
            if of.square and d != d_v:
                continue
            for dtype in configurations.ITEM_BYTES:
                if configurations.falls_back(kernel, backend, (d, d_v), dtype):
                    continue
                assert any(n.startswith(f"{kernel}/{dtype}/d-{d}-{d_v}/") for n in found)


def test_a_tile_is_for_heads_and_blocks_up_to_its_size():
    need = Need("hip", 512, 2)
    assert gpu_tiles.fit_block("backward", need, 128) < 128
    assert gpu_tiles.fit_block("backward", need, 16) == 16
    assert gpu_tiles.fit_block("forward", need, 128) == 128
    assert gpu_tiles.tile("select", need, 1024).rows > 0
    narrow = gpu_tiles.tile("backward", Need("hip", 128, 2), 64)
    assert narrow.rows >= gpu_tiles.tile("backward", need, 16).rows
    with pytest.raises(ValueError, match="1024 wide"):
        gpu_tiles.tile("forward", Need("cuda", 1024, 2), 64)


def test_many_best_blocks_take_more_warps():
    need = Need("cuda", 256, 2)
    how = gpu_tiles.tile("select", need, 64)
    assert gpu_tiles.choice_tile(how, need, 32) == how
    assert gpu_tiles.choice_tile(how, need, 64) == replace(how, warps=8)


def test_what_a_thread_can_have_falls_with_its_program():
    gfx, sm = static_report.TARGETS["gfx942"], static_report.TARGETS["sm_90"]
    assert (gfx.registers_at(4), gfx.registers_at(8)) == (512, 256)
    assert (sm.registers_at(4), sm.registers_at(8), sm.registers_at(16)) == (255, 255, 128)


def test_the_constants_of_a_kernel_are_those_of_its_launch():
    of = configuration("sum_parts", "cuda", (192, 128), group=3)
    assert of.tile == merge_tile(3, 192)
    assert merge_tile(16, 256).warps > of.tile.warps
    assert of.constants == {
        "TOP": 16,
        "HEADS": 32,
        "GROUP": 3,
        "GROUP_PAD": 4,
        "D": 192,
        "PAD": 256,
    }
    assert of.types["part"] == "*fp32"
    assert configuration("near_and_join", "cuda", (64, 64)).types["part"] == "*bf16"
    assert configuration("published_merge", "cuda", (64, 64)).types["part"] == "*fp32"
    span = configuration("span", "cuda", (64, 64), "fp32")
    assert span.types["q"] == "*fp32"
    assert isinstance(span.tile, Tile)
    assert span.constants["KEYS"] == span.tile.columns


def test_heads_that_no_backward_tile_holds_are_left_to_torch_with_one_line(caplog):
    wide, narrow = Need("cuda", 512, 4), Need("cuda", 256, 4)
    for _ in range(2):
        assert launch.in_torch("span_backward", wide)
    (line,) = caplog.messages
    assert "in torch" in line
    assert "512 wide" in line
    assert not launch.in_torch("backward", narrow)
    assert not launch.in_torch("backward", Need("cuda", 512, 2))
    with pytest.raises(ValueError, match="backward takes 256 at most with 4 bytes"):
        gpu_tiles.tile("backward", wide, 16)


class Noted:
    """A kernel that is not run: it notes which of its tensors begin at no multiple of 16 bytes."""

    def __init__(self, kernel, odd):
        self.kernel, self.odd = kernel, odd

    def __getitem__(self, grid):
        def launch(*given, **_):
            for parameter, x in zip(self.kernel.params, given, strict=False):
                odd = isinstance(x, torch.Tensor) and x.numel() and x.data_ptr() % 16
                if odd:
                    self.odd.setdefault(self.kernel.__name__, {})[parameter.name] = parameter

        return launch


@pytest.fixture
def odd(monkeypatch):
    """What kernels are given that begins anywhere."""
    found = {}
    for where, name in {(of.module, of.function) for of in configurations.KERNELS.values()}:
        module = import_module(f"trimtab.kernels.sparse.{where}")
        if name in vars(module):
            monkeypatch.setattr(module, name, Noted(getattr(module, name), found))
    return found


@pytest.mark.parametrize("until", [0, 10_000])
def test_what_launches_give_that_begins_anywhere_is_compiled_so(odd, monkeypatch, until):
    monkeypatch.setattr(selected_plan.SelectedPlan, "dense_until", lambda *_: until)
    cu = torch.tensor([0, 150, 301], dtype=torch.int32)
    for top, group, workspace in product((3, 16), (3, 16), (100_000, 3_000_000)):
        q, k, v = (torch.randn(301, heads, 64) for heads in (3 * group, 3, 3))
        ids = torch.randint(0, 3, (3, 301, top)).int()
        chosen = operators._chosen(q, k, v, ids, cu, cu, 64, 0.1, workspace)
        out, lse = launch.selected_forward(chosen)
        launch_published.forward(chosen)
        launch.selected_backward(q, out, lse, chosen)
    at = tables.place_queries(cu, cu, 301, 64)
    launch.select(q, k[:17], at.own, at.own, at, SparseShape(), 0.1, None)
    out, lse = launch_spans.forward(q, k, v, at.last, at.last, 0.1)
    launch_spans.backward(q, q, k, v, out, lse, at.last, at.last, 0.1)
    cache, table = torch.randn(60, 3, 16, 128), torch.zeros(2, 37).int()
    for selector, by in product(("mass", "top"), ("tile", "query")):
        pages = PagedCache(*cache.split(64, -1), table[1])
        few = torch.randn(301, 3, 64)
        paged_prefill(few, pages, 17, torch.empty_like(few), 0.1, Selection(selector, by=by))
    for kernel, parameters in odd.items():
        for name, parameter in parameters.items():
            assert parameter.do_not_specialize_on_alignment, (kernel, name)
    assert "pages" in odd["attend"]
    assert until or {"last", "item_row", "further"} <= odd["backward"].keys()


def test_a_report_takes_for_aligned_what_launches_know_to_be():
    given = static_report.aligned(configuration("backward", "cuda", (64, 64)))
    assert {"q", "k", "v", "gradient", "dq_part", "query", "block_first"} <= set(given)
    assert not {"lse", "delta", "rows", "item_row", "last", "scale", "BLOCK"} & set(given)
    paged = static_report.aligned(configuration("prefill", "cuda", (64, 64)))
    assert {"page_stride", "slot_stride", "counts"} <= set(paged)
    assert not {"pages", "position", "queries"} & set(paged)
