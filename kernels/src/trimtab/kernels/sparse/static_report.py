"""What the GPU kernels cost, before any GPU runs them: compiled for real targets and counted."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from trimtab.kernels.sparse.configurations import Configuration
from trimtab.kernels.sparse.launch import interpreted


@dataclass(frozen=True, slots=True)
class Target:
    """A GPU that kernels are compiled for, and what it has."""

    backend: str
    architecture: int | str
    warp: int
    """Threads of a warp."""
    shared_bytes: int
    """What one program may take."""
    registers: int
    """Of one multiprocessor, for a thread each; a thread has at most `most_registers`."""
    most_registers: int

    def registers_at(self, warps: int) -> int:
        """What a thread can have in a program of so many warps."""
        return min(self.most_registers, self.registers // (warps * self.warp))


TARGETS: Mapping[str, Target] = {
    "sm_80": Target("cuda", 80, 32, 163 * 1024, 65536, 255),
    "sm_90": Target("cuda", 90, 32, 227 * 1024, 65536, 255),
    "sm_100": Target("cuda", 100, 32, 227 * 1024, 65536, 255),
    "gfx942": Target("hip", "gfx942", 64, 64 * 1024, 4 * 64 * 512, 512),
}
"""By name."""


@dataclass(frozen=True, slots=True)
class Resources:
    """What one kernel takes on one target."""

    registers: int
    spilled_bytes: int
    """Of local memory for each thread."""
    shared_bytes: int
    tensor_instructions: int
    instructions: int
    loop_instructions: int
    """Of the innermost loop with tensor instructions; of all the text where there is none."""
    loop_flop: float
    """Of these tensor instructions, for each warp of the program."""

    @property
    def density(self) -> float:
        """Tensor-core FLOP to an instruction that a warp issues, in the main loop.

        Instructions of unlike shapes do unlike work, so that their numbers say little.
        """
        return self.loop_flop / self.loop_instructions


@dataclass(frozen=True, slots=True)
class Instruction:
    """One of a kernel's text."""

    address: int
    opcode: str
    flop: float
    """For each warp of the program, if it is one of the tensor cores'."""
    target: int | None
    """Where it jumps to, if it does."""


def main_loop(text: Sequence[Instruction]) -> list[Instruction]:
    """The innermost loop that does most on the tensor cores; all of the text if none does.

    A loop is what lies between a jump back and its target.
    """
    bodies = [
        [i for i in text if jump.target <= i.address <= jump.address]
        for jump in text
        if jump.target is not None and jump.target < jump.address
    ]
    working = [body for body in bodies if any(i.flop for i in body)]
    innermost = [
        body
        for body in working
        if not any(other[0] in body and len(other) < len(body) for other in working)
    ]
    return max(innermost, key=lambda body: sum(i.flop for i in body), default=list(text))


