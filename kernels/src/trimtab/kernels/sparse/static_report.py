"""What the GPU kernels cost, before any GPU runs them: compiled for real targets and counted."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
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

    @property
    def density(self) -> float:
        """Tensor-core instructions of all that stand in the kernel's text."""
        return self.tensor_instructions / self.instructions


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
    aligned = {
        (at,): [["tt.divisibility", 16]]
        for at, name in enumerate(names)
        if signature[name].startswith("*") or name.endswith("_stride")
    }
    source = ASTSource(
        configuration.function,
        signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs=aligned,
    )
    options = {"num_warps": configuration.tile.warps, "num_stages": configuration.tile.stages}
    to = TARGETS[target]
    compiled = triton.compile(
        source, target=GPUTarget(to.backend, to.architecture, to.warp), options=options
    )
    return Resources(**(_amd(compiled) if to.backend == "hip" else _nvidia(compiled)))


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
        "tensor_instructions": sum("MMA" in o.split(".")[0] for o in opcodes),
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
