"""Index tables made by Triton kernels: those of torch, in few launches and little memory."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trimtab.kernels.sparse import chosen, launch_tables, static_report, tables, triton_tables
from trimtab.kernels.sparse.configurations import TABLES, shipped, table_configuration

pytestmark = pytest.mark.integration


def test_tables_are_those_of_torch_interpreted_where_there_is_no_gpu():
    script = Path(__file__).with_name("interpreted_tables.py")
    how = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    environment = {**os.environ, **how, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, script], env=environment, check=True, timeout=300)


class Started:
    """Stands for a kernel, and notes its launches."""

    def __init__(self, name, launches):
        self.name, self.launches = name, launches

    def __getitem__(self, grid):
        return lambda *given, **constants: self.launches.append(self.name)


class Calls(TorchDispatchMode):
    """Notes torch's calls that start a kernel, and the bytes of what is new."""

    free = ("empty", "select", "slice", "view")

    def __init__(self):
        super().__init__()
        self.started, self.bytes = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        name = function.__name__.split(".")[0]
        if name not in self.free:
            self.started.append(name)
        if name == "empty":
            self.bytes += made.nbytes
        return made


@pytest.fixture
def launches(monkeypatch):
    """The kernels that are launched, none of which does anything."""
    found = []
    monkeypatch.setattr(launch_tables, "_on_triton", lambda x: True)
    for name in TABLES:
        monkeypatch.setattr(triton_tables, name, Started(name, found))
    return found


def test_a_table_is_made_in_three_launches_and_a_sum_and_its_items_in_one(launches):
    ids = torch.zeros(4, 100, 16, dtype=torch.int32)
    with Calls() as calls:
        table = tables.block_major(ids, 9, 30)
    assert (launches, calls.started) == (["count", "begin", "scatter"], ["cumsum"])
    assert table.place.shape == (16, 30, 16)
    launches.clear()
    lengths = torch.zeros(8, 18, dtype=torch.int64)
    with Calls() as calls:
        work = tables.work(lengths, 3, 1000, 64)
    assert (launches, calls.started) == (["items"], [])
    assert work.row.shape == (8, 1000 // 64 + 18)


def test_ids_are_numbered_in_one_launch(launches):
    cu = torch.tensor([0, 100])
    with Calls() as calls:
        queries, blocks = tables.place_queries(cu, cu, 100, 64), tables.cut(cu, 100, 64)
    assert (launches, calls.started) == (["place", "cut"], ["unbind", "unbind"])
    launches.clear()
    ids = torch.zeros(2, 100, 16, dtype=torch.int32)
    with Calls() as calls:
        tables.number_through(ids, queries, blocks)
    assert (launches, calls.started) == (["number"], [])


def test_what_no_program_holds_and_what_is_empty_is_left_to_torch(launches):
    cu = torch.tensor([0, 5])
    with patch.object(launch_tables, "_on_triton", lambda x: False):
        queries, blocks = tables.place_queries(cu, cu, 5, 16), tables.cut(cu, 5, 16)
    ids = torch.zeros(1, 5, 1025, dtype=torch.int32)
    assert tables.number_through(ids, queries, blocks)[0, 4].tolist() == [0] + [-1] * 1024
    assert tables.block_major(ids[..., :1], 1).rows.shape == (2,)
    assert launches == ["count", "begin", "scatter"]
    launches.clear()
    alone = ids.masked_fill(torch.arange(1025) > 0, -1)
    assert tables.block_major(alone, 1).query[:5].tolist() == list(range(5))
    assert tables.block_major(ids[:, :0], 1).rows.tolist() == [0, 0]
    assert tables.work(torch.zeros(1, 40_000, dtype=torch.int64), 1, 0, 64).row.shape == (1, 40_000)
    assert launches == []


@pytest.mark.parametrize(
    ("kv_heads", "tokens", "top", "block", "step"),
    [
        (16, 8 << 10, 16, 64, 8 << 10),
        (64, 8 << 10, 8, 128, 8 << 10),
        (1, 128 << 10, 16, 64, 22 << 10),
        (4, 1 << 20, 16, 64, 90 << 10),
        (2, 2 << 10, 1, 64, 2 << 10),
        (8, 300, 16, 64, 300),
    ],
)
def test_a_choice_takes_no_more_memory_than_lots_allow_for(
    launches, kv_heads, tokens, top, block, step
):
    blocks = tokens // block + 1
    with torch.device("meta"):
        ids = torch.empty(kv_heads, tokens, top, dtype=torch.int32)
        with Calls() as calls:
            table = tables.block_major(ids, blocks, step)
    rows = table.rows.numel()
    assert calls.bytes <= 10 * table.query.numel() + 24 * rows
    copied = 4 * table.query.numel()  # where ids do not lie as they are wanted
    assert calls.bytes + copied <= chosen._COUNTED_BYTES * table.query.numel()
    assert launches == ["count", "begin", "scatter"]


@pytest.mark.parametrize(
    ("queries", "counted"), [(1 << 20, torch.int32), ((1 << 21) + 64, torch.int64)]
)
def test_more_than_2_to_the_31_choices_are_counted_in_64_bits(launches, queries, counted):
    with torch.device("meta"):
        table = tables.block_major(torch.empty(64, queries, 16, dtype=torch.int32), 1000)
    assert table.place.dtype == counted
    assert table.rows.dtype == torch.int64


@pytest.mark.parametrize(
    ("kernel", "target"), [*product(TABLES, ["gfx942"]), ("number", "sm_100"), ("items", "sm_80")]
)
def test_no_kernel_of_tables_spills(kernel, target, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    to = static_report.TARGETS[target]
    of = table_configuration(kernel, to.backend)
    assert of in list(shipped(to.backend))
    used = static_report.measure(of, target)
    assert used.spilled_bytes == 0
    assert used.registers <= to.registers_at(of.tile.warps)
    assert used.shared_bytes <= to.shared_bytes


@pytest.mark.parametrize("kernel", TABLES)
def test_kernels_of_tables_are_compiled_as_they_are_launched(kernel, monkeypatch):
    given = {}

    class Noted:
        def __getitem__(self, grid):
            return lambda *arguments, **constants: given.update(a=arguments, c=constants)

    monkeypatch.setattr(launch_tables, "_on_triton", lambda x: True)
    of = table_configuration(kernel, "cuda")
    names, constants, types = of.function.arg_names, of.constants, of.types
    for name in TABLES:
        monkeypatch.setattr(triton_tables, name, Noted() if name == kernel else Started(name, []))
    with torch.device("meta"):
        cu = torch.zeros(2, dtype=torch.int32)
        placed, blocks = tables.place_queries(cu, cu, 65536, 64), tables.cut(cu, 65535, 64)
        tables.sees_entries(cu, cu, cu, 65536, 32, 16)
        ids = tables.number_through(torch.empty(1, 65536, 16, dtype=torch.int32), placed, blocks)
        table = tables.block_major(ids, blocks.first.numel())
        tables.work(table.lengths.view(1, -1), 1, table.query.numel(), 512)
    assert given["c"] == {**constants, "num_warps": of.tile.warps}
    assert len(given["a"]) + len(constants) == len(names)
    kinds = {torch.int32: "*i32", torch.int64: "*i64"}
    for name, argument in zip(names, given["a"], strict=False):
        kind = kinds[argument.dtype] if isinstance(argument, torch.Tensor) else "i32"
        assert types[name] == kind, name