def measure(configuration: Configuration, target: str) -> Resources:
    """Compiles a kernel for a target and counts its resources; needs no GPU.

    Raises:
        RuntimeError: Triton interprets kernels in this process, so that none can be compiled.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if interpreted():
        raise RuntimeError("TRITON_INTERPRET is set; unset it to compile kernels")
    names = configuration.function.arg_names
    constants, types = configuration.constants, configuration.types
    signature = {n: types.get(n, "constexpr") for n in names}
    source = ASTSource(
        configuration.function,
        signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned(configuration)},
    )
    options = {"num_warps": configuration.tile.warps, "num_stages": configuration.tile.stages}
    to = TARGETS[target]
    compiled = triton.compile(
        source, target=GPUTarget(to.backend, to.architecture, to.warp), options=options
    )
    return Resources(**(_amd(compiled) if to.backend == "hip" else _nvidia(compiled)))


def aligned(configuration: Configuration) -> list[str]:
    """The arguments of which launches know that 16 divides them, in bytes or as numbers.

    All pointers but those of which the kernel says that segments begin anywhere; and strides of the
    cache, of which heads and pages make multiples. Other numbers may be anything.
    """
    return [
        parameter.name
        for parameter in configuration.function.params
        if parameter.name in configuration.types
        and not parameter.do_not_specialize_on_alignment
        and (
            configuration.types[parameter.name].startswith("*")
            or parameter.name.endswith("_stride")
        )
    ]


def _nvidia(compiled: Any) -> dict[str, Any]:
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
    text = nvidia_text(code, compiled.asm["ptx"], compiled.metadata.num_warps)
    return {
        "registers": found["REG"],
        "spilled_bytes": found["STACK"] + found["LOCAL"],
        "shared_bytes": int(compiled.metadata.shared),
        **_counted(text),
    }


def _counted(text: Sequence[Instruction]) -> dict[str, Any]:
    loop = main_loop(text)
    return {
        "tensor_instructions": sum(i.flop > 0 for i in text),
        "instructions": len(text),
        "loop_instructions": len(loop),
        "loop_flop": sum(i.flop for i in loop),
    }


_SASS = re.compile(
    r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)(?: ([^;]*))?;", re.MULTILINE
)
_WARPGROUP = 4


def nvidia_text(code: str, ptx: str, warps: int) -> list[Instruction]:
    """The instructions of a listing by cuobjdump, without those that do nothing.

    Args:
        code: the listing.
        ptx: what it was assembled from; the shapes of Blackwell's products stand there alone.
        warps: of the program.
    """
    blackwell = iter(_blackwell_flop(ptx))
    found = []
    for address, opcode, operands in _SASS.findall(code):
        name, *details = opcode.split(".")
        if name == "NOP":
            continue
        target = re.search(r"0x([0-9a-f]+)", operands) if name == "BRA" else None
        flop = 0.0
        if name == "HGMMA":  # of four warps together
            flop = 2.0 * prod(map(int, details[0].split("x"))) / _WARPGROUP
        elif name.startswith("UTC") and name.endswith("MMA"):  # one thread's, for the program
            flop = next(blackwell) / warps
        elif "MMA" in name:
            m, n, k = _warp_shape(details[0])
            flop = 2.0 * m * n * k
        at = int(target[1], 16) if target else None
        found.append(Instruction(int(address, 16), opcode, flop, at))
    return found


def _warp_shape(digits: str) -> tuple[int, int, int]:
    """Of ``16816`` and its like: 16 by 8 by the rest."""
    return int(digits[:2]), int(digits[2:3]), int(digits[3:])


def _blackwell_flop(ptx: str) -> Iterator[float]:
    """FLOP of each ``tcgen05.mma``, by its instruction descriptor (PTX ISA, 9.7.16.4).

    Eights of columns stand in bits 17 to 22, sixteens of rows in bits 24 to 28.
    """
    for register in re.findall(r"tcgen05\.mma\.[\w:.]+\s*\[[^\]]*\],[^,]*,[^,]*,\s*(%\w+)", ptx):
        values = re.findall(rf"mov\.b32\s+{register},\s*(-?\d+);", ptx)
        descriptor = int(values[0]) & 0xFFFFFFFF
        columns, rows = 8 * (descriptor >> 17 & 63), 16 * (descriptor >> 24 & 31)
        yield 2.0 * rows * columns * 16


def _amd(compiled: Any) -> dict[str, Any]:
    asm = compiled.asm["amdgcn"]

    def number(name: str) -> int:
        return max((int(x) for x in re.findall(rf"\.{name}:\s+(\d+)", asm)), default=0)

    return {
        "registers": number("vgpr_count"),
        "spilled_bytes": 4 * number("vgpr_spill_count"),  # scalars spill into vector registers
        "shared_bytes": int(compiled.metadata.shared),
        **_counted(amd_text(asm)),
    }


_GCN = re.compile(
    r"^(\.L\w+):|^\s+([vs]_[a-z0-9_]+|ds_\w+|global_\w+|buffer_\w+)(?:\s+(\.L\w+))?", re.MULTILINE
)


def amd_text(asm: str) -> list[Instruction]:
    """The instructions of LLVM's listing for AMD, numbered through."""
    labels: dict[str, int] = {}
    found: list[Instruction] = []
    for label, opcode, goal in _GCN.findall(asm):
        if label:
            labels[label] = len(found)
            continue
        shape = re.search(r"v_mfma_\w+?_(\d+)x(\d+)x(\d+)", opcode)
        flop = 2.0 * prod(map(int, shape.groups())) if shape else 0.0
        found.append(Instruction(len(found), opcode, flop, labels.get(goal)))
    return found
