"""Places beyond 2 ** 31 numbers: the types of tables, and the integers behind kernels' addresses.

Nothing so large is made: tables are asked for their types without memory, and kernels are read as
Triton's own intermediate text, where an address computed in 32 bits can be seen.
"""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from triton._C.libtriton import ir, passes
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend

from trimtab.kernels.sparse import tables
from trimtab.kernels.sparse.configurations import (
    KERNELS,
    TABLES,
    configuration,
    table_configuration,
)

pytestmark = pytest.mark.integration

SIZES = {"HEADS": 39, "GROUP": 13, "GROUP_PAD": 16, "D": 24, "PAD": 32, "D_V": 40, "PAD_V": 64}
"""None of which is the size of a tile."""
TILES = ("ROWS", "QUERIES", "KEYS", "ENTRIES", "BLOCK", "STEP", "PER_PROGRAM", "PER_BLOCK", "CHUNK")
"""Constants by which the number of a tile, a block or a sample may be multiplied in 32 bits: what
comes out is the number of a token, of which there are fewer than 2 ** 31."""
THROUGH = ("addi", "subi", "extsi", "minsi", "maxsi", "select", "splat", "broadcast", "expand_dims")


@pytest.fixture(autouse=True)
def fused(monkeypatch):
    """As at every run; Triton warns where it is not said."""
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")


def intermediate(function, signature, constants):
    """A kernel in Triton's intermediate text, its helpers written out in it."""
    names = function.arg_names
    source = ASTSource(
        function,
        {name: signature.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
    )
    target = GPUTarget("cuda", 80, 32)
    backend = make_backend(target)
    options = backend.parse_options({})
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    module = source.make_ir(
        target,
        options,
        backend.get_codegen_implementation(options),
        backend.get_module_map(),
        context,
    )
    manager = ir.pass_manager(context)
    passes.common.add_inliner(manager)
    manager.run(module, "inline")
    return str(module)


def operations(text):
    """By the name of each value: what makes it, of which others, and the rest of the line."""
    made = {}
    for line in text.splitlines():
        found = re.match(r"\s*(%\w+)(?::\d+)? = (?:tt|arith|scf)\.(\w+)[ <(](.*)", line)
        if found:
            name, kind, rest = found.groups()
            made[name] = kind, re.findall(r"%\w+", rest.split(" : ")[0]), rest
    return made


def number(made, name):
    """The constant that a value is, or None."""
    kind, operands, rest = made.get(name, ("", [], ""))
    if kind in ("splat", "broadcast", "expand_dims") and operands:
        return number(made, operands[0])
    found = re.match(r"(?:dense<)?(-?\d+)", rest) if kind == "constant" else None
    return int(found[1]) if found else None


def is_narrow(made, name, allowed):
    """Whether a product is of 32 bits, not by an allowed number nor of a place in a page."""
    _, operands, rest = made[name]
    bounded = any(number(made, x) in allowed or made.get(x, ("",))[0] == "remsi" for x in operands)
    return bool(re.search(r"(?:x|: )i32", rest)) and not bounded


def products_in_32_bits(text, allowed):
    """The products behind addresses that may overflow."""
    made = operations(text)
    waiting = [operands[1] for kind, operands, _ in made.values() if kind == "addptr"]
    assert waiting
    seen = set()
    while waiting:
        name = waiting.pop()
        if name not in seen and name in made and made[name][0] in (*THROUGH, "muli"):
            seen.add(name)
            waiting += made[name][1]
    return [x for x in seen if made[x][0] == "muli" and is_narrow(made, x, allowed)]


@pytest.mark.parametrize("kernel", [name for name in KERNELS if not name.startswith("published")])
def test_addresses_are_computed_in_64_bits(kernel):
    of = replace(configuration(kernel, "cuda", (128, 128)), head_size=(24, 40))
    constants = {**of.constants, **{n: x for n, x in SIZES.items() if n in of.constants}}
    if "TOP" in constants:
        constants["TOP"] = 7
    allowed = {constants[name] for name in TILES if name in constants}
    assert not allowed & {*(SIZES[n] for n in ("HEADS", "GROUP", "D", "D_V")), 3, 7}
    text = intermediate(of.function, of.types, constants)
    assert products_in_32_bits(text, allowed) == []


@pytest.mark.parametrize("kernel", TABLES)
def test_addresses_in_tables_are_computed_in_64_bits(kernel):
    of = table_configuration(kernel, "cuda")
    constants = of.constants
    if "TOP" in constants:
        constants["TOP"] = 7
    allowed = {x for name, x in constants.items() if name != "TOP"}
    assert 7 not in allowed
    text = intermediate(of.function, of.types, constants)
    assert products_in_32_bits(text, allowed) == []


@triton.jit
def _narrow(x, out, stride, ROWS: tl.constexpr, D: tl.constexpr):  # noqa: N803
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tl.store(out + row, tl.load(x + row * D))
    tl.store(out + row, tl.load(x + (row * stride).to(tl.int64)))
    tl.store(out + row, tl.load(x + row.to(tl.int64) * stride))


def test_an_address_in_32_bits_is_seen():
    types = {"x": "*fp32", "out": "*fp32", "stride": "i32"}
    text = intermediate(_narrow, types, {"ROWS": 64, "D": 24})
    assert len(products_in_32_bits(text, {64})) == 2
    assert len(products_in_32_bits(text, {64, 24})) == 1


@pytest.mark.parametrize(
    ("queries", "counted"), [(1 << 20, torch.int32), ((1 << 21) + 64, torch.int64)]
)
def test_tables_of_more_than_2_to_the_31_choices_count_in_64_bits(queries, counted):
    """64 KV heads, 16 blocks each, and lists of twice 2 ** 31 numbers; without memory."""
    with torch.device("meta"):
        cu = torch.zeros(2, dtype=torch.int32)
        placed = tables.place_queries(cu, cu, queries, 64)
        blocks = tables.cut(cu, queries, 64)
        indices = torch.empty(64, queries, 16, dtype=torch.int32)
        ids = tables.number_through(indices, placed, blocks)
        table = tables.block_major(ids, blocks.first.numel())
        items = tables.schedule(table, 16, 64)
    choices = 64 * queries * 16
    assert (choices > 2**31) == (counted == torch.int64)
    wide = (placed.last, placed.own, blocks.first, blocks.length, table.rows)
    assert {x.dtype for x in wide} == {torch.int64}
    assert ids.dtype == torch.int32  # of blocks, which are fewer
    assert table.place.dtype == counted
    assert table.query.numel() == choices
    assert items.row.numel() == choices * 16 // 64 + 64 * blocks.first.numel()
    assert items.row.numel() < 2**31  # as many programs at most
