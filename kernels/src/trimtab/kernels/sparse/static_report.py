"""What the GPU kernels cost, before any GPU runs them: compiled for real targets and counted."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.kernels.sparse import launch, launch_spans

TARGETS: Mapping[str, tuple[str, int | str, int]] = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "gfx942": ("hip", "gfx942", 64),
}
"""Backend, architecture and threads of a warp by name."""

HEAD_SIZES = ((64, 64), (128, 128), (192, 128))
"""Dimensions of keys and values that are compiled for."""


@dataclass(frozen=True, slots=True)
class Resources:
    """One kernel on one target."""

    kernel: str
    target: str
    head_size: tuple[int, int]
    registers: int
    spilled_bytes: int
    """Of local memory for each thread."""
    shared_bytes: int
    tensor_instructions: int
    instructions: int


@dataclass(frozen=True, slots=True)
class Configuration:
    """A kernel with its types, constants and launch."""

    kernel: str
    function: Any
    head_size: tuple[int, int]
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    tile: launch.Tile


def configurations(group: int = 4) -> Iterator[Configuration]:
    """Every kernel as the launchers start it, for bfloat16 and each head size."""
    yield from _of_blocks(group)
    yield from _of_spans(group)
    yield from _as_published(group)


def _as_published(group: int) -> Iterator[Configuration]:
    """The kernels of FSA's published passes."""
    from trimtab.kernels.sparse import triton_published

    wide, narrow, number, index = "*fp32", "*bf16", "*i64", "*i32"
    lists = {"rows": number, "query": index, "item_row": index, "item_chunk": index}
    lists |= {"block_first": number, "block_length": number, "last": number}
    lists |= {"scale": "fp32", "blocks": "i32", "q": narrow, "k": narrow}
    parts = {"part": wide, "running": wide, "part_sum": wide}
    for d, d_v in HEAD_SIZES:
        keys = {"HEADS": 32, "GROUP": group, "WIDEN": False, "BLOCK": 64}
        keys |= {"ROWS": launch.FORWARD.rows, "D": d, "PAD": launch.padded(d)}
        values = {"D_V": d_v, "PAD_V": launch.padded(d_v)}
        yield Configuration(
            "published_maxima",
            triton_published.maxima,
            (d, d_v),
            {**lists, "part_max": wide},
            keys,
            launch.FORWARD,
        )
        yield Configuration(
            "published_forward",
            triton_published.forward,
            (d, d_v),
            {**lists, **parts, "v": narrow},
            {**keys, **values},
            launch.FORWARD,
        )
        yield Configuration(
            "published_merge",
            triton_published.merge,
            (d, d_v),
            {**parts, "place": index, "out": narrow, "lse": wide, "queries": "i32"},
            {"TOP": 16, "HEADS": 32, "GROUP": group, "GROUP_PAD": group, **values},
            launch.MERGE,
        )


def _of_spans(group: int) -> Iterator[Configuration]:
    """The kernels of the compressed and the sliding branch."""
    from trimtab.kernels.sparse import triton_spans

    wide, narrow, number = "*fp32", "*bf16", "*i64"
    qkv = {"q": narrow, "k": narrow, "v": narrow, "lse": wide}
    spans = {"low": number, "high": number, "queries": "i32", "scale": "fp32"}
    above = {**qkv, "gradient": narrow, "delta": wide, **spans}
    keys = {"first_query": number, "end_query": number, "tokens": "i32"}
    for d, d_v in HEAD_SIZES:
        pads = {"PAD": launch.padded(d), "PAD_V": launch.padded(d_v)}
        sizes = {"HEADS": 32, "GROUP": group, "WIDEN": False, "D": d, "D_V": d_v, **pads}
        for name, function, types in (
            ("span", triton_spans.forward, {**qkv, "out": narrow, **spans}),
            ("span_dq", triton_spans.backward_queries, {**above, "dq": narrow}),
            (
                "span_dkv",
                triton_spans.backward_keys,
                {**above, **keys, "dk": narrow, "dv": narrow},
            ),
        ):
            tile, columns = launch_spans.BACKWARD, launch_spans.BACKWARD_KEYS
            if name == "span":
                tile, columns = launch_spans.forward_tile(max(pads.values())), launch_spans.KEYS
            constants = {**sizes, "ROWS": tile.rows, "KEYS": columns}
            yield Configuration(name, function, (d, d_v), types, constants, tile)


