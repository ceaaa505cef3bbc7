"""`trimtab bench sparse-gpu` as far as it can be told without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from trimtab.cli import command_line
from trimtab.core.benchmark import Options
from trimtab.core.devices import device
from trimtab.core.errors import BadInput, Unsupported
from trimtab.kernels.sparse import SparseShape
from trimtab.kernels.sparse.configurations import KERNELS, configuration
from trimtab.sparse import gpu_bench, roofline
from trimtab.sparse.gpu_clock import GpuDevice, HostDevice, each_kernel, kernel_name
from trimtab.sparse.roofline import Sizes

pytestmark = pytest.mark.integration

NEEDS_NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
SIZES = Sizes(65536, 64, 16, 128, 128, torch.bfloat16, SparseShape())


def test_the_same_code_runs_in_the_interpreter_and_times_every_kernel():
    script = Path(__file__).with_name("interpreted_bench.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, script], env=environment, check=True, timeout=300)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("group", [4, 16])
def test_on_a_gpu_small_sizes_are_timed(group):
    sizes = [Sizes(4096, 16, 16 // group, 128, 128, torch.bfloat16, SparseShape())]
    cases = gpu_bench.run(Options(), lambda message, done=None: None, sizes=sizes, repeats=2)
    measured = {c.metric.removesuffix("_time") for c in cases}
    assert measured >= KERNELS.keys() - {
        "forward",
        "far",
        "near_and_join",
        "by_query",
        "add_chunks",
    }
    assert ("by_query" in measured) == (group == 16) != ("near_and_join" in measured)
    assert all(0 < c.value < 10 for c in cases if c.unit == "s")


@NEEDS_NO_GPU
def test_without_a_gpu_it_says_so_and_ends_as_for_bad_input(capsys):
    arguments = ["bench", "sparse-gpu", "--json"]
    status = command_line.run(
        lambda: command_line.command_line(arguments)(arguments, prog_name="trimtab")
    )
    out, said = capsys.readouterr()
    assert (status, out) == (2, "")
    assert "torch sees no GPU here" in said
    assert "sparse-static" in said
    with pytest.raises(Unsupported):
        GpuDevice()


def test_interpreted_kernels_are_not_timed_as_a_gpus(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(BadInput, match="unset it"):
        GpuDevice()


def test_kernels_go_by_the_names_of_what_is_shipped():
    for name, of in KERNELS.items():
        constants = configuration(name, "cuda", (64, 64)).constants
        assert kernel_name(f"{of.module}.{of.function}", constants) == name


def test_launchers_have_their_kernels_back_after_they_were_timed():
    from trimtab.kernels.sparse import triton_selected

    before = triton_selected.sum_parts

    def fail():
        assert triton_selected.sum_parts is not before
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        each_kernel(HostDevice(), fail)
    assert triton_selected.sum_parts is before


def test_the_work_of_kernels_is_what_the_papers_formulas_say():
    n, h, d, block, top = 65536, 64, 128, 64, 16
    forward, maxima, merged = (
        roofline.KERNELS[f"published_{k}"](SIZES) for k in ("forward", "maxima", "merge")
    )
    assert forward.flop == 4 * d * h * n * block * top  # appendix E, but for parts in float32
    assert maxima.flop == forward.flop / 2
    statistics = 8 * h * n * top
    assert forward.memory_bytes == 6 * d * h * n * top + statistics
    assert merged.memory_bytes == 2 * d * h * n * (1 + 2 * top) + statistics + 4 * h * n
    ours, near = (roofline.KERNELS[k](SIZES) for k in ("forward", "near_and_join"))
    assert SIZES.early == 3584
    late = n - SIZES.early
    assert ours.flop == 4 * d * h * late * block * (top - 3)
    assert ours.memory_bytes == h * late * (top - 3) * (4 * d + 8)
    assert near.flop == 4 * d * h * (SIZES.early**2 / 2 + late * 3 * block)
    assert near.memory_bytes == h * (n * (4 * d + 4) + late * (top - 3) * (2 * d + 8))
    dense = roofline.SPANS["dense"](SIZES, n / 2)
    assert dense.flop == 2 * d * h * n**2
    assert roofline.SPANS["dense_backward"](SIZES, n / 2).flop == 2.5 * dense.flop
    by_query = roofline.KERNELS["by_query"](replace(SIZES, kv_heads=4))
    assert by_query.flop == forward.flop
    assert by_query.cache_bytes == 4 * n * top * block * 2 * d * 2
    wide = replace(SIZES, d_v=64)
    assert roofline.KERNELS["published_forward"](wide).flop == forward.flop * 3 / 4


def test_a_roofline_is_bound_by_products_or_by_memory_and_knows_every_kernel():
    h100 = device("H100-SXM")
    assert roofline.dense_s(SIZES, h100) == pytest.approx(0.187, rel=0.02)  # as was published
    more = h100.model_copy(update={"memory_bandwidth_bytes_per_s": 1e15})
    for name in KERNELS:
        it = roofline.kernel_s(name, SIZES, 512.0, h100)
        assert it is not None
        assert it > roofline.LAUNCH_S
        assert roofline.kernel_s(name, SIZES, 512.0, more) <= it
    assert roofline.kernel_s("sum_parts", SIZES, 0.0, more) < 1e-4
    assert roofline.kernel_s("nothing", SIZES, 0.0, h100) is None


def test_the_grid_is_the_papers_and_gpus_are_known_by_their_names():
    every = list(gpu_bench.grid(quick=False))
    assert {s.tokens // 1024 for s in every} == {8, 16, 32, 64, 128}
    assert {s.group for s in every} == {1, 2, 4, 8, 16}
    assert len(every) == 25
    assert len(list(gpu_bench.grid(quick=True))) == 4
    assert gpu_bench._profile("NVIDIA H200").name == "H200"
    assert gpu_bench._profile("Some GPU") is None