def _of_blocks(group: int) -> Iterator[Configuration]:
    """The kernels of the selected branch and of the choice."""
    from trimtab.kernels.sparse import triton_select, triton_selected

    wide, narrow, number, index = "*fp32", "*bf16", "*i64", "*i32"
    lists = {"rows": number, "query": index, "block_first": number, "block_length": number}
    tables = {**lists, "last": number, "scale": "fp32", "blocks": "i32"}
    qkv = {"q": narrow, "k": narrow, "v": narrow}
    for d, d_v in HEAD_SIZES:
        pads = {"PAD": launch.padded(d), "PAD_V": launch.padded(d_v)}
        heads = {"HEADS": 32, "GROUP": group, "WIDEN": False}
        blocks = {**heads, "D": d, "D_V": d_v, **pads, "BLOCK": 64}
        merged = {"TOP": 16, "HEADS": 32, "GROUP": group, "GROUP_PAD": group}
        stats = {"part_max": wide, "part_sum": wide}
        items = {"item_row": index, "item_chunk": index}
        select = {"D": d, "PAD": pads["PAD"], "QUERIES": launch.SELECT.rows}
        tiles = {"tile_first": number, "tile_length": number, "entry_first": number}
        scored = {"q": narrow, "entries": narrow, "lse": wide, **tiles, "visible": number}
        behind = launch.backward_tile(max(pads.values()))
        yield Configuration(
            "forward",
            triton_selected.forward,
            (d, d_v),
            {**qkv, "part": narrow, **stats, **items, **tables},
            {**blocks, "ROWS": launch.FORWARD.rows},
            launch.FORWARD,
        )
        yield Configuration(
            "merge",
            triton_selected.merge,
            (d, d_v),
            {
                "part": narrow,
                **stats,
                "place": index,
                "out": narrow,
                "lse": wide,
                "queries": "i32",
            },
            {**merged, "D_V": d_v, "PAD_V": pads["PAD_V"]},
            launch.MERGE,
        )
        yield Configuration(
            "backward",
            triton_selected.backward,
            (d, d_v),
            {
                **qkv,
                "gradient": narrow,
                "lse": wide,
                "delta": wide,
                "dq_part": wide,
                "dk": wide,
                "dv": wide,
                **tables,
            },
            {**blocks, "ROWS": behind.rows},
            behind,
        )
        yield Configuration(
            "sum_parts",
            triton_selected.sum_parts,
            (d, d_v),
            {"part": wide, "place": index, "out": narrow, "queries": "i32"},
            {**merged, "D": d, "PAD": pads["PAD"]},
            launch.MERGE,
        )
        yield Configuration(
            "entry_logarithms",
            triton_select.entry_logarithms,
            (d, d_v),
            {**scored, "scale": "fp32"},
            {**heads, **select, "ENTRIES": launch.SELECT_ENTRIES},
            launch.SELECT,
        )
        yield Configuration(
            "best_blocks",
            triton_select.best_blocks,
            (d, d_v),
            {**scored, "out": index, "own": number, "tokens": "i32", "scale": "fp32"},
            {
                **heads,
                **select,
                "PER_BLOCK": 4,
                "REACH": 1,
                "OUTER": 2,
                "FIRST": 1,
                "RECENT": 2,
                "TOP": 16,
                "KEPT": 16,
            },
            launch.SELECT,
        )


def measure(configuration: Configuration, target: str) -> Resources:
    """Compiles a kernel for a target and counts its resources; needs no GPU.

    Raises:
        RuntimeError: Triton interprets kernels in this process, so that none can be compiled.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if launch.interpreted():
        raise RuntimeError("TRITON_INTERPRET is set; unset it to compile kernels")
    names = configuration.function.arg_names
    constants = configuration.constants
    signature = {n: "constexpr" if n in constants else configuration.types[n] for n in names}
    aligned = {
        (at,): [["tt.divisibility", 16]]
        for at, name in enumerate(names)
        if signature[name].startswith("*")
    }
    source = ASTSource(
        configuration.function,
        signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs=aligned,
    )
    options = {"num_warps": configuration.tile.warps, "num_stages": configuration.tile.stages}
    compiled = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)
    counted = _amd(compiled) if target.startswith("gfx") else _nvidia(compiled)
    return Resources(configuration.kernel, target, configuration.head_size, **counted)


def _nvidia(compiled: Any) -> dict[str, int]:
    from triton import knobs

    tool = Path(knobs.nvidia.cuobjdump.path)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run(
                [tool, flag, file.name], capture_output=True, text=True, check=True
            ).stdout
            for flag in ("-res-usage", "-sass")
        )
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    opcodes = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z][A-Z0-9_.]*)", code)
    return {
        "registers": found["REG"],
        "spilled_bytes": found["STACK"] + found["LOCAL"],
        "shared_bytes": int(compiled.metadata.shared),
        "tensor_instructions": sum(o.startswith(("HMMA", "HGMMA", "QGMMA")) for o in opcodes),
        "instructions": sum(not o.startswith("NOP") for o in opcodes),
    }


def _amd(compiled: Any) -> dict[str, int]:
    text = compiled.asm["amdgcn"]

    def number(name: str) -> int:
        return max((int(x) for x in re.findall(rf"\.{name}:\s+(\d+)", text)), default=0)

    opcodes = re.findall(r"^\s+([vs]_[a-z0-9_]+|ds_\w+|global_\w+|buffer_\w+)", text, re.MULTILINE)
    return {
        "registers": number("vgpr_count"),
        "spilled_bytes": 4 * number("vgpr_spill_count"),  # scalars spill into vector registers
        "shared_bytes": int(compiled.metadata.shared),
        "tensor_instructions": sum(o.startswith("v_mfma") for o in opcodes),
        "instructions": len(opcodes),
    }
